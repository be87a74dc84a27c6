//! The Controller as newer containerds than the node's call it. What CRI of containerd 2.4 sends is in
//! `pericarp_tests::direct::sandbox`.

use std::{collections::HashMap, path::Path};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{cgroups_v2::metrics::Metrics, protobuf::Message as _};
use oci_spec::runtime::Spec;
use pericarp_tests::{
    api,
    direct::{
        controller::{Controller, pod_config},
        netns::NetworkNamespace,
        sandbox::{Sandbox, SandboxInfo},
    },
    node::machine::MachineProcess,
    on_pericarp,
};
use serde_json::{Value, json};
use tonic::{Code, Status};

/// A pod's CRI configuration with something of each kind that kubelet sets.
fn config(name: &str) -> api::PodSandboxConfig {
    let metadata = api::PodSandboxMetadata {
        name: name.to_owned(),
        uid: format!("{name}-uid"),
        namespace: "default".to_owned(),
        attempt: 1,
    };
    api::PodSandboxConfig {
        metadata: Some(metadata),
        hostname: name.to_owned(),
        log_directory: format!("/var/log/pods/default_{name}"),
        dns_config: Some(api::DnsConfig { servers: vec!["10.96.0.10".to_owned()], ..Default::default() }),
        labels: HashMap::from([("app".to_owned(), name.to_owned())]),
        annotations: HashMap::from([("kubernetes.io/config.source".to_owned(), "api".to_owned())]),
        linux: Some(api::LinuxPodSandboxConfig {
            sysctls: HashMap::from([("net.core.somaxconn".to_owned(), "512".to_owned())]),
            security_context: Some(api::LinuxSandboxSecurityContext {
                namespace_options: Some(api::NamespaceOption {
                    pid: api::NamespaceMode::Container.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..pod_config(name)
    }
}

/// A sandbox id that begins with a name.
fn id(name: &str) -> String {
    format!("{name:0<64}")
}

/// The numbers that containerd would read, which accepts no other type.
async fn metrics(sandbox: &mut Sandbox) -> Result<Metrics> {
    let metric = sandbox.metrics().await?.context("there is no metric")?;
    ensure!(metric.id == sandbox.record.sandbox_id && metric.timestamp.is_some(), "{metric:?}");
    let data = metric.data.context("the metric is empty")?;
    assert_eq!(data.type_url, "io.containerd.cgroups.v2.Metrics");
    Ok(Metrics::parse_from_bytes(&data.value)?)
}

#[test]
fn a_pod_as_containerd_2_4_makes_it_is_ready_and_described_in_types_that_go_reads() -> Result<()> {
    on_pericarp(async |node| {
        let controller = Controller::serve("").await?;
        let netns = NetworkNamespace::new(node.name()).await?;
        let config = config("newer");
        let mut sandbox = Sandbox::new(&controller, &id("newer"), config.clone(), &netns).await?;
        let platform = sandbox.platform().await?.context("no platform")?;
        assert_eq!((platform.os.as_str(), platform.architecture.as_str()), ("linux", "amd64"));
        sandbox.create_with_annotations(HashMap::from([("anything".into(), "else".into())])).await?;
        // containerd 2.4 may ask for the status of a pod whose pause image it is still pulling.
        let created = sandbox.status(true).await?;
        assert_eq!((created.state.as_str(), created.pid), ("SANDBOX_NOTREADY", 0));
        let info: SandboxInfo = serde_json::from_str(&created.info["info"])?;
        assert_eq!((info.pid, info.process_status.as_str()), (0, "stopped"));

        let started = sandbox.start().await?;
        assert!(started.pid > 0 && started.created_at.is_some(), "{started:?}");
        assert_eq!(started.sandbox_id, id("newer"));
        // CRI hands these to the task service, which takes the protocol before the `+`.
        assert_eq!(started.version, 3);
        assert!(started.address.starts_with("ttrpc+hvsock:///"), "{}", started.address);
        // NRI reads the spec.
        let spec = started.spec.context("Start returns no spec")?;
        assert_eq!(spec.type_url, "types.containerd.io/opencontainers/runtime-spec/1/Spec");
        let spec: Spec = serde_json::from_slice(&spec.value)?;
        assert_eq!(spec.hostname().as_deref(), Some("newer"));
        let linux = spec.linux().as_ref().context("a spec without linux")?;
        let sysctls = linux.sysctl().clone().unwrap_or_default();
        assert_eq!(sysctls.get("net.core.somaxconn").map(String::as_str), Some("512"));
        let cgroup = linux.cgroups_path().as_ref().context("a spec without a cgroup")?;
        let cgroup = Path::new("/sys/fs/cgroup").join(cgroup.strip_prefix("/")?);
        assert!(cgroup.join("cgroup.procs").exists(), "{cgroup:?}");

        let wait = sandbox.wait();
        let status = sandbox.status(true).await?;
        assert_eq!((status.state.as_str(), status.pid), ("SANDBOX_READY", started.pid));
        assert_eq!((&status.address, status.version), (&started.address, 3));
        let mut keys: Vec<_> = status.info.keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["info", "pericarp"]);
        let info: SandboxInfo = serde_json::from_str(&status.info["info"])?;
        assert_eq!((info.pid, info.process_status.as_str()), (started.pid, "running"));
        assert!(!info.net_namespace_closed);
        assert_eq!(info.runtime_type, "io.containerd.pericarp.v1");
        assert_eq!(info.config, Some(config));
        let pericarp: Value = serde_json::from_str(&status.info["pericarp"])?;
        assert_eq!(pericarp["netns"], json!(netns.path()));
        let quiet = sandbox.status(false).await?;
        assert!(quiet.info.is_empty() && quiet.state == "SANDBOX_READY", "{quiet:?}");

        sandbox.stop().await?;
        let stopped = sandbox.status(true).await?;
        assert_eq!((stopped.state.as_str(), stopped.pid), ("SANDBOX_NOTREADY", 0));
        assert!(stopped.exited_at.is_some());
        serde_json::from_str::<SandboxInfo>(&stopped.info["info"])?;
        let ended = wait.await??;
        assert_eq!(ended.exited_at, stopped.exited_at);
        sandbox.shut_down().await?;
        assert_eq!(sandbox.status(true).await.unwrap_err().code(), Code::NotFound);
        netns.remove().await?;
        controller.stop().await
    })
}

#[test]
fn a_pods_metrics_are_complete_while_it_runs_and_empty_before_and_after() -> Result<()> {
    on_pericarp(async |node| {
        let controller = Controller::serve("").await?;
        let netns = NetworkNamespace::new(node.name()).await?;
        let mut sandbox = Sandbox::new(&controller, &id("counted"), config("counted"), &netns).await?;
        sandbox.create().await?;
        assert_eq!(metrics(&mut sandbox).await?, Metrics::new());
        sandbox.start().await?;
        let wait = sandbox.wait();
        let running = metrics(&mut sandbox).await?;
        let cpu = running.cpu.as_ref().context("no cpu")?;
        // The machine has booted a kernel.
        assert!(cpu.usage_usec > 10_000 && cpu.usage_usec >= cpu.user_usec, "{running:?}");
        let memory = running.memory.as_ref().context("no memory")?;
        assert!(memory.usage > 16 << 20 && memory.usage < memory.usage_limit, "{running:?}");
        assert!(memory.anon + memory.shmem + memory.file > 8 << 20, "{running:?}");
        assert!(running.pids.current > 1, "{running:?}");
        let later = metrics(&mut sandbox).await?.cpu.into_option().context("no cpu")?;
        assert!(later.usage_usec >= cpu.usage_usec, "{later:?} comes after {cpu:?}");
        sandbox.stop().await?;
        assert_eq!(metrics(&mut sandbox).await?, Metrics::new());
        sandbox.shut_down().await?;
        wait.await??;
        netns.remove().await?;
        controller.stop().await
    })
}

fn resources(cpu_milli: i64, mib: i64) -> api::LinuxContainerResources {
    api::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: cpu_milli * 100,
        cpu_shares: 512,
        memory_limit_in_bytes: mib << 20,
        ..Default::default()
    }
}

/// The vCPUs and the MiB of memory that `info` has.
async fn size(sandbox: &mut Sandbox) -> Result<(Value, Value)> {
    let status = sandbox.status(true).await?;
    let info: Value = serde_json::from_str(&status.info["pericarp"])?;
    Ok((info["vcpus"].clone(), info["memoryMib"].clone()))
}

#[test]
fn a_pod_is_resized_as_containerd_2_4_asks_for_it_or_not_at_all() -> Result<()> {
    on_pericarp(async |node| {
        let controller = Controller::serve("[limits]\nvcpus = 4\nmemory_mib = 1024").await?;
        let netns = NetworkNamespace::new(node.name()).await?;
        let mut sandbox = Sandbox::new(&controller, &id("resized"), config("resized"), &netns).await?;
        sandbox.create().await?;
        sandbox.start().await?;
        let wait = sandbox.wait();
        assert_eq!(size(&mut sandbox).await?, (json!(1), json!(512)));
        // Pod and overhead together.
        sandbox.update_resources(Some(resources(500, 64)), Some(resources(1500, 704))).await?;
        assert_eq!(size(&mut sandbox).await?, (json!(2), json!(768)));
        for (cpu_milli, mib, named) in [(7500, 704, "8 vCPUs"), (1500, 4096, "4160 MiB")] {
            let refused =
                sandbox.update_resources(Some(resources(500, 64)), Some(resources(cpu_milli, mib))).await;
            let refused = refused.unwrap_err();
            assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
            assert!(refused.message().contains(named), "{refused}");
            assert_eq!(size(&mut sandbox).await?, (json!(2), json!(768)), "after {refused}");
        }
        let refuse = |result: Result<(), Status>, named: &str| {
            let refused = result.unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
            assert!(refused.message().contains(named), "{named:?} is not in: {refused}");
        };
        refuse(sandbox.update(&["runtime"]).await, "runtime");
        sandbox.set_extension(("hologram", "io.example/Hologram"), &json!({ "depth": 3 }));
        refuse(sandbox.update_resources(None, Some(resources(1000, 600))).await, "hologram");
        assert_eq!(size(&mut sandbox).await?, (json!(2), json!(768)));
        sandbox.record.extensions.remove("hologram");
        // Without limits the pod has its processors as at its start; memory that it was started with stays.
        sandbox.update_resources(None, None).await?;
        assert_eq!(size(&mut sandbox).await?, (json!(1), json!(512)));
        // What CRI itself keeps means nothing to a machine.
        sandbox.record.extensions.remove("updated-resources");
        sandbox.update(&["extensions", "labels"]).await?;
        assert_eq!(size(&mut sandbox).await?, (json!(1), json!(512)));
        sandbox.stop().await?;
        let late = sandbox.update_resources(None, Some(resources(1000, 600))).await.unwrap_err();
        assert_eq!(late.code(), Code::FailedPrecondition, "{late}");
        sandbox.shut_down().await?;
        wait.await??;
        netns.remove().await?;
        controller.stop().await
    })
}

#[test]
fn a_pod_that_was_created_and_never_started_can_be_removed() -> Result<()> {
    on_pericarp(async |node| {
        let controller = Controller::serve("").await?;
        let netns = NetworkNamespace::new(node.name()).await?;
        let mut sandbox = Sandbox::new(&controller, &id("unstarted"), config("unstarted"), &netns).await?;
        sandbox.create().await?;
        let early = sandbox.update_resources(None, Some(resources(1000, 600))).await.unwrap_err();
        assert_eq!(early.code(), Code::FailedPrecondition, "{early}");
        sandbox.stop().await?;
        sandbox.shut_down().await?;
        assert_eq!(sandbox.status(false).await.unwrap_err().code(), Code::NotFound);
        // It has left nothing in the way of another of its id, which is removed without a Stop.
        sandbox.create().await?;
        sandbox.shut_down().await?;
        assert_eq!(controller.pod_directories()?, Vec::<String>::new());
        assert_eq!(MachineProcess::of_pod(&id("unstarted"))?, None);
        netns.remove().await?;
        controller.stop().await
    })
}

#[test]
fn a_pod_that_containerd_2_4_asks_for_and_nobody_has_made_is_not_found() -> Result<()> {
    on_pericarp(async |node| {
        let controller = Controller::serve("").await?;
        let netns = NetworkNamespace::new(node.name()).await?;
        let mut sandbox = Sandbox::new(&controller, &id("unknown"), config("unknown"), &netns).await?;
        let refused = [
            sandbox.start().await.map(drop),
            sandbox.wait().await?.map(drop),
            sandbox.status(true).await.map(drop),
            sandbox.metrics().await.map(drop),
            sandbox.update_resources(None, Some(resources(1000, 600))).await,
            sandbox.stop().await,
            sandbox.shut_down().await,
        ];
        for (number, refused) in refused.into_iter().enumerate() {
            let refused = refused.unwrap_err();
            assert_eq!(refused.code(), Code::NotFound, "call {number}: {refused}");
            assert!(refused.message().contains(&id("unknown")), "call {number}: {refused}");
        }
        netns.remove().await?;
        controller.stop().await
    })
}
