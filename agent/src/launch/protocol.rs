//! The protocol between agent and helper. Each message is its length (4 bytes, big endian) followed by JSON. The reply
//! to a [`Request`] is a `Result<i32, String>`.

use std::{
    io::{self, Read, Write},
    path::PathBuf,
};

use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The size of an encoded length, in bytes.
pub const LENGTH: usize = 4;

/// The longest message, in bytes. No OCI spec needs as much: containerd's own messages are limited to 4 MiB.
const MESSAGE_MAX: usize = 8 << 20;

/// The name of the socket, in a container's directory, on which its first process waits for the start.
pub const START_SOCKET: &str = "start.sock";

/// One process to be created.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// The container's id.
    pub id: String,
    /// An existing directory for the container's sockets, in the guest's memory.
    pub directory: PathBuf,
    /// What to create.
    pub action: Action,
}

/// The reply to a request for something other than a process.
pub const NO_PROCESS: i32 = 0;

/// What the helper creates.
#[derive(Debug, Serialize, Deserialize)]
pub enum Action {
    /// A container that is not started: its first process waits for a connection to the [`START_SOCKET`].
    Create(Box<Spec>),
    /// Another process in a running container. The helper replies when its program runs.
    Exec {
        /// The container's spec with another `process`, and with a path for every namespace.
        spec: Box<Spec>,
        /// A number that no other exec of this container has.
        serial: u64,
    },
    /// The first process of a PID namespace.
    PidNamespace {
        /// Whether the namespace belongs to the pod's user namespace.
        of_user_namespace: bool,
    },
    /// The namespaces of a pod with a user namespace, which an encoded `ConfigureRequest` describes. The helper replies
    /// with [`NO_PROCESS`].
    PodNamespaces(Vec<u8>),
}

impl Action {
    /// The name of the socket, in the container's directory, on which libcontainer waits for the start.
    pub fn notify_socket(&self) -> String {
        self.own_socket().unwrap_or_else(|| START_SOCKET.to_owned())
    }

    /// The name of that socket, if nobody needs it after the launch.
    pub fn own_socket(&self) -> Option<String> {
        match self {
            Self::Exec { serial, .. } => Some(format!("exec-{serial}.sock")),
            _ => None,
        }
    }
}

/// Encodes a message's length.
pub fn length(length: usize) -> io::Result<[u8; LENGTH]> {
    match u32::try_from(length) {
        Ok(length) => Ok(length.to_be_bytes()),
        Err(_) => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Decodes a message's length.
pub fn checked_length(length: [u8; LENGTH]) -> io::Result<usize> {
    match usize::try_from(u32::from_be_bytes(length)) {
        Ok(length) if length <= MESSAGE_MAX => Ok(length),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the message is too long")),
    }
}

/// Reads one message.
pub fn read<T: DeserializeOwned>(mut from: impl Read) -> io::Result<T> {
    let mut length = [0; LENGTH];
    from.read_exact(&mut length)?;
    let mut message = vec![0; checked_length(length)?];
    from.read_exact(&mut message)?;
    Ok(serde_json::from_slice(&message)?)
}

/// Writes one message.
pub fn write(mut to: impl Write, message: &impl Serialize) -> io::Result<()> {
    let message = serde_json::to_vec(message)?;
    let mut framed = length(message.len())?.to_vec();
    framed.extend(message);
    to.write_all(&framed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_back_as_it_was() {
        let request = Request {
            id: "a".into(),
            directory: "/run/a".into(),
            action: Action::Exec { spec: Box::default(), serial: 7 },
        };
        let mut wire = Vec::new();
        write(&mut wire, &request).unwrap();
        let back: Request = read(wire.as_slice()).unwrap();
        assert_eq!(back.id, "a");
        assert_eq!(back.action.notify_socket(), "exec-7.sock");
        assert_eq!(Action::Create(Box::default()).own_socket(), None);
    }

    #[test]
    fn an_absurd_length_is_refused_before_memory_is_taken() {
        let error = read::<Request>(&[0xff, 0xff, 0xff, 0xff][..]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
