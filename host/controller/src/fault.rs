//! Points at which a test has the controller killed, as if it had crashed there.
//!
//! They are there only with the feature `fault-points`, which no package of Pericarp is built with.

/// The variable that names a file. What is in that file is the name of the next point to be killed at.
#[cfg(feature = "fault-points")]
const FILE: &str = "PERICARP_FAULT_FILE";

/// Kills the controller if this point was asked for, and takes the request back so that the next controller lives.
#[cfg(feature = "fault-points")]
pub fn point(name: &str) {
    let Some(file) = std::env::var_os(FILE) else { return };
    let asked = std::fs::read_to_string(&file).is_ok_and(|asked| asked.trim() == name);
    // Whoever removes it is the one that dies: several pods may be here at once.
    if asked && std::fs::remove_file(&file).is_ok() {
        tracing::warn!(name, "killed at a fault point");
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        // The signal has been sent to this very process: it does not come back from here.
        loop {
            std::thread::park();
        }
    }
}

/// Nothing.
#[cfg(not(feature = "fault-points"))]
pub fn point(_name: &str) {}
