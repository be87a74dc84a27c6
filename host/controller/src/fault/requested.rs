//! What a test has asked for at a fault point.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use super::FaultPoint;

/// The variable that names a file. In it is what a test asks for: the name of the next point to be killed at; "hold"
/// and the name of the next point to be held up at for as long as a file of the name with ".held" is there; or
/// "attack", and the thread and the system call with which the next machine is to act as if it had been captured.
const FILE: &str = "PERICARP_FAULT_FILE";

/// How often a point that is held up looks whether it may go on.
const LOOK: Duration = Duration::from_millis(5);

pub fn act(point: FaultPoint) {
    let Some(file) = std::env::var_os(FILE) else { return };
    let Ok(request) = fs::read_to_string(&file) else { return };
    let request = request.trim();
    let (hold, name) = match request.strip_prefix("hold ") {
        Some(name) => (true, name),
        None => (false, request),
    };
    if name != point.name() {
        return;
    }
    if hold {
        hold_up(Path::new(&file), name);
    } else if fs::remove_file(&file).is_ok() {
        // Whoever removes it is the one that dies: several pods may be here at once.
        kill(name);
    }
}

/// The thread and the call of an attack, which is then no longer asked for.
pub fn claim_attack() -> Option<String> {
    let file = std::env::var_os(FILE)?;
    let request = fs::read_to_string(&file).ok()?;
    let attack = request.trim().strip_prefix("attack ")?.to_owned();
    fs::remove_file(&file).is_ok().then_some(attack)
}

fn hold_up(file: &Path, name: &str) {
    let mut held = file.as_os_str().to_owned();
    held.push(".held");
    let held = PathBuf::from(held);
    // Made first, so that a test that no longer finds its request finds this.
    if fs::write(&held, name).is_err() || fs::remove_file(file).is_err() {
        return;
    }
    tracing::warn!(name, "held up at a fault point");
    while held.exists() {
        thread::sleep(LOOK);
    }
}

fn kill(name: &str) {
    tracing::warn!(name, "killed at a fault point");
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    // The signal has been sent to this very process: it does not come back from here.
    loop {
        thread::park();
    }
}
