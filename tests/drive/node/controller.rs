//! The node's own controller, which tests kill and start again.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::process::{Process, controller_pid};
use crate::{direct::controller::connect, wait_until};

/// The socket of the node's own controller.
pub const NODE_CONTROLLER: &str = "/run/pericarp/controller.sock";

/// The run directory of the node's own controller.
pub const NODE_RUN_DIR: &str = "/run/pericarp";

/// Names of the pods' directories in a controller's run directory. A removed pod leaves none.
pub fn pod_directories(run_dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(run_dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

/// The environment variable that names the file in which the controller finds the fault point at which it is to die
/// (`host/controller/src/fault.rs`).
const FAULT_FILE: &str = "PERICARP_FAULT_FILE";

/// A request to kill the node's own controller at a fault point. Dropping it withdraws the request.
pub struct PendingKill {
    file: PathBuf,
    process: Option<Process>,
}

impl PendingKill {
    /// Waits until the controller is dead. Fails if it does not reach the fault point within the time limit.
    pub async fn wait_for_death(mut self) -> Result<KilledController> {
        let Self { file, process } = &mut self;
        let process = process.take().context("the test has waited for it before")?;
        process
            .wait_for_exit()
            .await
            .with_context(|| format!("the controller never reached {:?}", fs::read_to_string(file)))?;
        Ok(KilledController(()))
    }

    /// Withdraws the request. Returns the controller if it has been killed before.
    pub async fn withdraw(self) -> Result<Option<KilledController>> {
        match fs::remove_file(&self.file) {
            Ok(()) => Ok(None),
            // The controller has read the request and is being killed.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                self.wait_for_death().await.map(Some)
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for PendingKill {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

/// A request that the next machine act as if it had been captured (`host/vmm/src/attack.rs`). Dropping it withdraws the
/// request.
pub struct PendingAttack {
    file: PathBuf,
}

impl PendingAttack {
    /// Asks that a thread of a kind make a system call once the pod has started.
    pub fn of_next_machine(thread: &str, call: &str) -> Result<Self> {
        let file =
            std::env::var_os(FAULT_FILE).context("the node's controller was started without fault points")?;
        fs::write(&file, format!("attack {thread} {call}"))?;
        Ok(Self { file: file.into() })
    }

    /// Whether a machine has been started with it.
    pub fn is_claimed(&self) -> bool {
        !self.file.exists()
    }
}

impl Drop for PendingAttack {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

/// Where the node's own controller writes its log.
const LOG: &str = "/results/pericarp.log";

/// The lines about a pod in the log of the node's controller that somebody would have to look at.
pub fn warnings_about(pod: &str) -> Result<Vec<String>> {
    let log = fs::read_to_string(LOG).with_context(|| format!("read {LOG}"))?;
    let is_of_concern =
        |line: &&str| line.contains(pod) && (line.contains(" WARN ") || line.contains("ERROR "));
    Ok(log.lines().filter(is_of_concern).map(str::to_owned).collect())
}

/// The node's own controller while it is dead. Dropping it starts a new one.
pub struct KilledController(());

impl KilledController {
    /// Kills the node's controller.
    pub fn kill() -> Result<Self> {
        let pid = Pid::from_raw(controller_pid()?).context("the controller's pid")?;
        kill_process(pid, Signal::KILL)?;
        Ok(Self(()))
    }

    /// A controller that has died without [`KilledController::kill`].
    pub fn already_dead() -> Self {
        Self(())
    }

    /// Asks the node's controller to kill itself when it reaches a fault point.
    pub fn kill_at(point: &str) -> Result<PendingKill> {
        let file =
            std::env::var_os(FAULT_FILE).context("the node's controller was started without fault points")?;
        let process = Some(Process::open(controller_pid()?)?);
        fs::write(&file, point)?;
        Ok(PendingKill { file: file.into(), process })
    }

    /// Starts a new controller and waits until it serves.
    pub async fn restart(self) -> Result<()> {
        let socket = Path::new(NODE_CONTROLLER);
        drop(self);
        wait_until("the node's controller to answer", async || Ok(connect(socket).await.map(|_| true)?)).await
    }
}

impl Drop for KilledController {
    fn drop(&mut self) {
        let log = fs::File::options().create(true).append(true).open(LOG);
        let log = log.map_or_else(|_| Stdio::null(), Stdio::from);
        // The new controller outlives the tests, as the one before would have.
        let started =
            std::process::Command::new("pericarp").arg("serve").stdout(Stdio::null()).stderr(log).spawn();
        if let Err(error) = started {
            println!("the node's controller cannot be started again: {error}");
        }
    }
}

/// The node's own controller while it is held up at a fault point, or about to be. Dropping it lets the controller go
/// on.
pub struct HeldController {
    file: PathBuf,
}

impl HeldController {
    /// Asks the node's controller to stop and wait when it reaches a fault point.
    pub fn hold_at(point: &str) -> Result<Self> {
        let file =
            std::env::var_os(FAULT_FILE).context("the node's controller was started without fault points")?;
        fs::write(&file, format!("hold {point}"))?;
        Ok(Self { file: file.into() })
    }

    /// Waits until the controller has reached the point.
    pub async fn wait_until_held(&self) -> Result<()> {
        let held = self.held();
        wait_until("the controller to be held up", async || Ok(held.exists())).await
    }

    /// While this file is there, the controller waits.
    fn held(&self) -> PathBuf {
        let mut name = self.file.as_os_str().to_owned();
        name.push(".held");
        name.into()
    }
}

impl Drop for HeldController {
    fn drop(&mut self) {
        // The request first: else it could be met after the controller has been let go.
        let _ = fs::remove_file(&self.file);
        let _ = fs::remove_file(self.held());
    }
}
