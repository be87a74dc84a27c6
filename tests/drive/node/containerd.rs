//! The node's containerd, which tests stop and start again.

use std::{
    fs::File,
    process::{Command, Stdio},
};

use anyhow::{Context, Result};
use rustix::process::Signal;

use super::process::{Process, find_process};
use crate::{Node, api, wait_until};

/// containerd while it is down.
pub struct StoppedContainerd(());

impl StoppedContainerd {
    /// Ends containerd with a signal and waits until it has exited. Dropping the result starts it again.
    pub async fn stop(signal: Signal) -> Result<Self> {
        let pid = find_process(&["containerd"])?.context("no containerd is running")?;
        let process = Process::open(pid)?;
        process.signal(signal)?;
        process.wait_for_exit().await.context("containerd")?;
        Ok(Self(()))
    }

    /// Starts containerd again and waits until it serves CRI.
    pub async fn restart(self, node: &Node) -> Result<()> {
        drop(self);
        wait_until("a containerd that serves CRI again", async || {
            let status = node.cri.runtime().status(api::StatusRequest::default()).await?.into_inner().status;
            let ready =
                |condition: &api::RuntimeCondition| condition.r#type == "RuntimeReady" && condition.status;
            Ok(status.is_some_and(|status| status.conditions.iter().any(ready)))
        })
        .await
    }
}

impl Drop for StoppedContainerd {
    fn drop(&mut self) {
        let log = File::options().create(true).append(true).open("/results/containerd.log");
        let log =
            || log.as_ref().ok().and_then(|log| log.try_clone().ok()).map_or_else(Stdio::null, Stdio::from);
        // The new containerd outlives the tests, as the one before would have.
        if let Err(error) = Command::new("containerd").stdout(log()).stderr(log()).spawn() {
            println!("containerd cannot be started again: {error}");
        }
    }
}
