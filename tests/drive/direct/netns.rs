//! Network namespaces for pods that a test makes without containerd.

use anyhow::{Context, Result, bail};
use tokio::process::Command;

/// A named network namespace like the one that containerd makes for a pod.
pub struct NetworkNamespace(String);

impl NetworkNamespace {
    /// Makes a network namespace with this name.
    pub async fn new(name: &str) -> Result<Self> {
        ip(&["netns", "add", name]).await?;
        Ok(Self(name.to_owned()))
    }

    /// The file on which it is mounted.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.0)
    }

    /// Runs shell commands in it, which must succeed; returns their output.
    pub async fn run(&self, commands: &str) -> Result<String> {
        let netns = format!("--net={}", self.path());
        let output = Command::new("nsenter").args([&netns, "sh", "-ec", commands]).output().await?;
        if !output.status.success() {
            bail!("{commands:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Removes the namespace.
    pub async fn remove(self) -> Result<()> {
        ip(&["netns", "delete", &self.0]).await
    }
}

async fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output().await.context("run ip")?;
    if !output.status.success() {
        bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
