//! Standard input and output of containers, as containerd's streams.
//!
//! With `io_type = "streaming"`, containerd names each of a process's streams by a URL, `<address>?streaming_id=<id>`.
//! It opens a connection for each of them, on which it calls `containerd.services.streaming.v1.Streaming/Stream`
//! (containerd: `internal/cri/io`, `core/streaming/proxy`, `core/transfer/streaming`). It does so before the process
//! exists, and again after a restart. [`Streams`] matches the connections with the processes.

mod input;
mod message;
mod output;
mod streams;

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::{
    net::unix::pipe,
    sync::{Notify, watch},
    task::JoinHandle,
};

pub use streams::{StreamInUse, Streams};

/// Where a process's streams go: containerd's URLs. An empty one stands for `/dev/null`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Urls {
    /// The stream from which the process reads.
    pub stdin: String,
    /// The stream of its standard output, or of its terminal if it has one.
    pub stdout: String,
    /// The stream of its standard error output; unused if it has a terminal.
    pub stderr: String,
    /// Whether it has a terminal.
    pub terminal: bool,
}

/// Why a process's streams cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The URL is not one of containerd's stream URLs.
    #[error("{0:?} is not a stream's URL: it has no streaming_id")]
    Url(String),
    /// Another process has the same stream.
    #[error(transparent)]
    InUse(#[from] StreamInUse),
    /// A pipe could not be made.
    #[error("cannot set up the process's pipes: {0}")]
    Io(#[from] io::Error),
}

/// The bytes that a process may write before any of them is read. The kernel charges their memory to the container.
const OUTPUT_PIPE_SIZE: usize = 256 << 10;

/// How long [`Stdio::drained`] waits for a reader that does not read.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// The agent's side of one process's streams.
pub struct Stdio {
    outputs: Vec<Output>,
    input: Option<Input>,
    console: Option<OwnedFd>,
}

struct Output {
    /// Becomes true when the reader has read everything and has closed the stream.
    drained: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

struct Input {
    close: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Drop for Stdio {
    fn drop(&mut self) {
        let tasks = self.outputs.iter().map(|output| &output.task);
        tasks.chain(self.input.iter().map(|input| &input.task)).for_each(JoinHandle::abort);
    }
}

/// Claimed streams and new pipes for a process that does not exist yet.
pub struct PreparedStdio {
    /// What the process gets as stdin, stdout and stderr.
    descriptors: [OwnedFd; 3],
    agent_ends: AgentEnds,
}

impl PreparedStdio {
    /// Claims the streams that `urls` name and creates a pipe for each. With a terminal there are no pipes, because
    /// both directions go through the console.
    pub fn new(streams: &Arc<Streams>, urls: &Urls) -> Result<Self, StdioError> {
        let mut descriptors = [null()?, null()?, null()?];
        let mut agent_ends = AgentEnds { stdin: None, outputs: Vec::new() };
        if let Some(claim) = claim(streams, &urls.stdin)? {
            let mut pipe = None;
            if !urls.terminal {
                let (receiver, sender) = pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from)?;
                pipe = Some(nonblocking(sender).and_then(pipe::Sender::from_owned_fd)?);
                descriptors[0] = receiver;
            }
            agent_ends.stdin = Some((pipe, claim));
        }
        let outputs = [(1, &urls.stdout), (2, &urls.stderr)];
        for (number, url) in outputs.into_iter().take(if urls.terminal { 1 } else { 2 }) {
            let Some(claim) = claim(streams, url)? else { continue };
            let mut pipe = None;
            if !urls.terminal {
                let (receiver, sender) = pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from)?;
                // If this fails, the pipe is smaller and only slower.
                let _ = rustix::pipe::fcntl_setpipe_size(&receiver, OUTPUT_PIPE_SIZE);
                pipe = Some(nonblocking(receiver).and_then(pipe::Receiver::from_owned_fd)?);
                descriptors[number] = sender;
            }
            agent_ends.outputs.push((pipe, claim));
        }
        Ok(Self { descriptors, agent_ends })
    }

    /// Splits this into the descriptors for the process (stdin, stdout, stderr) and the agent's ends of its pipes.
    pub fn into_ends(self) -> ([OwnedFd; 3], AgentEnds) {
        (self.descriptors, self.agent_ends)
    }
}

/// The agent's ends of the pipes of a process that is being created, with their streams.
pub struct AgentEnds {
    stdin: Option<(Option<pipe::Sender>, streams::Claim)>,
    outputs: Vec<(Option<pipe::Receiver>, streams::Claim)>,
}

impl AgentEnds {
    /// Begins to copy to and from the pipes, or the console.
    pub fn start_copying(self, console: Option<OwnedFd>) -> Result<Stdio, StdioError> {
        let mut outputs = Vec::new();
        for (pipe, claim) in self.outputs {
            let source = match (pipe, &console) {
                (Some(pipe), _) => pipe,
                (None, Some(console)) => {
                    pipe::Receiver::from_owned_fd_unchecked(nonblocking(duplicate(console)?)?)?
                }
                (None, None) => continue,
            };
            let (drained_sender, drained) = watch::channel(false);
            let task = tokio::spawn(output::copy(source, claim, drained_sender));
            outputs.push(Output { drained, task });
        }
        let mut input = None;
        if let Some((pipe, claim)) = self.stdin {
            let is_console = pipe.is_none();
            let sink = match (pipe, &console) {
                (Some(pipe), _) => Some(pipe),
                (None, Some(console)) => {
                    Some(pipe::Sender::from_owned_fd_unchecked(nonblocking(duplicate(console)?)?)?)
                }
                (None, None) => None,
            };
            if let Some(sink) = sink {
                let close = Arc::new(Notify::new());
                let task = tokio::spawn(input::copy(sink, is_console, claim, Arc::clone(&close)));
                input = Some(Input { close, task });
            }
        }
        Ok(Stdio { outputs, input, console })
    }
}

impl Stdio {
    /// Waits until the readers have read all output of a process that has exited, but not longer than a limit: another
    /// process may keep the pipe open, or nobody may read.
    pub fn drained(&self) -> impl Future<Output = ()> + Send + use<> {
        let outputs: Vec<_> = self.outputs.iter().map(|output| output.drained.clone()).collect();
        async move {
            let all = async {
                for mut drained in outputs {
                    // An error means that the copying task has ended, so there is nothing to wait for.
                    let _ = drained.wait_for(|drained| *drained).await;
                }
            };
            let _ = tokio::time::timeout(DRAIN_LIMIT, all).await;
        }
    }

    /// Closes the process's stdin when everything that was sent to it has arrived.
    pub fn close_stdin(&self) {
        if let Some(input) = &self.input {
            input.close.notify_one();
        }
    }

    /// Sets the size of the terminal, in characters. Does nothing without a terminal.
    pub fn resize(&self, width: u16, height: u16) -> io::Result<()> {
        let Some(console) = &self.console else { return Ok(()) };
        let size = rustix::termios::Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(rustix::termios::tcsetwinsize(console, size)?)
    }
}

/// Opens `/dev/null`.
pub fn null() -> io::Result<OwnedFd> {
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
    Ok(rustix::fs::open("/dev/null", flags, rustix::fs::Mode::empty())?)
}

fn claim(streams: &Arc<Streams>, url: &str) -> Result<Option<streams::Claim>, StdioError> {
    if url.is_empty() {
        return Ok(None);
    }
    let id = stream_id(url).ok_or_else(|| StdioError::Url(url.to_owned()))?;
    Ok(Some(streams.claim(id)?))
}

/// The id in `<address>?streaming_id=<id>`.
fn stream_id(url: &str) -> Option<&str> {
    let (_, query) = url.split_once('?')?;
    let id = query.split('&').find_map(|pair| pair.strip_prefix("streaming_id="))?;
    (!id.is_empty()).then_some(id)
}

fn duplicate(descriptor: &OwnedFd) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(descriptor, 0)?)
}

fn nonblocking(descriptor: OwnedFd) -> io::Result<OwnedFd> {
    let flags = rustix::fs::fcntl_getfl(descriptor.as_fd())?;
    rustix::fs::fcntl_setfl(descriptor.as_fd(), flags | rustix::fs::OFlags::NONBLOCK)?;
    Ok(descriptor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_streams_id_is_found_in_its_url() {
        let url = "ttrpc+hvsock:///run/pericarp/ab/vsock.sock:1024?streaming_id=c1-stdout";
        assert_eq!(stream_id(url), Some("c1-stdout"));
        assert_eq!(stream_id("ttrpc+hvsock:///x?a=b&streaming_id=c-stdin"), Some("c-stdin"));
        assert_eq!(stream_id("/run/fifo/stdout"), None);
        assert_eq!(stream_id("ttrpc+hvsock:///x?streaming_id="), None);
    }
}
