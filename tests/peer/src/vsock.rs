//! What a process in a container can do with vsock, which needs no privilege.

use std::{
    io::{self, Read as _, Write as _},
    thread,
    time::Duration,
};

use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VMADDR_CID_LOCAL, VsockAddr, VsockListener, VsockStream};

/// The guest's own address, as the machine gives it.
const GUEST: u32 = 3;
/// The ports that the agent and the controller talk on, and one that is nobody's.
const PORTS: [u32; 5] = [1024, 1025, 1026, 1027, 1028];
/// More than the machine has.
const CONNECTIONS_MAX: usize = 2000;

/// Prints whether each port can be bound, and whether it can be connected to at each address that could lead there.
pub fn try_all() -> io::Result<()> {
    for port in PORTS {
        for (name, cid) in [("any", VMADDR_CID_ANY), ("guest", GUEST)] {
            say(&format!("bind {name}:{port}"), VsockListener::bind(&VsockAddr::new(cid, port)).map(drop))?;
        }
        for (name, cid) in [("host", VMADDR_CID_HOST), ("guest", GUEST), ("local", VMADDR_CID_LOCAL)] {
            say(&format!("connect {name}:{port}"), connect(cid, port).map(drop))?;
        }
    }
    Ok(())
}

fn say(what: &str, result: io::Result<()>) -> io::Result<()> {
    match result {
        Ok(()) => println!("{what}: done"),
        Err(error) => println!("{what}: refused, {error}"),
    }
    io::stdout().flush()
}

fn connect(cid: u32, port: u32) -> io::Result<VsockStream> {
    let mut stream = VsockStream::connect(&VsockAddr::new(cid, port))?;
    stream.set_read_timeout(Some(Duration::from_millis(200)))?;
    match stream.read(&mut [0]) {
        // Taken and closed at once is not taken.
        Ok(0) => Err(io::ErrorKind::ConnectionReset.into()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(error),
        _ => Ok(stream),
    }
}

/// Opens as many connections to the host as it can, keeps them, and goes on trying; prints `holding` after the first
/// round.
pub fn hold() -> io::Result<()> {
    let mut held = Vec::new();
    let mut round = 0;
    loop {
        for port in PORTS {
            for cid in [VMADDR_CID_HOST, GUEST, VMADDR_CID_LOCAL] {
                while held.len() < CONNECTIONS_MAX {
                    match VsockStream::connect(&VsockAddr::new(cid, port)) {
                        Ok(stream) => held.push(stream),
                        Err(_) => break,
                    }
                }
            }
        }
        if round == 0 {
            println!("holding {}", held.len());
            io::stdout().flush()?;
        }
        round += 1;
        thread::sleep(Duration::from_millis(10));
    }
}
