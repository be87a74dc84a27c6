//! A client of the agent's stdio streams.

use std::path::Path;

use pericarp_protos::{
    protobuf::{Message, well_known_types::any::Any},
    streaming::{StreamInit, StreamingClient},
    transfer::{Data, WindowUpdate},
    ttrpc::{
        self,
        r#async::{Client, ClientStream},
        context,
    },
};

use crate::harness::LIMIT;

/// One stdio stream, as containerd's client uses it.
pub struct Stream {
    pub stream: ClientStream<Any, Any>,
    _client: Client,
}

impl Stream {
    /// Opens the stream with this id, on a connection of its own to the agent's socket.
    pub async fn open(socket: &Path, id: &str) -> Self {
        let client = Client::connect(&format!("unix://{}", socket.display())).await.unwrap();
        let mut stream = StreamingClient::new(client.clone()).stream(context::with_timeout(0)).await.unwrap();
        let mut init = StreamInit::new();
        init.id = id.to_owned();
        stream.send(&any("containerd.services.streaming.v1.StreamInit", &init)).await.unwrap();
        tokio::time::timeout(LIMIT, stream.recv()).await.expect("an acknowledgement").unwrap();
        Self { stream, _client: client }
    }

    /// Lets the agent send so many more bytes of output.
    pub async fn grant(&mut self, bytes: i32) {
        let mut window = WindowUpdate::new();
        window.update = bytes;
        // This fails after the end of the stream, which is not an error of the client.
        let _ = self.stream.send(&any("containerd.types.transfer.WindowUpdate", &window)).await;
    }

    /// The next piece of output, or `None` at its end.
    pub async fn read(&mut self) -> Option<Vec<u8>> {
        match tokio::time::timeout(LIMIT, self.stream.recv()).await.expect("output or its end") {
            Ok(any) => {
                assert_eq!(any.type_url, "containerd.types.transfer.Data");
                Some(Data::parse_from_bytes(&any.value).unwrap().data)
            }
            Err(ttrpc::Error::Eof | ttrpc::Error::RemoteClosed) => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// Reads to the end with containerd's credit scheme.
    pub async fn read_to_end(mut self) -> Vec<u8> {
        const WINDOW: i32 = 65536;
        let mut output = Vec::new();
        let mut window = 0;
        loop {
            if window < WINDOW {
                self.grant(WINDOW).await;
                window += WINDOW;
            }
            if let Some(data) = self.read().await {
                assert!(data.len() <= 32768, "a message of {} bytes", data.len());
                window -= i32::try_from(data.len()).unwrap();
                assert!(window >= 0, "more output than was granted");
                output.extend(data);
            } else {
                let _ = self.stream.close_send().await;
                return output;
            }
        }
    }

    /// Waits for credit as a writer does.
    pub async fn credit(&mut self) -> usize {
        let any = tokio::time::timeout(LIMIT, self.stream.recv()).await.expect("credit").unwrap();
        assert_eq!(any.type_url, "containerd.types.transfer.WindowUpdate");
        usize::try_from(WindowUpdate::parse_from_bytes(&any.value).unwrap().update).unwrap()
    }

    pub async fn write(&mut self, bytes: &[u8]) {
        let mut data = Data::new();
        data.data = bytes.to_vec();
        self.stream.send(&any("containerd.types.transfer.Data", &data)).await.unwrap();
    }
}

fn any(name: &str, message: &impl Message) -> Any {
    let mut any = Any::new();
    any.type_url = name.to_owned();
    any.value = message.write_to_bytes().unwrap();
    any
}
