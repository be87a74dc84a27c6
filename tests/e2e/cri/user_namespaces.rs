//! Pods with a user namespace (`hostUsers: false`), and other features of a handler that containerd has to know.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
};

use anyhow::{Context as _, Result};
use pericarp_tests::{
    Container, HANG_LIMIT, Node, POD_ROOT, Pod, Runtime, api, on_node, on_pericarp, with_mapped_ids,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use pericarp_tests::node::{machine::MachineProcess, mount::TestMount};

fn volume(host_path: &str, container_path: &str) -> api::Mount {
    with_mapped_ids(api::Mount {
        host_path: host_path.to_owned(),
        container_path: container_path.to_owned(),
        ..api::Mount::default()
    })
}

fn owner(path: &str) -> Result<(u32, u32)> {
    let metadata = fs::symlink_metadata(path).with_context(|| format!("look at {path}"))?;
    Ok((metadata.uid(), metadata.gid()))
}

/// The path of a container's root file system on the node.
fn root_on_node(node: &Node, pod: &Pod, container: &Container) -> Result<String> {
    Ok(match node.runtime {
        Runtime::Runc => {
            format!("/run/containerd/io.containerd.runtime.v2.task/k8s.io/{}/rootfs", container.id)
        }
        // In the mount namespace of the pod's machine.
        Runtime::Pericarp => {
            let machine = MachineProcess::of_pod(&pod.id)?.context("the pod's machine")?;
            machine.path(&format!("/share/{}/rootfs", container.id))
        }
    })
}

#[test]
fn files_on_the_node_belong_to_the_ids_of_a_user_namespace() -> Result<()> {
    on_node(async |node| {
        let (ours, theirs) = (node.directory_for("mapped")?, node.directory_for("plain")?);
        fs::set_permissions(&ours, fs::Permissions::from_mode(0o777))?;
        fs::set_permissions(&theirs, fs::Permissions::from_mode(0o777))?;
        let pod = node.pod("ids").in_user_namespace().run().await?;
        let mut plain = volume(&theirs, "/plain");
        plain.uid_mappings.clear();
        plain.gid_mappings.clear();
        let mounts = vec![volume(&ours, "/mapped"), plain];
        let root = pod.container("root").with(|config| config.mounts = mounts.clone()).start().await?;
        let alice = pod
            .container("alice")
            .with(|config| config.mounts = mounts)
            .with_security(|security| security.run_as_user = Some(api::Int64Value { value: 1000 }))
            .start()
            .await?;
        for (container, name) in [(&root, "root"), (&alice, "alice")] {
            let script =
                format!("touch /mapped/{name} /plain/{name} /tmp/{name}; mv /mapped/{name} /mapped/{name}-2");
            container.shell(&script).await?;
        }
        assert_eq!(owner(&format!("{ours}/root-2"))?, (0, 0));
        assert_eq!(owner(&format!("{ours}/alice-2"))?, (1000, 1000));
        assert_eq!(owner(&format!("{theirs}/root"))?, (POD_ROOT, POD_ROOT));
        assert_eq!(owner(&format!("{theirs}/alice"))?, (POD_ROOT + 1000, POD_ROOT + 1000));
        let files = root_on_node(node, &pod, &root)?;
        assert_eq!(owner(&format!("{files}/bin/busybox"))?, (POD_ROOT, POD_ROOT));
        assert_eq!(owner(&format!("{files}/odd/owned"))?, (POD_ROOT + 1000, POD_ROOT + 2000));
        assert_eq!(owner(&format!("{files}/tmp/root"))?, (POD_ROOT, POD_ROOT));
        // Both see the volume as one, and who made what.
        assert_eq!(alice.shell("stat -c %u:%g /mapped/root-2 /mapped/alice-2").await?, "0:0\n1000:1000");
        Ok(())
    })
}

#[test]
fn commands_are_executed_in_the_containers_user_namespace() -> Result<()> {
    on_node(async |node| {
        let directory = node.directory_for("programs")?;
        let pod = node.pod("exec").in_user_namespace().run().await?;
        let mounts = vec![volume(&directory, "/programs")];
        let root = pod.container("root").with(|config| config.mounts = mounts.clone()).start().await?;
        let namespaces = "for ns in user net ipc uts pid mnt cgroup; do readlink /proc/$1/ns/$ns; done";
        let own = root.shell(&format!("set -- self; {namespaces}")).await?;
        assert_eq!(own, root.shell(&format!("set -- 1; {namespaces}")).await?);
        assert_eq!(root.shell("tr -s ' ' < /proc/self/uid_map").await?, format!(" 0 {POD_ROOT} 65536"));
        assert_eq!(root.shell("id -u; id -g; cat /proc/self/setgroups").await?, "0\n0\nallow");

        // A program that its user may run and not read hides its processes from the user namespace.
        root.shell("cp /bin/busybox /programs/sleep; chmod 0111 /programs/sleep").await?;
        let hidden = pod
            .container("hidden")
            .command(["/programs/sleep", "infinity"])
            .with(|config| config.mounts = mounts)
            .with_security(|security| security.run_as_user = Some(api::Int64Value { value: 1000 }))
            .start()
            .await?;
        assert_eq!(hidden.shell("id -u").await?, "1000");
        Ok(())
    })
}

#[test]
fn a_pod_with_a_user_namespace_is_on_the_network_and_can_be_forwarded_to() -> Result<()> {
    on_node(async |node| {
        let pod = node.pod("served").in_user_namespace().run().await?;
        let server = pod.container("server").command(["peer", "serve", "0.0.0.0:80"]).start().await?;
        server.wait_for_output("ready\n").await?;
        let address = *pod.addresses().await?.first().context("the pod has no address")?;
        let mut answer = String::new();
        let asked = async {
            let mut stream = TcpStream::connect(SocketAddr::new(address, 80)).await?;
            stream.write_all(b"name\n").await?;
            stream.read_to_string(&mut answer).await
        };
        timeout(HANG_LIMIT, asked).await??;
        assert_eq!(answer, "served\n");
        let shown = server.shell("ip -4 -o address show dev eth0; ip route; hostname").await?;
        assert!(shown.contains(&format!("inet {address}/16")) && shown.contains("default via"), "{shown}");
        assert!(shown.ends_with("served"), "{shown}");

        let mut forward = pod.forward_port(80).await?;
        forward.write(b"name\n").await?;
        let forwarded = forward.wait_for_end().await?;
        assert_eq!(
            (String::from_utf8_lossy(&forwarded.data).as_ref(), forwarded.error.as_str()),
            ("served\n", "")
        );
        Ok(())
    })
}

#[test]
fn an_image_of_the_erofs_snapshotter_belongs_to_the_ids_of_a_user_namespace() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.with_erofs().pod("erofs").in_user_namespace().run().await?;
        let container = pod.idle_container("idle").await?;
        let listed = container
            .shell("touch /new; mkdir /odd/new; stat -c '%n %u:%g' / /bin/busybox /odd/owned /new /odd/new")
            .await?;
        assert_eq!(listed, "/ 0:0\n/bin/busybox 0:0\n/odd/owned 1000:2000\n/new 0:0\n/odd/new 0:0");
        Ok(())
    })
}

#[test]
fn containerd_knows_what_a_handler_can_do() -> Result<()> {
    on_node(async |node| {
        let request = api::StatusRequest { verbose: false };
        let handlers = node.cri.runtime().status(request).await?.into_inner().runtime_handlers;
        let name = node.with_features().handler();
        let handler = handlers.iter().find(|handler| handler.name == name).context("no such handler")?;
        let features = handler.features.context("containerd knows nothing of it")?;
        assert!(features.user_namespaces && features.recursive_read_only_mounts, "{features:?}");
        Ok(())
    })
}

#[test]
fn recursive_read_only_volumes_are_read_only_all_the_way_down() -> Result<()> {
    on_node(async |node| {
        let node = node.with_features();
        let directory = node.directory_for("tree")?;
        let below = node.directory_for("tree/below")?;
        let _below = TestMount::tmpfs(&below, "1m")?;
        let pod = node.pod("tree").run().await?;
        let mut mount = volume(&directory, "/tree");
        mount.uid_mappings.clear();
        mount.gid_mappings.clear();
        let writable = mount.clone();
        mount.readonly = true;
        mount.recursive_read_only = true;
        let mut written = Vec::new();
        for (name, mount) in [("writable", writable), ("read-only", mount)] {
            let container = pod.container(name).with(|config| config.mounts = vec![mount]).start().await?;
            let script = "touch /tree/x; echo $?; touch /tree/below/x; echo $?";
            written.push(container.shell(script).await?);
        }
        pod.stop().await?;
        assert_eq!(written, ["0\n0", "1\n1"]);
        Ok(())
    })
}
