//! Containers: their life, exit, limits and statistics, and what they see of their image and specification.

use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use pericarp_tests::{BUSYBOX, BUSYBOX_USR1, api, on_node};

#[test]
fn a_container_tells_its_exit_code_and_times() -> Result<()> {
    on_node(async |node| {
        let before = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos();
        let pod = node.pooled_pod().await?;
        let container = pod.container("seven").script("sleep 5; exit 7").create().await?;
        let created = container.status().await?;
        assert_eq!(created.state(), api::ContainerState::ContainerCreated);
        container.start().await?;
        let running = container.status().await?;
        assert_eq!(running.state(), api::ContainerState::ContainerRunning);
        let exited = container.wait_for_exit().await?;
        let after = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos();

        assert_eq!((exited.exit_code, exited.reason.as_str()), (7, "Error"));
        let times = [exited.created_at, exited.started_at, exited.finished_at].map(i128::from);
        assert!(i128::try_from(before)? <= times[0] && times[0] < times[1], "{times:?}");
        // From its creation, because on a busy node the container may run a while before its start is known.
        let ran = times[2] - times[0];
        // The guest's clock may differ from the node's by a little.
        assert!((4_900_000_000..60_000_000_000).contains(&ran), "five seconds of sleep took {ran} ns");
        assert!(times[1] < times[2], "{times:?}");
        assert!(times[2] <= i128::try_from(after)? + 100_000_000, "{times:?} end after {after}");
        assert_eq!(exited.image.as_ref().map(|image| image.image.as_str()), Some(BUSYBOX));
        assert_eq!(exited.log_path, container.log_path().display().to_string());

        let (done, _) = pod.container("zero").command(["true"]).run().await?;
        assert_eq!((done.exit_code, done.reason.as_str()), (0, "Completed"));

        container.remove().await?;
        assert!(container.status().await.is_err(), "a removed container is not known any more");
        container.remove().await
    })
}

#[test]
fn stopping_a_container_sends_term_first_and_kill_after_the_grace_period() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let obedient = pod
            .container("obedient")
            .script("trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.1; done")
            .start()
            .await?;
        let deaf = pod
            .container("deaf")
            .script("trap '' TERM; echo ready; while :; do sleep 0.1; done")
            .start()
            .await?;
        for container in [&obedient, &deaf] {
            container.wait_for_output("ready\n").await?;
        }

        let start = Instant::now();
        obedient.stop(100).await?;
        assert!(start.elapsed() < Duration::from_secs(90), "it took {:?}", start.elapsed());
        let status = obedient.status().await?;
        assert_eq!((status.state(), status.exit_code), (api::ContainerState::ContainerExited, 3));
        assert_eq!(obedient.log()?.stdout(), "ready\nbye\n");

        let start = Instant::now();
        deaf.stop(2).await?;
        assert!(start.elapsed() >= Duration::from_secs(2), "it was killed after {:?}", start.elapsed());
        assert_eq!(deaf.status().await?.exit_code, 128 + 9);
        deaf.stop(2).await
    })
}

#[test]
fn a_container_is_stopped_by_the_signal_of_its_image() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let container = pod
            .container("usr1")
            .script("trap 'exit 4' USR1; trap '' TERM; echo ready; while :; do sleep 0.1; done")
            .image(BUSYBOX_USR1)
            .start()
            .await?;
        container.wait_for_output("ready\n").await?;
        container.stop(20).await?;
        assert_eq!(container.status().await?.exit_code, 4);
        Ok(())
    })
}

#[test]
fn a_pod_goes_on_when_one_of_its_containers_ends() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let stays = pod.idle_container("stays").await?;
        for attempt in 0..2 {
            let container = pod
                .container("comes-back")
                .script("echo attempt; exit 1")
                .with(|config| config.metadata.get_or_insert_default().attempt = attempt)
                .start()
                .await?;
            assert_eq!(container.wait_for_exit().await?.exit_code, 1);
            container.remove().await?;
        }
        assert!(pod.is_ready().await?);
        stays.shell("true").await?;
        Ok(())
    })
}

#[test]
fn limits_hold_inside_the_container_and_can_be_changed() -> Result<()> {
    on_node(async |node| {
        let resources = api::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 64 << 20,
            ..Default::default()
        };
        let pod = node.pod("limits").resources(resources.clone()).run().await?;
        let container = pod.container("limited").resources(resources.clone()).start().await?;
        let read = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max";
        assert_eq!(container.shell(read).await?, "67108864\n50000 100000");

        container
            .update(api::LinuxContainerResources {
                memory_limit_in_bytes: 96 << 20,
                cpu_quota: 75_000,
                ..resources
            })
            .await?;
        assert_eq!(container.shell(read).await?, "100663296\n75000 100000");
        Ok(())
    })
}

#[test]
fn a_container_over_its_memory_limit_is_killed_alone() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let neighbour = pod.idle_container("neighbour").await?;
        let resources =
            api::LinuxContainerResources { memory_limit_in_bytes: 32 << 20, ..Default::default() };
        // tail keeps all of a file without line ends in memory.
        let (status, _) =
            pod.container("greedy").command(["tail", "/dev/zero"]).resources(resources).run().await?;
        assert_eq!((status.exit_code, status.reason.as_str()), (128 + 9, "OOMKilled"));
        neighbour.shell("true").await?;
        assert!(pod.is_ready().await?);
        Ok(())
    })
}

#[test]
fn stats_of_a_container_count_its_cpu_and_memory() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let container = pod
            .container("busy")
            .script("dd if=/dev/zero of=/dev/shm/x bs=1M count=8; while :; do :; done")
            .start()
            .await?;
        container.shell("while [ ! -f /dev/shm/x ]; do sleep 0.1; done; sleep 1").await?;
        let stats = container.stats().await?;
        let attributes = stats.attributes.expect("attributes");
        assert_eq!(attributes.id, container.id);
        let cpu = stats.cpu.expect("CPU figures");
        let used = cpu.usage_core_nano_seconds.expect("CPU time").value;
        assert!(used > 100_000_000, "a busy loop used {used} ns");
        let memory = stats.memory.expect("memory figures");
        let working = memory.working_set_bytes.expect("a working set").value;
        assert!(working > 8 << 20, "8 MiB of shared memory, but a working set of {working}");
        Ok(())
    })
}

#[test]
fn a_container_has_the_environment_user_and_directory_that_were_asked_for() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let container = pod
            .container("user")
            .env("ASKED", "a b=c")
            .with(|config| config.working_dir = "/home/alice".to_owned())
            .with_security(|security| {
                security.run_as_user = Some(api::Int64Value { value: 1000 });
                security.run_as_group = Some(api::Int64Value { value: 1000 });
                security.supplemental_groups = vec![4242];
                security.no_new_privs = true;
            })
            .start()
            .await?;
        assert_eq!(container.shell("echo $ASKED $FROM_IMAGE; pwd").await?, "a b=c yes\n/home/alice");
        assert_eq!(container.shell("id -u; id -g; id -G").await?, "1000\n1000\n1000 2000 4242");
        assert_eq!(container.shell("grep NoNewPrivs /proc/self/status").await?, "NoNewPrivs:\t1");

        let closed =
            pod.container("closed").with_security(|security| security.readonly_rootfs = true).start().await?;
        let output = closed.exec(["touch", "/new"]).await?;
        assert!(output.exit_code == 1 && output.stderr.contains("Read-only"), "{output:?}");
        Ok(())
    })
}

#[test]
fn a_container_is_confined_unless_it_is_privileged() -> Result<()> {
    on_node(async |node| {
        let pod = node
            .pod("confined")
            .with_linux(|linux| linux.security_context.get_or_insert_default().privileged = true)
            .run()
            .await?;
        let confined = pod.idle_container("confined").await?;
        let status = confined.shell("grep -E '^(CapEff|Seccomp):' /proc/self/status").await?;
        assert_eq!(status, "CapEff:\t00000000a80425fb\nSeccomp:\t2");
        assert_eq!(confined.exec(["mount", "-t", "tmpfs", "x", "/tmp"]).await?.exit_code, 1);
        assert_eq!(confined.exec(["sh", "-c", "echo 1 > /proc/sys/kernel/sysrq"]).await?.exit_code, 1);

        let privileged = pod
            .container("privileged")
            .with_security(|security| {
                security.privileged = true;
                security.seccomp = None;
            })
            .start()
            .await?;
        privileged.shell("mount -t tmpfs x /tmp").await?;
        Ok(())
    })
}

#[test]
fn a_container_sees_the_image_as_it_was_made() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let container = pod.idle_container("idle").await?;
        let listed = container.shell("cd /odd; stat -c '%n %a %u:%g %F' * | sort").await?;
        let expected = "attributed 644 0:0 regular file
dangling 777 0:0 symbolic link
fifo 600 0:0 fifo
hard-link 640 1000:2000 regular file
high-owner 600 65533:65532 regular file
name with spaces and \u{fc} 644 0:0 regular file
owned 640 1000:2000 regular file
setuid 4755 0:0 regular file
sticky 3777 0:0 directory
unreadable 0 0:0 regular file";
        assert_eq!(listed, expected);
        assert_eq!(container.shell("[ odd/owned -ef odd/hard-link ] && cat odd/hard-link").await?, "alice's");
        assert_eq!(
            container.shell("cat etc/replaced; ls etc/removed 2>&1; ls var/emptied").await?,
            "from the second layer\nls: etc/removed: No such file or directory\nnew"
        );

        // What a container writes is its own.
        container.shell("echo mine > /odd/owned; rm /odd/setuid; chown 7:8 /odd/attributed").await?;
        assert_eq!(container.shell("cat /odd/owned; stat -c %u:%g /odd/attributed").await?, "mine\n7:8");
        let other = pod.idle_container("other").await?;
        assert_eq!(other.shell("cat /odd/owned; ls /odd/setuid").await?, "alice's\n/odd/setuid");
        Ok(())
    })
}
