//! The helper: a single-threaded process that creates one process and exits.

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
use nix::sched::{CloneFlags, unshare};
use oci_spec::runtime::Spec;
use pericarp_protos::agent::ConfigureRequest;
use protobuf::Message as _;
use rustix::{
    fs::FileType,
    process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit},
};

use super::{
    Action, BoxError, NO_CONSOLE, Request,
    executor::GuestExecutor,
    home, pause,
    protocol::{self, NO_PROCESS},
    user_namespace, working_directory,
};
use crate::resources::Cgroup;

/// How many open files a container may have unless it raises the limit; the same as on a usual host.
const DESCRIPTOR_SOFT_LIMIT: u64 = 1024;

/// How many bytes of libcontainer's own error messages are passed on.
const ERROR_LIMIT: u64 = 4096;

/// Creates the namespaces of a pod with a user namespace. What it starts gets the name of the launch.
pub type CreatePodNamespaces = fn(&str, &ConfigureRequest) -> Result<(), BoxError>;

/// Runs the helper. `arguments` are the number of the socket to the agent, the number of the console's socket or `-`,
/// and the name of its launch (see [`super::cleanup`]).
pub fn main(arguments: &[String], create_pod_namespaces: CreatePodNamespaces) -> ExitCode {
    let [channel, console, name] = arguments else { return ExitCode::FAILURE };
    let Some(channel) = descriptor(channel) else { return ExitCode::FAILURE };
    let console = if console == NO_CONSOLE { None } else { descriptor(console) };
    let mut channel = UnixStream::from(channel);
    // libcontainer's log messages are more precise than its errors. The processes that it forks share the memory file.
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
    let answer = protocol::read(&mut channel)
        .map_err(BoxError::from)
        .and_then(|request| create(name, request, console, create_pod_namespaces));
    let answer = answer.map_err(|error| describe(&*error, log.ok()));
    match protocol::write(&mut channel, &answer) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn descriptor(argument: &str) -> Option<OwnedFd> {
    let number: RawFd = argument.parse().ok().filter(|number| *number > 2)?;
    // SAFETY: the agent has opened this descriptor for the helper and names each one once. A number that is not open
    // makes its first use fail.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC).ok()?;
    Some(descriptor)
}

fn create(
    name: &str,
    request: Request,
    console: Option<OwnedFd>,
    create_pod_namespaces: CreatePodNamespaces,
) -> Result<i32, BoxError> {
    let socket = request.directory.join(request.action.notify_socket());
    match request.action {
        Action::Create(spec) => {
            Validator::validate_spec(&spec)?;
            let root = user_namespace::uid(&spec, 0).zip(user_namespace::gid(&spec, 0));
            working_directory::create(&spec, root)?;
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
        Action::PidNamespace { of_user_namespace } => create_pid_namespace(name, of_user_namespace),
        Action::PodNamespaces(request) => {
            create_pod_namespaces(name, &ConfigureRequest::parse_from_bytes(&request)?)?;
            Ok(NO_PROCESS)
        }
    }
}

/// Creates a process in a running container and waits until it has executed its program.
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
    // A successful execve closes the pipe, so that nothing is read.
    let mut text = String::new();
    File::from(failure).take(ERROR_LIMIT).read_to_string(&mut text)?;
    if text.is_empty() { Ok(pid) } else { Err(text.into()) }
}

/// Opens the namespaces of a spec and replaces their paths by those of the descriptors. From within a user namespace,
/// the namespaces of a process whose program may not be read cannot be opened.
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
        remove_host_settings(&mut spec);
        let process = spec.process_mut().as_mut().ok_or("the spec has no process")?;
        home::leave_to_executor(process);
        let uid = process.user().uid();
        // A missing maximum stands for no limit.
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        let current = maximum.map_or(DESCRIPTOR_SOFT_LIMIT, |maximum| DESCRIPTOR_SOFT_LIMIT.min(maximum));
        setrlimit(Resource::Nofile, Rlimit { current: Some(current), maximum })?;
        // The agent's own protection from the OOM killer must not be inherited.
        let badness = process.oom_score_adj().unwrap_or(0);
        fs::write("/proc/self/oom_score_adj", badness.to_string())?;
        if let (None, Some(uid)) = (&console, user_namespace::uid(&spec, uid)) {
            change_owner_of_pipes(uid)?;
        }
        // The processes of a container that this process enters must not be able to trace it.
        set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
        let cgroup = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone());
        let rootfs: PathBuf = spec.root().as_ref().ok_or("the spec has no root")?.path().clone();
        let arguments = ContainerArgs {
            container_type: self.kind,
            syscall: SyscallType::default(),
            rootfs: rootfs.canonicalize().map_err(|error| format!("root {}: {error}", rootfs.display()))?,
            // libcontainer closes the descriptor in the container's process.
            console_socket: console.map(IntoRawFd::into_raw_fd),
            notify_listener: NotifyListener::new(self.socket)?,
            preserve_fds: 0,
            // libcontainer needs this only to notify a seccomp agent, and there is none.
            container: Some(Container::new(
                self.id,
                ContainerStatus::Creating,
                None,
                self.directory,
                self.directory,
            )?),
            user_ns_config: self.user_namespace,
            cgroup_config: Cgroup::existing(cgroup.as_deref())?.config(self.id),
            detached: true,
            executor: Box::new(GuestExecutor { uid }),
            no_pivot: false,
            // Descriptors 0, 1 and 2 are those of the container already.
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

/// Removes from a spec what has no meaning in a guest.
fn remove_host_settings(spec: &mut Spec) {
    if let Some(process) = spec.process_mut() {
        // These are profiles of the host's kernel. The guest's kernel has no security module.
        process.set_apparmor_profile(None).set_selinux_label(None);
        // If this is `false` instead of missing, libcontainer installs the seccomp filter too late.
        if process.no_new_privileges() == Some(false) {
            process.set_no_new_privileges(None);
        }
    }
    if let Some(linux) = spec.linux_mut() {
        linux.set_mount_label(None).set_intel_rdt(None);
    }
}

/// Lets a process without privileges open `/dev/stdin`, `/dev/stdout` and `/dev/stderr`, as runc does.
fn change_owner_of_pipes(uid: u32) -> io::Result<()> {
    for stream in
        [rustix::io::dup(io::stdin())?, rustix::io::dup(io::stdout())?, rustix::io::dup(io::stderr())?]
    {
        if FileType::from_raw_mode(rustix::fs::fstat(&stream)?.st_mode) == FileType::Fifo {
            fchown(&stream, Some(uid), None)?;
        }
    }
    Ok(())
}

/// Creates a PID namespace with a first process, whose pid is returned. The namespace exists as long as that process.
fn create_pid_namespace(name: &str, of_user_namespace: bool) -> Result<i32, BoxError> {
    if of_user_namespace {
        user_namespace::enter()?;
    }
    unshare(CloneFlags::CLONE_NEWPID)?;
    pause::spawn(name)
}

/// The text of an error: runc's own for a command that cannot be run, and otherwise the error with its sources and the
/// first message that libcontainer has logged about it.
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
