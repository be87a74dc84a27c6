//! Reports containers of which the kernel's OOM killer has killed processes.

use std::{
    collections::HashMap,
    fs, io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;

use super::cgroup::Cgroup;

/// The least time between two reports of the same container. A container whose processes are killed over and over must
/// not crowd out the events of the others.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// Watches the `memory.events` files of all containers.
pub struct OomWatcher {
    events: AsyncFd<OwnedFd>,
    watched: Mutex<HashMap<i32, WatchedContainer>>,
}

struct WatchedContainer {
    container_id: String,
    file: PathBuf,
    kills: u64,
    reported: Option<Instant>,
}

impl WatchedContainer {
    /// Reads the number of kills again and records it; returns whether it has risen.
    fn record_kills(&mut self) -> bool {
        let now = kills(&self.file);
        now > std::mem::replace(&mut self.kills, now)
    }
}

impl OomWatcher {
    /// A watcher without containers. Must be called within a tokio runtime.
    pub fn new() -> io::Result<Self> {
        let events = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        // SAFETY: an `OwnedFd` keeps its descriptor open, and the same, until it is dropped.
        let events = unsafe { AsyncFd::register(events) }?;
        Ok(Self { events, watched: Mutex::default() })
    }

    /// Begins to watch a container. Removing its cgroup ends that.
    pub fn watch(&self, container_id: &str, cgroup: &Cgroup) -> io::Result<()> {
        let file = cgroup.directory().join("memory.events");
        let watch = inotify::add_watch(self.events.get_ref(), &file, inotify::WatchFlags::MODIFY)?;
        let watched = WatchedContainer {
            container_id: container_id.to_owned(),
            kills: kills(&file),
            file,
            reported: None,
        };
        self.watched().insert(watch, watched);
        Ok(())
    }

    /// Calls `report` with the id of each container of which processes have been killed. Never returns.
    pub async fn run(&self, report: impl Fn(&str)) {
        loop {
            let Ok(mut ready) = self.events.readable().await else { return };
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(self.events.get_ref(), &mut buffer);
            while let Ok(event) = reader.next() {
                let mut all = self.watched();
                if event.events().contains(inotify::ReadFlags::IGNORED) {
                    all.remove(&event.wd());
                } else if let Some(watched) = all.get_mut(&event.wd())
                    && watched.record_kills()
                    && watched.reported.is_none_or(|before| before.elapsed() >= REPORT_INTERVAL)
                {
                    watched.reported = Some(Instant::now());
                    report(&watched.container_id);
                }
            }
            ready.clear_ready();
        }
    }

    /// Returns whether processes of the container have been killed since the last report, and counts them as reported.
    pub fn take_unreported_kills(&self, container_id: &str) -> bool {
        let mut all = self.watched();
        all.values_mut()
            .find(|watched| watched.container_id == container_id)
            .is_some_and(WatchedContainer::record_kills)
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<i32, WatchedContainer>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many processes the OOM killer has killed, by a cgroup's `memory.events`.
fn kills(file: &PathBuf) -> u64 {
    let content = fs::read_to_string(file).unwrap_or_default();
    content.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok()).unwrap_or(0)
}
