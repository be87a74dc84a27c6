//! These mount for real, so they need root.

use std::{path::PathBuf, sync::Arc};

use serde_json::json;

use super::*;
use crate::{
    host::{
        rootfs::{Bind, HostMount, HostMountKind},
        share::testing::JailedProcess,
    },
    pod::{
        life::{Life, Running},
        owned::Resource,
        tests::undriven,
    },
};

/// A running pod that may have containers, and what stands for its machine.
struct RunningPod {
    directory: tempfile::TempDir,
    pod: Arc<Pod>,
    task: PodTask,
    process: JailedProcess,
}

impl RunningPod {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (pod, mut task) = undriven(directory.path());
        std::fs::create_dir(pod.directory()).unwrap();
        std::fs::create_dir(directory.path().join("root")).unwrap();
        let process = JailedProcess::start();
        task.owned.add(Resource::Machine { process: process.process() });
        task.publish(|_| ());
        let pid = process.process().pid;
        task.life = Life::running_with(Running::new(pid, pod.spec.resources, pod.size));
        Self { directory, pod, task, process }
    }

    fn request(&self, argument: &str) -> ContainerRequest {
        let spec = json!({
            "ociVersion": "1.2.0",
            "process": { "cwd": "/", "args": [argument] },
            "root": { "path": "rootfs" },
            "linux": {},
        });
        let bind = Bind { source: self.directory.path().join("root"), recursive: true, read_only: false };
        let mount = HostMount { kind: HostMountKind::Bind(bind), has_mapped_ids: false };
        let rootfs = RootFs::Mounted(mount);
        ContainerRequest { spec: spec.to_string().into_bytes(), given_devices: None, rootfs }
    }

    fn rootfs(&self) -> PathBuf {
        self.process.host_path("c1/rootfs")
    }

    /// The mount that the container's root file system is; 0 if there is none.
    fn mount(&self) -> u64 {
        let flags = rustix::fs::AtFlags::empty();
        let statx = rustix::fs::statx(rustix::fs::CWD, self.rootfs(), flags, rustix::fs::StatxFlags::MNT_ID);
        statx.map_or(0, |statx| statx.stx_mnt_id)
    }
}

fn argument(prepared: &Prepared) -> String {
    let spec: serde_json::Value = serde_json::from_slice(&prepared.spec).unwrap();
    spec["process"]["args"][0].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn what_was_prepared_ahead_is_what_the_guest_gets() {
    let mut running = RunningPod::new();
    let (id, request) = ("c1".parse().unwrap(), running.request("one"));
    running.task.prepare_ahead("c1".parse().unwrap(), request.clone()).await;
    let mount = running.mount();
    assert!(mount != 0 && running.pod.progress.knows("c1"));
    let prepared =
        running.task.prepare_for_guest(&id, request.clone(), AgentFeatures::CURRENT).await.unwrap();
    assert_eq!(argument(&prepared), "one");
    assert_eq!(running.mount(), mount, "it is not mounted again");
    // A guest that asks again has it made anew, as it has given up what it had.
    // The kernel gives a mount's number again only after its last user has gone.
    let _in_use = std::fs::File::open(running.rootfs()).unwrap();
    running.task.prepare_for_guest(&id, request, AgentFeatures::CURRENT).await.unwrap();
    assert_ne!(running.mount(), mount);
}

#[tokio::test]
async fn what_was_changed_after_it_was_prepared_is_prepared_anew() {
    let mut running = RunningPod::new();
    running.task.prepare_ahead("c1".parse().unwrap(), running.request("one")).await;
    let changed = running.request("two");
    let prepared = running
        .task
        .prepare_for_guest(&"c1".parse().unwrap(), changed, AgentFeatures::CURRENT)
        .await
        .unwrap();
    assert_eq!(argument(&prepared), "two");
}

#[tokio::test]
async fn what_was_prepared_is_released_when_its_source_has_deleted_it() {
    let mut running = RunningPod::new();
    let id = "c1".parse().unwrap();
    // No guest has asked for it.
    running.task.prepare_ahead("c1".parse().unwrap(), running.request("one")).await;
    running.task.release_deleted(&id).await;
    assert!(!running.rootfs().exists() && !running.pod.progress.knows("c1"));
    assert_eq!(running.task.all_limits(), []);
    // One has, and has given up.
    let request = running.request("one");
    running.task.prepare_ahead("c1".parse().unwrap(), request.clone()).await;
    running.task.prepare_for_guest(&id, request, AgentFeatures::CURRENT).await.unwrap();
    // It is not prepared again behind the guest's back.
    let mount = running.mount();
    running.task.prepare_ahead("c1".parse().unwrap(), running.request("two")).await;
    assert_eq!(running.mount(), mount);
    running.task.release_deleted(&id).await;
    assert!(!running.rootfs().exists());
    // It may have been released by its guest before.
    running.task.release_deleted(&id).await;
}

#[tokio::test]
async fn a_pod_has_so_many_containers_prepared_ahead_and_no_more() {
    let mut running = RunningPod::new();
    for number in 0..AHEAD_MAX + 3 {
        let request = running.request("one");
        running.task.prepare_ahead(format!("c{number}").parse().unwrap(), request).await;
    }
    assert_eq!(running.task.life.running().unwrap().prepared_ahead.len(), AHEAD_MAX);
    running.task.life.advance(Life::Ended);
    let request = running.request("one");
    running.task.prepare_ahead("late".parse().unwrap(), request).await;
    assert!(!running.process.host_path("late").exists());
}
