//! What agent and helper say to each other: each message is its length (4 bytes, big endian)
//! followed by JSON. The answer is a `Result<i32, String>`.

use std::{
    io::{self, Read, Write},
    path::PathBuf,
};

use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Bytes of a length.
pub const LENGTH: usize = 4;

/// More than any OCI spec needs; containerd's own messages end at 4 MiB.
const LIMIT: usize = 8 << 20;

/// Name of the socket, in a container's directory, on which its first process waits for the start.
pub const START_SOCKET: &str = "start.sock";

/// One process to be made.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// The container's id.
    pub id: String,
    /// An existing directory for what belongs to this container, in the guest's memory.
    pub directory: PathBuf,
    /// What to make.
    pub action: Action,
}

/// What the helper is to make.
#[derive(Debug, Serialize, Deserialize)]
pub enum Action {
    /// A container, created but not started: its init waits until something connects to the
    /// [`START_SOCKET`].
    Create(Box<Spec>),
    /// One more process in a running container. Answered when it runs.
    Exec {
        /// The container's spec with `process` replaced, and every namespace given by its path.
        spec: Box<Spec>,
        /// A number that no other exec of this container has.
        serial: u64,
    },
    /// The first process of a PID namespace.
    PidNamespace {
        /// Whether it belongs to the pod's user namespace.
        of_user_namespace: bool,
    },
    /// The namespaces of a pod with a user namespace, as an encoded `ConfigureRequest` has them. There is no process
    /// to answer with.
    Namespaces(Vec<u8>),
}

impl Action {
    /// Name of the socket, in the container's directory, on which libcontainer waits for the start.
    pub fn notify_socket(&self) -> String {
        match self {
            Self::Exec { serial, .. } => format!("exec-{serial}.sock"),
            _ => START_SOCKET.to_owned(),
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
        Ok(length) if length <= LIMIT => Ok(length),
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
    }

    #[test]
    fn an_absurd_length_is_refused_before_memory_is_taken() {
        let error = read::<Request>(&[0xff, 0xff, 0xff, 0xff][..]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
