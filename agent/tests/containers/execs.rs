//! Many execs, and execs that go wrong.

use std::{collections::BTreeSet, fs, time::Duration};

use containerd_shim_protos::{api, events::task::TaskExit, protobuf::Message as _};
use pericarp_protos::{agent::TaskEvent, ttrpc::Code};
use serde_json::Value;

use crate::harness::{Agent, context, process, status};

/// Open descriptors, and processes that the agent has made or inherited.
fn holdings(agent: &Agent) -> (usize, Vec<String>) {
    let directory = format!("/proc/{}", agent.pid());
    let descriptors = fs::read_dir(format!("{directory}/fd")).unwrap().count();
    let children = fs::read_to_string(format!("{directory}/task/{}/children", agent.pid())).unwrap();
    (descriptors, children.split_whitespace().map(str::to_owned).collect())
}

fn resident(agent: &Agent) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Runs a hundred execs at once, each with an exit code and output of its own.
async fn hundred(agent: &Agent, round: usize) {
    let execs = (0..100).map(async |n| {
        let id = format!("e{round}-{n}");
        let output = agent.stream(&format!("{id}-stdout")).await;
        let script = format!("echo {n}; exit {}", n % 50);
        agent.exec("c1", &id, process(&["sh", "-c", &script]), &["stdout"]).await.unwrap();
        let (output, exit) = tokio::join!(output.read_to_end(), agent.wait("c1", &id));
        assert_eq!(String::from_utf8(output).unwrap(), format!("{n}\n"));
        assert_eq!(exit, n % 50);
        assert_eq!(agent.delete("c1", &id).await.unwrap().exit_status, n % 50);
    });
    futures::future::join_all(execs).await;
}

#[tokio::test]
async fn a_hundred_execs_at_once_are_all_answered_and_leave_nothing_behind() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sh", "-c", "while :; do echo busy; done"]);
    let mut log = agent.stream("c1-stdout").await;
    let init = agent.create("c1", &["stdout"]).await;
    agent.start_task("c1").await;
    // The container's own output goes on meanwhile.
    let reading = tokio::spawn(async move {
        loop {
            log.grant(65536).await;
            let mut taken = 0;
            while taken < 65536 {
                taken += log.read().await.expect("the container runs").len();
            }
        }
    });
    let descriptors = holdings(&agent).0;
    hundred(&agent, 0).await;
    let first = resident(&agent);
    hundred(&agent, 1).await;
    let second = resident(&agent);
    assert!(second < first + 1024, "{first} kB became {second} kB");
    // The connections of the streams are closed a moment after their ends.
    let expected = (descriptors, vec![init.to_string()]);
    let mut after = holdings(&agent);
    for _ in 0..1000 {
        if after == expected {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        after = holdings(&agent);
    }
    assert_eq!(after, expected, "descriptors and children");
    reading.abort();
}

#[tokio::test]
async fn an_exec_whose_helper_dies_is_an_error_and_leaves_no_process() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sleep", "1000"]);
    let init = agent.create("c1", &[]).await;
    agent.start_task("c1").await;
    // In a frozen cgroup the new process stops half-way, and its helper waits for it.
    let freeze = format!("/sys/fs/cgroup/pod-{}/c1/cgroup.freeze", agent.pid());
    fs::write(&freeze, "1").unwrap();
    let exec = agent.exec("c1", "e1", process(&["sleep", "1001"]), &[]);
    tokio::pin!(exec);
    let helper = loop {
        let (_, children) = holdings(&agent);
        let helper = children.into_iter().find(|pid| {
            let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let state = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            command.contains("launch-") && !state.contains("youki")
        });
        let joined =
            fs::read_to_string(freeze.replace("cgroup.freeze", "cgroup.procs")).unwrap().lines().count() > 1;
        if let Some(helper) = helper.filter(|_| joined) {
            break helper;
        }
        tokio::select! {
            result = &mut exec => panic!("{result:?}"),
            () = tokio::time::sleep(Duration::from_millis(20)) => {}
        }
    };
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(helper.parse().unwrap()), nix::sys::signal::SIGKILL)
        .unwrap();
    let (code, message) = status(&exec.await.unwrap_err());
    assert_eq!(code, Code::UNKNOWN);
    assert!(message.contains("ended with status 137"), "{message}");
    fs::write(&freeze, "0").unwrap();
    // SIGKILL takes effect now.
    let mut left = Vec::new();
    for _ in 0..1000 {
        let mut request = api::PidsRequest::new();
        request.id = "c1".into();
        let processes = agent.task.pids(context(), &request).await.unwrap().processes;
        left = processes.iter().map(|process| process.pid).collect();
        if left == [init] {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(left, [init], "the half-made process is left");
    agent.exec("c1", "e2", process(&["true"]), &[]).await.unwrap();
    assert_eq!(agent.wait("c1", "e2").await, 0);
}

#[tokio::test]
async fn the_ends_of_execs_are_told_before_the_end_of_their_container() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sleep", "1000"]);
    agent.create("c1", &[]).await;
    agent.start_task("c1").await;
    for exec in ["e1", "e2", "e3"] {
        agent.exec("c1", exec, process(&["sleep", "1000"]), &[]).await.unwrap();
    }
    // One that ends before anybody looks.
    agent.exec("c1", "quick", process(&["true"]), &[]).await.unwrap();
    agent.wait("c1", "quick").await;
    agent.kill("c1", 9).await.unwrap();
    agent.wait("c1", "").await;
    agent.delete("c1", "").await.unwrap();
    let events = agent.task_events("/tasks/delete").await;
    let topics: Vec<_> = events.iter().map(|event| event.topic.trim_start_matches("/tasks/")).collect();
    let expected =
        [vec!["create", "start"], ["exec-added", "exec-started"].repeat(4), vec!["exit"; 5], vec!["delete"]];
    assert_eq!(topics, expected.concat());
    let ended: Vec<_> = events.iter().filter(|event| event.topic == "/tasks/exit").map(exited).collect();
    assert_eq!((ended[0].as_str(), ended[4].as_str()), ("quick", "c1"), "{ended:?}");
}

/// Which process a `TaskExit` is about.
fn exited(event: &TaskEvent) -> String {
    TaskExit::parse_from_bytes(&event.payload.value).unwrap().id
}

/// What an exec that cannot be started says.
async fn refused(agent: &Agent, exec: &str, process: Value) -> (Code, String) {
    let error = agent.exec("c1", exec, process, &[]).await.unwrap_err();
    agent.delete("c1", exec).await.unwrap();
    status(&error)
}

#[tokio::test]
async fn an_exec_that_cannot_be_started_says_why() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sleep", "1000"]);
    agent.create("c1", &[]).await;
    agent.start_task("c1").await;
    let (_, message) = refused(&agent, "missing", process(&["/no/such"])).await;
    assert!(message.ends_with("exec: \"/no/such\": stat /no/such: no such file or directory"), "{message}");
    let (_, message) = refused(&agent, "data", process(&["/etc/not-a-program"])).await;
    assert!(message.ends_with("exec: \"/etc/not-a-program\": permission denied"), "{message}");
    let (_, message) = refused(&agent, "directory", process(&["/etc"])).await;
    assert!(message.contains("exec: \"/etc\": is a directory"), "{message}");
    let mut nowhere = process(&["true"]);
    nowhere["cwd"] = "/no/such/directory".into();
    let (_, message) = refused(&agent, "nowhere", nowhere).await;
    let expected =
        "chdir to cwd (\"/no/such/directory\") set in config.json failed: no such file or directory";
    assert!(message.ends_with(expected), "{message}");
    // None of them is left, and the container is as well as before.
    agent.exec("c1", "fine", process(&["true"]), &[]).await.unwrap();
    assert_eq!(agent.wait("c1", "fine").await, 0);
}

#[tokio::test]
async fn an_exec_has_what_was_asked_for_it_and_the_containers_cgroup_and_namespaces() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sleep", "1000"]);
    agent.create("c1", &[]).await;
    agent.start_task("c1").await;
    let script = "echo $WHO; pwd; id -u; id -g; id -G; grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status; \
                  ulimit -n; grep ^0: /proc/self/cgroup; for name in pid mnt cgroup net ipc uts; do \
                  [ $(readlink /proc/self/ns/$name) = $(readlink /proc/1/ns/$name) ] || echo another $name; done";
    let mut asked = process(&["sh", "-c", script]);
    asked["env"] = serde_json::json!(["PATH=/bin", "WHO=me"]);
    asked["cwd"] = "/tmp".into();
    asked["noNewPrivileges"] = true.into();
    asked["rlimits"] = serde_json::json!([{ "type": "RLIMIT_NOFILE", "soft": 77, "hard": 88 }]);
    asked["user"] = serde_json::json!({ "uid": 1000, "gid": 2000, "additionalGids": [3000] });
    let capabilities = ["CAP_KILL", "CAP_SYS_PTRACE"];
    asked["capabilities"] = serde_json::json!({
        "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
        "inheritable": capabilities, "ambient": capabilities,
    });
    let output = agent.stream("e1-stdout").await;
    agent.exec("c1", "e1", asked, &["stdout"]).await.unwrap();
    let output = String::from_utf8(output.read_to_end().await).unwrap();
    let expected =
        "me\n/tmp\n1000\n2000\n2000 3000\nCapEff:\t0000000000080020\nNoNewPrivs:\t1\nSeccomp:\t2\n77\n0::/\n";
    assert_eq!(output, expected);
}

#[tokio::test]
async fn a_terminal_has_the_size_that_was_asked_for_before_it_was_there() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sleep", "1000"]);
    agent.create("c1", &[]).await;
    agent.start_task("c1").await;
    let script = "until [ \"$(stty size)\" = '31 97' ]; do sleep 0.05; done; echo sized";
    let mut shell = process(&["sh", "-c", script]);
    shell["terminal"] = true.into();
    let stdout = agent.stream("e1-stdout").await;
    agent.add_exec("c1", "e1", shell, &["stdout"]).await.unwrap();
    let mut request = api::ResizePtyRequest::new();
    request.id = "c1".into();
    request.exec_id = "e1".into();
    (request.width, request.height) = (97, 31);
    agent.task.resize_pty(context(), &request).await.unwrap();
    agent.start_exec("c1", "e1").await.unwrap();
    // stty complains as long as the terminal has no size.
    let output = String::from_utf8(stdout.read_to_end().await).unwrap();
    assert!(output.ends_with("sized\r\n"), "{output}");
    assert_eq!(agent.wait("c1", "e1").await, 0);
}

/// Replaces a file of the root that all containers of an agent share by a FIFO: whoever opens it waits for ever.
fn make_fifo(agent: &Agent, name: &str) {
    let path = agent.path().join("rootfs").join(name);
    let _ = fs::remove_file(&path);
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
}

#[tokio::test]
async fn a_home_is_looked_up_without_the_libraries_and_pipes_of_the_image() {
    let agent = Agent::start().await;
    let root = agent.path().join("rootfs");
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n")
        .unwrap();
    // glibc would read this first, to learn which library of the image it is to load.
    make_fifo(&agent, "etc/nsswitch.conf");
    agent.add_container("c1", &["sleep", "1000"]);
    agent.create("c1", &[]).await;
    agent.start_task("c1").await;
    let home = async |exec: &str, uid: u32, variable: Option<&str>| {
        let output = agent.stream(&format!("{exec}-stdout")).await;
        let mut process = process(&["sh", "-c", "echo $HOME"]);
        process["user"]["uid"] = uid.into();
        process["env"].as_array_mut().unwrap().extend(variable.map(Value::from));
        agent.exec("c1", exec, process, &["stdout"]).await.unwrap();
        String::from_utf8(output.read_to_end().await).unwrap()
    };
    assert_eq!(home("e1", 0, None).await, "/root\n");
    assert_eq!(home("e2", 1000, Some("HOME=")).await, "/home/alice\n");
    assert_eq!(home("e3", 7, None).await, "/\n");
    assert_eq!(home("e4", 0, Some("HOME=/own")).await, "/own\n");
    make_fifo(&agent, "etc/passwd");
    assert_eq!(home("e5", 0, None).await, "/\n");
}

#[tokio::test]
async fn a_start_that_hangs_ends_with_the_exec_and_execs_that_wait_for_it_are_started() {
    /// As many as are started at a time.
    const STARTING: usize = 16;
    let agent = Agent::start().await;
    agent.add_container("c1", &["sleep", "1000"]);
    let init = agent.create("c1", &[]).await;
    agent.start_task("c1").await;
    // In a frozen cgroup new processes stop half-way.
    let freeze = format!("/sys/fs/cgroup/pod-{}/c1/cgroup.freeze", agent.pid());
    fs::write(&freeze, "1").unwrap();
    let names: Vec<_> = (0..STARTING + 2).map(|n| format!("e{n}")).collect();
    for name in &names {
        agent.add_exec("c1", name, process(&["true"]), &[]).await.unwrap();
    }
    let starts = futures::future::join_all(names.iter().map(|name| agent.start_exec("c1", name)));
    let removals = async {
        let launches = || {
            let (_, children) = holdings(&agent);
            let name = |pid: &String| {
                let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                command.split('\0').find(|argument| argument.starts_with("launch-")).map(str::to_owned)
            };
            // The first process was created by a launch, too, and has its own command by now.
            children.iter().filter_map(name).collect::<BTreeSet<_>>().len()
        };
        while launches() < STARTING {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(launches(), STARTING, "the others wait");
        // One of them waits, the other ones hang.
        agent.delete("c1", names.last().unwrap()).await.unwrap();
        for name in &names[..STARTING] {
            agent.delete("c1", name).await.unwrap();
        }
        fs::write(&freeze, "0").unwrap();
    };
    let (results, ()) = tokio::join!(starts, removals);
    for (name, result) in names.iter().zip(results) {
        if *name == names[STARTING] {
            result.unwrap();
        } else {
            let (code, message) = status(&result.unwrap_err());
            assert_eq!(code, Code::UNKNOWN, "{name}: {message}");
            assert!(message.contains("killed before its program ran"), "{name}: {message}");
        }
    }
    assert_eq!(agent.wait("c1", &names[STARTING]).await, 0);
    let sockets = format!("/proc/{}/root/run/pericarp/containers/0", agent.pid());
    let left: Vec<_> = fs::read_dir(sockets).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with("exec-")), "{left:?}");
    let (_, children) = holdings(&agent);
    assert_eq!(children, [init.to_string()]);
}
