//! The tests' program inside containers: the other end of their connections, and a witness of what a container is. It
//! is one static file.
//!
//! * `peer serve ADDRESS:PORT` answers TCP and UDP there, and prints `ready` when it does. The first line of a
//!   connection says what it is for: `name`, `echo`, `sink` or `source BYTES`. The response to a datagram is the
//!   host's name and the datagram.
//! * `peer tcp ADDRESS:PORT LINE` sends a line and prints all that comes back.
//! * `peer udp ADDRESS:PORT TEXT` sends a datagram and prints the one that comes back.
//! * `peer portrait` prints all that the container it runs in can tell of itself.
//! * `peer files DIRECTORY` prints what the file system there can do.
//! * `peer bomb` starts itself over and over, and each of them does; it says `full` when it cannot for the first time.
//! * `peer hoard` takes what the kernel counts for each user, says how much it has, and keeps it.
//! * `peer load MILLISECONDS MIB` takes so much memory, works for so much CPU time, says `loaded`, and keeps the
//!   memory.
//! * `peer map FILE TEXT` maps a file of one huge page of 2 MiB, prints the text in it, and writes another.
//! * `peer vsock try` prints which of the agent's and the controller's vsock ports it can take or reach; `peer vsock
//!   hold` keeps every connection that it can get.
//! * `peer listen FILE` listens at a unix socket and sends the first line back; `peer connect FILE LINE` sends one
//!   there.
//! * `peer hold-lock FILE` locks a file until its stdin ends; `peer try-lock FILE` says whether it could be locked.

mod files;
mod hoard;
mod load;
mod portrait;
mod unix;
mod vsock;

use std::{
    env, fs,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream, UdpSocket},
    process::{Command, ExitCode},
    thread,
    time::Duration,
};

/// Nobody waits longer for an answer.
const PATIENCE: Duration = Duration::from_secs(120);
/// The largest datagram.
const DATAGRAM_MAX: usize = 65_536;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        ["serve", address] => serve(address),
        ["tcp", address, line] => ask(address, line),
        ["udp", address, text] => ask_by_datagram(address, text),
        ["files", directory] => files::try_all(directory),
        ["map", path, text] => files::map_huge(path, text),
        ["hold-lock", path] => files::hold_lock(path),
        ["try-lock", path] => files::try_lock(path),
        ["listen", path] => unix::listen(path),
        ["connect", path, line] => unix::connect(path, line),
        ["vsock", "try"] => vsock::try_all(),
        ["vsock", "hold"] => vsock::hold(),
        ["load", cpu, memory] => load::run(cpu, memory),
        ["bomb"] => bomb(),
        ["hoard"] => hoard::all(),
        ["portrait"] => {
            portrait::print();
            Ok(())
        }
        _ => {
            eprintln!("usage: peer COMMAND ARGUMENT… (see the source)");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("peer: {}: {error}", arguments.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn bomb() -> ! {
    let mut is_full = false;
    loop {
        // Nobody waits for what is started: the dead count, too.
        if Command::new("/proc/self/exe").arg("bomb").spawn().is_err() && !is_full {
            is_full = true;
            println!("full");
        }
    }
}

fn serve(address: &str) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    let socket = UdpSocket::bind(address)?;
    thread::spawn(move || answer_datagrams(&socket));
    println!("ready");
    io::stdout().flush()?;
    for stream in listener.incoming() {
        let stream = stream?;
        // What goes wrong with a connection is its client's to notice.
        thread::spawn(move || answer(stream));
    }
    Ok(())
}

fn answer_datagrams(socket: &UdpSocket) {
    let mut datagram = vec![0; DATAGRAM_MAX];
    while let Ok((length, from)) = socket.recv_from(&mut datagram) {
        let mut answer = format!("{} ", host_name()).into_bytes();
        answer.extend_from_slice(&datagram[..length]);
        // As with any datagram, the answer may be lost.
        let _ = socket.send_to(&answer, from);
    }
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut input = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    input.read_line(&mut line)?;
    let mut words = line.split_whitespace();
    match (words.next(), words.next()) {
        (Some("name"), None) => writeln!(stream, "{}", host_name())?,
        (Some("echo"), None) => {
            io::copy(&mut input, &mut stream)?;
        }
        (Some("sink"), None) => {
            let mut buffer = vec![0; 1 << 18];
            let mut total = 0;
            loop {
                match input.read(&mut buffer)? {
                    0 => break,
                    length => total += length,
                }
            }
            writeln!(stream, "{total}")?;
        }
        (Some("source"), Some(bytes)) => {
            let bytes = bytes.parse().map_err(io::Error::other)?;
            // In large pieces: what is measured is the way, not this loop.
            let piece = vec![b'p'; 1 << 18];
            let mut left: usize = bytes;
            while left > 0 {
                let length = left.min(piece.len());
                stream.write_all(&piece[..length])?;
                left -= length;
            }
        }
        _ => writeln!(stream, "not understood: {line:?}")?,
    }
    stream.shutdown(Shutdown::Write)
}

fn ask(address: &str, line: &str) -> io::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    writeln!(stream, "{line}")?;
    stream.shutdown(Shutdown::Write)?;
    io::copy(&mut stream, &mut io::stdout())?;
    Ok(())
}

fn ask_by_datagram(address: &str, text: &str) -> io::Result<()> {
    let any = if address.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send_to(text.as_bytes(), address)?;
    let mut answer = vec![0; DATAGRAM_MAX];
    let length = socket.recv(&mut answer)?;
    println!("{}", String::from_utf8_lossy(&answer[..length]));
    Ok(())
}

fn host_name() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}
