//! The helper: a single-threaded process that makes one container process and ends.

use std::{
    error::Error,
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
        unix::{fs::fchown, net::UnixStream},
    },
    path::{Path, PathBuf},
    process::ExitCode,
    rc::Rc,
    sync::Mutex,
};

use libcontainer::{
    container::{Container, ContainerStatus},
    notify_socket::{NotifyListener, NotifySocket},
    process::{
        args::{ContainerArgs, ContainerType},
        container_main_process::container_main_process,
    },
    syscall::syscall::SyscallType,
    user_ns::UserNamespaceConfig,
    validator::Validator,
};
use nix::{
    sched::{CloneFlags, unshare},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        stat::SFlag,
    },
};
use oci_spec::runtime::Spec;
use pericarp_protos::agent::ConfigureRequest;
use protobuf::Message as _;

use super::{
    Action, BoxError, NO_CONSOLE, Request, directory, executor::GuestExecutor, namespaces, pause, protocol,
};
use crate::cgroup;

/// Open files that a container may have unless it raises the limit; the same as on a usual host.
const DESCRIPTOR_SOFT_LIMIT: u64 = 1024;

/// How much of libcontainer's own error messages is passed on.
const ERROR_LIMIT: u64 = 4096;

/// Answers a request for something that is no process.
const NOBODY: i32 = 0;

/// `arguments`: the number of the socket to the agent, and of the console's socket or `-`. One more is there to
/// be seen from outside (see [`super::leftover`]).
pub fn main(arguments: &[String]) -> ExitCode {
    let [channel, console, _] = arguments else { return ExitCode::FAILURE };
    let Some(channel) = descriptor(channel) else { return ExitCode::FAILURE };
    let console = if console == NO_CONSOLE { None } else { descriptor(console) };
    let mut channel = UnixStream::from(channel);
    // libcontainer's messages are more precise than its errors. A memory file is shared with the
    // processes that it forks.
    let log = rustix::fs::memfd_create("errors", rustix::fs::MemfdFlags::CLOEXEC).map(File::from);
    if let Ok(Ok(log)) = log.as_ref().map(File::try_clone) {
        tracing_subscriber::fmt()
            .with_writer(Mutex::new(log))
            .with_max_level(tracing::Level::ERROR)
            .with_ansi(false)
            .with_level(false)
            .with_target(false)
            .without_time()
            .init();
    }
    let answer =
        protocol::read(&mut channel).map_err(BoxError::from).and_then(|request| make(request, console));
    let answer = answer.map_err(|error| describe(&*error, log.ok()));
    match protocol::write(&mut channel, &answer) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn descriptor(argument: &str) -> Option<OwnedFd> {
    let number: RawFd = argument.parse().ok().filter(|number| *number > 2)?;
    // SAFETY: the agent has opened this descriptor for us and names each one once; a number that is
    // not open makes the first use of it fail.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC).ok()?;
    Some(descriptor)
}

fn make(request: Request, console: Option<OwnedFd>) -> Result<i32, BoxError> {
    let socket = request.directory.join(request.action.notify_socket());
    match request.action {
        Action::Create(spec) => {
            Validator::validate_spec(&spec)?;
            directory::make(&spec, namespaces::uid(&spec, 0).zip(namespaces::gid(&spec, 0)))?;
            let user_namespace = UserNamespaceConfig::new(&spec)?;
            let arguments = Arguments {
                id: &request.id,
                directory: &request.directory,
                socket: &socket,
                kind: ContainerType::InitContainer,
                user_namespace,
            };
            arguments.run(*spec, console)
        }
        Action::Exec { spec, .. } => {
            let pid = exec(&request.id, &request.directory, &socket, *spec, console);
            let _ = fs::remove_file(&socket);
            pid
        }
        Action::PidNamespace { of_user_namespace } => pid_namespace(of_user_namespace),
        Action::Namespaces(request) => {
            namespaces::make(&ConfigureRequest::parse_from_bytes(&request)?)?;
            Ok(NOBODY)
        }
    }
}

/// Makes a process in a running container and waits until it has become its program.
fn exec(
    id: &str,
    directory: &Path,
    socket: &Path,
    mut spec: Spec,
    console: Option<OwnedFd>,
) -> Result<i32, BoxError> {
    let namespaces = open_namespaces(&mut spec)?;
    let (failure, report) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let arguments = Arguments {
        id,
        directory,
        socket,
        kind: ContainerType::TenantContainer { exec_notify_fd: report.as_raw_fd() },
        user_namespace: None,
    };
    let pid = arguments.run(spec, console)?;
    drop(namespaces);
    drop(report);
    NotifySocket::new(socket).notify_container_start()?;
    // Closed without a word by a successful execve.
    let mut text = String::new();
    File::from(failure).take(ERROR_LIMIT).read_to_string(&mut text)?;
    if text.is_empty() { Ok(pid) } else { Err(text.into()) }
}

/// Has the namespaces of a spec found by descriptors of this process's. From within a user namespace, those of a process
/// whose program nobody may read are out of reach.
fn open_namespaces(spec: &mut Spec) -> io::Result<Vec<File>> {
    let mut opened = Vec::new();
    let linux = spec.linux_mut().as_mut();
    for namespace in linux.and_then(|linux| linux.namespaces_mut().as_mut()).into_iter().flatten() {
        if let Some(path) = namespace.path() {
            let file = File::open(path)?;
            namespace.set_path(Some(format!("/proc/self/fd/{}", file.as_raw_fd()).into()));
            opened.push(file);
        }
    }
    Ok(opened)
}

struct Arguments<'a> {
    id: &'a str,
    directory: &'a Path,
    socket: &'a Path,
    kind: ContainerType,
    user_namespace: Option<UserNamespaceConfig>,
}

impl Arguments<'_> {
    fn run(self, mut spec: Spec, console: Option<OwnedFd>) -> Result<i32, BoxError> {
        adapt(&mut spec);
        let process = spec.process().as_ref().ok_or("the spec has no process")?;
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTOR_SOFT_LIMIT.min(hard), hard)?;
        // The agent's own protection is not for its children.
        let badness = process.oom_score_adj().unwrap_or(0);
        fs::write("/proc/self/oom_score_adj", badness.to_string())?;
        if let (None, Some(uid)) = (&console, namespaces::uid(&spec, process.user().uid())) {
            give_pipes_to(uid)?;
        }
        // Nobody in a container that this process enters may look into it.
        nix::sys::prctl::set_dumpable(false)?;
        let cgroup = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone());
        let rootfs: PathBuf = spec.root().as_ref().ok_or("the spec has no root")?.path().clone();
        let arguments = ContainerArgs {
            container_type: self.kind,
            syscall: SyscallType::default(),
            rootfs: rootfs.canonicalize().map_err(|error| format!("root {}: {error}", rootfs.display()))?,
            // libcontainer closes it in the container's process.
            console_socket: console.map(IntoRawFd::into_raw_fd),
            notify_listener: NotifyListener::new(self.socket)?,
            preserve_fds: 0,
            // Wanted for the answer to a seccomp agent, which there is none of.
            container: Some(Container::new(
                self.id,
                ContainerStatus::Creating,
                None,
                self.directory,
                self.directory,
            )?),
            user_ns_config: self.user_namespace,
            cgroup_config: cgroup::Cgroup::existing(cgroup.as_deref())?.config(self.id),
            detached: true,
            executor: Box::new(GuestExecutor),
            no_pivot: false,
            // 0, 1 and 2 are the container's already.
            stdin: None,
            stdout: None,
            stderr: None,
            as_sibling: true,
            pid_file: None,
            spec: Rc::new(spec),
        };
        Ok(container_main_process(&arguments)?.as_raw())
    }
}

/// Takes out of a spec what has no meaning in a guest.
fn adapt(spec: &mut Spec) {
    if let Some(process) = spec.process_mut() {
        // Profiles of the host's kernel. The guest's has no security module: the machine is the wall.
        process.set_apparmor_profile(None).set_selinux_label(None);
        // libcontainer installs the seccomp filter too late if this is `false` instead of missing.
        if process.no_new_privileges() == Some(false) {
            process.set_no_new_privileges(None);
        }
    }
    if let Some(linux) = spec.linux_mut() {
        linux.set_mount_label(None).set_intel_rdt(None);
    }
}

/// Lets a process without privileges open `/dev/stdout` and its like again, as runc does.
fn give_pipes_to(uid: u32) -> io::Result<()> {
    for stream in
        [rustix::io::dup(io::stdin())?, rustix::io::dup(io::stdout())?, rustix::io::dup(io::stderr())?]
    {
        let kind = SFlag::from_bits_truncate(rustix::fs::fstat(&stream)?.st_mode) & SFlag::S_IFMT;
        if kind == SFlag::S_IFIFO {
            fchown(&stream, Some(uid), None)?;
        }
    }
    Ok(())
}

/// Makes a PID namespace that lives as long as its first process, or the mount that the agent keeps it by.
fn pid_namespace(of_user_namespace: bool) -> Result<i32, BoxError> {
    if of_user_namespace {
        namespaces::enter_user_namespace()?;
    }
    unshare(CloneFlags::CLONE_NEWPID)?;
    pause::spawn()
}

/// The most telling text for an error: runc's own for a command that cannot be run, and otherwise
/// the error with the first thing that libcontainer had to say about it.
fn describe(error: &dyn Error, log: Option<File>) -> String {
    let mut text = error.to_string();
    if let Some(start) = text.find("exec: \"") {
        return text.split_off(start);
    }
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    let mut details = String::new();
    if let Some(mut log) = log
        && io::Seek::rewind(&mut log).is_ok()
        && log.take(ERROR_LIMIT).read_to_string(&mut details).is_ok()
        && let Some(first) = details.lines().next()
    {
        text = format!("{text}: {}", first.trim());
    }
    text
}
