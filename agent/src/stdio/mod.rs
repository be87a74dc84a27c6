//! Standard input and output of containers, as containerd's streams.
//!
//! With `io_type = "streaming"`, containerd names each of a process's streams by a URL,
//! `<address>?streaming_id=<id>`, and opens a connection for it on which it calls
//! `containerd.services.streaming.v1.Streaming/Stream` (containerd: `internal/cri/io`,
//! `core/streaming/proxy`, `core/transfer/streaming`). It does so before the process exists, and
//! again after a restart: [`Streams`] brings connections and processes together.

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

pub use streams::{Streams, Taken};

/// Where a process's streams go: containerd's URLs; empty stands for `/dev/null`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Urls {
    /// What the process reads.
    pub stdin: String,
    /// What it writes, or everything if it has a terminal.
    pub stdout: String,
    /// What it writes to its standard error output; unused with a terminal.
    pub stderr: String,
    /// Whether it has a terminal.
    pub terminal: bool,
}

/// Why a process's streams cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// Not one of containerd's stream URLs.
    #[error("{0:?} is not a stream's URL: it has no streaming_id")]
    Url(String),
    /// Another process has the same stream.
    #[error(transparent)]
    Taken(#[from] Taken),
    /// A pipe could not be made.
    #[error("cannot set up the process's pipes: {0}")]
    Io(#[from] io::Error),
}

/// Bytes that a process may write before any of it is read. Their memory is the container's, not the agent's.
const OUTPUT_PIPE: usize = 256 << 10;

/// How long [`Stdio::drained`] waits for a reader that does not read.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// The agent's side of one process's streams.
pub struct Stdio {
    outputs: Vec<Output>,
    input: Option<Input>,
    console: Option<OwnedFd>,
}

struct Output {
    /// Becomes true once the reader has taken everything and closed.
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

/// Streams that are claimed and pipes that are made, for a process that does not exist yet.
pub struct Prepared {
    /// What the process gets as stdin, stdout and stderr.
    descriptors: [OwnedFd; 3],
    /// The other ends of those that are pipes, with their streams.
    stdin: Option<(Option<pipe::Sender>, streams::Claim)>,
    outputs: Vec<(Option<pipe::Receiver>, streams::Claim)>,
}

impl Prepared {
    /// Claims the streams that `urls` name and makes a pipe for each. With a terminal there are no
    /// pipes: both directions go through the console.
    pub fn new(streams: &Arc<Streams>, urls: &Urls) -> Result<Self, StdioError> {
        let mut prepared =
            Self { descriptors: [null()?, null()?, null()?], stdin: None, outputs: Vec::new() };
        if let Some(claim) = claim(streams, &urls.stdin)? {
            let mut ours = None;
            if !urls.terminal {
                let (theirs, sender) = pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from)?;
                ours = Some(nonblocking(sender).and_then(pipe::Sender::from_owned_fd)?);
                prepared.descriptors[0] = theirs;
            }
            prepared.stdin = Some((ours, claim));
        }
        let outputs = [(1, &urls.stdout), (2, &urls.stderr)];
        for (number, url) in outputs.into_iter().take(if urls.terminal { 1 } else { 2 }) {
            let Some(claim) = claim(streams, url)? else { continue };
            let mut ours = None;
            if !urls.terminal {
                let (receiver, theirs) = pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from)?;
                // A smaller pipe does as well, only slower.
                let _ = rustix::pipe::fcntl_setpipe_size(&receiver, OUTPUT_PIPE);
                ours = Some(nonblocking(receiver).and_then(pipe::Receiver::from_owned_fd)?);
                prepared.descriptors[number] = theirs;
            }
            prepared.outputs.push((ours, claim));
        }
        Ok(prepared)
    }

    /// Takes the process's ends of the pipes, to be given to it.
    pub fn into_descriptors(self) -> ([OwnedFd; 3], Ready) {
        (self.descriptors, Ready { stdin: self.stdin, outputs: self.outputs })
    }
}

/// The agent's ends of the pipes of a process that is being made, with their streams.
pub struct Ready {
    stdin: Option<(Option<pipe::Sender>, streams::Claim)>,
    outputs: Vec<(Option<pipe::Receiver>, streams::Claim)>,
}

impl Ready {
    /// Begins to copy, to and from the pipes or the console.
    pub fn start(self, console: Option<OwnedFd>) -> Result<Stdio, StdioError> {
        let mut outputs = Vec::new();
        for (pipe, claim) in self.outputs {
            let source = match (pipe, &console) {
                (Some(pipe), _) => pipe,
                (None, Some(console)) => {
                    pipe::Receiver::from_owned_fd_unchecked(nonblocking(duplicate(console)?)?)?
                }
                (None, None) => continue,
            };
            let (report, drained) = watch::channel(false);
            outputs.push(Output { drained, task: tokio::spawn(output::copy(source, claim, report)) });
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
    /// Waits until the readers have taken all output of a process that has exited, or until it is
    /// clear that they will not: somebody else may hold the pipe open, or nobody may be reading.
    pub fn drained(&self) -> impl Future<Output = ()> + Send + use<> {
        let outputs: Vec<_> = self.outputs.iter().map(|output| output.drained.clone()).collect();
        async move {
            let all = async {
                for mut drained in outputs {
                    // An error means that the copying has ended, so there is nothing to wait for.
                    let _ = drained.wait_for(|drained| *drained).await;
                }
            };
            let _ = tokio::time::timeout(DRAIN_LIMIT, all).await;
        }
    }

    /// Closes the process's stdin once everything that was sent to it has arrived.
    pub fn close_stdin(&self) {
        if let Some(input) = &self.input {
            input.close.notify_one();
        }
    }

    /// Sets the size of the terminal, in characters. Without a terminal nothing happens.
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
