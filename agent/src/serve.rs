//! Creates the agent's parts, connects them, and serves.

use std::{
    io,
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex},
    time::Instant,
};

use containerd_shim_protos::shim_async::create_task;
use pericarp_protos::{
    agent::create_agent,
    guest::{AGENT_PORT, REQUESTS_PORT},
};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    controller::{AgentService, ControllerAddress, ControllerClient, EventLog, announce_ready},
    init,
    launch::Reaper,
    pod::{Pod, port_forward},
    stdio::Streams,
    task::TaskService,
    ttrpc::{self, Listener, Services},
};

/// Boots the guest and serves it, as PID 1. When this returns, the kernel panics and the machine ends. It returns only
/// if the guest is of no use.
pub fn serve_as_init() -> ExitCode {
    let start = Instant::now();
    let booted = init::prepare();
    log_to("/dev/console");
    if let Err(error) = booted {
        tracing::error!(%error, "the guest cannot boot");
        return ExitCode::FAILURE;
    }
    run(async move {
        let listener = Listener::vsock(AGENT_PORT)?;
        // Taken before there is a container that could take the port, and never closed.
        let requests = Listener::vsock(REQUESTS_PORT)?;
        spawn_announcement(ControllerAddress::Vsock, start);
        serve(listener, requests, Some(port_forward::listen()?)).await
    })
}

/// Serves on unix sockets, for tests. `arguments` are the paths of the agent's socket, of the socket on which the
/// controller waits for the report that the agent is ready, and of the agent's socket for the controller. Nothing is
/// booted: what the agent needs must exist.
pub fn serve_on_sockets(arguments: &[String]) -> ExitCode {
    let [agent, controller, requests] = arguments else { return ExitCode::FAILURE };
    log_to("/dev/stderr");
    let (agent, controller) = (PathBuf::from(agent), PathBuf::from(controller));
    let requests = PathBuf::from(requests);
    run(async move {
        // As PID 1 does, it inherits what its helpers leave.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        let listener = Listener::Unix(tokio::net::UnixListener::bind(agent)?);
        let requests = Listener::Unix(tokio::net::UnixListener::bind(requests)?);
        spawn_announcement(ControllerAddress::Unix(controller), Instant::now());
        serve(listener, requests, None).await
    })
}

/// Runs a future on one thread. So messages are handled in the order in which they come, and a process that is started
/// cannot inherit a descriptor that is meant for another one.
fn run(serve: impl Future<Output = io::Result<()>>) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "cannot start the runtime");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "cannot serve");
            ExitCode::FAILURE
        }
    }
}

/// Spawns a task that reports to the controller that the agent is ready.
fn spawn_announcement(controller: ControllerAddress, start: Instant) {
    tokio::spawn(async move {
        if let Err(error) = announce_ready(&controller, start.elapsed()).await {
            tracing::error!(%error, "cannot report to the controller that the guest is ready");
        }
    });
}

/// Serves containerd and the controller on `listener`, and never returns without an error. `requests` accepts the
/// connections on which the agent calls the controller, and `forwarded`, if there is one, connections to the pod's
/// localhost.
async fn serve(listener: Listener, requests: Listener, forwarded: Option<Listener>) -> io::Result<()> {
    let controller = ControllerClient::new();
    tokio::spawn(Arc::clone(&controller).accept_connections(requests));
    let reaper = Reaper::new();
    tokio::spawn(reap(Arc::clone(&reaper), signal(SignalKind::child())?));
    let pod = Pod::new(Arc::clone(&reaper));
    tokio::spawn(Arc::clone(&pod).mount_share_when_idle());
    if let Some(forwarded) = forwarded {
        tokio::spawn(port_forward::serve_pod(forwarded, Arc::clone(&pod)));
    }
    let streams = Streams::new();
    let events = EventLog::new();
    let tasks =
        TaskService::new(Arc::clone(&pod), controller, reaper, Arc::clone(&streams), Arc::clone(&events));
    let mut services = Services::default();
    services.add(create_task(tasks));
    services.add(create_agent(AgentService::new(pod)));
    services.add_stream("pericarp.agent.v1.Agent", "Events", move |request, stream| {
        tokio::spawn(Arc::clone(&events).stream(request, stream));
    });
    services.add_stream("containerd.services.streaming.v1.Streaming", "Stream", move |_, stream| {
        tokio::spawn(Arc::clone(&streams).open(stream));
    });
    ttrpc::serve(listener, Arc::new(services)).await;
    Ok(())
}

/// Reaps children whenever SIGCHLD reports the exit of some.
async fn reap(reaper: Arc<Reaper>, mut children: Signal) {
    loop {
        reaper.reap();
        if children.recv().await.is_none() {
            return;
        }
    }
}

/// Logs warnings and errors to `path`, and nothing else: in a guest each byte costs an exit of the machine.
fn log_to(path: &str) {
    let Ok(console) = std::fs::OpenOptions::new().write(true).open(path) else { return };
    tracing_subscriber::fmt()
        .with_writer(Mutex::new(console))
        .with_max_level(tracing::Level::WARN)
        .with_ansi(false)
        .with_target(false)
        .without_time()
        .init();
    std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "a task of the agent has panicked")));
}
