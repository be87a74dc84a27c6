//! Work inside a network namespace.

use std::{fs::File, io, os::fd::AsFd as _, path::Path, thread, time::Duration};

use rtnetlink::Handle;
use rustix::{
    fs::{fstat, stat},
    io::Errno,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use super::NetworkError;

/// Limit of all that is done in a namespace at once. It takes milliseconds on a host that is well.
const TIME_LIMIT: Duration = Duration::from_secs(5);

/// Does `work` on a new thread that has entered the namespace, with a netlink socket there, and waits for it: the
/// thread ends with the work, so that no other ever finds itself in a namespace that is not its own.
pub fn inside<T: Send>(
    netns: &Path,
    work: impl AsyncFnOnce(Handle) -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("pod-network".into())
            .spawn_scoped(scope, || {
                enter(netns)?;
                run(work)
            })
            .map_err(NetworkError::Thread)?
            .join()
            .unwrap_or_else(|_| Err(NetworkError::Thread(io::Error::other("it panicked"))))
    })
}

fn enter(netns: &Path) -> Result<(), NetworkError> {
    let missing = |source| NetworkError::Missing { netns: netns.to_owned(), source };
    let failed = |source| NetworkError::Enter { netns: netns.to_owned(), source };
    let file = File::open(netns).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => missing(error),
        _ => failed(error),
    })?;
    let own = stat("/proc/thread-self/ns/net").map_err(|errno| failed(errno.into()))?;
    let there = fstat(&file).map_err(|errno| failed(errno.into()))?;
    if (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino) {
        return Err(NetworkError::Own { netns: netns.to_owned() });
    }
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).map_err(|errno| match errno {
        // A namespace that was unmounted leaves a plain file.
        Errno::INVAL => missing(errno.into()),
        errno => failed(errno.into()),
    })
}

fn run<T>(work: impl AsyncFnOnce(Handle) -> Result<T, NetworkError>) -> Result<T, NetworkError> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(NetworkError::Thread)?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()
            .map_err(|source| NetworkError::Netlink { request: "open a netlink socket".into(), source })?;
        tokio::spawn(connection);
        tokio::time::timeout(TIME_LIMIT, work(handle))
            .await
            .unwrap_or(Err(NetworkError::TimeLimit { seconds: TIME_LIMIT.as_secs() }))
    })
}
