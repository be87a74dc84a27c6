//! What containerd has its one-shot `delete` do: end a container that it has given up.
//!
//! containerd asks for it when it was started again and finds no way to a container's task, and when the connection to
//! one ends. Mostly the machine has ended. If it has not, the container must not run on unseen.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{api, shim_async::TaskClient};
use pericarp_protos::{
    id::{ContainerId, SandboxId},
    protobuf::well_known_types::timestamp::Timestamp,
    ttrpc::{self, context},
};

use crate::{config::Config, guest::dial_agent, host::machine::file, pod::end_on_record};

/// For the guest's part. containerd gives the whole of it 5 s (`cleanupTimeout`).
const LIMIT: Duration = Duration::from_secs(3);
/// SIGKILL.
const KILL: u32 = 9;
/// As if it was killed, like runc's.
const KILLED: u32 = 128 + KILL;

/// The end of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deleted {
    /// As a shell would report it.
    pub exit_status: u32,
    /// When it ended, as far as that is known.
    pub exited_at: SystemTime,
}

/// Ends a container of a pod, if it still runs, and tells how it ended.
pub async fn delete(config: &Config, sandbox: &SandboxId, container: &ContainerId) -> Deleted {
    let directory = config.run_dir.join(sandbox);
    if let Some(end) = end_on_record(&directory) {
        return Deleted { exit_status: end.exit.status(), exited_at: end.at };
    }
    let in_guest = tokio::time::timeout(LIMIT, delete_in_guest(&directory, container)).await;
    if let Ok(Ok(deleted)) = in_guest {
        return deleted;
    }
    // Perhaps the machine is ending right now.
    let exited_at = end_on_record(&directory).map_or_else(SystemTime::now, |end| end.at);
    Deleted { exit_status: KILLED, exited_at }
}

async fn delete_in_guest(directory: &Path, container: &ContainerId) -> ttrpc::Result<Deleted> {
    let client = dial_agent(&directory.join(file::VSOCK))
        .await
        .map_err(|error| ttrpc::Error::Socket(error.to_string()))?;
    let task = TaskClient::new(client);
    let id = || container.to_string();
    let kill = api::KillRequest { id: id(), signal: KILL, all: true, ..api::KillRequest::default() };
    match task.kill(context::with_duration(LIMIT), &kill).await {
        // It has exited by itself.
        Err(ttrpc::Error::RpcStatus(_)) | Ok(_) => {}
        Err(error) => return Err(error),
    }
    let wait = api::WaitRequest { id: id(), ..api::WaitRequest::default() };
    task.wait(context::with_duration(LIMIT), &wait).await?;
    let request = api::DeleteRequest { id: id(), ..api::DeleteRequest::default() };
    let response = task.delete(context::with_duration(LIMIT), &request).await?;
    let exited_at = response.exited_at.as_ref().map_or_else(SystemTime::now, time);
    Ok(Deleted { exit_status: response.exit_status, exited_at })
}

/// A guest's word for a time: none before 1970, and none that cannot be counted.
fn time(timestamp: &Timestamp) -> SystemTime {
    let seconds = u64::try_from(timestamp.seconds).unwrap_or(0);
    let nanoseconds = u32::try_from(timestamp.nanos).unwrap_or(0).min(999_999_999);
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds)).unwrap_or_else(SystemTime::now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_time_that_a_guest_tells_is_a_time() {
        let at = |seconds, nanos| time(&Timestamp { seconds, nanos, ..Timestamp::default() });
        assert_eq!(at(1, 500_000_000), SystemTime::UNIX_EPOCH + Duration::from_millis(1500));
        assert_eq!(at(-1, -1), SystemTime::UNIX_EPOCH);
        assert!(at(i64::MAX, i32::MAX) > SystemTime::UNIX_EPOCH);
    }

    #[tokio::test]
    async fn a_container_whose_pod_has_gone_was_killed() {
        let directory = tempfile::tempdir().unwrap();
        let config = Config { run_dir: directory.path().into(), ..Config::default() };
        let deleted = delete(&config, &"sandbox".parse().unwrap(), &"container".parse().unwrap()).await;
        assert_eq!(deleted.exit_status, 137);
    }
}
