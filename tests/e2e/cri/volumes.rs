//! Volumes: directories and files of the node, as kubelet prepares them for each kind.

use std::{fs, os::unix::fs::symlink, time::Duration};

use anyhow::{Context as _, Result};
use pericarp_tests::{BUSYBOX_USR1, api, node::mount::TestMount, on_node, on_pericarp};
use rustix::mount::MountPropagationFlags;

#[test]
fn directories_and_files_of_the_node_are_volumes() -> Result<()> {
    on_node(async |node| {
        let file = node.file("config/key", "value\n")?;
        let directory = file.trim_end_matches("/key");
        let single = node.file("single", "one file\n")?;
        let pod = node.pooled_pod().await?;
        let container = pod
            .container("user")
            .mount(directory, "/rw", false)
            .mount(directory, "/ro", true)
            .mount(&single, "/etc/single", true)
            .start()
            .await?;
        assert_eq!(container.shell("cat /rw/key /ro/key /etc/single").await?, "value\nvalue\none file");
        container.shell("echo from inside > /rw/new && chown 1000:2000 /rw/new").await?;
        assert_eq!(fs::read_to_string(format!("{directory}/new"))?, "from inside\n");
        assert_eq!(container.shell("cat /ro/new").await?, "from inside");

        // Changes of the node are seen at once: how ConfigMaps are updated.
        fs::write(&file, "changed\n")?;
        fs::write(format!("{directory}/later"), "later\n")?;
        assert_eq!(container.shell("cat /ro/key /rw/later").await?, "changed\nlater");

        for command in ["echo x > /ro/key", "rm /ro/key", "touch /ro/other", "echo x > /etc/single"] {
            let output = container.exec(["sh", "-c", command]).await?;
            assert!(
                output.exit_code != 0 && output.stderr.contains("Read-only file system"),
                "{command}: {output:?}"
            );
        }
        assert_eq!(fs::read_to_string(&file)?, "changed\n");
        Ok(())
    })
}

#[test]
fn containers_of_a_pod_can_share_a_volume() -> Result<()> {
    on_node(async |node| {
        let file = node.file("shared/seed", "")?;
        let directory = file.trim_end_matches("/seed");
        let pod = node.pooled_pod().await?;
        let writer = pod.container("writer").mount(directory, "/out", false).start().await?;
        let reader = pod.container("reader").mount(directory, "/in", true).start().await?;
        writer.shell("seq 100000 > /out/numbers; mv /out/numbers /out/done").await?;
        assert_eq!(reader.shell("tail -n 1 /in/done").await?, "100000");
        Ok(())
    })
}

#[test]
fn an_update_of_a_config_map_is_seen_within_a_second() -> Result<()> {
    on_node(async |node| {
        // As kubelet's atomic writer lays a volume out: the keys lead through a link that is replaced.
        let volume = node.directory_for("config-map")?;
        let publish = |version: &str| -> Result<()> {
            let data = format!("{volume}/..{version}");
            fs::create_dir(&data)?;
            fs::write(format!("{data}/key"), version)?;
            symlink(format!("..{version}"), format!("{volume}/..data_tmp"))?;
            fs::rename(format!("{volume}/..data_tmp"), format!("{volume}/..data"))?;
            Ok(())
        };
        publish("first")?;
        symlink("..data/key", format!("{volume}/key"))?;
        let turns = node.directory_for("turns")?;
        let pod = node.pooled_pod().await?;
        let container = pod
            .container("reader")
            .mount(&volume, "/config", true)
            .mount(&format!("{volume}/..first/key"), "/sub-path", true)
            .mount(&turns, "/turns", false)
            // Each turn takes 0.2 s of the guest's own time, by which it forgets what it knows of a file.
            .script(
                "turn=0; last=; while :; do turn=$((turn + 1)); echo $turn > /turns/now
                now=$(cat /config/key); [ \"$now\" = \"$last\" ] || echo \"$now $turn\"; last=$now; sleep 0.2; done",
            )
            .start()
            .await?;
        let reported = async |version: &str| -> Result<u64> {
            loop {
                let log = container.log()?.stdout();
                if let Some(line) = log.lines().find_map(|line| line.strip_prefix(version)) {
                    return Ok(line.trim().parse()?);
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        reported("first").await?;
        publish("second")?;
        let before: u64 =
            fs::read_to_string(format!("{turns}/now"))?.trim().parse().context("a turn's number")?;
        fs::remove_dir_all(format!("{volume}/..first"))?;
        let seen = reported("second").await?;
        // A second, and as much again for turns that take less than they should.
        assert!(seen <= before + 10, "changed in turn {before}, seen in turn {seen}");
        // A subPath is the file that it was: Kubernetes promises no updates for it.
        assert_eq!(container.shell("cat /sub-path").await?, "first");
        Ok(())
    })
}

#[test]
fn bidirectional_propagation_is_refused_with_the_reason() -> Result<()> {
    on_pericarp(async |node| {
        let outer = node.directory_for("shared")?;
        let _outer = TestMount::tmpfs(&outer, "1m")?;
        rustix::mount::mount_change(outer.as_str(), MountPropagationFlags::SHARED)?;
        let pod = node
            .pod("bidirectional")
            .with_linux(|linux| linux.security_context.get_or_insert_default().privileged = true)
            .run()
            .await?;
        let container = pod
            .container("csi-driver")
            .with_security(|security| security.privileged = true)
            .with(|config| {
                config.mounts.push(api::Mount {
                    host_path: outer.clone(),
                    container_path: "/volume".to_owned(),
                    propagation: api::MountPropagation::PropagationBidirectional.into(),
                    ..Default::default()
                });
            })
            .create()
            .await?;
        let error = container.try_start().await.unwrap_err();
        assert!(
            error.message().contains("/volume") && error.message().contains("HostToContainer"),
            "{error}"
        );
        Ok(())
    })
}

#[test]
fn a_volume_in_the_nodes_memory_keeps_its_size_limit() -> Result<()> {
    on_node(async |node| {
        // It is not where kubelet mounts an emptyDir, so it is not the guest's own in a machine either.
        let path = node.directory_for("memory")?;
        let _memory = TestMount::tmpfs(&path, "2m")?;
        let pod = node.pooled_pod().await?;
        let container = pod.container("writer").mount(&path, "/cache", false).start().await?;
        let output = container.exec(["sh", "-c", "dd if=/dev/zero of=/cache/x bs=64k count=64"]).await?;
        assert!(output.exit_code == 1 && output.stderr.contains("No space left"), "{output:?}");
        assert_eq!(container.shell("df -Pk /cache | tail -n 1 | awk '{ print $2 }'").await?, "2048");
        Ok(())
    })
}

#[test]
fn an_image_is_a_volume() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let container = pod
            .container("user")
            .with(|config| {
                config.mounts.push(api::Mount {
                    container_path: "/artefact".to_owned(),
                    image: Some(api::ImageSpec { image: BUSYBOX_USR1.to_owned(), ..Default::default() }),
                    readonly: true,
                    ..Default::default()
                });
            })
            .start()
            .await?;
        // Programs of the volume can be run.
        let read = "/artefact/bin/busybox cat /artefact/etc/replaced";
        assert_eq!(container.shell(read).await?, "from the second layer");
        let output = container.exec(["touch", "/artefact/new"]).await?;
        assert!(output.stderr.contains("Read-only file system"), "{output:?}");
        Ok(())
    })
}

#[test]
fn ten_thousand_small_files_are_listed_read_and_removed() -> Result<()> {
    on_node(async |node| {
        let path = node.directory_for("many")?;
        for n in 0..10_000 {
            fs::write(format!("{path}/{n:05}"), n.to_string())?;
        }
        let pod = node.pooled_pod().await?;
        let container = pod.container("reader").mount(&path, "/many", false).start().await?;
        assert_eq!(container.shell("cd /many; ls | wc -l; cat 09* | wc -c").await?, "10000\n4000");
        container.shell("cd /many; rm 00*").await?;
        assert_eq!(fs::read_dir(&path)?.count(), 9000);
        Ok(())
    })
}

#[test]
fn a_lock_holds_between_the_containers_of_a_pod() -> Result<()> {
    on_node(async |node| {
        let path = node.directory_for("locks")?;
        let pod = node.pooled_pod().await?;
        let holder = pod
            .container("holder")
            .mount(&path, "/shared", false)
            .script("sleep infinity | peer hold-lock /shared/lock")
            .start()
            .await?;
        holder.wait_for_output("locked\n").await?;
        let other = pod.container("other").mount(&path, "/shared", false).start().await?;
        assert_eq!(other.shell("peer try-lock /shared/lock").await?, "flock false fcntl false");
        holder.stop(0).await?;
        assert_eq!(other.shell("peer try-lock /shared/lock").await?, "flock true fcntl true");
        Ok(())
    })
}
