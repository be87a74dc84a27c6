//! The messages inside a stream (containerd: `api/types/transfer/streaming.proto`), each in a `google.protobuf.Any`.

use pericarp_protos::{
    protobuf::{Message, well_known_types::any::Any},
    streaming::StreamInit,
    transfer::{Data, WindowUpdate},
};

use crate::ttrpc::pack;

/// The most bytes of output in one message; containerd sends as many. Its reader takes at least this much at once. Of a
/// longer message it counts only the part that fits, and so grants too little credit.
pub const MAX_DATA: usize = 32 << 10;

const INIT: &str = "containerd.services.streaming.v1.StreamInit";
const WINDOW_UPDATE: &str = "containerd.types.transfer.WindowUpdate";
const DATA: &str = "containerd.types.transfer.Data";

/// A message that a client sends.
#[derive(Debug, PartialEq, Eq)]
pub enum FromClient {
    /// The first message, which says which stream this is.
    Init(String),
    /// The client accepts so many more bytes of output.
    Credit(usize),
    /// Input for the process.
    Data(Vec<u8>),
    /// A message of another type, or one that cannot be decoded.
    Unknown,
}

impl FromClient {
    /// Decodes a message that a client has sent on a stream.
    pub fn decode(message: &[u8]) -> Self {
        let Ok(any) = Any::parse_from_bytes(message) else { return Self::Unknown };
        let decoded = match any.type_url.rsplit('/').next() {
            Some(INIT) => StreamInit::parse_from_bytes(&any.value).map(|init| Self::Init(init.id)),
            Some(WINDOW_UPDATE) => WindowUpdate::parse_from_bytes(&any.value)
                .map(|window| Self::Credit(usize::try_from(window.update).unwrap_or(0))),
            Some(DATA) => Data::parse_from_bytes(&any.value).map(|data| Self::Data(data.data)),
            _ => return Self::Unknown,
        };
        decoded.unwrap_or(Self::Unknown)
    }
}

/// The reply to [`FromClient::Init`]. containerd accepts any message.
pub fn acknowledgement() -> Any {
    Any::new()
}

/// A message with output.
pub fn data(bytes: &[u8]) -> Any {
    let mut data = Data::new();
    data.data = bytes.to_vec();
    pack(DATA, &data)
}

/// A message that lets the client send so many more bytes of input.
pub fn credit(bytes: usize) -> Any {
    let mut window = WindowUpdate::new();
    window.update = i32::try_from(bytes).unwrap_or(i32::MAX);
    pack(WINDOW_UPDATE, &window)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(any: &Any) -> Vec<u8> {
        any.write_to_bytes().unwrap()
    }

    #[test]
    fn what_is_encoded_can_be_decoded() {
        assert_eq!(FromClient::decode(&encode(&data(b"abc"))), FromClient::Data(b"abc".to_vec()));
        assert_eq!(FromClient::decode(&encode(&data(b""))), FromClient::Data(Vec::new()));
        assert_eq!(FromClient::decode(&encode(&credit(65536))), FromClient::Credit(65536));
        let mut prefixed = credit(1);
        prefixed.type_url = format!("type.googleapis.com/{}", prefixed.type_url);
        assert_eq!(FromClient::decode(&encode(&prefixed)), FromClient::Credit(1));
        let mut init = StreamInit::new();
        init.id = "c1-stdin".into();
        assert_eq!(FromClient::decode(&encode(&pack(INIT, &init))), FromClient::Init("c1-stdin".into()));
    }

    #[test]
    fn nonsense_is_recognised_as_such() {
        let data = encode(&data(b"abc"));
        for length in 0..data.len() {
            let cut = FromClient::decode(&data[..length]);
            // Without its last field it is a message with nothing in it.
            let empty = FromClient::Data(Vec::new());
            assert!(cut == FromClient::Unknown || cut == empty, "{length} bytes: {cut:?}");
        }
        for nonsense in
            [&b"\xff\xff\xff"[..], b"", b"\x0b", &[0xff; 30], b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"]
        {
            assert_eq!(FromClient::decode(nonsense), FromClient::Unknown, "{nonsense:?}");
        }
        let mut negative = WindowUpdate::new();
        negative.update = -5;
        assert_eq!(FromClient::decode(&encode(&pack(WINDOW_UPDATE, &negative))), FromClient::Credit(0));
    }
}
