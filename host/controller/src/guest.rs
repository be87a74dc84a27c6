//! The controller's conversations with a guest: the service that the agent calls, and the agent's own.
//!
//! The guest is not trusted: each call to it has a time limit, what it sends is capped by ttrpc's message
//! limit (4 MiB), and it can hold only so many connections.

use std::{
    io,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use pericarp_protos::{
    agent::{AgentClient, CheckRequest, ConfigureRequest, ResizeRequest},
    guest,
    host::{
        Disk, FitResourcesRequest, FitResourcesResponse, Host, PrepareContainerRequest,
        PrepareContainerResponse, ReadyRequest, ReadyResponse, ReleaseContainerRequest,
        ReleaseContainerResponse, create_host,
    },
    ttrpc::{
        self,
        asynchronous::{
            Client, Server, TtrpcContext,
            transport::{Listener, Socket},
        },
        context,
    },
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_stream::{StreamExt as _, wrappers::UnixListenerStream};

/// Limit of a call to the agent.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections that a guest may have to its host service at the same time. The agent uses one.
const CONNECTIONS_MAX: usize = 4;
/// `OK 4294967295\n`
const ANSWER_MAX: usize = 14;

/// A container that the guest can make.
#[derive(Debug)]
pub struct Prepared {
    /// Its OCI runtime spec for the guest, JSON.
    pub spec: Vec<u8>,
    /// The disks that it uses.
    pub disks: Vec<Disk>,
}

/// What the host service asks of the pod that it belongs to.
#[async_trait]
pub trait Requests: Send + Sync {
    /// The agent is up; it took this long from its first instruction.
    fn ready(&self, since_init: Duration, kernel: &str);
    /// Makes a container's file systems appear.
    async fn prepare(&self, container: &str) -> Result<Prepared, (ttrpc::Code, String)>;
    /// Makes the machine fit what its containers may use now.
    async fn fit(&self, container: &str) -> Result<(), (ttrpc::Code, String)>;
    /// Undoes it.
    async fn release(&self, container: &str) -> Result<(), (ttrpc::Code, String)>;
}

/// Serves a guest's requests on its pod's socket. The service ends when the answer is dropped.
pub async fn serve(
    listener: std::os::unix::net::UnixListener,
    requests: Arc<dyn Requests>,
) -> ttrpc::Result<Server> {
    let listener = listen(listener).map_err(|error| ttrpc::Error::Others(error.to_string()))?;
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // A connection beyond the limit is closed at once.
    let bounded = UnixListenerStream::new(listener).filter_map(move |accepted| match accepted {
        Ok(stream) => slots.clone().try_acquire_owned().ok().map(|slot| Ok(Bounded { stream, _slot: slot })),
        Err(error) => Some(Err(error)),
    });
    let mut server = Server::new()
        .add_listener(Listener::new(bounded))
        .register_service(create_host(Arc::new(HostService { requests })));
    server.start().await?;
    Ok(server)
}

fn listen(listener: std::os::unix::net::UnixListener) -> io::Result<UnixListener> {
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

struct HostService {
    requests: Arc<dyn Requests>,
}

fn status((code, message): (ttrpc::Code, String)) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))
}

#[async_trait]
impl Host for HostService {
    async fn ready(&self, _context: &TtrpcContext, request: ReadyRequest) -> ttrpc::Result<ReadyResponse> {
        self.requests.ready(Duration::from_nanos(request.since_init_ns), &request.kernel_release);
        Ok(ReadyResponse::default())
    }

    async fn prepare_container(
        &self,
        _context: &TtrpcContext,
        request: PrepareContainerRequest,
    ) -> ttrpc::Result<PrepareContainerResponse> {
        let Prepared { spec, disks } = self.requests.prepare(&request.container_id).await.map_err(status)?;
        Ok(PrepareContainerResponse { spec, disks, ..PrepareContainerResponse::default() })
    }

    async fn fit_resources(
        &self,
        _context: &TtrpcContext,
        request: FitResourcesRequest,
    ) -> ttrpc::Result<FitResourcesResponse> {
        self.requests.fit(&request.container_id).await.map_err(status)?;
        Ok(FitResourcesResponse::default())
    }

    async fn release_container(
        &self,
        _context: &TtrpcContext,
        request: ReleaseContainerRequest,
    ) -> ttrpc::Result<ReleaseContainerResponse> {
        self.requests.release(&request.container_id).await.map_err(status)?;
        Ok(ReleaseContainerResponse::default())
    }
}

/// A connection that holds one of a guest's slots.
struct Bounded {
    stream: UnixStream,
    _slot: OwnedSemaphorePermit,
}

impl AsyncRead for Bounded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// The agent of one guest.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
}

impl Agent {
    /// Connects through the machine's vsock socket.
    pub async fn connect(socket: &Path) -> io::Result<Agent> {
        let client = tokio::time::timeout(CALL_TIMEOUT, dial_agent(socket)).await.map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, "the guest's agent does not accept the connection")
        })??;
        Ok(Agent { client: AgentClient::new(client) })
    }

    /// Whether a guest answers within a time limit, on a connection like those that containerd makes.
    pub async fn check(socket: &Path, limit: Duration) -> io::Result<()> {
        let timed_out = |_| io::Error::new(io::ErrorKind::TimedOut, "the guest's agent does not answer");
        let check = async {
            let client = AgentClient::new(dial_agent(socket).await?);
            match client.check(context::with_duration(limit), &CheckRequest::default()).await {
                // An agent that is older than this controller does not know the call, but it has answered.
                Ok(_) | Err(ttrpc::Error::RpcStatus(_)) => Ok(()),
                Err(error) => Err(io::Error::other(error)),
            }
        };
        tokio::time::timeout(limit, check).await.map_err(timed_out)?
    }

    /// Makes the guest into the pod, within a time limit.
    pub async fn configure(&self, request: &ConfigureRequest, limit: Duration) -> ttrpc::Result<()> {
        self.client.configure(context::with_duration(limit), request).await.map(drop)
    }

    /// Uses so many processors; binds the device through which memory comes, if one is named.
    pub async fn resize(&self, vcpus: u8, memory_device: Option<u32>) -> ttrpc::Result<u32> {
        let request = ResizeRequest { vcpus: u32::from(vcpus), memory_device, ..ResizeRequest::default() };
        Ok(self.client.resize(context::with_duration(CALL_TIMEOUT), &request).await?.vcpus)
    }
}

/// Connects to the port on which the agent serves containerd and the controller.
pub async fn dial_agent(socket: &Path) -> io::Result<Client> {
    Ok(Client::new(Socket::from(dial(socket, guest::AGENT_PORT).await?)))
}

/// Connects to a port of the guest: `CONNECT <port>\n`, then `OK …\n`, then the stream.
pub async fn dial(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = Vec::with_capacity(ANSWER_MAX);
    // One byte at a time: what follows the line belongs to the stream.
    while answer.last() != Some(&b'\n') {
        if answer.len() == ANSWER_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the machine's vsock socket gives no answer that can be read",
            ));
        }
        answer.push(stream.read_u8().await?);
    }
    if answer.starts_with(b"OK ") { Ok(stream) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn answered_with(answer: &'static [u8]) -> io::Result<UnixStream> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let machine = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut line = [0; 13];
            stream.read_exact(&mut line).await.unwrap();
            assert_eq!(&line, b"CONNECT 1024\n");
            stream.write_all(answer).await.unwrap();
        });
        let result = dial(&path, 1024).await;
        machine.await.unwrap();
        result
    }

    #[tokio::test]
    async fn what_follows_the_answer_belongs_to_the_stream() {
        let mut stream = answered_with(b"OK 1073741824\nhello").await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "hello");
    }

    #[tokio::test]
    async fn an_endless_answer_is_given_up() {
        let error = answered_with(&[b'x'; 100]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    /// Asks a guest whether it lives; it answers with this status, or not at all.
    async fn checked(answer: Option<ttrpc::Code>) -> io::Result<()> {
        use pericarp_protos::ttrpc::proto::{Codec as _, GenMessage, MessageHeader};
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let guest = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.read_exact(&mut [0; 13]).await.unwrap();
            stream.write_all(b"OK 1\n").await.unwrap();
            let question = GenMessage::read_from(&mut stream).await.unwrap();
            if let Some(code) = answer {
                let mut response = ttrpc::Response::new();
                response.status = Some(ttrpc::get_status(code, "an answer")).into();
                let payload = response.encode().unwrap();
                let length = u32::try_from(payload.len()).unwrap();
                let header = MessageHeader::new_response(question.header.stream_id, length);
                GenMessage { header, payload }.write_to(&mut stream).await.unwrap();
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            answer = Agent::check(&path, Duration::from_millis(300)) => answer,
            () = guest => unreachable!("a guest that is pending"),
        }
    }

    #[tokio::test]
    async fn a_guest_lives_if_it_gives_any_answer() {
        checked(Some(ttrpc::Code::OK)).await.unwrap();
        // As one says that was made before there was this question.
        checked(Some(ttrpc::Code::UNIMPLEMENTED)).await.unwrap();
        checked(None).await.unwrap_err();
    }
}
