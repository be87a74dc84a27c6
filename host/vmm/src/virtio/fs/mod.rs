//! virtio-fs (virtio 1.2, section 5.11): one directory of the host, the share, served by virtiofsd's FUSE server as a
//! library.
//!
//! One thread ([`worker`]) serves both queues. It has its own working directory and few capabilities.
//!
//! Trust: the guest is hostile, and virtiofsd was written for a client that it can trust. So virtiofsd sees no request
//! that was not checked here: each is copied out of guest memory once ([`staging`]), must have exactly the fields of
//! its operation ([`request`]), can only name files one step from a directory that the guest knows ([`names`]), and is
//! executed with suitable credentials ([`credentials`]) on a file system that refuses the rest ([`checked_fs`]).
//! [`xattrs`] keeps the host's extended attributes from the guest.

mod checked_fs;
mod credentials;
mod names;
mod request;
mod staging;
mod worker;
mod xattrs;

#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use thiserror::Error;
use virtiofsd::{
    passthrough::{CachePolicy, Config, NegotiationMode, PassthroughFs},
    server::Server,
};

use self::checked_fs::CheckedFs;
use super::{
    ActivateError, Activation, Counter, Device, F_EVENT_IDX, RunningWorker, all_queues, device_type,
    read_config_bytes, throttle::Throttle,
};
use crate::{
    config::{RateLimit, ShareConfig},
    thread_kind::ThreadKind,
};

/// `VIRTIO_F_INDIRECT_DESC`: large requests take one entry of the ring.
const F_INDIRECT_DESC: u64 = 1 << 28;
/// Bytes of the tag in the configuration space.
const TAG_SIZE: usize = 36;
/// Sizes of the high-priority queue (FORGET, INTERRUPT) and of the request queue.
const QUEUE_SIZES: [u16; 2] = [64, 512];
/// How long the guest may rely on what it knows of a file. It sees updates of volumes (the symbolic link in a configMap
/// is changed) within this time.
const ATTRIBUTE_TIMEOUT: Duration = Duration::from_secs(1);
/// Descriptors of this process that the guest's open files and known inodes may not use up. Most are for the vsock
/// device.
const RESERVED_DESCRIPTORS: u64 = 2048;

/// The share cannot be served.
#[derive(Debug, Error)]
pub enum FsError {
    #[error("the share's tag {tag:?} is empty or longer than {TAG_SIZE} bytes")]
    Tag { tag: String },
    #[error("the share {directory} is not a directory that can be opened")]
    Directory {
        directory: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the names of extended attributes cannot be mapped")]
    Attributes(#[source] virtiofsd::passthrough::xattrmap::Error),
}

/// Counted by the worker, read by the control service.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    requests: Counter,
    /// Bytes of files that have been read, written or copied.
    data_bytes: Counter,
}

/// The shared directory's device.
pub struct Fs {
    config: [u8; TAG_SIZE + 4],
    server: Arc<Server<CheckedFs>>,
    worker: Option<RunningWorker>,
    counters: Counters,
    throttle: Throttle,
}

impl Fs {
    /// Prepares to serve a directory. This raises the process's limit of open files as far as it may, and clears its
    /// umask (in virtiofsd), because the guest's kernel applies those of its processes. `descriptors` is
    /// `/proc/self/fd`, for a process that has no `/proc`.
    pub fn new(share: &ShareConfig, limit: &RateLimit, descriptors: Option<File>) -> Result<Self, FsError> {
        if share.tag.is_empty() || share.tag.len() > TAG_SIZE {
            return Err(FsError::Tag { tag: share.tag.clone() });
        }
        let directory = share.directory.as_deref().unwrap_or(Path::new(pericarp_jail::SHARE));
        let unusable = |source| FsError::Directory { directory: directory.to_owned(), source };
        if !directory.metadata().map_err(unusable)?.is_dir() {
            return Err(unusable(io::Error::from(io::ErrorKind::NotADirectory)));
        }
        let root_dir = directory.to_str().ok_or_else(|| unusable(io::ErrorKind::InvalidFilename.into()))?;
        let passthrough = PassthroughFs::new(Config {
            root_dir: root_dir.to_owned(),
            proc_sfd_rawfd: descriptors,
            entry_timeout: ATTRIBUTE_TIMEOUT,
            attr_timeout: ATTRIBUTE_TIMEOUT,
            cache_policy: CachePolicy::Auto,
            xattr: true,
            xattrmap: Some(xattrs::map().map_err(FsError::Attributes)?),
            // Root filesystems and volumes are mounted below the share while the guest runs.
            announce_submounts: true,
            killpriv_v2: true,
            posix_acl: NegotiationMode::Auto,
            guest_fd_limit: descriptors_for_guest(raise_file_limit()),
            ..Config::default()
        })
        .map_err(unusable)?;
        let mut config = [0; TAG_SIZE + 4];
        config[..share.tag.len()].copy_from_slice(share.tag.as_bytes());
        config[TAG_SIZE..].copy_from_slice(&1u32.to_le_bytes());
        let counters = Counters::default();
        Ok(Self {
            config,
            server: Arc::new(Server::new(CheckedFs::new(passthrough, counters.data_bytes.clone()))),
            worker: None,
            counters,
            throttle: Throttle::new(limit),
        })
    }
}

/// How many of the process's descriptors the guest may use.
fn descriptors_for_guest(limit: u64) -> u64 {
    limit - RESERVED_DESCRIPTORS.min(limit / 2)
}

/// The limit of open files that the machine asks for: the kernel's default of `fs.nr_open`. Each file that the guest
/// knows is open here, and so is each entry of a directory that it lists; beyond the limit, listings end early. More
/// would let a guest use too much of the host's memory.
const OPEN_FILES: u64 = 1 << 20;

/// Sets the limit of open files to [`OPEN_FILES`], or as close to it as is allowed. Returns the limit that applies
/// then. On the host, root may raise it; in a user namespace of its own it may not.
pub fn raise_file_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const UNLIMITED: u64 = u64::MAX;
    let limit = getrlimit(Resource::Nofile);
    let hard = limit.maximum.unwrap_or(UNLIMITED);
    // Raising the hard limit needs a privilege, which a machine need not have.
    for wanted in [OPEN_FILES, hard] {
        let raised = Rlimit { current: Some(wanted), maximum: Some(wanted) };
        if setrlimit(Resource::Nofile, raised).is_ok() {
            return wanted;
        }
    }
    limit.current.unwrap_or(UNLIMITED)
}

impl Device for Fs {
    fn name(&self) -> &'static str {
        "fs"
    }

    fn device_type(&self) -> u32 {
        device_type::FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_EVENT_IDX | F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queues = all_queues(activation.queues)?;
        let (server, counters) = (self.server.clone(), self.counters.clone());
        let throttle = self.throttle.clone();
        let worker = super::start_worker(&activation.threads, ThreadKind::Fs, "fs", |stop| {
            let worker = worker::Worker::new(activation.memory, queues, server, counters, throttle, stop)?;
            Ok(move || worker.run())
        });
        self.worker = Some(worker.map_err(ActivateError::Worker)?);
        Ok(())
    }

    fn stop(&mut self) {
        super::stop_worker(self.worker.take());
    }

    fn counters(&self) -> Vec<(&'static str, Counter)> {
        vec![
            ("requests", self.counters.requests.clone()),
            ("data_bytes", self.counters.data_bytes.clone()),
            ("throttled", self.throttle.throttled()),
        ]
    }
}
