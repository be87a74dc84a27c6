//! Where a pod is in its life.
//!
//! ```text
//!   Created ──Start──▶ Starting ──guest ready──▶ Running
//!      │                  │ fails, or stopped       │ stopped, or the machine ends
//!      └──────Stop────────┴───────────▶ Ended ◀─────┘
//! ```
//!
//! A pod that the controller takes over begins as `Running` or as `Ended`. `Ended` is final: what is left to be removed
//! then is what the pod [owns](super::owned).

use std::collections::HashMap;

use pericarp_protos::id::ContainerId;

use super::ports::ContainerRequest;
use crate::{
    guest::service::{AgentFeatures, Prepared},
    host::{
        cpuset::CpuSet,
        size::{Limits, PodResources, Size},
    },
};

/// Where a pod is, with what belongs to that time alone.
#[derive(Debug)]
pub enum Life {
    /// It is known, and nothing of it has been made.
    Created,
    /// Its machine is being made.
    Starting,
    /// Its guest serves.
    Running(Box<Running>),
    /// Its machine has ended, or never was.
    Ended,
}

/// Where a pod is, for those who look from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Created,
    Starting,
    Running { pid: u32 },
    Ended,
}

/// What a pod has while its guest serves.
#[derive(Debug)]
pub struct Running {
    /// The machine's process.
    pub pid: u32,
    /// What the pod asks for now.
    pub resources: PodResources,
    /// What each prepared container may use. After a take-over they are looked up when they are needed.
    pub limits: HashMap<ContainerId, Limits>,
    /// What the guest's agent can do, as far as is known.
    pub agent: AgentFeatures,
    /// Containers that are prepared although no guest has asked for them yet.
    pub prepared_ahead: HashMap<ContainerId, PreparedAhead>,
    /// The machine's size, as far as this controller has set it.
    pub size: Option<Size>,
    /// The host's CPUs and memory nodes that the machine is kept on, as far as this controller has set them.
    pub pinned: Option<(CpuSet, CpuSet)>,
}

/// A container that is ready for its guest.
#[derive(Debug)]
pub struct PreparedAhead {
    /// What it was prepared from. If that has changed when the guest asks, it is prepared anew.
    pub request: ContainerRequest,
    /// What its guest's agent was taken to be able to do.
    pub agent: AgentFeatures,
    pub prepared: Prepared,
}

impl Running {
    /// For a pod whose machine has just been started with that size.
    pub fn new(pid: u32, resources: PodResources, size: Size) -> Self {
        let pinned = Some((CpuSet::default(), CpuSet::default()));
        Self {
            pid,
            resources,
            limits: HashMap::new(),
            agent: AgentFeatures::CURRENT,
            prepared_ahead: HashMap::new(),
            size: Some(size),
            pinned,
        }
    }

    /// For a pod that is taken over: it may have been resized, and moved.
    pub fn taken_over(pid: u32, resources: PodResources) -> Self {
        Self {
            pid,
            resources,
            limits: HashMap::new(),
            agent: AgentFeatures::default(),
            prepared_ahead: HashMap::new(),
            size: None,
            pinned: None,
        }
    }
}

impl Life {
    pub fn running_with(running: Running) -> Self {
        Self::Running(Box::new(running))
    }

    pub fn phase(&self) -> Phase {
        match self {
            Self::Created => Phase::Created,
            Self::Starting => Phase::Starting,
            Self::Running(running) => Phase::Running { pid: running.pid },
            Self::Ended => Phase::Ended,
        }
    }

    pub fn running(&self) -> Option<&Running> {
        match self {
            Self::Running(running) => Some(running),
            _ => None,
        }
    }

    pub fn running_mut(&mut self) -> Option<&mut Running> {
        match self {
            Self::Running(running) => Some(running),
            _ => None,
        }
    }

    /// Goes on to the next state.
    ///
    /// # Panics
    ///
    /// If life would go backwards, which is a mistake of the caller's.
    pub fn advance(&mut self, next: Self) {
        let (from, to) = (self.phase(), next.phase());
        let valid = matches!(
            (from, to),
            (Phase::Created, Phase::Starting)
                | (Phase::Starting, Phase::Running { .. })
                | (Phase::Created | Phase::Starting | Phase::Running { .. } | Phase::Ended, Phase::Ended)
        );
        assert!(valid, "a pod that is {from:?} cannot become {to:?}");
        *self = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running() -> Life {
        Life::running_with(Running::taken_over(1, PodResources::default()))
    }

    #[test]
    fn life_goes_forward() {
        let mut life = Life::Created;
        for next in [Life::Starting, running(), Life::Ended, Life::Ended] {
            life.advance(next);
        }
        assert_eq!(life.phase(), Phase::Ended);
    }

    #[test]
    fn life_does_not_go_backwards_and_leaves_nothing_out() {
        let states: [fn() -> Life; 4] = [|| Life::Created, || Life::Starting, running, || Life::Ended];
        for (number, from) in states.iter().enumerate() {
            for (other, to) in states.iter().enumerate() {
                let advanced = std::panic::catch_unwind(|| from().advance(to()));
                let valid = other == number + 1 || other == 3;
                assert_eq!(advanced.is_ok(), valid, "from {number} to {other}");
            }
        }
    }
}
