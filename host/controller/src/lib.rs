//! The controller: containerd's sandbox Controller, served by `pericarp serve`.
//!
//! It makes, watches and removes pods' machines and answers their guests; see ARCHITECTURE.md. [`serve`] is
//! the whole of it.

mod blocking;
pub mod config;
mod edge;
pub mod fault;
mod guest;
mod host;
mod pod;
mod pods;
mod telemetry;

use std::{
    fs::{DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::PathBuf,
    sync::Arc,
};

pub use self::edge::containerd::delete::{Deleted, delete};
pub use self::edge::containerd::rootfs::ALLOWED_MOUNT_TYPES;
pub use self::host::network::steer::{SteerError, probe as probe_port_forward};
pub use self::telemetry::error_chain::chain;

use pericarp_protos::sandbox::controller_server::ControllerServer;
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Endpoint, Server};

use crate::{
    config::Config,
    edge::containerd::{
        announcements::Announcements, containers::ContainerdContainers, events::ContainerdEvents,
        pod_spec::older_record, sandboxes::Sandboxes,
    },
    host::size::HostCapacity,
    pod::{BootQueue, Environment, ports::ContainerSource},
    pods::Pods,
    telemetry::systemd::Manager,
};

/// The controller cannot serve.
#[derive(Debug, Error)]
pub enum ServeError {
    #[error("cannot make the run directory {path}")]
    RunDir {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("another controller is serving {path}; stop it first")]
    Running { path: PathBuf },
    #[error("cannot take over the pods in {path}")]
    Adopt {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot listen on {path}")]
    Listen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot use containerd's socket {path}")]
    Containerd {
        path: PathBuf,
        #[source]
        source: tonic::transport::Error,
    },
    #[error("serving containerd failed")]
    Serve(#[source] tonic::transport::Error),
    #[error("cannot wait for signals")]
    Signals(#[source] io::Error),
}

/// Serves until SIGTERM or SIGINT. Pods go on without the controller.
pub async fn serve(config: Config) -> Result<(), ServeError> {
    let path = config.run_dir.clone();
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&path)
        .map_err(|source| ServeError::RunDir { path: path.clone(), source })?;
    let _lock = lock(&config)?;
    let channel = containerd(&config)?;
    let user_namespace = pericarp_jail::make_user_namespace();
    if let Err(error) = &user_namespace {
        // The pods that there are go on, and are taken over.
        tracing::error!(%error, "no pod can be started without a user namespace for machines; `pericarp check` helps");
    }
    let capacity = HostCapacity::read();
    let containers = Arc::new(ContainerdContainers::new(channel.clone()));
    let environment = Arc::new(Environment {
        containers: Arc::clone(&containers) as Arc<dyn ContainerSource>,
        events: Arc::new(ContainerdEvents::new(channel.clone())),
        boots: BootQueue::new(usize::try_from(capacity.cpus).unwrap_or(1)),
        machines_user_namespace: user_namespace.ok(),
        read_older_record: older_record,
        capacity,
        config,
    });
    let adopted = pod::adopt_all(&environment).await.map_err(|source| ServeError::Adopt { path, source })?;

    let socket = environment.config.controller_socket();
    let listener = listen(&socket).map_err(|source| ServeError::Listen { path: socket.clone(), source })?;
    let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServeError::Signals)?;
    tracing::info!(socket = %socket.display(), pods = adopted.len(), "serving containerd");
    let pods = Pods::of_adopted(adopted);
    tokio::spawn(Announcements::new(channel, containers, pods.clone()).follow());
    let manager = Manager::from_environment();
    manager.ready();
    let server = Server::builder()
        .add_service(ControllerServer::new(Sandboxes::new(environment, pods)))
        .serve_with_incoming(UnixListenerStream::new(listener));
    // Not a graceful shutdown: that would wait for containerd's open `Wait` calls, which it makes again.
    let result = tokio::select! {
        result = server => result.map_err(ServeError::Serve),
        () = manager.keep_alive() => Ok(()),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    manager.stopping();
    result
}

/// One controller to a run directory. The lock ends with the process.
fn lock(config: &Config) -> Result<File, ServeError> {
    use rustix::fs::{FlockOperation, flock};
    let path = config.run_dir.join("controller.lock");
    let file = File::create(&path).map_err(|source| ServeError::RunDir { path: path.clone(), source })?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| ServeError::Running { path: config.run_dir.clone() })?;
    Ok(file)
}

fn listen(socket: &std::path::Path) -> io::Result<tokio::net::UnixListener> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = host::machine::bind(socket)?;
    listener.set_nonblocking(true)?;
    tokio::net::UnixListener::from_std(listener)
}

/// A channel that connects when it is first used, and again when containerd was restarted.
fn containerd(config: &Config) -> Result<Channel, ServeError> {
    let path = config.containerd_address.clone();
    Endpoint::try_from(format!("unix://{}", path.display()))
        .map(|endpoint| endpoint.connect_lazy())
        .map_err(|source| ServeError::Containerd { path, source })
}
