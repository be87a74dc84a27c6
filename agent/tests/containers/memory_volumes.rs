//! Volumes in memory, as containers have them.

use std::fs;

use pericarp_protos::host::{Directory, MemoryVolume};
use serde_json::json;

use crate::harness::{Agent, context, status};

/// The volume `cache` with the directory `part` in it, as the controller describes them.
fn cache() -> MemoryVolume {
    let directory = |path: &str, mode, uid, gid| {
        let mut directory = Directory::new();
        directory.path = path.to_owned();
        (directory.mode, directory.uid, directory.gid) = (mode, uid, gid);
        directory
    };
    let mut volume = MemoryVolume::new();
    volume.name = "cache".to_owned();
    (volume.size_bytes, volume.inodes) = (1 << 20, 100);
    volume.directories = vec![directory("", 0o2777, 0, 4242), directory("part", 0o1777, 1000, 4242)];
    volume
}

/// Adds a container that has the source, a path of a volume, at `/tmp`.
fn add(agent: &Agent, id: &str, source: &str, mode: &str, script: &str) {
    let source = format!("/run/pericarp/memory/{source}");
    agent.add_container(id, &["sh", "-c", script]).change(|spec| {
        let options = json!(["rbind", "rprivate", mode]);
        let mount = json!({ "destination": "/tmp", "type": "bind", "source": source, "options": options });
        spec["mounts"].as_array_mut().unwrap().push(mount);
    });
}

/// Runs a container to its end, and returns its output.
async fn run(agent: &Agent, id: &str, source: &str, mode: &str, script: &str) -> String {
    add(agent, id, source, mode, script);
    let stdout = agent.stream(&format!("{id}-stdout")).await;
    agent.create(id, &["stdout"]).await;
    agent.start_task(id).await;
    let output = stdout.read_to_end().await;
    agent.wait(id, "").await;
    agent.delete(id, "").await.unwrap();
    String::from_utf8(output).unwrap()
}

/// The mounts of the agent below a directory of its own.
fn mounts_of_agent(agent: &Agent, below: &str) -> usize {
    let table = fs::read_to_string(format!("/proc/{}/mountinfo", agent.pid())).unwrap();
    table.lines().filter(|line| line.contains(&format!(" /run/pericarp/{below}/"))).count()
}

#[tokio::test]
async fn a_volume_in_memory_is_shared_and_stays() {
    let agent = Agent::start().await;
    *agent.host.memory_volumes.lock().unwrap() = vec![cache()];
    let look = "stat -f -c %T /tmp; stat -c '%a %u:%g' /tmp";
    let output = run(&agent, "c1", "cache", "rw", &format!("{look}; echo kept > /tmp/file")).await;
    assert_eq!(output, "tmpfs\n2777 0:4242\n");
    let output =
        run(&agent, "c2", "cache", "ro", "cat /tmp/file; (echo x > /tmp/x) 2>/dev/null || echo refused")
            .await;
    assert_eq!(output, "kept\nrefused\n");
    let output = run(&agent, "c3", "cache/part", "rw", &format!("{look}; echo inside > /tmp/x")).await;
    assert_eq!(output, "tmpfs\n1777 1000:4242\n");
    let script = "cat /tmp/part/x; dd if=/dev/zero of=/tmp/large bs=1024 count=1100 2>/dev/null || echo full";
    assert_eq!(run(&agent, "c4", "cache", "rw", script).await, "inside\nfull\n");
    // The mount for the subPath has gone with its container, and the volume stays.
    assert_eq!((mounts_of_agent(&agent, "memory"), mounts_of_agent(&agent, "memory-sub-paths")), (1, 0));
}

#[tokio::test]
async fn a_container_whose_sub_path_leads_elsewhere_is_refused_and_leaves_no_mount() {
    let agent = Agent::start().await;
    *agent.host.memory_volumes.lock().unwrap() = vec![cache()];
    // A program that is not there: the container fails after its subPath has been mounted.
    add(&agent, "broken", "cache/part", "rw", "true");
    agent.host.specs.lock().unwrap().get_mut("broken").unwrap()["process"]["args"] = json!(["nope"]);
    agent.task.create(context(), &Agent::create_request("broken", &[])).await.unwrap_err();
    assert_eq!(mounts_of_agent(&agent, "memory-sub-paths"), 0);

    let volume = format!("/proc/{}/root/run/pericarp/memory/cache", agent.pid());
    std::os::unix::fs::symlink("/", format!("{volume}/link")).unwrap();
    add(&agent, "link", "cache/link", "rw", "ls /tmp");
    let error = agent.task.create(context(), &Agent::create_request("link", &[])).await.unwrap_err();
    let (_, message) = status(&error);
    assert!(message.contains("container link") && message.contains("subPath"), "{message}");
}
