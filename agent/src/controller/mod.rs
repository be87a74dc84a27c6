//! The agent's side of its conversation with the controller: what the controller asks of the agent
//! (`pericarp.agent.v1.Agent`), and what the agent asks of the controller (`pericarp.host.v1`).

mod client;
mod events;
mod service;

pub use self::{
    client::{ControllerAddress, ControllerClient, announce_ready},
    events::{EventLog, EventSubject, timestamp},
    service::AgentService,
};
