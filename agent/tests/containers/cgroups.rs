//! What a container's cgroup keeps it from, and the cgroups that a container makes.

use std::fs;

use pericarp_protos::ttrpc::Code;
use serde_json::{Value, json};

use crate::harness::{Agent, status};

/// Runs a shell's commands in a container with the capabilities to create device nodes and to read the kernel's log.
/// Returns its exit status.
async fn run(agent: &Agent, id: &str, commands: &str, rules: &Value) -> u32 {
    let commands = &format!("exec 2> /said\n{commands}");
    agent.add_container(id, &["sh", "-c", commands]).change(|spec| {
        spec["linux"]["resources"] = json!({ "devices": rules });
        for set in ["bounding", "effective", "permitted"] {
            let capabilities = spec["process"]["capabilities"][set].as_array_mut().unwrap();
            capabilities.extend(["CAP_MKNOD".into(), "CAP_SYSLOG".into()]);
        }
    });
    agent.create(id, &[]).await;
    agent.start_task(id).await;
    let exit = agent.wait(id, "").await;
    agent.delete(id, "").await.unwrap();
    let said = fs::read_to_string(agent.path().join("rootfs/said")).unwrap();
    println!("{id}: {exit} {said}");
    exit
}

/// Makes a node of each device and opens it; all of them must be such that it can, or cannot, be done.
fn open(devices: &[&str], how: &str, may: bool) -> String {
    let tries = devices.iter().map(|device| {
        let not = if may { "" } else { "! " };
        format!(
            "busybox rm -f /dev/my; busybox mknod /dev/my {device} || exit 1; \
             {not}true 2> /dev/null {how} /dev/my || exit 2;"
        )
    });
    tries.collect()
}

#[tokio::test]
async fn a_container_opens_no_device_but_those_of_its_rules() {
    let agent = Agent::start().await;
    // The kernel's log, and the first serial line by its own and by the console's number.
    let others = ["c 1 11", "c 4 64", "c 5 1", "b 254 0"];
    let nothing = json!([{ "allow": false, "access": "rwm" }]);
    let script = open(&others, "<", false) + &open(&["c 1 3", "c 1 5"], "<", true);
    assert_eq!(run(&agent, "nothing", &script, &nothing).await, 0);
    // The console's number is nobody's but who may use everything.
    let console =
        json!([nothing[0], { "allow": true, "type": "c", "major": 5, "minor": 1, "access": "rwm" }]);
    assert_eq!(run(&agent, "console", &open(&["c 5 1"], "<", false), &console).await, 0);
    let log = json!([nothing[0], { "allow": true, "type": "c", "major": 1, "minor": 11, "access": "r" }]);
    let script = open(&["c 1 11"], "<", true) + &open(&["c 1 11"], ">", false);
    assert_eq!(run(&agent, "log", &script, &log).await, 0);
    let all = json!([{ "allow": true, "access": "rwm" }]);
    assert_eq!(run(&agent, "all", &open(&["c 1 11", "c 1 3"], "<", true), &all).await, 0);
}

#[tokio::test]
async fn device_rules_that_cannot_be_followed_refuse_the_container() {
    let agent = Agent::start().await;
    agent.add_container("c1", &["true"]).change(|spec| {
        spec["linux"]["resources"] = json!({ "devices": [
            { "allow": true, "type": "b", "major": 254, "access": "rwm" },
            { "allow": false, "type": "b", "major": 254, "minor": 0, "access": "rwm" },
        ] });
    });
    let request = Agent::create_request("c1", &[]);
    let error = agent.task.create(crate::harness::context(), &request).await.unwrap_err();
    let (code, message) = status(&error);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
    assert!(message.contains("wildcards"), "{message}");
    assert!(!fs::exists(format!("/sys/fs/cgroup/pod-{}/c1", agent.pid())).unwrap());
}

#[tokio::test]
async fn a_container_is_deleted_with_cgroups_below_its_own_deeper_than_a_path_can_be_long() {
    let agent = Agent::start().await;
    agent.add_container("deep", &["sleep", "1000"]).change(|spec| spec["linux"]["resources"] = json!({}));
    agent.create("deep", &[]).await;
    agent.start_task("deep").await;
    let directory = format!("/sys/fs/cgroup/pod-{}/deep", agent.pid());
    // As a container does to which its cgroups are given.
    let name = "x".repeat(200);
    let mut made = std::process::Command::new("sh");
    made.current_dir(&directory);
    let script = format!("for i in $(seq 30); do mkdir {name} && cd -P {name} 2> /dev/null || exit 0; done");
    assert!(made.args(["-c", &script]).status().unwrap().success());
    agent.kill("deep", 9).await.unwrap();
    agent.wait("deep", "").await;
    agent.delete("deep", "").await.unwrap();
    assert!(!fs::exists(&directory).unwrap());
}
