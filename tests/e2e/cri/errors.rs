//! Bad input, through CRI: the caller learns what was wrong with which pod, and nothing is left behind.

use std::path::Path;

use anyhow::{Context, Result};
use pericarp_tests::{
    Node, PodBuilder, Runtime, api,
    node::{controller::NODE_RUN_DIR, machine::MachineProcess},
    on_node, on_pericarp,
};
use tonic::Status;

/// Asks for a pod that has to be refused; returns the error after checking that it names the pod and that nothing is
/// left.
async fn refused(node: &Node, pod: PodBuilder, name: &str) -> Result<Status> {
    let error = pod.try_run().await?.err().context("this pod should not run")?;
    assert_eq!(node.pods().await?, [], "after {error}");
    // "pod namespace/name (id)": the id is known from nowhere else.
    let named = format!("-{name} (");
    let (_, rest) = error.message().split_once(&named).with_context(|| format!("no {named:?} in {error}"))?;
    let id = rest.split(')').next().unwrap_or_default();
    assert_eq!(id.len(), 64, "an id in {error}");
    assert_eq!(MachineProcess::of_pod(id)?, None, "after {error}");
    assert!(!Path::new(NODE_RUN_DIR).join(id).exists(), "after {error}");
    Ok(error)
}

fn says(error: &Status, parts: &[&str]) {
    for part in parts {
        assert!(error.message().contains(part), "{part:?} is not in: {error}");
    }
}

#[test]
fn a_pod_on_the_hosts_network_is_refused_with_the_reason() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node
            .pod("hostnet")
            .with_namespaces(|namespaces| namespaces.set_network(api::NamespaceMode::Node));
        let error = refused(node, pod, "hostnet").await?;
        says(&error, &["hostNetwork"]);
        Ok(())
    })
}

#[test]
fn a_pod_for_windows_is_refused() -> Result<()> {
    on_pericarp(async |node| {
        let pod =
            node.pod("windows").with(|config| config.windows = Some(api::WindowsPodSandboxConfig::default()));
        says(&refused(node, pod, "windows").await?, &["a Windows pod"]);
        Ok(())
    })
}

#[test]
fn a_pod_on_the_hosts_processes_or_ipc_is_refused() -> Result<()> {
    on_pericarp(async |node| {
        let pod =
            node.pod("hostpid").with_namespaces(|namespaces| namespaces.set_pid(api::NamespaceMode::Node));
        says(&refused(node, pod, "hostpid").await?, &["hostPID"]);
        let pod =
            node.pod("hostipc").with_namespaces(|namespaces| namespaces.set_ipc(api::NamespaceMode::Node));
        says(&refused(node, pod, "hostipc").await?, &["hostIPC"]);
        Ok(())
    })
}

#[test]
fn a_mode_or_value_that_nobody_here_understands_is_refused_by_its_name() -> Result<()> {
    on_pericarp(async |node| {
        for (name, mode, said) in [
            ("container", 1, "the mode CONTAINER for its user namespace"),
            ("target", 3, "the mode TARGET for its user namespace"),
            (
                "ninth",
                9,
                "the value 9 of CRI's field linux.security_context.namespace_options.userns_options.mode",
            ),
        ] {
            let pod = node.pod(name).with_namespaces(|namespaces| {
                namespaces.userns_options = Some(api::UserNamespace { mode, ..Default::default() });
            });
            says(&refused(node, pod, name).await?, &[said]);
        }
        let pod = node.pooled_pod().await?;
        let container = pod
            .container("ipc")
            .with_security(|security| {
                let options = security.namespace_options.get_or_insert_default();
                options.set_ipc(api::NamespaceMode::Target);
            })
            .create()
            .await?;
        says(&container.try_start().await.unwrap_err(), &["the mode TARGET for its ipc namespace"]);
        assert_eq!(pod.idle_container("next").await?.shell("echo fine").await?, "fine");
        Ok(())
    })
}

#[test]
fn a_pod_larger_than_the_host_is_refused_with_the_figures() -> Result<()> {
    on_pericarp(async |node| {
        let memory = api::LinuxContainerResources { memory_limit_in_bytes: 1 << 40, ..Default::default() };
        let error = refused(node, node.pod("big").resources(memory), "big").await?;
        says(&error, &["1048576 MiB of memory"]);
        let cpu = api::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 300 * 100_000,
            ..Default::default()
        };
        let error = refused(node, node.pod("wide").resources(cpu), "wide").await?;
        says(&error, &["300 vCPUs"]);
        let pod = node.pod("odd").with(|config| {
            config.annotations.insert("io.pericarp.memory-mib".to_owned(), "much".to_owned());
        });
        says(&refused(node, pod, "odd").await?, &["io.pericarp.memory-mib", "\"much\""]);
        Ok(())
    })
}

#[test]
fn an_annotation_for_nested_virtualization_that_is_neither_yes_nor_no_is_refused() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.pod("perhaps").with(|config| {
            config.annotations.insert("io.pericarp.nested-virtualization".to_owned(), "perhaps".to_owned());
        });
        says(&refused(node, pod, "perhaps").await?, &["io.pericarp.nested-virtualization", "\"perhaps\""]);
        Ok(())
    })
}

#[test]
fn a_sysctl_that_the_guest_does_not_have_is_named() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.pod("sysctl").with_linux(|linux| {
            linux.sysctls.insert("net.core.no_such_key".to_owned(), "1".to_owned());
        });
        says(&refused(node, pod, "sysctl").await?, &["net.core.no_such_key"]);

        let pod = node.pod("good").with_linux(|linux| {
            linux.sysctls.insert("net.core.somaxconn".to_owned(), "777".to_owned());
        });
        let container = pod.run().await?.idle_container("idle").await?;
        assert_eq!(container.shell("cat /proc/sys/net/core/somaxconn").await?, "777");
        Ok(())
    })
}

/// What kubelet sees of a container that could not be started.
#[derive(Debug, PartialEq, Eq)]
struct FailedStart {
    code: tonic::Code,
    exit_code: i32,
    reason: String,
    /// The message from `exec:` on; before it, each runtime names itself.
    message: String,
}

/// Starts a container for each of the commands, in one pod; each has to fail.
async fn failed_starts(node: &Node, commands: &[&str]) -> Result<Vec<FailedStart>> {
    let pod = node.pooled_pod().await?;
    let mut failed = Vec::new();
    for (number, command) in commands.iter().enumerate() {
        let container = pod.container(&format!("broken-{number}")).command([*command]).create().await?;
        let error = container.try_start().await.err().context("this container should not start")?;
        let status = container.status().await?;
        let start = error.message().find("exec:").with_context(|| format!("no \"exec:\" in {error}"))?;
        let message = error.message()[start..].trim_end_matches(": unknown").to_owned();
        failed.push(FailedStart {
            code: error.code(),
            exit_code: status.exit_code,
            reason: status.reason,
            message,
        });
    }
    // The pod still works.
    assert_eq!(pod.idle_container("next").await?.shell("echo fine").await?, "fine");
    Ok(failed)
}

#[test]
fn a_command_that_is_not_in_the_image_fails_as_it_does_with_runc() -> Result<()> {
    on_node(async |node| {
        let commands = ["no-such-command", "/no/such/path", "/etc/passwd"];
        let expected = failed_starts(&node.with_runtime(Runtime::Runc), &commands).await?;
        for failed in &expected {
            assert_eq!((failed.exit_code, failed.reason.as_str()), (128, "StartError"));
        }
        if node.runtime != Runtime::Runc {
            assert_eq!(failed_starts(node, &commands).await?, expected);
        }
        Ok(())
    })
}

#[test]
fn a_volume_whose_source_has_gone_is_named() -> Result<()> {
    on_node(async |node| {
        let file = node.file("going", "soon gone\n")?;
        let pod = node.pooled_pod().await?;
        let container = pod.container("user").mount(&file, "/etc/going", true).create().await?;
        std::fs::remove_file(&file)?;
        let error = container.try_start().await.unwrap_err();
        says(&error, &["/etc/going"]);
        // The guest hands the error on, and paths of the host are none of its business.
        let names_source = error.message().contains(&file);
        assert_eq!(names_source, node.runtime == Runtime::Runc, "{error}");
        assert_eq!(pod.idle_container("next").await?.shell("echo fine").await?, "fine");
        Ok(())
    })
}

#[test]
fn a_specification_that_cannot_be_run_is_refused_with_the_reason() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let container = pod
            .container("relative")
            .with(|config| config.working_dir = "not/absolute".to_owned())
            .create()
            .await?;
        let error = container.try_start().await.unwrap_err();
        let message = error.message().to_lowercase();
        assert!(message.contains("cwd") || message.contains("working directory"), "{error}");
        assert!(message.contains("absolute"), "{error}");

        let resources = api::LinuxContainerResources {
            unified: [("memory.no_such_key".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        };
        let container = pod.container("cgroup").resources(resources).create().await?;
        says(&container.try_start().await.unwrap_err(), &["memory.no_such_key"]);
        assert_eq!(pod.idle_container("next").await?.shell("echo fine").await?, "fine");
        Ok(())
    })
}
