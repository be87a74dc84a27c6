//! A pod's share: the one directory that the guest sees through virtio-fs.
//!
//! It is in the mount namespace of the pod's machine, and nowhere else ([`place`]): the host's mount table has nothing
//! of a pod, and all of it is gone with the machine. What is mounted in it is made on the host first, attached nowhere.
//!
//! The share is read-only and private. Read-only, so that a guest can write only into what is mounted below (its
//! containers' root file systems and volumes) and can neither fill the share nor put a symbolic link where the
//! controller is about to mount something. Private, so that no mount in it leaks into another mount namespace.

pub mod place;
#[cfg(test)]
pub mod testing;
pub mod volume;
mod volume_users;
pub mod writable;

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use pericarp_protos::{guest::VOLUMES, id::ContainerId};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, fstat, mkdirat, openat},
    io::Errno,
};

use thiserror::Error;

use self::{
    place::Place,
    volume::{IdMapping, Propagation, ReadOnly, Volume},
    volume_users::{MountAction, VolumeUsers},
};
use crate::{
    host::{
        mounts::{self, MountError, SetPropagation},
        rootfs::{self, HostMount, RootfsError},
        user_namespace::UserNamespace,
    },
    telemetry::error_chain::chain,
};

const ROOT: &str = "rootfs";
/// Where a container writes whose layers are disks.
pub const WRITABLE: &str = "writable";

/// What of a container's root file system is in the share.
#[derive(Clone, Debug)]
pub enum SharedRoot {
    /// All of it, mounted on the host.
    Mounted(HostMount),
    /// The guest puts it together from disks. Only this directory, if any, is on the host: see [`writable`].
    Disks(Option<PathBuf>),
}

/// Why a container's files cannot be put into the share.
#[derive(Debug, Error)]
pub enum ShareError {
    /// The kernel refused something on a path.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// There is no machine that has it.
    #[error("the pod's machine has ended, and its share with it")]
    Gone,
    /// The machine's mount namespace cannot be entered.
    #[error("cannot enter the mount namespace of the pod's machine")]
    Enter(#[source] io::Error),
    /// The root file system.
    #[error("cannot mount the root file system")]
    Root(#[from] RootfsError),
    /// A volume whose source is gone.
    #[error("the source {source_path} of the volume at {destination} does not exist; create it or remove the volume",
            source_path = path.display())]
    VolumeMissing {
        /// On the host.
        path: PathBuf,
        /// In the container.
        destination: String,
    },
    /// A volume of a kind that does not work through virtio-fs.
    #[error("the source {source_path} of the volume at {destination} is a {kind}, which cannot be reached from \
             inside the machine; use a directory or a regular file", source_path = path.display())]
    VolumeKind {
        /// On the host.
        path: PathBuf,
        /// In the container.
        destination: String,
        /// For example "socket".
        kind: &'static str,
    },
    /// A volume whose file system has no mapped ids.
    #[error(
        "the ids in {source_path}, the volume at {destination}, cannot be mapped for the pod's user namespace: its \
         file system, or this kernel for it, cannot do that (tmpfs can from Linux 6.3 on)", source_path = path.display()
    )]
    VolumeIds {
        /// On the host.
        path: PathBuf,
        /// In the container.
        destination: String,
        #[source]
        source: io::Error,
    },
    /// A volume that the kernel refuses to mount.
    #[error("cannot mount {source_path} as the volume at {destination}", source_path = path.display())]
    Volume {
        /// On the host.
        path: PathBuf,
        /// In the container.
        destination: String,
        #[source]
        source: io::Error,
    },
}

/// A pod's share.
#[derive(Clone, Debug)]
pub struct Share {
    place: Place,
    users: PathBuf,
}

impl Share {
    /// The share at a place. Who uses which volume is kept in `users`, a file that need not exist.
    pub fn new(place: Place, users: PathBuf) -> Share {
        Share { place, users }
    }

    /// Mounts a container's root file system and volumes. On an error nothing of it is left. Blocks.
    pub fn add(
        &self,
        container: &ContainerId,
        root: &SharedRoot,
        volumes: &[Volume],
        user_namespace: Option<&UserNamespace>,
    ) -> Result<(), ShareError> {
        // Before anything is made: what fails from here on is taken away again.
        let half_made = HalfMade { share: self, container, abandoned: true };
        let (name, root) = match root {
            SharedRoot::Mounted(mount) => (ROOT, Some(rootfs::mount(mount, user_namespace)?)),
            SharedRoot::Disks(Some(snapshot)) => (WRITABLE, Some(writable::mount(snapshot)?)),
            SharedRoot::Disks(None) => (WRITABLE, None),
        };
        if let Some(root) = &root {
            mounts::make_inert(root).map_err(MountError::new("take the devices from", Path::new(name)))?;
        }
        let mut wanted = Vec::with_capacity(volumes.len());
        for (volume, needed) in self.add_user(container, volumes)? {
            let mount = match needed {
                MountAction::Mount => Some(DetachedVolume::make(volume, user_namespace)?),
                MountAction::Writable | MountAction::Nothing => None,
            };
            wanted.push((volume, mount));
        }
        let missing = self.place.enter(|share| {
            let directory: &Path = container.as_ref();
            make_directory(directory)?;
            let target = directory.join(name);
            make_directory(&target)?;
            if let Some(root) = root {
                attach(&root, share, &target).map_err(MountError::new("mount", &share.join(&target)))?;
            }
            attach_volumes(share, wanted)
        })?;
        if !missing.is_empty() {
            let mounts = missing.into_iter().map(|volume| {
                DetachedVolume::make(volume, user_namespace).map(|mount| (volume, Some(mount)))
            });
            let wanted = mounts.collect::<Result<Vec<_>, _>>()?;
            self.place.enter(|share| attach_volumes(share, wanted))?;
        }
        half_made.keep();
        Ok(())
    }

    /// Undoes [`Share::add`], whether or not it was called for this container. Blocks.
    pub fn remove_container(&self, container: &ContainerId) -> Result<(), ShareError> {
        let file = &self.users;
        let mut users = VolumeUsers::load(file).map_err(MountError::new("read", file))?;
        let has_volumes = users.has(container.as_str());
        let unused = if has_volumes { users.remove(container.as_str()) } else { Vec::new() };
        let removed = self.place.enter(|share| {
            let directory: &Path = container.as_ref();
            mounts::detach(&share.join(directory).join(ROOT))?;
            mounts::detach(&share.join(directory).join(WRITABLE))?;
            for name in unused {
                remove_volume(share, &Path::new(VOLUMES).join(name))?;
            }
            match std::fs::remove_dir_all(directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(MountError::new("remove", &share.join(directory))(error).into())
                }
                _ => Ok(()),
            }
        });
        match removed {
            // With all that was in it.
            Err(ShareError::Gone) => {}
            removed => removed?,
        }
        if has_volumes {
            users.store(file).map_err(MountError::new("write", file))?;
        }
        Ok(())
    }

    /// The containers that have something in the share. Blocks.
    pub fn containers(&self) -> Vec<ContainerId> {
        let names = self.place.enter(|share| {
            let entries = std::fs::read_dir(".").map_err(MountError::new("list", share))?;
            Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
        });
        let names: Vec<String> = match names {
            Err(ShareError::Gone) => Vec::new(),
            Err(error) => {
                tracing::warn!(error = chain(&error), "the containers in a share are not known");
                Vec::new()
            }
            Ok(names) => names,
        };
        // The directory of the volumes has a name that is no id.
        names.into_iter().filter_map(|name| name.try_into().ok()).collect()
    }

    /// Takes a container for a user of its volumes; returns what each of them needs.
    fn add_user<'a>(
        &self,
        container: &ContainerId,
        volumes: &'a [Volume],
    ) -> Result<Vec<(&'a Volume, MountAction)>, ShareError> {
        if volumes.is_empty() {
            return Ok(Vec::new());
        }
        let file = &self.users;
        let mut users = VolumeUsers::load(file).map_err(MountError::new("read", file))?;
        let mut needed = Vec::with_capacity(volumes.len());
        for volume in volumes {
            let writable = volume.read_only == ReadOnly::No;
            let add = users.add(&volume.name, &volume.source, container.as_str(), writable);
            needed.push((volume, add.map_err(failed(volume))?));
        }
        // Before anything is mounted, so that it is undone with its user.
        users.store(file).map_err(MountError::new("write", file))?;
        Ok(needed)
    }
}

/// Attaches volumes, or lets those that are mounted already be written if they have to. Those without a mount are taken
/// to be mounted; returns the ones that are not: a controller may have been killed after it had noted a user and before
/// it had mounted the volume for it.
fn attach_volumes<'a>(
    share: &Path,
    volumes: Vec<(&'a Volume, Option<DetachedVolume>)>,
) -> Result<Vec<&'a Volume>, ShareError> {
    let mut missing = Vec::new();
    for (volume, mount) in volumes {
        let target = Path::new(VOLUMES).join(&volume.name);
        if let Some(mount) = mount {
            ignore_existing(make_directory(Path::new(VOLUMES)))?;
            ignore_existing(if mount.is_directory { make_directory(&target) } else { make_file(&target) })?;
            attach(&mount.mount, share, &target).map_err(failed(volume))?;
            continue;
        }
        match open_inside(share, &target) {
            Ok(place) if mounts::is_mount(&place).map_err(failed(volume))? => {
                if volume.read_only == ReadOnly::No {
                    mounts::set_writable(place).map_err(failed(volume))?;
                }
            }
            _ => missing.push(volume),
        }
    }
    Ok(missing)
}

/// Unmounts a volume and removes its place.
fn remove_volume(share: &Path, target: &Path) -> Result<(), ShareError> {
    mounts::detach(&share.join(target))?;
    let removed = match std::fs::remove_dir(target) {
        // It may be a file's place. What is not there was never made.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => std::fs::remove_file(target),
        removed => removed,
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(MountError::new("remove", &share.join(target))(error).into())
        }
        _ => Ok(()),
    }
}

/// Attaches a detached mount at a place in the share.
fn attach(mount: &OwnedFd, share: &Path, target: &Path) -> rustix::io::Result<()> {
    mounts::attach(mount, open_inside(share, target)?)
}

/// Opens a place in the share, which the name cannot leave.
fn open_inside(share: &Path, name: &Path) -> rustix::io::Result<OwnedFd> {
    mounts::open_place_below(mounts::open_place(share)?, name)
}

/// Makes a directory of the share, which is the working directory.
fn make_directory(name: &Path) -> Result<(), ShareError> {
    Ok(mkdirat(CWD, name, Mode::from_raw_mode(0o755)).map_err(MountError::new("create", name))?)
}

fn make_file(name: &Path) -> Result<(), ShareError> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let made = openat(CWD, name, flags, Mode::from_raw_mode(0o600));
    Ok(made.map(drop).map_err(MountError::new("create", name))?)
}

fn ignore_existing(made: Result<(), ShareError>) -> Result<(), ShareError> {
    match made {
        Err(ShareError::Mount(error)) if error.source.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// Takes a half-made container away when it goes out of scope.
struct HalfMade<'a> {
    share: &'a Share,
    container: &'a ContainerId,
    abandoned: bool,
}

impl HalfMade<'_> {
    fn keep(mut self) {
        self.abandoned = false;
    }
}

impl Drop for HalfMade<'_> {
    fn drop(&mut self) {
        if self.abandoned
            && let Err(error) = self.share.remove_container(self.container)
        {
            tracing::warn!(container = %self.container, error = chain(&error), "cannot undo a preparation");
        }
    }
}

fn failed<E: Into<io::Error>>(volume: &Volume) -> impl Fn(E) -> ShareError {
    move |source| ShareError::Volume {
        path: volume.source.clone(),
        destination: volume.destination.clone(),
        source: source.into(),
    }
}

/// The mount of a volume, attached nowhere yet.
struct DetachedVolume {
    mount: OwnedFd,
    is_directory: bool,
}

impl DetachedVolume {
    fn make(volume: &Volume, user_namespace: Option<&UserNamespace>) -> Result<Self, ShareError> {
        let source = mounts::open_place(&volume.source).map_err(|error| match error {
            Errno::NOENT | Errno::NOTDIR => ShareError::VolumeMissing {
                path: volume.source.clone(),
                destination: volume.destination.clone(),
            },
            error => failed(volume)(error),
        })?;
        let kind = FileType::from_raw_mode(fstat(&source).map_err(failed(volume))?.st_mode);
        let is_directory = check_kind(volume, kind)?;
        let mount = mounts::clone_tree(&source, volume.recursive).map_err(failed(volume))?;
        map_ids(&mount, volume, user_namespace)?;
        match volume.read_only {
            ReadOnly::No => {}
            ReadOnly::Top | ReadOnly::TopOfTree => {
                mounts::set_read_only(&mount, false).map_err(failed(volume))?;
            }
            ReadOnly::Recursive => mounts::set_read_only(&mount, true).map_err(failed(volume))?,
        }
        let propagation = match volume.propagation {
            Propagation::Private => SetPropagation::Private,
            Propagation::Slave => SetPropagation::Slave,
        };
        mounts::set_propagation(&mount, propagation).map_err(failed(volume))?;
        mounts::make_inert(&mount).map_err(failed(volume))?;
        Ok(Self { mount, is_directory })
    }
}

/// Whether a volume is a directory. Only directories and files work through virtio-fs.
fn check_kind(volume: &Volume, kind: FileType) -> Result<bool, ShareError> {
    let kind = match kind {
        FileType::Directory => return Ok(true),
        FileType::RegularFile => return Ok(false),
        FileType::Socket => "socket",
        FileType::Fifo => "FIFO",
        FileType::CharacterDevice | FileType::BlockDevice => "device node",
        FileType::Symlink => "symbolic link",
        FileType::Unknown => "file of an unknown kind",
    };
    Err(ShareError::VolumeKind { path: volume.source.clone(), destination: volume.destination.clone(), kind })
}

fn map_ids(
    mount: &OwnedFd,
    volume: &Volume,
    user_namespace: Option<&UserNamespace>,
) -> Result<(), ShareError> {
    // A spec asks for it only if the pod has one.
    let Some(namespace) = user_namespace.filter(|_| volume.ids != IdMapping::Host) else { return Ok(()) };
    mounts::map_ids(mount, &namespace.descriptor, volume.ids == IdMapping::PodRecursive).map_err(|source| {
        ShareError::VolumeIds { path: volume.source.clone(), destination: volume.destination.clone(), source }
    })
}

#[cfg(test)]
mod tests;
