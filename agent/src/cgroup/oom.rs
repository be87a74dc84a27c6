//! Learns when a container has run out of memory.

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

use super::Cgroup;

/// One report of a container in this time says it all: one that has its processes killed over and over must not crowd out the
/// events of the others.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// Watches the `memory.events` files of all containers.
pub struct OomWatcher {
    events: AsyncFd<OwnedFd>,
    watched: Mutex<HashMap<i32, Watched>>,
}

struct Watched {
    container_id: String,
    file: PathBuf,
    kills: u64,
    reported: Option<Instant>,
}

impl Watched {
    fn has_killed(&mut self) -> bool {
        let now = kills(&self.file);
        now > std::mem::replace(&mut self.kills, now)
    }
}

impl OomWatcher {
    /// Watches nothing yet. Needs a tokio runtime.
    pub fn new() -> io::Result<Self> {
        let events = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        // SAFETY: an `OwnedFd` keeps its descriptor open, and the same, until it is dropped.
        let events = unsafe { AsyncFd::register(events) }?;
        Ok(Self { events, watched: Mutex::default() })
    }

    /// Begins to watch a container. It ends by itself when the cgroup is removed.
    pub fn watch(&self, container_id: &str, cgroup: &Cgroup) -> io::Result<()> {
        let file = cgroup.directory().join("memory.events");
        let watch = inotify::add_watch(self.events.get_ref(), &file, inotify::WatchFlags::MODIFY)?;
        let watched =
            Watched { container_id: container_id.to_owned(), kills: kills(&file), file, reported: None };
        self.watched().insert(watch, watched);
        Ok(())
    }

    /// Reports containers of which processes were killed, for ever.
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
                    && watched.has_killed()
                    && watched.reported.is_none_or(|before| before.elapsed() >= REPORT_INTERVAL)
                {
                    watched.reported = Some(Instant::now());
                    report(&watched.container_id);
                }
            }
            ready.clear_ready();
        }
    }

    /// Whether processes of the container were killed that have not been reported; they are now.
    pub fn has_killed(&self, container_id: &str) -> bool {
        let mut all = self.watched();
        all.values_mut().find(|watched| watched.container_id == container_id).is_some_and(Watched::has_killed)
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<i32, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many processes of the cgroup the OOM killer has killed.
fn kills(file: &PathBuf) -> u64 {
    let content = fs::read_to_string(file).unwrap_or_default();
    content.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok()).unwrap_or(0)
}
