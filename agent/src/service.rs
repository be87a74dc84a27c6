//! Puts the parts together and serves.

use std::{
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
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    boot,
    events::Events,
    forward,
    host::{Address, Host, say_ready},
    pod::Pod,
    server::{self, Listener, Services},
    stdio::Streams,
    task::{Exits, Tasks},
};

/// Boots the guest and serves it, as PID 1. Returning would make the kernel panic, and so end the
/// machine: it happens when the guest cannot be of any use.
pub fn serve_as_init() -> ExitCode {
    let began = Instant::now();
    let booted = boot::prepare();
    log_to("/dev/console");
    if let Err(error) = booted {
        tracing::error!(%error, "the guest cannot boot");
        return ExitCode::FAILURE;
    }
    run(async move {
        let listener = Listener::vsock(AGENT_PORT)?;
        // Before there is a container that could take it, and for good.
        let requests = Listener::vsock(REQUESTS_PORT)?;
        announce(Address::Vsock, began);
        serve(listener, requests, Some(forward::listen()?)).await
    })
}

/// Serves on unix sockets, for tests: `arguments` are the agent's, the controller's for the first word, and
/// the agent's for the controller. Nothing is
/// booted; what the agent needs must be there.
pub fn serve_on_sockets(arguments: &[String]) -> ExitCode {
    let [agent, controller, requests] = arguments else { return ExitCode::FAILURE };
    log_to("/dev/stderr");
    let (agent, controller) = (PathBuf::from(agent), PathBuf::from(controller));
    let requests = PathBuf::from(requests);
    run(async move {
        let listener = Listener::Unix(tokio::net::UnixListener::bind(agent)?);
        let requests = Listener::Unix(tokio::net::UnixListener::bind(requests)?);
        announce(Address::Unix(controller), Instant::now());
        serve(listener, requests, None).await
    })
}

/// One thread: messages are handled in the order in which they come, and starting a process cannot
/// leak a descriptor into another that is started at the same time.
fn run(serve: impl Future<Output = std::io::Result<()>>) -> ExitCode {
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

/// Tells the controller that the agent serves.
fn announce(controller: Address, began: Instant) {
    tokio::spawn(async move {
        if let Err(error) = say_ready(&controller, began.elapsed()).await {
            tracing::error!(%error, "the controller has not heard that the guest is ready");
        }
    });
}

/// `requests` is where the controller comes to be asked, and `forwarded` where connections to the pod's localhost arrive, if
/// they do.
async fn serve(listener: Listener, requests: Listener, forwarded: Option<Listener>) -> std::io::Result<()> {
    let host = Host::new();
    tokio::spawn(Arc::clone(&host).welcome(requests));
    let exits = Exits::new();
    let mut children = signal(SignalKind::child())?;
    let reaper = Arc::clone(&exits);
    tokio::spawn(async move {
        loop {
            reaper.reap();
            if children.recv().await.is_none() {
                return;
            }
        }
    });
    let pod = Pod::new(Arc::clone(&exits));
    tokio::spawn(Arc::clone(&pod).mount_share_when_idle());
    if let Some(forwarded) = forwarded {
        tokio::spawn(forward::serve_pod(forwarded, Arc::clone(&pod)));
    }
    let streams = Streams::new();
    let events = Events::new();
    let tasks = Tasks::new(Arc::clone(&pod), host, exits, Arc::clone(&streams), Arc::clone(&events));
    let mut services = Services::default();
    services.add(create_task(tasks));
    services.add(create_agent(pod));
    services.add_stream("pericarp.agent.v1.Agent", "Events", move |request, stream| {
        tokio::spawn(Arc::clone(&events).stream(request, stream));
    });
    services.add_stream("containerd.services.streaming.v1.Streaming", "Stream", move |_, stream| {
        tokio::spawn(Arc::clone(&streams).open(stream));
    });
    server::serve(listener, Arc::new(services)).await;
    Ok(())
}

/// Warnings and errors go to `path`, and nothing else does: in a guest each byte costs an exit of
/// the machine.
fn log_to(path: &str) {
    let Ok(console) = std::fs::OpenOptions::new().write(true).open(path) else { return };
    tracing_subscriber::fmt()
        .with_writer(Mutex::new(console))
        .with_max_level(tracing::Level::WARN)
        .with_ansi(false)
        .with_target(false)
        .without_time()
        .init();
    std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "a task of the agent has failed")));
}
