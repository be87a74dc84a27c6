//! Huge pages of 2 MiB: those that a container may use are reserved while it exists, and volumes of them are mounted.
//!
//! The controller has made the machine larger by as much (`Size::fitting`), so they do not reduce containers' memory.

use std::{
    collections::HashMap,
    ffi::CString,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use oci_spec::runtime::{LinuxResources, Mount, Spec};
use pericarp_protos::guest::CGROUP_PARENT;
use rustix::mount::{MountFlags, mount};

use crate::resources;

/// The name of the page size in the OCI runtime spec.
const PAGE_SIZE_NAME: &str = "2MB";

/// The page size in bytes.
const PAGE_SIZE: u64 = 2 << 20;

/// The file with the number of huge pages (kernel: `Documentation/admin-guide/mm/hugetlbpage.rst`).
const COUNT_FILE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Where volumes of huge pages are mounted.
const VOLUMES_DIR: &str = "/run/pericarp/huge";

/// Why a container cannot have its huge pages.
#[derive(Debug, thiserror::Error)]
pub enum HugePagesError {
    /// The guest does not have huge pages of this size.
    #[error("there are no huge pages of size {0} in a pericarp pod; use those of 2Mi")]
    Size(String),
    /// The kernel does not find enough contiguous memory.
    #[error("the guest has {got} of {wanted} MiB of huge pages; its other memory is in use")]
    TooFew {
        /// MiB that all containers may use together.
        wanted: u64,
        /// MiB that the kernel has reserved.
        got: u64,
    },
    /// The kernel refuses to reserve them.
    #[error("cannot reserve huge pages: {0}")]
    Reserve(io::Error),
    /// The name of a volume is not a file name.
    #[error("{0:?} is not the name of a volume of huge pages")]
    Name(PathBuf),
    /// A volume cannot be mounted.
    #[error("cannot mount the volume of huge pages at {destination:?}: {source}")]
    Mount {
        /// Its path in the container.
        destination: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// How many huge pages each container may use.
#[derive(Debug, Default)]
pub struct HugePages {
    containers: Mutex<HashMap<String, u64>>,
    /// How many pages the kernel was last asked to reserve.
    requested: Mutex<u64>,
}

/// A container's reservation of huge pages, which ends when it is dropped.
#[derive(Debug)]
pub struct HugePageReservation {
    pages: Arc<HugePages>,
    container: String,
}

impl HugePages {
    /// An empty reservation for a container that has none yet.
    pub fn reservation(self: &Arc<Self>, container: &str) -> HugePageReservation {
        HugePageReservation { pages: Arc::clone(self), container: container.to_owned() }
    }

    /// Has the kernel reserve as many pages as all containers may use together.
    fn reserve_total(&self) -> Result<(), HugePagesError> {
        let mut requested = lock(&self.requested);
        let wanted = lock(&self.containers).values().fold(0, |sum: u64, pages| sum.saturating_add(*pages));
        if *requested == wanted {
            return Ok(());
        }
        *requested = wanted;
        let got = set_count(wanted).map_err(HugePagesError::Reserve)?;
        if got < wanted {
            let mib = |pages: u64| pages * (PAGE_SIZE >> 20);
            return Err(HugePagesError::TooFew { wanted: mib(wanted), got: mib(got) });
        }
        Ok(())
    }
}

impl HugePageReservation {
    /// Reserves the pages that the container may use. Resources without limits of huge pages change nothing.
    pub async fn set(&self, resources: &LinuxResources) -> Result<(), HugePagesError> {
        let Some(wanted) = page_count(resources) else { return Ok(()) };
        let before = lock(&self.pages.containers).insert(self.container.clone(), wanted);
        if before.unwrap_or(0) == wanted {
            return Ok(());
        }
        // On another thread, because the kernel may have to move other memory.
        let pages = Arc::clone(&self.pages);
        let reserved = tokio::task::spawn_blocking(move || pages.reserve_total()).await;
        let reserved = reserved.map_err(|error| HugePagesError::Reserve(io::Error::other(error)));
        if let Err(error) = reserved.and_then(|result| result) {
            lock(&self.pages.containers).insert(self.container.clone(), before.unwrap_or(0));
            return Err(error);
        }
        Ok(())
    }
}

impl Drop for HugePageReservation {
    fn drop(&mut self) {
        let had = lock(&self.pages.containers).remove(&self.container);
        let pages = Arc::clone(&self.pages);
        let free = move || {
            if let Err(error) = pages.reserve_total() {
                tracing::warn!(%error, "cannot free a container's huge pages");
            }
        };
        // Without a runtime the agent is exiting, and the guest with it.
        if had.is_some_and(|pages| pages > 0)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn_blocking(free);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change is a single statement, so the value is consistent after a panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many pages a container may use; `None` if the resources do not limit them.
fn page_count(resources: &LinuxResources) -> Option<u64> {
    let limits = resources.hugepage_limits().as_ref()?;
    let limit = limits.iter().find(|limit| limit.page_size() == PAGE_SIZE_NAME)?.limit();
    Some(u64::try_from(limit).unwrap_or(0).div_ceil(PAGE_SIZE))
}

/// Has the kernel reserve so many pages, and returns how many there are afterwards.
fn set_count(wanted: u64) -> io::Result<u64> {
    fs::write(COUNT_FILE, wanted.to_string())?;
    let count = fs::read_to_string(COUNT_FILE)?.trim().parse().map_err(io::Error::other)?;
    // Reserved pages are not memory that containers can use otherwise.
    resources::reserve_for_agent(CGROUP_PARENT)?;
    Ok(count)
}

/// Removes limits of 0 for page sizes that the guest does not have, because there is nothing to limit. Returns an error
/// for other limits of such sizes.
pub fn check_sizes(resources: &mut LinuxResources) -> Result<(), HugePagesError> {
    let Some(mut limits) = resources.hugepage_limits().clone() else { return Ok(()) };
    let is_missing = |size: &str| size != PAGE_SIZE_NAME || !Path::new(COUNT_FILE).exists();
    if let Some(limit) = limits.iter().find(|limit| is_missing(limit.page_size()) && limit.limit() > 0) {
        return Err(HugePagesError::Size(limit.page_size().clone()));
    }
    limits.retain(|limit| !is_missing(limit.page_size()));
    resources.set_hugepage_limits(Some(limits));
    Ok(())
}

/// Mounts the volumes of huge pages that a spec names, each once for all containers, and replaces them in the spec by
/// bind mounts.
pub fn mount_volumes(spec: &mut Spec) -> Result<(), HugePagesError> {
    let mounts = spec.mounts_mut().iter_mut().flatten();
    for entry in mounts.filter(|mount| mount.typ().as_deref() == Some("hugetlbfs")) {
        let name = entry.source().clone().unwrap_or_default();
        let is_file_name = name.file_name().is_some_and(|file| file == name);
        if !is_file_name {
            return Err(HugePagesError::Name(name));
        }
        let mount_point = Path::new(VOLUMES_DIR).join(name);
        let options = entry.options().clone().unwrap_or_default();
        let (data, mut options): (Vec<_>, Vec<_>) =
            options.into_iter().partition(|option| option.contains('='));
        mount_once(&mount_point, &data.join(","))
            .map_err(|source| HugePagesError::Mount { destination: entry.destination().clone(), source })?;
        options.push("rbind".to_owned());
        replace_by_bind_mount(entry, mount_point, options);
    }
    Ok(())
}

fn replace_by_bind_mount(entry: &mut Mount, source: PathBuf, options: Vec<String>) {
    entry.set_typ(Some("bind".to_owned())).set_source(Some(source)).set_options(Some(options));
}

/// Mounts a volume if it is not mounted yet. It stays mounted, with its files, until the pod ends.
fn mount_once(mount_point: &Path, data: &str) -> io::Result<()> {
    static MOUNTING: Mutex<()> = Mutex::new(());
    let data = CString::new(data)?;
    let _mounting = lock(&MOUNTING);
    fs::create_dir_all(VOLUMES_DIR)?;
    match fs::create_dir(mount_point) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        made => made?,
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("none", mount_point, "hugetlbfs", flags, data.as_c_str()).map_err(|errno| {
        let _ = fs::remove_dir(mount_point);
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
            |limit: i64| page_count(&resources(&serde_json::json!([{ "pageSize": "2MB", "limit": limit }])));
        assert_eq!([count(0), count(1), count(4 << 20)], [Some(0), Some(1), Some(2)]);
        assert_eq!(page_count(&LinuxResources::default()), None);
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
