//! virtio-fs (virtio 1.2, section 5.11): one directory of the host, served by virtiofsd's own FUSE
//! server inside the machine.

mod checked;
mod names;
mod request;
mod staging;
mod user;
mod worker;
mod xattrs;

#[cfg(test)]
mod tests;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use thiserror::Error;
use virtiofsd::{
    passthrough::{CachePolicy, Config, NegotiationMode, PassthroughFs},
    server::Server,
};

use self::checked::Checked;
use super::{
    ActivateError, Active, Counter, Device, F_EVENT_IDX, RunningWorker, all_queues, device_type,
    read_config_bytes,
};
use crate::config::ShareConfig;

/// `VIRTIO_F_INDIRECT_DESC`: large requests take one entry of the ring.
const F_INDIRECT_DESC: u64 = 1 << 28;
const TAG_SIZE: usize = 36;
/// High-priority queue (FORGET, INTERRUPT) and one request queue.
const QUEUE_SIZES: [u16; 2] = [64, 512];
/// How long the guest may rely on what it knows of a file: live updates of volumes (a configMap's
/// symlink is switched) are seen within this time.
const ATTRIBUTES_VALID: Duration = Duration::from_secs(1);
/// Descriptors of this process that the guest's open files and known inodes may not use up: those of
/// the vsock device, above all.
const RESERVED_FILES: u64 = 2048;

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

/// The shared directory's device.
pub struct Fs {
    config: [u8; TAG_SIZE + 4],
    server: Arc<Server<Checked>>,
    worker: Option<RunningWorker>,
    requests: Counter,
}

impl Fs {
    /// Prepares to serve a directory. Raises the process's limit of open files as far as it is allowed
    /// to, and (in virtiofsd) clears its umask, because the guest's kernel applies the guest's own.
    pub fn new(share: &ShareConfig) -> Result<Fs, FsError> {
        if share.tag.is_empty() || share.tag.len() > TAG_SIZE {
            return Err(FsError::Tag { tag: share.tag.clone() });
        }
        let unusable = |source| FsError::Directory { directory: share.directory.clone(), source };
        if !share.directory.metadata().map_err(unusable)?.is_dir() {
            return Err(unusable(io::Error::from(io::ErrorKind::NotADirectory)));
        }
        let root_dir =
            share.directory.to_str().ok_or_else(|| unusable(io::ErrorKind::InvalidFilename.into()))?;
        let passthrough = PassthroughFs::new(Config {
            root_dir: root_dir.to_owned(),
            entry_timeout: ATTRIBUTES_VALID,
            attr_timeout: ATTRIBUTES_VALID,
            cache_policy: CachePolicy::Auto,
            xattr: true,
            xattrmap: Some(xattrs::map().map_err(FsError::Attributes)?),
            // Root filesystems and volumes are mounted below the share while the guest runs.
            announce_submounts: true,
            killpriv_v2: true,
            posix_acl: NegotiationMode::Auto,
            guest_fd_limit: files_for_guest(raise_file_limit()),
            ..Config::default()
        })
        .map_err(unusable)?;
        let mut config = [0; TAG_SIZE + 4];
        config[..share.tag.len()].copy_from_slice(share.tag.as_bytes());
        config[TAG_SIZE..].copy_from_slice(&1u32.to_le_bytes());
        Ok(Fs {
            config,
            server: Arc::new(Server::new(Checked::new(passthrough))),
            worker: None,
            requests: Counter::default(),
        })
    }
}

fn files_for_guest(limit: u64) -> u64 {
    limit - RESERVED_FILES.min(limit / 2)
}

/// Open files that the machine asks for. Each file that the guest knows of is an open one here, and a directory that is
/// listed is one for each of its entries: beyond the limit, listings end early. The kernel's default of `fs.nr_open`, and as
/// much as a guest may have of the host's memory for that, whatever the machine was allowed.
const FILES: u64 = 1 << 20;

/// Sets the limit of open files to that, or as near to it as is allowed; answers with the limit in force.
fn raise_file_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let hard = limit.maximum.unwrap_or(u64::MAX);
    // More than the hard limit is for the privileged, which a machine need not be.
    for wanted in [FILES, hard] {
        let raised = Rlimit { current: Some(wanted), maximum: Some(wanted) };
        if setrlimit(Resource::Nofile, raised).is_ok() {
            return wanted;
        }
    }
    limit.current.unwrap_or(u64::MAX)
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

    fn activate(&mut self, active: Active) -> Result<(), ActivateError> {
        let queues = all_queues(active.queues)?;
        let (server, requests) = (self.server.clone(), self.requests.clone());
        let worker = super::start_worker("fs", |stop| {
            let worker = worker::Worker::new(active.memory, queues, server, requests, stop)?;
            Ok(move || worker.run())
        });
        self.worker = Some(worker.map_err(ActivateError::Worker)?);
        Ok(())
    }

    fn stop(&mut self) {
        super::stop_worker(self.worker.take());
    }

    fn counters(&self) -> Vec<(&'static str, Counter)> {
        vec![("requests", self.requests.clone())]
    }
}
