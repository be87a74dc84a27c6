//! emptyDirs in memory: file systems of the pod's own, as kubelet has prepared them.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
};

use anyhow::Result;
use pericarp_tests::{Container, Runtime, api, on_node, on_pericarp};

#[test]
fn an_empty_dir_in_memory_keeps_its_size_limit() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        // kubelet mounts it on the node, with the limit as its size.
        let cache = pod.empty_dir_in_memory("limited", "2m")?;
        let container = pod.container("writer").mount(&cache.path(), "/cache", false).start().await?;
        // Kubernetes' conformance tests look at the type.
        assert_eq!(container.shell("stat -f -c %T /cache").await?, "tmpfs");
        let output = container.exec(["sh", "-c", "dd if=/dev/zero of=/cache/x bs=64k count=64"]).await?;
        assert!(output.exit_code == 1 && output.stderr.contains("No space left"), "{output:?}");
        assert_eq!(container.shell("df -Pk /cache | tail -n 1 | awk '{ print $2 }'").await?, "2048");
        let on_node = fs::read_dir(cache.path())?.count();
        // In a machine, it is the guest's memory, and the node's tmpfs stays empty.
        assert_eq!(on_node, usize::from(node.runtime == Runtime::Runc));
        Ok(())
    })
}

#[test]
fn containers_share_an_empty_dir_in_memory_with_its_locks_and_sockets() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let cache = pod.empty_dir_in_memory("shared", "8m")?;
        let holder = pod
            .container("holder")
            .mount(&cache.path(), "/shared", false)
            .script("sleep infinity | peer hold-lock /shared/lock")
            .start()
            .await?;
        holder.wait_for_output("locked\n").await?;
        let server = pod
            .container("server")
            .mount(&cache.path(), "/elsewhere", false)
            .command(["peer", "listen", "/elsewhere/socket"])
            .start()
            .await?;
        server.wait_for_output("ready\n").await?;
        let other = pod.container("other").mount(&cache.path(), "/shared", false).start().await?;
        assert_eq!(other.shell("peer try-lock /shared/lock").await?, "flock false fcntl false");
        assert_eq!(other.shell("peer connect /shared/socket hello").await?, "hello");
        holder.stop(0).await?;
        assert_eq!(other.shell("peer try-lock /shared/lock").await?, "flock true fcntl true");

        // One that may not write changes nothing for those that may.
        let reader = pod.container("reader").mount(&cache.path(), "/shared", true).start().await?;
        let output = reader.exec(["touch", "/shared/new"]).await?;
        assert!(output.exit_code == 1 && output.stderr.contains("Read-only file system"), "{output:?}");
        other.shell("echo written > /shared/file").await?;
        assert_eq!(reader.shell("cat /shared/file").await?, "written");
        Ok(())
    })
}

#[test]
fn a_sub_path_of_an_empty_dir_in_memory_is_the_same_directory_for_all_containers() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let mut cache = pod.empty_dir_in_memory("divided", "8m")?;
        // As kubelet prepares a volume for fsGroup.
        chown(cache.path(), Some(0), Some(4242))?;
        fs::set_permissions(cache.path(), fs::Permissions::from_mode(0o2777))?;
        let path = cache.sub_path("writer", 0, "data/inner")?;
        let writer = pod
            .container("writer")
            .mount(&path, "/part", false)
            .with_security(|security| security.run_as_user = Some(api::Int64Value { value: 1000 }))
            .start()
            .await?;
        writer.shell("echo written > /part/file").await?;
        let looked = "stat -c '%n %a %u:%g' /part; stat -c '%u:%g' /part/file";
        assert_eq!(writer.shell(looked).await?, "/part 2777 0:4242\n1000:4242");

        let whole = pod.container("whole").mount(&cache.path(), "/whole", false).start().await?;
        assert_eq!(
            whole.shell("cat /whole/data/inner/file; stat -c '%a %g' /whole").await?,
            "written\n2777 4242"
        );
        let path = cache.sub_path("reader", 3, "data/inner")?;
        let reader = pod.container("reader").mount(&path, "/part", true).start().await?;
        assert_eq!(reader.shell("ls -A /part").await?, "file");
        let output = reader.exec(["touch", "/part/new"]).await?;
        assert!(output.exit_code == 1 && output.stderr.contains("Read-only file system"), "{output:?}");
        writer.shell("mv /part/file /part/renamed").await?;
        assert_eq!(reader.shell("cat /part/renamed").await?, "written");
        Ok(())
    })
}

#[test]
fn an_empty_dir_in_memory_outlives_its_containers() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let mut cache = pod.empty_dir_in_memory("outliving", "8m")?;
        let part = cache.sub_path("main", 1, "part")?;
        let start = async |name: &str| -> Result<Container> {
            let container = pod.container(name).mount(&cache.path(), "/cache", false);
            container.mount(&part, "/part", false).start().await
        };
        let first = start("first").await?;
        first.shell("echo one > /cache/file; echo two > /part/file; chmod 700 /part").await?;
        first.stop(0).await?;
        first.remove().await?;
        let second = start("second").await?;
        let script = "cat /cache/file /part/file /cache/part/file; stat -c %a /part; rm /cache/file";
        assert_eq!(second.shell(script).await?, "one\ntwo\ntwo\n700");
        Ok(())
    })
}

#[test]
fn what_a_container_writes_into_memory_counts_as_its_own() -> Result<()> {
    on_node(async |node| {
        let pod = node.pod("charged").run().await?;
        let cache = pod.empty_dir_in_memory("cache", "400m")?;
        let limit = api::LinuxContainerResources {
            memory_limit_in_bytes: 64 << 20,
            memory_swap_limit_in_bytes: 64 << 20,
            ..Default::default()
        };
        let writer = pod
            .container("writer")
            .mount(&cache.path(), "/cache", false)
            .resources(limit)
            .command(["dd", "if=/dev/zero", "of=/cache/file", "bs=1M", "count=200"])
            .start()
            .await?;
        let status = writer.wait_for_exit().await?;
        assert_eq!((status.exit_code, status.reason.as_str()), (128 + 9, "OOMKilled"));
        // The pod lives on, with what was written.
        let other = pod.container("other").mount(&cache.path(), "/cache", false).start().await?;
        assert_eq!(other.shell("[ -s /cache/file ] && rm /cache/file && echo removed").await?, "removed");
        Ok(())
    })
}

/// Under runc, kubelet looks at the link before it mounts anything.
#[test]
fn a_sub_path_cannot_lead_out_of_an_empty_dir_in_memory() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.pooled_pod().await?;
        let mut cache = pod.empty_dir_in_memory("linked", "1m")?;
        let hostile = pod.container("hostile").mount(&cache.path(), "/cache", false).start().await?;
        hostile
            .shell("ln -s / /cache/absolute; ln -s ../../../proc /cache/relative; ln -s . /cache/inside")
            .await?;
        for (number, link) in ["absolute", "relative"].into_iter().enumerate() {
            let path = cache.sub_path("victim", number, link)?;
            let victim = pod.container(link).mount(&path, "/part", false).create().await?;
            let error = victim.try_start().await.unwrap_err();
            assert!(error.message().contains("subPath") && error.message().contains(link), "{error}");
        }
        let path = cache.sub_path("victim", 2, "inside")?;
        let allowed = pod.container("allowed").mount(&path, "/part", false).start().await?;
        assert_eq!(allowed.shell("ls /part").await?, "absolute\ninside\nrelative");
        Ok(())
    })
}
