//! The services that must answer: containerd, and the controller.

use std::{path::Path, time::Duration};

use pericarp_controller::chain;
use pericarp_protos::{
    containerd::version::version_client::VersionClient,
    sandbox::{ControllerPlatformRequest, controller_client::ControllerClient},
};
use thiserror::Error;
use tonic::transport::{Channel, Endpoint};

use super::{
    Finding,
    containerd_config::Release,
    host::{at_least, numbers},
};

/// Limit of a call, with the connection that it needs.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// The oldest containerd that is supported, as major and minor version.
const CONTAINERD: (u32, u32) = (2, 1);

/// Why a service gave no answer.
#[derive(Debug, Error)]
enum CallError {
    #[error("no answer within {} s", CALL_TIMEOUT.as_secs())]
    Timeout,
    #[error("cannot connect")]
    Connect(#[from] tonic::transport::Error),
    #[error("{}", .0.message())]
    Refused(#[from] tonic::Status),
}

/// Connects to a socket and makes a call.
async fn call<T>(
    socket: &Path,
    method: impl AsyncFnOnce(Channel) -> Result<T, tonic::Status>,
) -> Result<T, CallError> {
    let answer = async {
        let channel = Endpoint::try_from(format!("unix://{}", socket.display()))?.connect().await?;
        Ok(method(channel).await?)
    };
    tokio::time::timeout(CALL_TIMEOUT, answer).await.unwrap_or(Err(CallError::Timeout))
}

/// Whether containerd responds, and is new enough; and which release it is, if that is known.
pub async fn containerd(socket: &Path) -> (Finding, Option<Release>) {
    let version = call(socket, async |channel| VersionClient::new(channel).version(()).await).await;
    match version {
        Ok(answer) => {
            let version = answer.into_inner().version;
            (judge_version(&version), numbers(&version).map(|(major, minor)| Release(major, minor)))
        }
        Err(error) => {
            let finding = Finding::failed(
                format!("{}: {}", socket.display(), chain(&error)),
                "start containerd, or correct containerd_address in the configuration",
            );
            (finding, None)
        }
    }
}

fn judge_version(version: &str) -> Finding {
    at_least("containerd", version, CONTAINERD)
}

/// Whether the controller answers.
pub async fn controller(socket: &Path) -> Finding {
    let request = ControllerPlatformRequest::default();
    match call(socket, async |channel| ControllerClient::new(channel).platform(request).await).await {
        Ok(_) => Finding::ok(format!("serves {}", socket.display())),
        Err(error) => {
            Finding::warning(format!("{}: {}", socket.display(), chain(&error)), "start `pericarp serve`")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, time::Instant};

    use super::{super::Status, *};

    #[test]
    fn versions_are_compared_by_number() {
        for (version, status) in [
            ("v2.1.0", Status::Ok),
            ("2.1.9~ds1", Status::Ok),
            ("v2.10.1", Status::Ok),
            ("v3.0.0-beta.0", Status::Ok),
            ("v2.0.7", Status::Failed),
            ("1.7.28", Status::Failed),
            ("", Status::Warning),
        ] {
            assert_eq!(judge_version(version).status, status, "{version}");
        }
    }

    #[tokio::test]
    async fn a_socket_that_is_not_there_is_named() {
        let (finding, release) = containerd(Path::new("/nonexistent/containerd.sock")).await;
        assert_eq!(release, None);
        assert_eq!(finding.status, Status::Failed);
        assert!(finding.found.starts_with("/nonexistent/containerd.sock: cannot connect"), "{finding:?}");
    }

    #[tokio::test]
    async fn a_service_that_never_answers_is_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("silent.sock");
        let _silent = UnixListener::bind(&path).unwrap();
        let start = Instant::now();
        let finding = controller(&path).await;
        assert_eq!(finding.status, Status::Warning);
        assert!(finding.found.ends_with("no answer within 2 s"), "{finding:?}");
        assert!(start.elapsed() < CALL_TIMEOUT * 2);
    }
}
