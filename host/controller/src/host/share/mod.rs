//! A pod's share: the one directory that the guest sees through virtio-fs.
//!
//! The share is mounted on itself, read-only and private. Read-only, so that a guest can write only
//! into what is mounted below (its containers' root file systems and volumes) and can neither fill
//! the host's `/run` nor put a symbolic link where the controller is about to mount something.
//! Private, so that no mount in it leaks into another mount namespace, and so that unmounting the
//! share takes everything below it away at once.

pub mod volume;
mod volume_users;
pub mod writable;

use std::{
    io,
    os::{fd::OwnedFd, unix::fs::DirBuilderExt as _},
    path::{Path, PathBuf},
};

use pericarp_protos::{guest::VOLUMES, id::ContainerId};
use rustix::{
    fs::{FileType, Mode, OFlags, fstat, mkdirat, openat},
    io::Errno,
};

use thiserror::Error;

use self::{
    volume::{IdMapping, Propagation, ReadOnly, Volume},
    volume_users::{MountAction, VolumeUsers},
};
use crate::{
    host::{
        mounts::{self, MountError, SetPropagation, descriptor_path},
        rootfs::{self, HostMount, RootfsError},
        user_namespace::UserNamespace,
    },
    telemetry::error_chain::chain,
};

const ROOT: &str = "rootfs";
/// Beside the share: who uses them.
const USERS: &str = "volumes.json";
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
    directory: PathBuf,
}

impl Share {
    /// Names a share that exists already, or that is to be removed.
    pub fn at(directory: PathBuf) -> Share {
        Share { directory }
    }

    /// Makes the share's directory and mounts it on itself.
    pub fn create(&self) -> Result<(), ShareError> {
        let path = self.directory.as_path();
        let fail = |action| move |error| MountError { action, path: path.into(), source: error };
        std::fs::DirBuilder::new().mode(0o755).create(path).map_err(fail("create"))?;
        let place = mounts::open_place(path).map_err(MountError::new("open", path))?;
        let mount = mounts::clone_tree(&place, false).map_err(MountError::new("bind", path))?;
        mounts::set_read_only(&mount, false).map_err(fail("make read-only"))?;
        mounts::attach(&mount, &place).map_err(MountError::new("mount", path))?;
        // After attaching, because a mount becomes shared when its parent is.
        mounts::set_propagation(&mount, SetPropagation::Private).map_err(fail("make private"))?;
        Ok(())
    }

    /// Mounts a container's root file system and volumes. On an error nothing of it is left.
    pub fn add(
        &self,
        container: &ContainerId,
        root: &SharedRoot,
        volumes: &[Volume],
        user_namespace: Option<&UserNamespace>,
    ) -> Result<(), ShareError> {
        // Made first: what fails from here on is taken away again.
        let half_made = HalfMade { share: self, container, abandoned: true };
        let made = mounts::below_mounts(&self.directory)?;
        let directory: &Path = container.as_ref();
        self.make_directory(&made, directory)?;
        let name = if matches!(root, SharedRoot::Mounted(_)) { ROOT } else { WRITABLE };
        let target = directory.join(name);
        self.make_directory(&made, &target)?;
        let at = self.open_inside(&target).map_err(MountError::new("open", &self.directory.join(&target)))?;
        match root {
            SharedRoot::Mounted(mount) => rootfs::mount(&at, mount, user_namespace)?,
            SharedRoot::Disks(Some(snapshot)) => writable::mount(snapshot, &at)?,
            SharedRoot::Disks(None) => {}
        }
        for (volume, needed) in self.add_user(container, volumes)? {
            self.add_volume(&made, volume, needed, user_namespace)?;
        }
        half_made.keep();
        Ok(())
    }

    /// Undoes [`Share::add`], whether or not it was called for this container.
    pub fn remove_container(&self, container: &ContainerId) -> Result<(), ShareError> {
        let directory = self.directory.join(container);
        mounts::detach(&directory.join(ROOT))?;
        mounts::detach(&directory.join(WRITABLE))?;
        let made = match mounts::below_mounts(&self.directory) {
            Ok(made) => made,
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        self.remove_volumes(&made, container)?;
        match std::fs::remove_dir_all(descriptor_path(&made).join(container)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(MountError::new("remove", &directory)(error).into())
            }
            _ => Ok(()),
        }
    }

    /// The containers that have something in the share.
    pub fn containers(&self) -> Vec<ContainerId> {
        let entries = std::fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        // The directory of the volumes has a name that is no id.
        names.filter_map(|name| name.try_into().ok()).collect()
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
        let file = self.users();
        let mut users = VolumeUsers::load(&file).map_err(MountError::new("read", &file))?;
        let mut needed = Vec::with_capacity(volumes.len());
        for volume in volumes {
            let writable = volume.read_only == ReadOnly::No;
            let add = users.add(&volume.name, &volume.source, container.as_str(), writable);
            needed.push((volume, add.map_err(failed(volume))?));
        }
        // Before anything is mounted, so that it is undone with its user.
        users.store(&file).map_err(MountError::new("write", &file))?;
        Ok(needed)
    }

    /// Mounts a volume, unless another container has it already.
    fn add_volume(
        &self,
        made: &OwnedFd,
        volume: &Volume,
        needed: MountAction,
        user_namespace: Option<&UserNamespace>,
    ) -> Result<(), ShareError> {
        let target = Path::new(VOLUMES).join(&volume.name);
        // A controller may have been killed after it had noted a user and before it had mounted the volume for it.
        let mounted = match self.open_inside(&target) {
            Ok(place) if needed != MountAction::Mount => {
                mounts::is_mount(&place).map_err(failed(volume))?.then_some(place)
            }
            _ => None,
        };
        match mounted {
            Some(_) if volume.read_only != ReadOnly::No => Ok(()),
            Some(mounted) => mounts::set_writable(mounted).map_err(failed(volume)),
            None => {
                let source = open_source(volume)?;
                match self.make_directory(made, Path::new(VOLUMES)) {
                    Err(ShareError::Mount(error)) if error.source.kind() == io::ErrorKind::AlreadyExists => {}
                    result => result?,
                }
                let place = if source.is_directory {
                    self.make_directory(made, &target)
                } else {
                    self.make_file(made, &target)
                };
                match place {
                    Err(ShareError::Mount(error)) if error.source.kind() == io::ErrorKind::AlreadyExists => {}
                    place => place?,
                }
                let at = self.open_inside(&target).map_err(failed(volume))?;
                mount_volume(&source.place, &at, volume, user_namespace)
            }
        }
    }

    /// Unmounts the volumes that only this container has used.
    fn remove_volumes(&self, made: &OwnedFd, container: &ContainerId) -> Result<(), ShareError> {
        let file = self.users();
        let mut users = VolumeUsers::load(&file).map_err(MountError::new("read", &file))?;
        if !users.has(container.as_str()) {
            return Ok(());
        }
        for name in users.remove(container.as_str()) {
            let target = Path::new(VOLUMES).join(name);
            mounts::detach(&self.directory.join(&target))?;
            let place = descriptor_path(made).join(&target);
            let removed = match std::fs::remove_dir(&place) {
                // It may be a file's place. What is not there was never made.
                Err(error) if error.kind() == io::ErrorKind::NotADirectory => std::fs::remove_file(&place),
                removed => removed,
            };
            match removed {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(MountError::new("remove", &self.directory.join(target))(error).into());
                }
                _ => {}
            }
        }
        Ok(users.store(&file).map_err(MountError::new("write", &file))?)
    }

    /// Opens a place in the share, which the name cannot leave.
    fn open_inside(&self, name: &Path) -> rustix::io::Result<OwnedFd> {
        mounts::open_place_below(mounts::open_place(&self.directory)?, name)
    }

    fn users(&self) -> PathBuf {
        self.directory.with_file_name(USERS)
    }

    /// Unmounts the share with everything below it and removes its directory.
    pub fn remove(&self) -> Result<(), ShareError> {
        mounts::detach(&self.directory)?;
        mounts::remove_tree(&self.directory)?;
        Ok(())
    }

    fn make_directory(&self, made: &OwnedFd, name: &Path) -> Result<(), ShareError> {
        mkdirat(made, name, Mode::from_raw_mode(0o755))
            .map_err(|error| MountError::new("create", &self.directory.join(name))(error).into())
    }

    fn make_file(&self, made: &OwnedFd, name: &Path) -> Result<(), ShareError> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        match openat(made, name, flags, Mode::from_raw_mode(0o600)) {
            Ok(_) => Ok(()),
            Err(error) => Err(MountError::new("create", &self.directory.join(name))(error).into()),
        }
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

struct Source {
    place: OwnedFd,
    is_directory: bool,
}

fn failed<E: Into<io::Error>>(volume: &Volume) -> impl Fn(E) -> ShareError {
    move |source| ShareError::Volume {
        path: volume.source.clone(),
        destination: volume.destination.clone(),
        source: source.into(),
    }
}

fn open_source(volume: &Volume) -> Result<Source, ShareError> {
    let place = mounts::open_place(&volume.source).map_err(|error| match error {
        Errno::NOENT | Errno::NOTDIR => {
            ShareError::VolumeMissing { path: volume.source.clone(), destination: volume.destination.clone() }
        }
        error => failed(volume)(error),
    })?;
    let kind = match FileType::from_raw_mode(fstat(&place).map_err(failed(volume))?.st_mode) {
        FileType::Directory => return Ok(Source { place, is_directory: true }),
        FileType::RegularFile => return Ok(Source { place, is_directory: false }),
        FileType::Socket => "socket",
        FileType::Fifo => "FIFO",
        FileType::CharacterDevice | FileType::BlockDevice => "device node",
        FileType::Symlink => "symbolic link",
        FileType::Unknown => "file of an unknown kind",
    };
    Err(ShareError::VolumeKind { path: volume.source.clone(), destination: volume.destination.clone(), kind })
}

fn mount_volume(
    source: &OwnedFd,
    at: &OwnedFd,
    volume: &Volume,
    user_namespace: Option<&UserNamespace>,
) -> Result<(), ShareError> {
    let mount = mounts::clone_tree(source, volume.recursive).map_err(failed(volume))?;
    map_ids(&mount, volume, user_namespace)?;
    attach_volume(&mount, at, volume).map_err(failed(volume))
}

fn attach_volume(mount: &OwnedFd, at: &OwnedFd, volume: &Volume) -> io::Result<()> {
    match volume.read_only {
        ReadOnly::No => {}
        ReadOnly::Top | ReadOnly::TopOfTree => mounts::set_read_only(mount, false)?,
        ReadOnly::Recursive => mounts::set_read_only(mount, true)?,
    }
    let propagation = match volume.propagation {
        Propagation::Private => SetPropagation::Private,
        Propagation::Slave => SetPropagation::Slave,
    };
    mounts::set_propagation(mount, propagation)?;
    Ok(mounts::attach(mount, at)?)
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
