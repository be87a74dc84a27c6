//! Every protocol that Pericarp speaks, and the facts both sides of a conversation must agree on.
//!
//! * [`agent`], [`host`], [`vmm`]: our own services (ttrpc).
//! * [`streaming`], [`transfer`]: containerd's stdio streams as the agent serves them (ttrpc).
//! * [`sandbox`], [`cri`] (feature `grpc`): what containerd asks of the controller, and CRI's messages.
//!
//! * [`descriptors`]: how open files reach a machine.
//!
//! The Task API itself comes from the `containerd-shim-protos` crate.

pub mod descriptors;
pub mod guest;
pub mod id;

/// Code generated from `proto/`; reached through the modules below.
#[allow(warnings, clippy::all, clippy::pedantic)]
mod generated {
    pub mod messages {
        include!(concat!(env!("OUT_DIR"), "/messages/mod.rs"));
    }
    pub mod transfer {
        include!(concat!(env!("OUT_DIR"), "/transfer/mod.rs"));
    }
    pub mod blocking {
        include!(concat!(env!("OUT_DIR"), "/blocking/mod.rs"));
    }
    #[cfg(feature = "grpc")]
    pub mod grpc {
        pub mod containerd {
            pub mod types {
                include!(concat!(env!("OUT_DIR"), "/containerd.types.rs"));
            }
            pub mod services {
                pub mod containers {
                    pub mod v1 {
                        include!(concat!(env!("OUT_DIR"), "/containerd.services.containers.v1.rs"));
                    }
                }
                pub mod events {
                    pub mod v1 {
                        include!(concat!(env!("OUT_DIR"), "/containerd.services.events.v1.rs"));
                    }
                }
                pub mod sandbox {
                    pub mod v1 {
                        include!(concat!(env!("OUT_DIR"), "/containerd.services.sandbox.v1.rs"));
                    }
                }
                pub mod snapshots {
                    pub mod v1 {
                        include!(concat!(env!("OUT_DIR"), "/containerd.services.snapshots.v1.rs"));
                    }
                }
                pub mod version {
                    pub mod v1 {
                        include!(concat!(env!("OUT_DIR"), "/containerd.services.version.v1.rs"));
                    }
                }
            }
        }
        pub mod cri {
            include!(concat!(env!("OUT_DIR"), "/runtime.v1.rs"));
        }
    }
}

pub use protobuf;
pub use ttrpc;

/// `pericarp.agent.v1`: controller → agent.
pub mod agent {
    pub use crate::generated::messages::{agent::*, agent_ttrpc::*};
}

/// `pericarp.host.v1`: agent → controller.
pub mod host {
    pub use crate::generated::messages::{host::*, host_ttrpc::*};
}

/// `pericarp.vmm.v1`: controller → machine, asynchronous side.
pub mod vmm {
    pub use crate::generated::messages::{vmm::*, vmm_ttrpc::*};
}

/// `pericarp.vmm.v1`, blocking side, for the machine itself.
pub mod vmm_blocking {
    pub use crate::generated::blocking::{vmm::*, vmm_ttrpc::*};
}

/// `containerd.services.streaming.v1`: one bidirectional stream per stdio stream.
pub mod streaming {
    pub use crate::generated::messages::{streaming::*, streaming_ttrpc::*};
}

/// `containerd.types.transfer`: the messages inside a stdio stream.
pub mod transfer {
    pub use crate::generated::transfer::streaming::*;
}

/// `containerd.services.sandbox.v1` and `containerd.types`.
#[cfg(feature = "grpc")]
pub mod sandbox {
    pub use crate::generated::grpc::containerd::{services::sandbox::v1::*, types};
}

/// The services of containerd that the controller calls, by their package's name.
#[cfg(feature = "grpc")]
pub mod containerd {
    pub use crate::generated::grpc::containerd::{
        services::{
            containers::v1 as containers, events::v1 as events, snapshots::v1 as snapshots,
            version::v1 as version,
        },
        types,
    };
}

/// CRI, `runtime.v1`.
#[cfg(feature = "grpc")]
pub mod cri {
    pub use crate::generated::grpc::cri::*;

    /// Its description (`FileDescriptorSet`): what it has names for.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cri.descriptors"));
}
