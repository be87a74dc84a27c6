//! What the agent asks of the controller, on a connection that the controller has made.
//!
//! The guest is not trusted. A request has a size limit, a pod may have so many of them at a time, and each has a task
//! of its own, which goes on whatever becomes of the connection: half a container helps nobody.

use std::{collections::HashMap, io, sync::Arc, time::Duration};

use async_trait::async_trait;
use pericarp_protos::{
    host::{
        Disk, FitResourcesRequest, FitResourcesResponse, Host, MemoryVolume, PrepareContainerRequest,
        PrepareContainerResponse, ReleaseContainerRequest, ReleaseContainerResponse, create_host,
    },
    ttrpc::{
        self,
        asynchronous::{Service, TtrpcContext},
        proto::{MessageHeader, Request, Response},
    },
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader, WriteHalf},
    sync::{Mutex, Semaphore},
};

use super::frames;
use crate::telemetry::rate::Rate;

/// Requests of a pod at a time, over all of its connections. What comes beyond them waits in the guest.
pub const REQUESTS_MAX: usize = 8;
/// Requests of a pod at once, and then one in each interval: a container takes two or three in its life, and each may
/// have the host mount, unmount and ask containerd.
const BURST: u32 = 64;
const EACH: Duration = Duration::from_millis(50);
/// For an answer to be taken by the guest.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A container that the guest can make.
#[derive(Debug)]
pub struct Prepared {
    /// Its OCI runtime spec for the guest, JSON.
    pub spec: Vec<u8>,
    /// The disks that it uses.
    pub disks: Vec<Disk>,
    /// The volumes in the guest's memory that it uses.
    pub memory_volumes: Vec<MemoryVolume>,
}

/// What the agent of a guest can do, by its own word: an agent that was started by an earlier version says nothing.
/// Either way a guest gets no more than what is on record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AgentFeatures {
    /// It makes volumes in memory itself. If it does not, they are in the share.
    pub memory_volumes: bool,
    /// It maps the ids of image layers.
    pub maps_layers: bool,
}

impl AgentFeatures {
    /// What the agent of this version can do.
    pub const CURRENT: Self = Self { memory_volumes: true, maps_layers: true };
}

/// Why a request is not answered, in words that a guest may know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestError {
    pub code: ttrpc::Code,
    pub message: String,
}

/// What the host service asks of the pod that it belongs to.
#[async_trait]
pub trait Requests: Send + Sync {
    /// Makes a container's file systems appear.
    async fn prepare(&self, container: &str, agent: AgentFeatures) -> Result<Prepared, RequestError>;
    /// Makes the machine fit what its containers may use now.
    async fn resize_machine(&self, container: &str) -> Result<(), RequestError>;
    /// Removes what was made to appear for a container.
    async fn release(&self, container: &str) -> Result<(), RequestError>;
}

/// The host service of one pod.
pub struct HostServer {
    services: Arc<HashMap<String, Service>>,
    places: Arc<Semaphore>,
    rate: Rate,
}

impl HostServer {
    pub fn new(requests: Arc<dyn Requests>) -> HostServer {
        HostServer {
            services: Arc::new(create_host(Arc::new(HostService { requests }))),
            places: Arc::new(Semaphore::new(REQUESTS_MAX)),
            rate: Rate::new(BURST, EACH),
        }
    }

    /// Answers requests until the connection ends, which is always an error.
    pub async fn serve<S>(&self, connection: S) -> io::Error
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (reader, writer) = tokio::io::split(connection);
        let mut reader = BufReader::new(reader);
        let writer = Arc::new(Mutex::new(writer));
        loop {
            let Ok(place) = self.places.clone().acquire_owned().await else {
                return io::Error::other("the host service has ended");
            };
            let (header, request) = match frames::read_request(&mut reader).await {
                Ok(read) => read,
                Err(error) => return error,
            };
            self.rate.wait().await;
            let (services, writer) = (self.services.clone(), writer.clone());
            tokio::spawn(async move {
                let answer = dispatch(&services, &header, request).await;
                respond(&writer, &header, answer).await;
                drop(place);
            });
        }
    }
}

async fn dispatch(
    services: &HashMap<String, Service>,
    header: &MessageHeader,
    request: Request,
) -> ttrpc::Result<Response> {
    let method = services.get(&request.service).and_then(|service| service.methods.get(&request.method));
    let Some(method) = method else {
        let text = "the controller serves pericarp.host.v1.Host here, without such a method";
        return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::UNIMPLEMENTED, text)));
    };
    let context = TtrpcContext { mh: *header, timeout_nano: request.timeout_nano, ..Default::default() };
    method.handler(context, request).await
}

/// Sends an answer. A guest that does not take it loses its connection.
async fn respond<S: AsyncWrite + Send>(
    writer: &Mutex<WriteHalf<S>>,
    to: &MessageHeader,
    answer: ttrpc::Result<Response>,
) {
    let mut writer = writer.lock().await;
    let written =
        tokio::time::timeout(ANSWER_TIMEOUT, frames::write_response(&mut *writer, to, answer)).await;
    if !matches!(written, Ok(Ok(()))) {
        // Part of an answer may be on its way: nothing that follows could be understood.
        let _ = writer.shutdown().await;
    }
}

struct HostService {
    requests: Arc<dyn Requests>,
}

fn status(RequestError { code, message }: RequestError) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))
}

#[async_trait]
impl Host for HostService {
    async fn prepare_container(
        &self,
        _context: &TtrpcContext,
        request: PrepareContainerRequest,
    ) -> ttrpc::Result<PrepareContainerResponse> {
        let agent =
            AgentFeatures { memory_volumes: request.makes_memory_volumes, maps_layers: request.maps_layers };
        let prepared = self.requests.prepare(&request.container_id, agent).await.map_err(status)?;
        let Prepared { spec, disks, memory_volumes } = prepared;
        Ok(PrepareContainerResponse { spec, disks, memory_volumes, ..PrepareContainerResponse::default() })
    }

    async fn fit_resources(
        &self,
        _context: &TtrpcContext,
        request: FitResourcesRequest,
    ) -> ttrpc::Result<FitResourcesResponse> {
        self.requests.resize_machine(&request.container_id).await.map_err(status)?;
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use pericarp_protos::{
        host::{BootClient, HostClient, ReadyRequest},
        ttrpc::{
            asynchronous::{Client, transport::Socket},
            context,
        },
    };
    use tokio::{net::UnixStream, sync::watch};

    use super::*;

    /// A pod that lets its requests go on when it is told to, and counts them.
    struct Gate {
        open: watch::Sender<bool>,
        begun: watch::Sender<usize>,
        finished: AtomicUsize,
    }

    #[async_trait]
    impl Requests for Gate {
        async fn prepare(&self, _: &str, _: AgentFeatures) -> Result<Prepared, RequestError> {
            Err(RequestError { code: ttrpc::Code::NOT_FOUND, message: "none".into() })
        }

        async fn resize_machine(&self, _container: &str) -> Result<(), RequestError> {
            Ok(())
        }

        async fn release(&self, _container: &str) -> Result<(), RequestError> {
            self.begun.send_modify(|begun| *begun += 1);
            self.open.subscribe().wait_for(|open| *open).await.unwrap();
            self.finished.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    fn gate() -> Arc<Gate> {
        let (open, begun) = (watch::Sender::new(false), watch::Sender::new(0));
        Arc::new(Gate { open, begun, finished: AtomicUsize::new(0) })
    }

    /// A guest's client, and what serves it.
    fn connected(server: &Arc<HostServer>) -> (HostClient, tokio::task::JoinHandle<io::Error>) {
        let (host, guest) = UnixStream::pair().unwrap();
        let server = server.clone();
        let serving = tokio::spawn(async move { server.serve(host).await });
        (HostClient::new(Client::new(Socket::new(guest))), serving)
    }

    fn release(client: &HostClient) -> tokio::task::JoinHandle<ttrpc::Result<ReleaseContainerResponse>> {
        let client = client.clone();
        let request = ReleaseContainerRequest::default();
        tokio::spawn(async move { client.release_container(context::with_timeout(0), &request).await })
    }

    #[tokio::test]
    async fn a_pod_has_so_many_requests_at_a_time_and_no_more_with_more_connections() {
        let gate = gate();
        let server = Arc::new(HostServer::new(gate.clone()));
        let (first, _serving) = connected(&server);
        let mut answers: Vec<_> = (0..REQUESTS_MAX + 4).map(|_| release(&first)).collect();
        gate.begun.subscribe().wait_for(|begun| *begun >= REQUESTS_MAX).await.unwrap();
        let (second, _serving) = connected(&server);
        answers.push(release(&second));
        // Every task that can go on has its turn, many times over.
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
        assert_eq!(*gate.begun.borrow(), REQUESTS_MAX);
        gate.open.send_replace(true);
        for answer in answers {
            answer.await.unwrap().unwrap();
        }
        assert_eq!(*gate.begun.borrow(), REQUESTS_MAX + 5);
    }

    #[tokio::test(start_paused = true)]
    async fn requests_beyond_a_rate_wait_whatever_connection_they_come_on() {
        let server = Arc::new(HostServer::new(gate()));
        let start = tokio::time::Instant::now();
        for _ in 0..2 {
            let (client, _serving) = connected(&server);
            for _ in 0..BURST {
                let request = FitResourcesRequest::default();
                client.fit_resources(context::with_timeout(0), &request).await.unwrap();
            }
        }
        assert!(start.elapsed() >= EACH * (BURST - 1), "{:?}", start.elapsed());
    }

    #[tokio::test]
    async fn a_request_is_carried_through_although_its_guest_has_gone() {
        let gate = gate();
        let server = Arc::new(HostServer::new(gate.clone()));
        let (client, serving) = connected(&server);
        let answer = release(&client);
        gate.begun.subscribe().wait_for(|begun| *begun == 1).await.unwrap();
        answer.abort();
        assert!(answer.await.is_err());
        drop(client);
        serving.await.unwrap();
        gate.open.send_replace(true);
        while gate.finished.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn errors_and_methods_that_there_are_not_are_answered() {
        let server = Arc::new(HostServer::new(gate()));
        let (client, _serving) = connected(&server);
        let error = client
            .prepare_container(context::with_timeout(0), &PrepareContainerRequest::default())
            .await
            .unwrap_err();
        assert!(matches!(&error, ttrpc::Error::RpcStatus(status) if status.code() == ttrpc::Code::NOT_FOUND));
        client.fit_resources(context::with_timeout(0), &FitResourcesRequest::default()).await.unwrap();
        let (host, guest) = UnixStream::pair().unwrap();
        tokio::spawn(async move { server.serve(host).await });
        let boot = BootClient::new(Client::new(Socket::new(guest)));
        let error = boot.ready(context::with_timeout(0), &ReadyRequest::default()).await.unwrap_err();
        assert!(
            matches!(&error, ttrpc::Error::RpcStatus(status) if status.code() == ttrpc::Code::UNIMPLEMENTED),
            "{error}"
        );
    }
}
