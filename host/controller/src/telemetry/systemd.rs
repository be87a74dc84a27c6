//! Tells systemd how the service is (`sd_notify(3)`, `sd_watchdog_enabled(3)`).

use std::{
    env,
    ffi::{OsStr, OsString},
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram},
    },
    time::Duration,
};

/// The service manager, if it wants to know.
pub struct Manager {
    address: Option<SocketAddr>,
    watchdog: Option<Duration>,
}

impl Manager {
    /// As the environment tells.
    pub fn from_environment() -> Manager {
        let number = |name| env::var(name).ok()?.parse::<u64>().ok();
        // Meant for another process if it names one.
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        Manager::new(env::var_os("NOTIFY_SOCKET"), number("WATCHDOG_USEC").filter(|_| ours))
    }

    fn new(socket: Option<OsString>, watchdog_us: Option<u64>) -> Manager {
        let address = socket.and_then(|socket| {
            let address = address(&socket);
            address.inspect_err(|error| tracing::warn!(?socket, %error, "cannot talk to systemd")).ok()
        });
        let watchdog = watchdog_us.filter(|us| *us > 0).map(Duration::from_micros);
        Manager { address, watchdog }
    }

    /// Every pod has been taken over, and containerd is served.
    pub fn ready(&self) {
        self.tell(b"READY=1");
    }

    /// The service ends, as it was asked to.
    pub fn stopping(&self) {
        self.tell(b"STOPPING=1");
    }

    /// Says that the service is alive, twice as often as it must. Does not end; a runtime that hangs says nothing.
    pub async fn keep_alive(&self) {
        let Some(limit) = self.watchdog else { return std::future::pending().await };
        let mut interval = tokio::time::interval(limit / 2);
        loop {
            interval.tick().await;
            self.tell(b"WATCHDOG=1");
        }
    }

    fn tell(&self, state: &[u8]) {
        let Some(address) = &self.address else { return };
        let send = || UnixDatagram::unbound()?.send_to_addr(state, address);
        if let Err(error) = send() {
            let state = String::from_utf8_lossy(state);
            tracing::warn!(%error, %state, "cannot tell systemd how the service is");
        }
    }
}

fn address(socket: &OsStr) -> io::Result<SocketAddr> {
    match socket.as_encoded_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(socket),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn systemd_is_told_what_it_wants_to_know() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        systemd.set_nonblocking(true).unwrap();
        let received = || {
            let mut text = [0; 64];
            systemd.recv(&mut text).map(|length| String::from_utf8_lossy(&text[..length]).into_owned())
        };
        let manager = Manager::new(Some(path.into()), Some(4_000_000));
        manager.ready();
        assert_eq!(received().unwrap(), "READY=1");
        let alive = tokio::time::timeout(Duration::from_secs(5), manager.keep_alive());
        alive.await.unwrap_err();
        // At once, after 2 s and after 4 s.
        for _ in 0..3 {
            assert_eq!(received().unwrap(), "WATCHDOG=1");
        }
        assert!(received().is_err());
        manager.stopping();
        assert_eq!(received().unwrap(), "STOPPING=1");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_told_without_a_service_manager() {
        let manager = Manager::new(None, None);
        manager.ready();
        let alive = tokio::time::timeout(Duration::from_secs(3600), manager.keep_alive());
        alive.await.unwrap_err();
    }
}
