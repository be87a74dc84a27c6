//! `pericarp.agent.v1.Agent`, except its stream of events, which [`super::EventLog`] serves.

use std::{sync::Arc, time::Instant};

use async_trait::async_trait;
use pericarp_protos::{
    agent::{
        Agent, CheckRequest, CheckResponse, ConfigureRequest, ConfigureResponse, ResizeRequest,
        ResizeResponse,
    },
    ttrpc::{self, Code, r#async::TtrpcContext},
};

use crate::{
    pod::{Pod, PodError, devices},
    ttrpc::status,
};

/// Serves the controller's calls.
pub struct AgentService(Arc<Pod>);

impl AgentService {
    /// A service for this pod.
    pub fn new(pod: Arc<Pod>) -> Arc<Self> {
        Arc::new(Self(pod))
    }
}

#[async_trait]
impl Agent for AgentService {
    async fn configure(
        &self,
        _: &TtrpcContext,
        request: ConfigureRequest,
    ) -> ttrpc::Result<ConfigureResponse> {
        let arrival = Instant::now();
        self.0.configure(&request).await.map_err(|error| status(code(&error), error.to_string()))?;
        let mut response = ConfigureResponse::new();
        response.configure_ns = u64::try_from(arrival.elapsed().as_nanos()).unwrap_or(u64::MAX);
        Ok(response)
    }

    async fn resize(&self, _: &TtrpcContext, request: ResizeRequest) -> ttrpc::Result<ResizeResponse> {
        devices::resize(request).await.map_err(|error| status(Code::INTERNAL, error.to_string()))
    }

    async fn check(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<CheckResponse> {
        Ok(CheckResponse::new())
    }
}

fn code(error: &PodError) -> Code {
    match error {
        PodError::AlreadyConfigured => Code::FAILED_PRECONDITION,
        PodError::Hostname(..) | PodError::UnknownSysctl(_) | PodError::Sysctl { .. } => {
            Code::INVALID_ARGUMENT
        }
        PodError::File { .. }
        | PodError::Limits(_)
        | PodError::SharedMemory(_)
        | PodError::Network(_)
        | PodError::Namespaces(_) => Code::INTERNAL,
    }
}
