//! The node's containerd, which tests stop and start again.

use std::{
    fs::File,
    process::{Command, Stdio},
};

use anyhow::{Context, Result};
use rustix::process::Signal;

use crate::{Node, api, machine, until};

/// containerd while it is down.
pub struct Stopped(());

impl Stopped {
    /// Ends it with a signal and waits for its end. It is started again at the latest when the answer is dropped.
    pub async fn by(signal: Signal) -> Result<Self> {
        let pid = machine::process_of(&["containerd"])?.context("no containerd is running")?;
        let process = machine::Process::of(pid)?;
        process.signal(signal)?;
        process.ended().await.context("containerd")?;
        Ok(Self(()))
    }

    /// Starts it again and waits until it serves CRI.
    pub async fn restart(self, node: &Node) -> Result<()> {
        drop(self);
        until("a containerd that serves CRI again", async || {
            let status = node.cri.runtime().status(api::StatusRequest::default()).await?.into_inner().status;
            let ready =
                |condition: &api::RuntimeCondition| condition.r#type == "RuntimeReady" && condition.status;
            Ok(status.is_some_and(|status| status.conditions.iter().any(ready)))
        })
        .await
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let log = File::options().create(true).append(true).open("/results/containerd.log");
        let log =
            || log.as_ref().ok().and_then(|log| log.try_clone().ok()).map_or_else(Stdio::null, Stdio::from);
        // It outlives the tests, as the one before would have.
        if let Err(error) = Command::new("containerd").stdout(log()).stderr(log()).spawn() {
            println!("containerd cannot be started again: {error}");
        }
    }
}
