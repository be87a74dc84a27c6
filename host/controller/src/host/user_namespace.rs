//! A pod's user namespace: whose ids on the host the pod's are.
//!
//! What is in the share belongs, as under runc, to the pod's ids on the host, and the guest has a user namespace of the
//! same mapping for the pod. For that, the host's kernel maps the ids of root file systems and volumes where they are
//! mounted, and wants a user namespace to be told how. Such a namespace exists already: it owns the pod's network
//! namespace, as containerd made that inside it (`setupNetnsWithinUserns`).

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    str::FromStr,
};

use pericarp_protos::agent;
use rustix::fs::{fstat, stat};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

/// Ids of the pod, and what they are on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    /// The first of them in the pod.
    pub inside: u32,
    /// The first of them on the host.
    pub outside: u32,
    /// How many there are.
    pub length: u32,
}

impl IdRange {
    /// What an id of the pod is on the host; `None` if it is none of the pod's.
    pub fn on_host(&self, id: u32) -> Option<u32> {
        let offset = id.checked_sub(self.inside).filter(|offset| *offset < self.length)?;
        self.outside.checked_add(offset)
    }
}

/// All of a pod's ids. containerd takes one range for each (`parseUsernsIDMap`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    pub uids: IdRange,
    pub gids: IdRange,
}

/// Not one range of ids.
#[derive(Debug, PartialEq, Eq, Error)]
#[error("it has not one range of ids for users and one for groups")]
pub struct NotOneRange;

impl IdMap {
    /// Whether lists of an OCI spec (`LinuxIDMapping`) are this map.
    pub fn is(&self, uids: &Value, gids: &Value) -> bool {
        let same = |list: &Value, range: IdRange| {
            let entry = list.as_array().filter(|list| list.len() == 1).and_then(|list| list.first());
            let number = |key| entry.and_then(|entry| entry.get(key)).and_then(Value::as_u64).unwrap_or(0);
            entry.is_some()
                && number("containerID") == u64::from(range.inside)
                && number("hostID") == u64::from(range.outside)
                && number("size") == u64::from(range.length)
        };
        same(uids, self.uids) && same(gids, self.gids)
    }

    /// As the guest is told.
    pub fn message(&self) -> agent::UserNamespace {
        let range = |range: IdRange| agent::IdRange {
            inside: range.inside,
            outside: range.outside,
            length: range.length,
            ..agent::IdRange::default()
        };
        agent::UserNamespace {
            uids: Some(range(self.uids)).into(),
            gids: Some(range(self.gids)).into(),
            ..agent::UserNamespace::default()
        }
    }
}

impl FromStr for IdRange {
    type Err = NotOneRange;

    /// "inside:outside:length", as snapshotters' labels and options have it (containerd: `userns.IDMap.Marshal`).
    fn from_str(text: &str) -> Result<IdRange, NotOneRange> {
        let numbers: Result<Vec<u32>, _> = text.split(':').map(str::parse).collect();
        match numbers.as_deref() {
            Ok(&[inside, outside, length]) => Ok(IdRange { inside, outside, length }),
            _ => Err(NotOneRange),
        }
    }
}

/// The user namespace cannot be found.
#[derive(Debug, Error)]
pub enum UserNamespaceError {
    #[error("its network namespace {netns} cannot be asked for its owner", netns = netns.display())]
    Owner {
        netns: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "its network namespace {netns} belongs to the host and not to a user namespace of the pod's; use containerd \
         2.1 or newer, or remove hostUsers: false from the pod", netns = netns.display()
    )]
    Hosts { netns: PathBuf },
}

/// A pod's user namespace on the host.
#[derive(Debug)]
pub struct UserNamespace {
    /// Told to the kernel as the map. containerd has made it from the same configuration that the pod's [`IdMap`] comes
    /// from.
    pub descriptor: OwnedFd,
}

impl UserNamespace {
    /// The owner of the pod's network namespace.
    pub fn of_netns(netns: &Path) -> Result<UserNamespace, UserNamespaceError> {
        let failed = |source| UserNamespaceError::Owner { netns: netns.to_owned(), source };
        let descriptor = owner(&File::open(netns).map_err(failed)?).map_err(failed)?;
        let own = stat("/proc/self/ns/user").map_err(|errno| failed(errno.into()))?;
        let found = fstat(&descriptor).map_err(|errno| failed(errno.into()))?;
        if (own.st_dev, own.st_ino) == (found.st_dev, found.st_ino) {
            return Err(UserNamespaceError::Hosts { netns: netns.to_owned() });
        }
        Ok(UserNamespace { descriptor })
    }
}

/// The user namespace that owns another namespace (`ioctl_nsfs(2)`).
fn owner(namespace: &File) -> io::Result<OwnedFd> {
    // SAFETY: the request takes no argument.
    let descriptor = unsafe { libc::ioctl(namespace.as_raw_fd(), libc::NS_GET_USERNS) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// For tests: a user namespace in which ids 0 to 65535 are 65536 and up on the host.
#[cfg(test)]
pub(crate) fn for_tests() -> UserNamespace {
    use std::{
        io::{Read as _, Write as _},
        process::{Command, Stdio},
    };
    let mut holder = Command::new("unshare")
        .args(["--user", "sh", "-c", "echo; read end"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    holder.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    let proc = PathBuf::from(format!("/proc/{}", holder.id()));
    for file in ["uid_map", "gid_map"] {
        std::fs::write(proc.join(file), "0 65536 65536").unwrap();
    }
    let descriptor = File::open(proc.join("ns/user")).unwrap().into();
    holder.stdin.take().unwrap().write_all(b"\n").unwrap();
    holder.wait().unwrap();
    UserNamespace { descriptor }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MAP: IdMap = IdMap {
        uids: IdRange { inside: 0, outside: 131_072, length: 65536 },
        gids: IdRange { inside: 0, outside: 196_608, length: 65536 },
    };

    #[test]
    fn the_maps_of_a_spec_are_the_pods_only_if_they_are_the_same() {
        let list = |host: u32| json!([{ "containerID": 0, "hostID": host, "size": 65536 }]);
        assert!(MAP.is(&list(131_072), &list(196_608)));
        assert!(!MAP.is(&list(131_072), &list(131_072)));
        assert!(!MAP.is(&Value::Null, &list(196_608)));
        assert!(!MAP.is(&list(131_072), &json!([])));
    }

    #[test]
    fn an_id_of_the_pod_is_another_on_the_host_and_other_ids_are_none() {
        let range = IdRange { inside: 10, outside: 5000, length: 3 };
        assert_eq!([9, 10, 12, 13].map(|id| range.on_host(id)), [None, Some(5000), Some(5002), None]);
        let broken = IdRange { inside: 0, outside: u32::MAX, length: 2 };
        assert_eq!([0, 1].map(|id| broken.on_host(id)), [Some(u32::MAX), None]);
    }

    #[test]
    fn a_snapshotters_range_is_read() {
        assert_eq!("0:131072:65536".parse(), Ok(MAP.uids));
        for wrong in ["", "0:1", "0:1:2:3", "a:1:2", "0:1:1,1:2:1"] {
            assert_eq!(wrong.parse::<IdRange>(), Err(NotOneRange), "{wrong}");
        }
    }

    #[test]
    fn a_network_namespace_of_the_hosts_is_refused_with_what_to_do() {
        let error = UserNamespace::of_netns(Path::new("/proc/self/ns/net")).unwrap_err();
        assert!(error.to_string().contains("hostUsers"), "{error}");
        let error = UserNamespace::of_netns(Path::new("/no/such/netns")).unwrap_err();
        assert!(matches!(error, UserNamespaceError::Owner { .. }), "{error}");
    }
}
