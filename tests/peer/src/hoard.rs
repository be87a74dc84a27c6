//! Takes as much as a process may of what the kernel counts for each user, and keeps it.

use std::{fs, io, os::fd::OwnedFd, thread};

use rustix::{
    event::{
        EventfdFlags,
        epoll::{self, EventData, EventFlags},
        eventfd,
    },
    fs::inotify,
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::UnshareFlags,
};

/// How much is taken at most, which is far more than a small machine's kernel allows by itself.
const EPOLL_INSTANCES: usize = 250;
const EPOLL_EVENTS: usize = 240;
const INOTIFY_INSTANCES: usize = 1000;
const INOTIFY_FILES: usize = 20;
const NAMESPACES: usize = 700;

/// Says what it has, and never ends.
pub fn all() -> io::Result<()> {
    let files = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: files.maximum, maximum: files.maximum })?;
    let mut kept = Vec::new();
    let epoll = take_epoll(&mut kept);
    let inotify = take_inotify(&mut kept);
    let namespaces = take_namespaces(&mut kept);
    println!("hoards {epoll} of epoll, {inotify} of inotify, {namespaces} namespaces");
    loop {
        thread::park();
    }
}

fn take_epoll(kept: &mut Vec<OwnedFd>) -> usize {
    let events: Vec<_> = (0..EPOLL_EVENTS).map_while(|_| eventfd(0, EventfdFlags::CLOEXEC).ok()).collect();
    let mut count = 0;
    'all: for _ in 0..EPOLL_INSTANCES {
        let Ok(instance) = epoll::create(epoll::CreateFlags::CLOEXEC) else { break };
        for event in &events {
            if epoll::add(&instance, event, EventData::new_u64(0), EventFlags::IN).is_err() {
                kept.push(instance);
                break 'all;
            }
            count += 1;
        }
        kept.push(instance);
    }
    kept.extend(events);
    count
}

fn take_inotify(kept: &mut Vec<OwnedFd>) -> usize {
    let names: Vec<_> = (0..INOTIFY_FILES).map(|number| format!("/dev/shm/hoard-{number}")).collect();
    let names: Vec<_> = names.iter().filter(|name| fs::write(name, "").is_ok()).collect();
    let mut count = 0;
    for _ in 0..INOTIFY_INSTANCES {
        let Ok(instance) = inotify::init(inotify::CreateFlags::CLOEXEC) else { break };
        for name in &names {
            if inotify::add_watch(&instance, name.as_str(), inotify::WatchFlags::MODIFY).is_err() {
                break;
            }
            count += 1;
        }
        kept.push(instance);
    }
    count
}

/// They count for the owner of the user namespace that they belong to, and so for whoever runs this.
fn take_namespaces(kept: &mut Vec<OwnedFd>) -> usize {
    // SAFETY: this process has one thread, and descriptors stay shared with nobody.
    if unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) }.is_err() {
        return 0;
    }
    let mut count = 0;
    while count < NAMESPACES {
        // SAFETY: as above.
        if unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.is_err() {
            break;
        }
        let Ok(namespace) = fs::File::open("/proc/self/ns/mnt") else { break };
        kept.push(namespace.into());
        count += 1;
    }
    count
}
