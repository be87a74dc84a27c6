//! Every call of the Task API in the states in which it is refused, with the codes of containerd's own shim.

use std::fs;

use containerd_shim_protos::{
    api, cgroups_v2::metrics::Metrics, protobuf::Message as _, types::task::Status,
};
use pericarp_protos::{
    protobuf::{MessageField, well_known_types::any::Any},
    ttrpc::{self, Code},
};
use serde_json::{Value, json};

use crate::harness::{Agent, context, process, status};

/// Calls by name, each for a container and, where it has one, an exec.
async fn call(agent: &Agent, name: &str, id: &str, exec_id: &str) -> ttrpc::Result<()> {
    macro_rules! made {
        ($call:ident, $request:ident, $with_exec:tt) => {{
            let mut request = api::$request::new();
            request.id = id.to_owned();
            made!(@exec request, $with_exec);
            agent.task.$call(context(), &request).await.map(drop)
        }};
        (@exec $request:ident, true) => { $request.exec_id = exec_id.to_owned(); };
        (@exec $request:ident, false) => {};
    }
    match name {
        "create" => agent.task.create(context(), &Agent::create_request(id, &[])).await.map(drop),
        "start" => made!(start, StartRequest, true),
        "delete" => made!(delete, DeleteRequest, true),
        "state" => made!(state, StateRequest, true),
        "pids" => made!(pids, PidsRequest, false),
        "pause" => made!(pause, PauseRequest, false),
        "resume" => made!(resume, ResumeRequest, false),
        "checkpoint" => made!(checkpoint, CheckpointTaskRequest, false),
        "kill" => made!(kill, KillRequest, true),
        "exec" => agent.add_exec(id, exec_id, process(&["sleep", "1000"]), &[]).await,
        "resize" => made!(resize_pty, ResizePtyRequest, true),
        "close" => made!(close_io, CloseIORequest, true),
        "update" => update(agent, id, json!({})).await,
        "wait" => made!(wait, WaitRequest, true),
        "stats" => made!(stats, StatsRequest, false),
        "connect" => made!(connect, ConnectRequest, false),
        "shutdown" => made!(shutdown, ShutdownRequest, false),
        other => panic!("no such call: {other}"),
    }
}

async fn update(agent: &Agent, id: &str, resources: Value) -> ttrpc::Result<()> {
    let mut any = Any::new();
    any.type_url = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into();
    any.value = serde_json::to_vec(&resources).unwrap();
    let mut request = api::UpdateTaskRequest::new();
    request.id = id.to_owned();
    request.resources = MessageField::some(any);
    agent.task.update(context(), &request).await.map(drop)
}

/// Makes calls, one after the other, and compares how each ends.
async fn check(agent: &Agent, state: &str, calls: &[(&str, &str, &str, Option<Code>)]) {
    for (name, id, exec_id, expected) in calls {
        let result = call(agent, name, id, exec_id).await;
        let code = result.as_ref().err().map(|error| status(error).0);
        assert_eq!(code, *expected, "{state}: {name} of {id}/{exec_id}: {result:?}");
        if let Err(error) = &result {
            assert!(status(error).1.contains(id), "{state}: {name}: {error} does not name {id}");
        }
    }
}

const NOT_FOUND: Option<Code> = Some(Code::NOT_FOUND);
const EXISTS: Option<Code> = Some(Code::ALREADY_EXISTS);
const STATE: Option<Code> = Some(Code::FAILED_PRECONDITION);
const OK: Option<Code> = None;

#[tokio::test]
async fn every_call_for_what_does_not_exist_says_so() {
    let agent = Agent::start().await;
    let calls = [
        "create", "start", "delete", "state", "pids", "pause", "resume", "kill", "exec", "resize", "close",
        "update", "wait", "stats",
    ];
    for name in calls {
        check(&agent, "no container", &[(name, "nobody", "e1", NOT_FOUND)]).await;
    }
    // Not these: containerd connects before there is a container, and shuts down after the last.
    check(&agent, "no container", &[("connect", "nobody", "", OK), ("shutdown", "nobody", "", OK)]).await;
    agent.add_container("c1", &["sleep", "1000"]);
    agent.create("c1", &[]).await;
    agent.start_task("c1").await;
    for name in ["start", "delete", "state", "kill", "resize", "close", "wait"] {
        check(&agent, "no exec", &[(name, "c1", "nobody", NOT_FOUND)]).await;
    }
}

#[tokio::test]
async fn what_is_no_id_is_refused_where_something_is_to_be_made_of_it() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sleep", "1000"]);
    agent.create("c1", &[]).await;
    agent.start_task("c1").await;
    let invalid = Some(Code::INVALID_ARGUMENT);
    for id in ["", "..", "../c1", "/c1", "a b"] {
        check(&agent, "no id", &[("create", id, "", invalid), ("exec", "c1", id, invalid)]).await;
    }
}

#[tokio::test]
async fn a_call_that_does_not_fit_the_state_is_refused_as_containerd_expects() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sleep", "1000"]);
    agent.create("c1", &[]).await;
    check(
        &agent,
        "created",
        &[
            ("create", "c1", "", EXISTS),
            ("exec", "c1", "e1", STATE),
            ("pause", "c1", "", STATE),
            ("resume", "c1", "", STATE),
            ("checkpoint", "c1", "", Some(Code::UNIMPLEMENTED)),
            ("update", "c1", "", OK),
            ("stats", "c1", "", OK),
            ("start", "c1", "", OK),
        ],
    )
    .await;
    check(
        &agent,
        "running",
        &[
            ("start", "c1", "", STATE),
            ("delete", "c1", "", STATE),
            ("create", "c1", "", EXISTS),
            ("resume", "c1", "", STATE),
            ("exec", "c1", "e1", OK),
            ("exec", "c1", "e1", EXISTS),
            // Announced, not started: there is nothing to signal.
            ("kill", "c1", "e1", STATE),
            ("start", "c1", "e1", OK),
            ("start", "c1", "e1", STATE),
            ("delete", "c1", "e1", STATE),
            ("resize", "c1", "e1", OK),
            ("close", "c1", "e1", OK),
            // Signal 0 asks whether it is there.
            ("kill", "c1", "e1", OK),
            ("exec", "c1", "e2", OK),
            ("delete", "c1", "e2", OK),
            ("shutdown", "c1", "", OK),
        ],
    )
    .await;
    check(
        &agent,
        "paused",
        &[
            ("pause", "c1", "", OK),
            ("pause", "c1", "", STATE),
            ("delete", "c1", "", STATE),
            ("start", "c1", "", STATE),
            ("exec", "c1", "e3", OK),
            ("start", "c1", "e3", STATE),
            ("delete", "c1", "e3", OK),
            ("update", "c1", "", OK),
            ("resume", "c1", "", OK),
            ("resume", "c1", "", STATE),
        ],
    )
    .await;
    agent.kill("c1", 9).await.unwrap();
    assert_eq!((agent.wait("c1", "").await, agent.wait("c1", "e1").await), (137, 137));
    check(
        &agent,
        "stopped",
        &[
            ("create", "c1", "", EXISTS),
            ("start", "c1", "", STATE),
            ("exec", "c1", "e3", STATE),
            ("pause", "c1", "", STATE),
            ("resume", "c1", "", STATE),
            ("update", "c1", "", STATE),
            ("resize", "c1", "", STATE),
            ("kill", "c1", "e1", NOT_FOUND),
            ("state", "c1", "", OK),
            ("wait", "c1", "", OK),
            ("delete", "c1", "e1", OK),
            ("delete", "c1", "e1", NOT_FOUND),
        ],
    )
    .await;
    let (code, message) = status(&agent.kill("c1", 9).await.unwrap_err());
    assert_eq!(code, Code::NOT_FOUND);
    // containerd looks for these words.
    assert!(message.contains("process already finished"), "{message}");
    check(
        &agent,
        "deleted",
        &[
            ("delete", "c1", "", OK),
            ("delete", "c1", "", NOT_FOUND),
            ("kill", "c1", "", NOT_FOUND),
            ("exec", "c1", "e4", NOT_FOUND),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_signal_reaches_one_process_or_all() {
    let agent = Agent::start().await;
    // The first process goes on until its children have ended.
    let script = "trap : TERM; sleep 1234 & sleep 1234 & \
        until [ $(ps -o args | grep -c '^sleep 1234') = 2 ]; do :; done; \
        echo ready; wait; wait; wait; exit 3";
    agent.add_container("c1", &["sh", "-c", script]);
    let mut output = agent.stream("c1-stdout").await;
    agent.create("c1", &["stdout"]).await;
    agent.start_task("c1").await;
    output.grant(65536).await;
    assert_eq!(output.read().await.unwrap(), b"ready\n");
    agent.exec("c1", "e1", process(&["sleep", "1000"]), &[]).await.unwrap();
    let mut request = api::KillRequest::new();
    request.id = "c1".into();
    request.exec_id = "e1".into();
    request.signal = 15;
    agent.task.kill(context(), &request).await.unwrap();
    assert_eq!(agent.wait("c1", "e1").await, 143);
    assert_eq!(agent.state("c1").await.unwrap().status.unwrap(), Status::RUNNING);
    let error = {
        request.exec_id = String::new();
        request.signal = 999;
        agent.task.kill(context(), &request).await.unwrap_err()
    };
    assert_eq!(status(&error).0, Code::INVALID_ARGUMENT);
    request.signal = 15;
    request.all = true;
    tokio::spawn(output.read_to_end());
    // Everybody waits for the same end.
    let (one, two, three, killed) = tokio::join!(
        agent.wait("c1", ""),
        agent.wait("c1", ""),
        agent.wait("c1", ""),
        agent.task.kill(context(), &request),
    );
    killed.unwrap();
    assert_eq!([one, two, three], [3; 3]);
}

#[tokio::test]
async fn limits_are_changed_and_nonsense_is_refused_with_its_reason() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sleep", "1000"]);
    agent.create("c1", &[]).await;
    agent.start_task("c1").await;
    let directory = format!("/sys/fs/cgroup/pod-{}/c1", agent.pid());
    let read =
        |name: &str| fs::read_to_string(format!("{directory}/{name}")).map(|text| text.trim().to_owned());
    let has = |name: &str| agent.cgroup_has("c1", name);
    for (resources, file, expected) in [
        (json!({ "memory": { "limit": 64 << 20 } }), "memory.max", "67108864"),
        (json!({ "memory": { "reservation": 32 << 20 } }), "memory.low", "33554432"),
        (json!({ "cpu": { "quota": 50_000, "period": 100_000 } }), "cpu.max", "50000 100000"),
        (json!({ "pids": { "limit": 55 } }), "pids.max", "55"),
        (json!({ "cpu": { "cpus": "0" } }), "cpuset.cpus", "0"),
        (json!({ "unified": { "memory.high": "50331648" } }), "memory.high", "50331648"),
        (json!({ "unified": { "pids.max": "44" } }), "pids.max", "44"),
        (
            json!({ "hugepageLimits": [{ "pageSize": "2MB", "limit": 4 << 20 }] }),
            "hugetlb.2MB.max",
            "4194304",
        ),
    ] {
        if has(file) {
            update(&agent, "c1", resources.clone())
                .await
                .unwrap_or_else(|error| panic!("{resources}: {error}"));
            assert_eq!(read(file).unwrap(), expected, "{resources}");
        }
    }
    // What was not named stays.
    if has("memory.max") {
        assert_eq!(read("memory.max").unwrap(), "67108864");
    }
    for nonsense in [
        json!({ "unified": { "no.such.file": "1" } }),
        json!({ "unified": { "../escape": "1" } }),
        json!({ "unified": { "pids.max": "many" } }),
        json!({ "cpu": { "cpus": "4000" } }),
        json!({ "memory": { "limit": "much" } }),
    ] {
        let error = update(&agent, "c1", nonsense.clone()).await.unwrap_err();
        let (code, message) = status(&error);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{nonsense}: {message}");
        assert!(message.contains("container c1"), "{message}");
    }
}

#[tokio::test]
async fn a_small_share_of_the_cpu_does_not_slow_the_making_of_a_container() {
    let agent = Agent::start().await;
    let directory = format!("/sys/fs/cgroup/pod-{}/poor", agent.pid());
    let limits = json!({ "cpu": { "shares": 2, "quota": 1000, "period": 1_000_000 } });
    agent.add_container("poor", &["true"]).change(|spec| spec["linux"]["resources"] = limits);
    // A thousandth of a CPU: this would take minutes.
    agent.create("poor", &[]).await;
    let read = |name: &str| fs::read_to_string(format!("{directory}/{name}")).unwrap_or_default();
    if !agent.cgroup_has("poor", "cpu.max") {
        return;
    }
    assert_eq!((read("cpu.max").as_str(), read("cpu.weight").as_str()), ("1000 1000000\n", "1\n"));
    assert!(read("cpu.stat").contains("nr_throttled 0\n"), "{}", read("cpu.stat"));
    // Nor its end.
    agent.delete("poor", "").await.unwrap();
}

#[tokio::test]
async fn statistics_have_a_value_for_every_controller() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["sh", "-c", "head -c 5000000 /dev/zero >/dev/null; sleep 1000"]);
    agent.create("c1", &[]).await;
    agent.start_task("c1").await;
    let has = |name: &str| agent.cgroup_has("c1", name);
    let mut request = api::StatsRequest::new();
    request.id = "c1".into();
    let stats = agent.task.stats(context(), &request).await.unwrap().stats;
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
    let metrics = Metrics::parse_from_bytes(&stats.value).unwrap();
    assert!(metrics.cpu.usage_usec > 0, "{metrics:?}");
    assert_eq!(metrics.memory.is_some(), has("memory.current"));
    assert_eq!(metrics.memory_events.is_some(), has("memory.events"));
    assert_eq!(metrics.pids.is_some(), has("pids.current"));
    assert_eq!(metrics.io.is_some(), has("io.stat"));
    assert_eq!(metrics.hugetlb.is_empty(), !has("hugetlb.2MB.current"));
    // As runc's shim has it, without an entry where there is no controller.
    assert!(
        metrics.rdma.is_some() && (has("rdma.current") || metrics.rdma.current.is_empty()),
        "{metrics:?}"
    );
    if has("memory.current") {
        assert!(metrics.memory.usage > 0 && metrics.memory.usage_limit == u64::MAX, "{metrics:?}");
    }
    if has("pids.current") {
        assert!((1..=3).contains(&metrics.pids.current), "{metrics:?}");
    }
}
