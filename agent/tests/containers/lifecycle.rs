//! Containers and execs, from their making to their end.

use containerd_shim_protos::{api, types::task::Status};
use pericarp_protos::{
    protobuf::Message,
    ttrpc::{self, Code, proto},
};

use tokio::net::UnixStream;

use crate::harness::{Agent, context, process, status, topic};

#[tokio::test]
async fn a_container_lives_and_dies() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sh", "-c", "echo $GREETING; echo problem >&2; exit 7"]);
    // containerd opens the streams first.
    let (stdout, stderr) = (agent.stream("c1-stdout").await, agent.stream("c1-stderr").await);
    let pid = agent.create("c1", &["stdout", "stderr"]).await;
    assert!(pid > 0);
    let state = agent.state("c1").await.unwrap();
    assert_eq!((state.status.unwrap(), state.pid), (Status::CREATED, pid));
    assert_eq!(state.bundle, "/host/c1");
    agent.start_task("c1").await;
    let (output, errors) = tokio::join!(stdout.read_to_end(), stderr.read_to_end());
    assert_eq!(String::from_utf8(output).unwrap(), "hello\n");
    assert_eq!(String::from_utf8(errors).unwrap(), "problem\n");
    assert_eq!(agent.wait("c1", "").await, 7);
    let state = agent.state("c1").await.unwrap();
    assert_eq!((state.status.unwrap(), state.exit_status), (Status::STOPPED, 7));
    let deleted = agent.delete("c1", "").await.unwrap();
    assert_eq!((deleted.exit_status, deleted.pid), (7, pid));
    assert!(deleted.exited_at.seconds > 0);
    assert_eq!(status(&agent.state("c1").await.unwrap_err()).0, Code::NOT_FOUND);
    assert_eq!(*agent.host.released.lock().unwrap(), ["c1"]);

    let events = agent.events(6).await;
    let topics: Vec<_> = events.iter().map(topic).collect();
    assert_eq!(topics, ["/tasks/create", "timing", "/tasks/start", "timing", "/tasks/exit", "/tasks/delete"]);
    let sequence: Vec<_> = events.iter().map(|event| event.sequence).collect();
    assert_eq!(sequence, [1, 2, 3, 4, 5, 6]);
    assert_eq!(events[4].task().payload.type_url, "containerd.events.TaskExit");
}

#[tokio::test]
async fn tasks_are_served_only_in_a_configured_pod() {
    let agent = Agent::start_unconfigured().await;
    agent.add_container("c1", &["true"]);
    let error = agent.task.create(context(), &Agent::create_request("c1", &[])).await.unwrap_err();
    assert_eq!(status(&error).0, Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn a_container_that_cannot_be_made_leaves_nothing_behind() {
    let agent = Agent::start().await;
    let create = async |id: &str| {
        let error = agent.task.create(context(), &Agent::create_request(id, &["stdout"])).await.unwrap_err();
        let (code, message) = status(&error);
        assert!(message.contains(&format!("container {id}")), "{message}");
        (code, message)
    };
    assert_eq!(create("unknown").await.0, Code::NOT_FOUND);

    agent.add_container("nope", &["nope"]);
    let (_, message) = create("nope").await;
    assert!(message.ends_with("exec: \"nope\": executable file not found in $PATH"), "{message}");
    agent.add_container("data", &["/etc/not-a-program"]);
    let (_, message) = create("data").await;
    assert!(message.ends_with("exec: \"/etc/not-a-program\": permission denied"), "{message}");
    agent.add_container("mount", &["true"]).change(|spec| {
        spec["mounts"][3]["source"] = "/does/not/exist".into();
    });
    let (_, message) = create("mount").await;
    assert!(message.contains("/does/not/exist"), "{message}");
    agent.add_container("broken", &["true"]).change(|spec| spec["process"]["cwd"] = 5.into());
    assert_eq!(create("broken").await.0, Code::INVALID_ARGUMENT);

    let released = agent.host.released.lock().unwrap().clone();
    assert_eq!(released, ["nope", "data", "mount", "broken"]);
    // An id can be used again once what was wrong is right.
    agent.add_container("nope", &["true"]);
    agent.create("nope", &["stdout"]).await;
}

#[tokio::test]
async fn an_id_is_used_once_at_a_time() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sleep", "1000"]);
    agent.create("c1", &[]).await;
    let error = agent.task.create(context(), &Agent::create_request("c1", &[])).await.unwrap_err();
    assert_eq!(status(&error).0, Code::ALREADY_EXISTS);
}

#[tokio::test]
async fn a_container_is_stopped_by_signals() {
    let agent = Agent::start().await;
    agent.add_container("term", &["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.05; done"]);
    agent.create("term", &[]).await;
    agent.start_task("term").await;
    let error = agent.delete("term", "").await.unwrap_err();
    assert_eq!(status(&error).0, Code::FAILED_PRECONDITION);
    // The trap is set a moment after the start: the first signal may be too early for it.
    let wait = agent.wait("term", "");
    tokio::pin!(wait);
    let exit = loop {
        let _ = agent.kill("term", 15).await;
        tokio::select! {
            exit = &mut wait => break exit,
            () = tokio::time::sleep(std::time::Duration::from_millis(50)) => {}
        }
    };
    assert_eq!(exit, 3);
    assert_eq!(status(&agent.kill("term", 9).await.unwrap_err()).0, Code::NOT_FOUND);

    agent.add_container("kill", &["sleep", "1000"]);
    agent.create("kill", &[]).await;
    agent.start_task("kill").await;
    agent.kill("kill", 9).await.unwrap();
    assert_eq!(agent.wait("kill", "").await, 137);
}

#[tokio::test]
async fn a_created_container_can_be_deleted() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sleep", "1000"]);
    agent.create("c1", &[]).await;
    assert_eq!(agent.delete("c1", "").await.unwrap().exit_status, 137);
}

#[tokio::test]
async fn a_container_that_has_exited_is_not_taken_for_one_that_never_was() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["true"]);
    let pid = agent.create("c1", &[]).await;
    agent.start_task("c1").await;
    assert_eq!(agent.wait("c1", "").await, 0);
    // containerd deletes tasks without processes when it is started again.
    let mut request = api::PidsRequest::new();
    request.id = "c1".into();
    let pids = agent.task.pids(context(), &request).await.unwrap().processes;
    assert_eq!(pids.iter().map(|process| process.pid).collect::<Vec<_>>(), [pid]);
    agent.delete("c1", "").await.unwrap();
}

/// Makes a call of the Task API on a connection of its own. ttrpc's client does not send a request whose time is over,
/// and keeps its connection until it has the response.
async fn call_by_hand(agent: &Agent, method: &str, timeout_nano: i64, message: &impl Message) -> UnixStream {
    let request = ttrpc::Request {
        service: "containerd.task.v3.Task".into(),
        method: method.into(),
        timeout_nano,
        payload: message.write_to_bytes().unwrap(),
        ..Default::default()
    };
    let mut socket = UnixStream::connect(agent.path().join("agent.sock")).await.unwrap();
    let message = proto::Message::new_request(1, request).unwrap();
    proto::GenMessage::try_from(message).unwrap().write_to(&mut socket).await.unwrap();
    socket
}

#[tokio::test]
async fn a_container_is_deleted_though_nobody_waits_for_it() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sleep", "1000"]);
    agent.create("c1", &[]).await;
    let mut delete = api::DeleteRequest::new();
    delete.id = "c1".into();
    let held = agent.host.release.lock().await;
    let mut socket = call_by_hand(&agent, "Delete", 1, &delete).await;
    let answer = proto::GenMessage::read_from(&mut socket).await.unwrap();
    let answer = ttrpc::Response::parse_from_bytes(&answer.payload).unwrap();
    assert_eq!(answer.status.code(), Code::DEADLINE_EXCEEDED);
    drop(held);
    agent.task_events("/tasks/delete").await;
    assert_eq!(status(&agent.state("c1").await.unwrap_err()).0, Code::NOT_FOUND);
    assert_eq!(*agent.host.released.lock().unwrap(), ["c1"]);
}

#[tokio::test]
async fn a_container_is_made_though_its_client_has_gone_away() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sleep", "1000"]);
    let held = agent.host.prepare.lock().await;
    let create = Agent::create_request("c1", &[]);
    let client = call_by_hand(&agent, "Create", 0, &create).await;
    agent.host.asked.notified().await;
    drop(client);
    // The agent, which has one thread, has seen that by the time that it has answered what came later.
    for _ in 0..3 {
        agent.state("c1").await.unwrap_err();
    }
    drop(held);
    agent.task_events("/tasks/create").await;
    agent.start_task("c1").await;
    assert_eq!(agent.state("c1").await.unwrap().status.unwrap(), Status::RUNNING);
}

#[tokio::test]
async fn a_process_is_executed_in_a_running_container() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sleep", "1000"]);
    agent.create("c1", &[]).await;
    let early = agent.exec("c1", "e0", process(&["true"]), &[]).await.unwrap_err();
    assert_eq!(status(&early).0, Code::FAILED_PRECONDITION);
    agent.start_task("c1").await;

    let output = agent.stream("e1-stdout").await;
    agent
        .exec("c1", "e1", process(&["sh", "-c", "echo $$ $(cat /proc/1/comm); exit 5"]), &["stdout"])
        .await
        .unwrap();
    let output = String::from_utf8(output.read_to_end().await).unwrap();
    let (pid, first) = output.trim().split_once(' ').unwrap();
    assert!(pid.parse::<u32>().unwrap() > 1 && first == "sleep", "{output}");
    assert_eq!(agent.wait("c1", "e1").await, 5);
    assert_eq!(agent.delete("c1", "e1").await.unwrap().exit_status, 5);
    assert_eq!(status(&agent.delete("c1", "e1").await.unwrap_err()).0, Code::NOT_FOUND);

    let error = agent.exec("c1", "e2", process(&["nope"]), &[]).await.unwrap_err();
    let message = status(&error).1;
    assert!(message.ends_with("exec: \"nope\": executable file not found in $PATH"), "{message}");
    agent.delete("c1", "e2").await.unwrap();
    // Everything ends with the container.
    agent.exec("c1", "e3", process(&["sleep", "1000"]), &[]).await.unwrap();
    let again = agent.exec("c1", "e3", process(&["true"]), &[]).await.unwrap_err();
    assert_eq!(status(&again).0, Code::ALREADY_EXISTS);
    agent.kill("c1", 9).await.unwrap();
    assert_eq!(agent.wait("c1", "e3").await, 137);
    assert_eq!(agent.wait("c1", "").await, 137);
    agent.delete("c1", "").await.unwrap();
}

#[tokio::test]
async fn the_seccomp_filter_holds_for_a_container_and_for_what_is_executed_in_it() {
    let agent = Agent::start().await;
    for no_new_privileges in [None, Some(false), Some(true)] {
        let id = format!("c-{no_new_privileges:?}").replace(['(', ')'], "");
        let command =
            ["sh", "-c", "hostname other || echo refused; grep Seccomp: /proc/self/status; sleep 1000"];
        agent.add_container(&id, &command).change(|spec| {
            if let Some(value) = no_new_privileges {
                spec["process"]["noNewPrivileges"] = value.into();
            }
        });
        let mut output = agent.stream(&format!("{id}-stdout")).await;
        agent.create(&id, &["stdout"]).await;
        agent.start_task(&id).await;
        output.grant(65536).await;
        let mut text = String::new();
        while !text.contains("Seccomp") {
            text += &String::from_utf8(output.read().await.unwrap()).unwrap();
        }
        assert!(text.starts_with("refused\n") && text.contains("Seccomp:\t2"), "{id}: {text}");
        let exec = format!("{id}-exec");
        let output = agent.stream(&format!("{exec}-stdout")).await;
        let mut process = process(&["sh", "-c", "hostname other || echo refused"]);
        if let Some(value) = no_new_privileges {
            process["noNewPrivileges"] = value.into();
        }
        agent.exec(&id, &exec, process, &["stdout"]).await.unwrap();
        assert_eq!(output.read_to_end().await, b"refused\n", "{id}");
    }
}

#[tokio::test]
async fn a_container_cannot_see_the_agents_descriptors_or_ignore_sigpipe() {
    let agent = Agent::start().await;
    agent.add_container(
        "c1",
        &[
            "sh",
            "-c",
            "ls /proc/self/fd; grep -E 'SigIgn|SigBlk' /proc/self/status; cat /proc/self/oom_score_adj",
        ],
    );
    let output = agent.stream("c1-stdout").await;
    agent.create("c1", &["stdout"]).await;
    agent.start_task("c1").await;
    let output = String::from_utf8(output.read_to_end().await).unwrap();
    // 3 is the directory that ls itself reads.
    let expected = "0\n1\n2\n3\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n1000\n";
    assert_eq!(output, expected);
}

#[tokio::test]
async fn a_container_is_paused_counted_and_limited() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sh", "-c", "while :; do :; done"]);
    let pid = agent.create("c1", &[]).await;
    agent.start_task("c1").await;
    let mut request = api::PauseRequest::new();
    request.id = "c1".into();
    agent.task.pause(context(), &request).await.unwrap();
    assert_eq!(agent.state("c1").await.unwrap().status.unwrap(), Status::PAUSED);
    let error = agent.exec("c1", "e1", process(&["true"]), &[]).await.unwrap_err();
    assert_eq!(status(&error).0, Code::FAILED_PRECONDITION);
    let mut request = api::ResumeRequest::new();
    request.id = "c1".into();
    agent.task.resume(context(), &request).await.unwrap();
    assert_eq!(agent.state("c1").await.unwrap().status.unwrap(), Status::RUNNING);

    let mut request = api::PidsRequest::new();
    request.id = "c1".into();
    let pids = agent.task.pids(context(), &request).await.unwrap().processes;
    assert_eq!(pids.iter().map(|process| process.pid).collect::<Vec<_>>(), [pid]);
    let mut request = api::StatsRequest::new();
    request.id = "c1".into();
    let stats = agent.task.stats(context(), &request).await.unwrap().stats;
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
    assert!(!stats.value.is_empty());

    let mut request = api::UpdateTaskRequest::new();
    request.id = "c1".into();
    let error = agent.task.update(context(), &request).await.unwrap_err();
    assert_eq!(status(&error).0, Code::INVALID_ARGUMENT);
}

/// A file system whose server never answers holds its callers where nothing but SIGKILL reaches them.
#[tokio::test]
async fn a_pause_that_does_not_succeed_in_time_lets_everything_go_on() {
    let agent = Agent::start().await;
    let script = "mknod /dev/shm/fuse c 10 229 && exec 3<>/dev/shm/fuse && mkdir -p /dev/shm/hung && \
        mount -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 none /dev/shm/hung && \
        { ls /dev/shm/hung & } && until grep -q 'State:.D' /proc/$!/status; do :; done; \
        while :; do echo on; sleep 1; done";
    agent.add_container("c1", &["sh", "-c", script]).change(|spec| {
        spec["process"]["capabilities"] = process(&[])["capabilities"].clone();
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set].as_array_mut().unwrap().push("CAP_MKNOD".into());
        }
        let rule =
            serde_json::json!({ "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm" });
        spec["linux"]["resources"]["devices"] = [rule].into();
        // A seccomp filter of its own takes part in nothing here.
        spec["linux"].as_object_mut().unwrap().remove("seccomp");
    });
    let mut output = agent.stream("c1-stdout").await;
    agent.create("c1", &["stdout"]).await;
    agent.start_task("c1").await;
    output.grant(1 << 20).await;
    assert_eq!(output.read().await.unwrap(), b"on\n");
    let mut request = api::PauseRequest::new();
    request.id = "c1".into();
    let (code, message) = status(&agent.task.pause(context(), &request).await.unwrap_err());
    assert!(message.contains("have not stopped within 10 s, so they go on"), "{code:?}: {message}");
    assert_eq!(agent.state("c1").await.unwrap().status.unwrap(), Status::RUNNING);
    // More than it may have written before.
    for _ in 0..5 {
        output.read().await.unwrap();
    }
    agent.exec("c1", "e1", process(&["true"]), &[]).await.unwrap();
    assert_eq!(agent.wait("c1", "e1").await, 0);
    agent.kill("c1", 9).await.unwrap();
    assert_eq!(agent.wait("c1", "").await, 137);
    agent.delete("c1", "").await.unwrap();
}

#[tokio::test]
async fn containers_can_share_the_pods_pid_namespace() {
    let agent = Agent::start().await;
    let share = |spec: &mut serde_json::Value| {
        spec["linux"]["namespaces"][0]["path"] = "/run/pericarp/ns/pid".into();
    };
    agent.add_container("c1", &["sh", "-c", "sleep 1234 & wait"]).change(share);
    agent
        .add_container("c2", &["sh", "-c", "until ps | grep -q 'sleep 123[4]'; do :; done; cat /proc/1/comm"])
        .change(share);
    agent.create("c1", &[]).await;
    agent.start_task("c1").await;
    let output = agent.stream("c2-stdout").await;
    agent.create("c2", &["stdout"]).await;
    agent.start_task("c2").await;
    assert_eq!(output.read_to_end().await, b"pause\n");
    assert_eq!(agent.wait("c2", "").await, 0);
    // The first process is nobody's init here: the rest must be killed for it.
    let pids = async || {
        let mut request = api::PidsRequest::new();
        request.id = "c1".into();
        agent.task.pids(context(), &request).await.unwrap().processes.len()
    };
    assert_eq!(pids().await, 2);
    agent.kill("c1", 9).await.unwrap();
    assert_eq!(agent.wait("c1", "").await, 137);
    // Where there are none, the first one is named.
    assert_eq!(pids().await, 1);
    agent.delete("c1", "").await.unwrap();
}

#[tokio::test]
async fn the_first_process_of_a_shared_pid_namespace_has_nothing_to_take() {
    let agent = Agent::start().await;
    let script = "grep -E '^(Cap...|NoNewPrivs):' /proc/1/status; ls -A /proc/1/root/ | wc -l; \
        ls /proc/1/fd | wc -l; ls -A /proc/1/cwd/ | wc -l";
    agent.add_container("c1", &["sh", "-c", script]).change(|spec| {
        spec["linux"]["namespaces"][0]["path"] = "/run/pericarp/ns/pid".into();
        // Who may trace any process sees the most.
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set] = serde_json::json!(["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"]);
        }
    });
    let output = agent.stream("c1-stdout").await;
    agent.create("c1", &["stdout"]).await;
    agent.start_task("c1").await;
    let output = String::from_utf8(output.read_to_end().await).unwrap();
    let none = "0000000000000000";
    let capabilities = ["Inh", "Prm", "Eff", "Bnd", "Amb"].map(|set| format!("Cap{set}:\t{none}\n")).concat();
    assert_eq!(output, format!("{capabilities}NoNewPrivs:\t1\n0\n0\n0\n"));
    assert_eq!(agent.wait("c1", "").await, 0);
    agent.delete("c1", "").await.unwrap();
}

#[tokio::test]
async fn processes_that_die_of_real_time_signals_have_died() {
    let agent = Agent::start().await;
    // In a PID namespace of its own the kernel would keep signals without a handler from a container's first process.
    agent.add_container("c1", &["sleep", "1234"]).change(|spec| {
        spec["linux"]["namespaces"][0]["path"] = "/run/pericarp/ns/pid".into();
    });
    agent.create("c1", &[]).await;
    agent.start_task("c1").await;
    agent.exec("c1", "e1", process(&["sleep", "1234"]), &[]).await.unwrap();
    let mut kill = api::KillRequest::new();
    (kill.id, kill.exec_id, kill.signal) = ("c1".into(), "e1".into(), 34);
    agent.task.kill(context(), &kill).await.unwrap();
    assert_eq!(agent.wait("c1", "e1").await, 128 + 34);
    agent.kill("c1", 64).await.unwrap();
    assert_eq!(agent.wait("c1", "").await, 128 + 64);
    agent.delete("c1", "").await.unwrap();
}
