//! Our own programs and containerd's event service, called without CRI in between.

pub mod controller;
pub mod events;
pub mod machine;
pub mod netns;
pub mod sandbox;
