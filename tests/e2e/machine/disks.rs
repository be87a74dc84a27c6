//! Block devices in pods: raw volumes of the node, and images that are file systems of their own.

use std::{fs, process::Command};

use anyhow::{Context, Result, ensure};
use pericarp_tests::{ContainerBuilder, Pod, api, on_node, on_pericarp};

/// A loop device of the node.
pub struct Loop(String);

impl Loop {
    pub fn of(file: &str) -> Result<Self> {
        let output =
            Command::new("losetup").args(["--find", "--show", file]).output().context("run losetup")?;
        ensure!(output.status.success(), "losetup: {}", String::from_utf8_lossy(&output.stderr));
        Ok(Self(String::from_utf8(output.stdout)?.trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").args(["--detach", &self.0]).status();
        if !detached.is_ok_and(|status| status.success()) {
            println!("cannot detach {}", self.0);
        }
    }
}

/// How many disks a pod's machine has.
pub async fn disks_of(pod: &Pod) -> Result<usize> {
    let info = pod.info().await?;
    let devices = info["pericarp"]["devices"].as_object().context("no devices")?;
    Ok(devices.keys().filter(|name| name.starts_with("disk")).count())
}

/// Gives a container a loop device as `/dev/data`.
pub fn with_device(container: ContainerBuilder, disk: &Loop, permissions: &str) -> ContainerBuilder {
    container.with(|config| {
        config.devices.push(api::Device {
            container_path: "/dev/data".to_owned(),
            host_path: disk.0.clone(),
            permissions: permissions.to_owned(),
        });
    })
}

#[test]
fn a_raw_block_volume_is_a_disk_of_the_pod() -> Result<()> {
    on_node(async |node| {
        let file = node.file("disk", "")?;
        fs::File::options().write(true).open(&file)?.set_len(4 << 20)?;
        let disk = Loop::of(&file)?;
        let pod = node.pod("block").run().await?;
        let writer = with_device(pod.container("writer"), &disk, "rwm").start().await?;
        let script = "stat -c %F /dev/data; blockdev --getsize64 /dev/data
            echo written inside | dd of=/dev/data bs=512 seek=7 conv=notrunc,fsync 2> /dev/null
            dd if=/dev/data bs=512 skip=7 count=1 2> /dev/null | head -n 1";
        assert_eq!(writer.shell(script).await?, "block special file\n4194304\nwritten inside");
        writer.stop(0).await?;
        writer.remove().await?;
        assert!(fs::read(&file)?[7 * 512..].starts_with(b"written inside\n"));

        // Its numbers are no secret, and anybody may make a node of them.
        let writer = with_device(pod.container("writer-again"), &disk, "rwm").start().await?;
        let node = writer.shell("stat -c '$((0x%t)) $((0x%T))' /dev/data").await?;
        let sibling = pod.idle_container("sibling").await?;
        let script = format!("mknod /dev/theirs b {node} && ! head -c 1 /dev/theirs 2>&1");
        assert_eq!(sibling.shell(&script).await?, "head: /dev/theirs: Operation not permitted");
        writer.stop(0).await?;
        writer.remove().await?;

        let reader = with_device(pod.container("reader"), &disk, "r").start().await?;
        assert_eq!(
            reader.shell("dd if=/dev/data bs=512 skip=7 count=1 2> /dev/null | head -n 1").await?,
            "written inside"
        );
        let output = reader.exec(["sh", "-c", "echo x > /dev/data"]).await?;
        assert_ne!(output.exit_code, 0, "{output:?}");
        assert!(fs::read(&file)?.starts_with(&[0; 512]));
        Ok(())
    })
}

#[test]
fn image_layers_of_the_erofs_snapshotter_are_disks_of_the_machine() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.with_erofs().pod("erofs").run().await?;
        let container = pod.idle_container("idle").await?;
        let root = "awk '$5 == \"/\" { sub(/.* - /, \"\"); print $1 }' /proc/self/mountinfo";
        assert_eq!(container.shell(root).await?, "overlay", "the guest's own overlay");
        assert_eq!(
            container.shell("cat /etc/replaced; ls /etc/removed 2>&1; ls /var/emptied").await?,
            "from the second layer\nls: /etc/removed: No such file or directory\nnew"
        );
        let listed = container.shell("cd /odd; stat -c '%n %a %u:%g %F' owned setuid fifo sticky").await?;
        assert_eq!(
            listed,
            "owned 640 1000:2000 regular file\nsetuid 4755 0:0 regular file\nfifo 600 0:0 fifo\n\
             sticky 3777 0:0 directory"
        );
        // What it writes is its own, on the node, and another container of the image does not see it.
        container
            .shell(
                "echo mine > /odd/owned; rm /odd/setuid; mkdir /odd/new; mv /etc/replaced /etc/moved; \
                 chown 7:8 /odd/fifo",
            )
            .await?;
        assert_eq!(
            container
                .shell("cat /odd/owned; ls -d /odd/setuid /odd/new 2>&1; stat -c %u:%g /odd/fifo")
                .await?,
            "mine\nls: /odd/setuid: No such file or directory\n/odd/new\n7:8"
        );
        let other = pod.idle_container("other").await?;
        assert_eq!(
            other.shell("cat /odd/owned /etc/replaced; ls /odd/setuid").await?,
            "alice's\nfrom the second layer\n/odd/setuid"
        );
        assert_eq!(disks_of(&pod).await?, 2);

        container.stop(0).await?;
        container.remove().await?;
        assert_eq!(disks_of(&pod).await?, 1);
        Ok(())
    })
}

#[test]
fn more_containers_than_slots_go_through_the_share() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.with_erofs().pod("many").run().await?;
        let mut kinds = Vec::new();
        for number in 0..10 {
            let container = pod.idle_container(&format!("c{number}")).await?;
            assert_eq!(container.shell("cat /etc/replaced").await?, "from the second layer");
            kinds.push(
                container
                    .shell("awk '$5 == \"/\" { sub(/.* - /, \"\"); print $1 }' /proc/self/mountinfo")
                    .await?,
            );
        }
        let disks = kinds.iter().filter(|kind| *kind == "overlay").count();
        assert!((1..10).contains(&disks), "{kinds:?}");
        assert!(kinds[disks..].iter().all(|kind| kind == "virtiofs"), "{kinds:?}");
        Ok(())
    })
}
