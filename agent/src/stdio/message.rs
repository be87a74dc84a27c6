//! The messages inside a stream (containerd: `api/types/transfer/streaming.proto`).
//!
//! Each is a `google.protobuf.Any`. The bytes of a stream are most of what the agent ever copies, so these few
//! messages are taken apart in place and put together in one piece, instead of one copy for each level.

use pericarp_protos::{
    protobuf::{Message, well_known_types::any::Any},
    streaming::StreamInit,
    transfer::WindowUpdate,
};

use crate::server::Frame;

/// The most that one message carries: what containerd itself sends, and the least that its reader
/// takes at once. Of a larger message its reader counts only what fits, and so grants too little.
pub const CHUNK: usize = 32 << 10;

const DATA: &str = "containerd.types.transfer.Data";

/// Wire types of protobuf's encoding.
const VARINT: u64 = 0;
const FIXED_64: u64 = 1;
const BYTES: u64 = 2;
const FIXED_32: u64 = 5;

/// The keys of the fields that are encoded here: a field's number and its wire type.
const BYTES_IN_FIELD_1: u8 = 0x0a;
const BYTES_IN_FIELD_2: u8 = 0x12;

/// A message that a client sends.
#[derive(Debug, PartialEq, Eq)]
pub enum FromClient<'a> {
    /// The first: which stream this is.
    Init(String),
    /// So many more bytes of output may be sent.
    Credit(usize),
    /// Some input.
    Data(&'a [u8]),
    /// Something else, or something broken.
    Unknown,
}

impl<'a> FromClient<'a> {
    /// Decodes what came in on a stream.
    pub fn decode(message: &'a [u8]) -> Self {
        Self::try_decode(message).unwrap_or(Self::Unknown)
    }

    fn try_decode(message: &'a [u8]) -> Option<Self> {
        let [url, value] = bytes_fields(message)?;
        let url = std::str::from_utf8(url).ok()?;
        match url.rsplit('/').next() {
            Some("containerd.services.streaming.v1.StreamInit") => {
                StreamInit::parse_from_bytes(value).ok().map(|init| Self::Init(init.id))
            }
            Some("containerd.types.transfer.WindowUpdate") => {
                let window = WindowUpdate::parse_from_bytes(value).ok()?;
                Some(Self::Credit(usize::try_from(window.update).unwrap_or(0)))
            }
            Some(DATA) => bytes_fields(value).map(|[data]| Self::Data(data)),
            _ => None,
        }
    }
}

/// The fields 1 to `N` of a message in which these are bytes; a missing one is empty. Others are passed over.
fn bytes_fields<const N: usize>(mut message: &[u8]) -> Option<[&[u8]; N]> {
    let mut fields = [&[][..]; N];
    while !message.is_empty() {
        let key = varint(&mut message)?;
        let length = match key & 7 {
            VARINT => {
                varint(&mut message)?;
                continue;
            }
            FIXED_64 => 8,
            FIXED_32 => 4,
            BYTES => usize::try_from(varint(&mut message)?).ok()?,
            _ => return None,
        };
        let (content, rest) = message.split_at_checked(length)?;
        message = rest;
        let number = usize::try_from(key >> 3).ok()?;
        if key & 7 == BYTES
            && let Some(field) = number.checked_sub(1).and_then(|index| fields.get_mut(index))
        {
            *field = content;
        }
    }
    Some(fields)
}

/// Takes a number off the front of a message.
fn varint(message: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = message.split_first()?;
        *message = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// The answer to [`FromClient::Init`]. containerd takes any message.
pub fn acknowledgement() -> Any {
    Any::new()
}

/// Some output.
pub fn data(bytes: &[u8]) -> Frame {
    // Room for the keys, the lengths and the type's name, too.
    let mut frame = Frame::with_capacity(bytes.len() + DATA.len() + 16);
    frame.extend(&[BYTES_IN_FIELD_1]);
    frame.extend(Varint::of(DATA.len()).bytes());
    frame.extend(DATA.as_bytes());
    let length = Varint::of(bytes.len());
    frame.extend(&[BYTES_IN_FIELD_2]);
    frame.extend(Varint::of(1 + length.bytes().len() + bytes.len()).bytes());
    frame.extend(&[BYTES_IN_FIELD_1]);
    frame.extend(length.bytes());
    frame.extend(bytes);
    frame
}

/// An encoded length.
struct Varint {
    bytes: [u8; 10],
    length: usize,
}

impl Varint {
    fn of(mut number: usize) -> Self {
        let mut varint = Self { bytes: [0; 10], length: 1 };
        while number > 0x7f {
            varint.bytes[varint.length - 1] = number.to_le_bytes()[0] | 0x80;
            varint.length += 1;
            number >>= 7;
        }
        varint.bytes[varint.length - 1] = number.to_le_bytes()[0];
        varint
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// Permission to send so many more bytes of input.
pub fn credit(bytes: usize) -> Any {
    let mut window = WindowUpdate::new();
    window.update = i32::try_from(bytes).unwrap_or(i32::MAX);
    any("containerd.types.transfer.WindowUpdate", &window)
}

fn any(name: &str, message: &impl Message) -> Any {
    let mut any = Any::new();
    name.clone_into(&mut any.type_url);
    // Encoding into memory fails only beyond 2 GiB.
    any.value = message.write_to_bytes().unwrap_or_default();
    any
}

#[cfg(test)]
mod tests {
    use pericarp_protos::transfer::Data;

    use super::*;

    fn encode(any: &Any) -> Vec<u8> {
        any.write_to_bytes().unwrap()
    }

    #[test]
    fn output_is_encoded_as_the_generated_code_would_do_it() {
        for length in [0, 1, 100, 127, 128, 16_000, 16_383, 16_384, CHUNK] {
            let bytes = vec![b'x'; length];
            let mut data = Data::new();
            data.data = bytes.clone();
            let mut expected = any(DATA, &data);
            let frame = super::data(&bytes);
            let mut decoded = Any::parse_from_bytes(frame.payload()).unwrap();
            assert_eq!(decoded.type_url, DATA);
            assert_eq!(Data::parse_from_bytes(&decoded.value).unwrap().data, bytes, "{length} bytes");
            // The generated code leaves an empty field out.
            if length > 0 {
                assert_eq!(frame.payload(), encode(&expected), "{length} bytes");
            }
            std::mem::swap(&mut decoded, &mut expected);
            assert_eq!(FromClient::decode(frame.payload()), FromClient::Data(&bytes));
        }
    }

    #[test]
    fn what_is_encoded_can_be_decoded() {
        assert_eq!(FromClient::decode(&encode(&credit(65536))), FromClient::Credit(65536));
        let mut prefixed = credit(1);
        prefixed.type_url = format!("type.googleapis.com/{}", prefixed.type_url);
        assert_eq!(FromClient::decode(&encode(&prefixed)), FromClient::Credit(1));
        let mut init = StreamInit::new();
        init.id = "c1-stdin".into();
        let init = encode(&any("containerd.services.streaming.v1.StreamInit", &init));
        assert_eq!(FromClient::decode(&init), FromClient::Init("c1-stdin".into()));
    }

    #[test]
    fn fields_that_a_newer_client_may_add_are_passed_over() {
        let mut message = encode(&any(DATA, &{
            let mut data = Data::new();
            data.data = b"abc".to_vec();
            data
        }));
        // A number, 8 bytes, 4 bytes, and bytes, all in fields that nobody knows.
        message.extend([9 << 3, 0xff, 0x01, 10 << 3 | 1, 1, 2, 3, 4, 5, 6, 7, 8]);
        message.extend([11 << 3 | 5, 1, 2, 3, 4, 12 << 3 | 2, 2, b'x', b'y']);
        assert_eq!(FromClient::decode(&message), FromClient::Data(b"abc"));
    }

    #[test]
    fn nonsense_is_recognised_as_such() {
        let data = super::data(b"abc");
        for length in 0..data.payload().len() {
            let cut = FromClient::decode(&data.payload()[..length]);
            // Without its last field it is a message with nothing in it.
            assert!(matches!(cut, FromClient::Unknown | FromClient::Data([])), "{length} bytes: {cut:?}");
        }
        for nonsense in
            [&b"\xff\xff\xff"[..], b"", b"\x0b", &[0xff; 30], b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"]
        {
            assert_eq!(FromClient::decode(nonsense), FromClient::Unknown, "{nonsense:?}");
        }
        let mut negative = WindowUpdate::new();
        negative.update = -5;
        let negative = encode(&any("containerd.types.transfer.WindowUpdate", &negative));
        assert_eq!(FromClient::decode(&negative), FromClient::Credit(0));
    }
}
