//! Huge pages of 2 MiB: those that containers may use are set aside while they live, and volumes are made of them.
//!
//! The controller has made the machine larger by as much (`Size::fitting`), so they cost no container its memory.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::mount::{MsFlags, mount};
use oci_spec::runtime::{LinuxResources, Mount, Spec};
use pericarp_protos::guest::CGROUP_PARENT;

use crate::cgroup;

/// What the OCI runtime spec calls the size.
const SIZE: &str = "2MB";
const PAGE: u64 = 2 << 20;

/// How many there are (kernel: `Documentation/admin-guide/mm/hugetlbpage.rst`).
const COUNT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Where volumes of huge pages are mounted.
const VOLUMES: &str = "/run/pericarp/huge";

/// Something about huge pages that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum HugePagesError {
    /// The guest has no such pages.
    #[error("there are no huge pages of size {0} in a pericarp pod; use those of 2Mi")]
    Size(String),
    /// The kernel does not find enough memory in one piece.
    #[error("the guest has {got} of {wanted} MiB of huge pages; its other memory is in use")]
    TooFew {
        /// MiB that all containers may use together.
        wanted: u64,
        /// MiB that there are.
        got: u64,
    },
    /// The kernel does not set them aside.
    #[error("cannot set huge pages aside: {0}")]
    Reserve(io::Error),
    /// A volume's name is not one.
    #[error("{0:?} is not the name of a volume of huge pages")]
    Name(PathBuf),
    /// A volume cannot be mounted.
    #[error("cannot mount the volume of huge pages at {destination:?}: {source}")]
    Mount {
        /// Its place in the container.
        destination: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// How many huge pages each container may use.
#[derive(Debug, Default)]
pub struct HugePages {
    containers: Mutex<HashMap<String, u64>>,
    /// How many the kernel was asked for last.
    asked: Mutex<u64>,
}

/// A container's huge pages, which are given back when it is dropped.
#[derive(Debug)]
pub struct Reserved {
    pages: Arc<HugePages>,
    container: String,
}

impl HugePages {
    /// For a container that has none yet.
    pub fn of(self: &Arc<Self>, container: &str) -> Reserved {
        Reserved { pages: Arc::clone(self), container: container.to_owned() }
    }

    /// Asks the kernel for all that containers may use together, and says how many there are then.
    fn ask(&self) -> Result<(), HugePagesError> {
        let mut asked = locked(&self.asked);
        let wanted = locked(&self.containers).values().fold(0, |sum: u64, pages| sum.saturating_add(*pages));
        if *asked == wanted {
            return Ok(());
        }
        *asked = wanted;
        let got = set_count(wanted).map_err(HugePagesError::Reserve)?;
        if got < wanted {
            return Err(HugePagesError::TooFew { wanted: wanted * (PAGE >> 20), got: got * (PAGE >> 20) });
        }
        Ok(())
    }
}

impl Reserved {
    /// Sets aside what the container may use; resources that do not speak of huge pages change nothing.
    pub async fn set(&self, resources: &LinuxResources) -> Result<(), HugePagesError> {
        let Some(wanted) = pages(resources) else { return Ok(()) };
        let before = locked(&self.pages.containers).insert(self.container.clone(), wanted);
        if before.unwrap_or(0) == wanted {
            return Ok(());
        }
        // The kernel may have to move what is in memory: not on the agent's own threads.
        let pages = Arc::clone(&self.pages);
        let asked = tokio::task::spawn_blocking(move || pages.ask()).await;
        let asked = asked.map_err(|error| HugePagesError::Reserve(io::Error::other(error)));
        if let Err(error) = asked.and_then(|result| result) {
            locked(&self.pages.containers).insert(self.container.clone(), before.unwrap_or(0));
            return Err(error);
        }
        Ok(())
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let had = locked(&self.pages.containers).remove(&self.container);
        let pages = Arc::clone(&self.pages);
        let give_back = move || {
            if let Err(error) = pages.ask() {
                tracing::warn!(%error, "huge pages are not given back");
            }
        };
        // Without a runtime the agent is ending, and the guest with it.
        if had.is_some_and(|pages| pages > 0)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn_blocking(give_back);
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change is whole after one statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many pages a container may use; `None` if nothing is said of them.
fn pages(resources: &LinuxResources) -> Option<u64> {
    let limits = resources.hugepage_limits().as_ref()?;
    let limit = limits.iter().find(|limit| limit.page_size() == SIZE)?.limit();
    Some(u64::try_from(limit).unwrap_or(0).div_ceil(PAGE))
}

/// Asks for this many, and answers with how many there are then.
fn set_count(wanted: u64) -> io::Result<u64> {
    fs::write(COUNT, wanted.to_string())?;
    let count = fs::read_to_string(COUNT)?.trim().parse().map_err(io::Error::other)?;
    // They are no longer memory that containers may use otherwise.
    cgroup::leave_room_for_agent(CGROUP_PARENT)?;
    Ok(count)
}

/// Takes limits of 0 for pages that the guest does not have off the list: there is nothing to limit.
pub fn check_sizes(resources: &mut LinuxResources) -> Result<(), HugePagesError> {
    let Some(mut limits) = resources.hugepage_limits().clone() else { return Ok(()) };
    let other = |size: &str| size != SIZE || !Path::new(COUNT).exists();
    if let Some(limit) = limits.iter().find(|limit| other(limit.page_size()) && limit.limit() > 0) {
        return Err(HugePagesError::Size(limit.page_size().clone()));
    }
    limits.retain(|limit| !other(limit.page_size()));
    resources.set_hugepage_limits(Some(limits));
    Ok(())
}

/// Mounts the volumes of huge pages that a spec names, each once for all containers, and lets the spec bind them.
pub fn mount_volumes(spec: &mut Spec) -> Result<(), HugePagesError> {
    let mounts = spec.mounts_mut().iter_mut().flatten();
    for entry in mounts.filter(|mount| mount.typ().as_deref() == Some("hugetlbfs")) {
        let name = entry.source().clone().unwrap_or_default();
        let plain = name.file_name().is_some_and(|file| file == name);
        if !plain {
            return Err(HugePagesError::Name(name));
        }
        let place = Path::new(VOLUMES).join(name);
        let options = entry.options().clone().unwrap_or_default();
        let (data, mut options): (Vec<_>, Vec<_>) =
            options.into_iter().partition(|option| option.contains('='));
        mount_once(&place, &data.join(","))
            .map_err(|source| HugePagesError::Mount { destination: entry.destination().clone(), source })?;
        options.push("rbind".to_owned());
        bind(entry, place, options);
    }
    Ok(())
}

fn bind(entry: &mut Mount, place: PathBuf, options: Vec<String>) {
    entry.set_typ(Some("bind".to_owned())).set_source(Some(place)).set_options(Some(options));
}

/// It stays until the pod ends, as its files do.
fn mount_once(place: &Path, data: &str) -> io::Result<()> {
    static MOUNTING: Mutex<()> = Mutex::new(());
    let _mounting = locked(&MOUNTING);
    fs::create_dir_all(VOLUMES)?;
    match fs::create_dir(place) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        made => made?,
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("none"), place, Some("hugetlbfs"), flags, Some(data)).map_err(|errno| {
        let _ = fs::remove_dir(place);
        errno.into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(limits: &serde_json::Value) -> LinuxResources {
        serde_json::from_value(serde_json::json!({ "hugepageLimits": limits })).unwrap()
    }

    #[test]
    fn only_limits_of_what_does_not_exist_are_taken_away() {
        let mut none = resources(&serde_json::json!([{ "pageSize": "1GB", "limit": 0 }]));
        check_sizes(&mut none).unwrap();
        assert_eq!(none.hugepage_limits().as_ref().unwrap().len(), 0);
        let mut some = resources(&serde_json::json!([{ "pageSize": "1GB", "limit": 1 << 30 }]));
        let error = check_sizes(&mut some).unwrap_err();
        assert!(matches!(&error, HugePagesError::Size(size) if size == "1GB"), "{error}");
    }

    #[test]
    fn a_container_gets_whole_pages() {
        let count =
            |limit: i64| pages(&resources(&serde_json::json!([{ "pageSize": "2MB", "limit": limit }])));
        assert_eq!([count(0), count(1), count(4 << 20)], [Some(0), Some(1), Some(2)]);
        assert_eq!(pages(&LinuxResources::default()), None);
    }

    #[test]
    fn a_volumes_name_cannot_lead_elsewhere() {
        for name in ["../x", "/etc", "a/b", "", ".."] {
            let mut spec: Spec = serde_json::from_value(serde_json::json!({ "ociVersion": "1.2.0",
                "mounts": [{ "destination": "/huge", "type": "hugetlbfs", "source": name }] }))
            .unwrap();
            assert!(matches!(mount_volumes(&mut spec), Err(HugePagesError::Name(_))), "{name}");
        }
    }
}
