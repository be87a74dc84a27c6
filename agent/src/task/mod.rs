//! Containers and their processes: `containerd.task.v3.Task`.

mod container;
mod error;
mod exits;
mod pause;
mod process;
mod service;
mod spec;

use error::TaskError;
pub use exits::{Exit, Exits};
pub use service::Tasks;
