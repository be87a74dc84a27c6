//! containerd's task events (`api/events/task.proto`).

use containerd_shim_protos::{
    api,
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused,
        TaskResumed, TaskStart,
    },
    protobuf::MessageField,
};

use crate::{
    container::{Container, Process},
    controller::{EventLog, EventSubject, timestamp},
    launch::Exit,
};

pub fn publish_create(events: &EventLog, request: &api::CreateTaskRequest, container: &Container) {
    let mut io = TaskIO::new();
    io.stdin.clone_from(&request.stdin);
    io.stdout.clone_from(&request.stdout);
    io.stderr.clone_from(&request.stderr);
    io.terminal = request.terminal;
    let mut event = TaskCreate::new();
    event.container_id.clone_from(&request.id);
    event.bundle.clone_from(&request.bundle);
    event.io = MessageField::some(io);
    event.pid = container.init.pid().cast_unsigned();
    events.publish(EventSubject::Container, "/tasks/create", &event);
}

pub fn publish_start(events: &EventLog, container: &Container, pid: i32) {
    let mut event = TaskStart::new();
    event.container_id = container.id.to_string();
    event.pid = pid.cast_unsigned();
    events.publish(EventSubject::Container, "/tasks/start", &event);
}

pub fn publish_exit(events: &EventLog, container: &Container, process: &Process, exit: Exit) {
    let (subject, id) = match process.exec_id.as_str() {
        "" => (EventSubject::Container, container.id.to_string()),
        exec_id => (EventSubject::Exec, exec_id.to_owned()),
    };
    let mut event = TaskExit::new();
    event.container_id = container.id.to_string();
    event.id = id;
    event.pid = process.pid().cast_unsigned();
    event.exit_status = exit.status;
    event.exited_at = MessageField::some(timestamp(exit.at));
    events.publish(subject, "/tasks/exit", &event);
}

/// `response` is that of the `Delete` call for the container.
pub fn publish_delete(events: &EventLog, container_id: String, response: &api::DeleteResponse) {
    let mut event = TaskDelete::new();
    event.container_id = container_id;
    event.pid = response.pid;
    event.exit_status = response.exit_status;
    event.exited_at = response.exited_at.clone();
    events.publish(EventSubject::Container, "/tasks/delete", &event);
}

pub fn publish_exec_added(events: &EventLog, container_id: String, exec_id: String) {
    let mut event = TaskExecAdded::new();
    event.container_id = container_id;
    event.exec_id = exec_id;
    events.publish(EventSubject::Exec, "/tasks/exec-added", &event);
}

pub fn publish_exec_started(events: &EventLog, container: &Container, process: &Process) {
    let mut event = TaskExecStarted::new();
    event.container_id = container.id.to_string();
    event.exec_id.clone_from(&process.exec_id);
    event.pid = process.pid().cast_unsigned();
    events.publish(EventSubject::Exec, "/tasks/exec-started", &event);
}

pub fn publish_paused(events: &EventLog, container_id: String) {
    let mut event = TaskPaused::new();
    event.container_id = container_id;
    events.publish(EventSubject::Container, "/tasks/paused", &event);
}

pub fn publish_resumed(events: &EventLog, container_id: String) {
    let mut event = TaskResumed::new();
    event.container_id = container_id;
    events.publish(EventSubject::Container, "/tasks/resumed", &event);
}

pub fn publish_oom(events: &EventLog, container_id: &str) {
    let mut event = TaskOOM::new();
    container_id.clone_into(&mut event.container_id);
    events.publish(EventSubject::Container, "/tasks/oom", &event);
}
