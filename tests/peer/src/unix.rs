//! Unix sockets in the file system.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::net::{UnixListener, UnixStream},
};

/// Listens at a path, prints `ready`, and sends the line of the first connection back.
pub fn listen(path: &str) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    println!("ready");
    io::stdout().flush()?;
    let (mut stream, _) = listener.accept()?;
    let mut line = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut line)?;
    stream.write_all(line.as_bytes())
}

/// Sends a line to the socket at a path, and prints what comes back.
pub fn connect(path: &str, line: &str) -> io::Result<()> {
    let mut stream = UnixStream::connect(path)?;
    writeln!(stream, "{line}")?;
    io::copy(&mut stream, &mut io::stdout()).map(drop)
}
