//! Volumes of the node: through links, with file systems mounted in them, and with mounts that come later on either
//! side.

use std::{fs, os::unix::fs::symlink};

use anyhow::{Context, Result};
use pericarp_tests::{Container, Node, Pod, Runtime, api, on_node};
use rustix::mount::{MountPropagationFlags, mount_bind_recursive, mount_change};

use pericarp_tests::node::mount::TestMount;

/// A container that may mount, with one volume at the same path as on the node.
async fn with_volume(
    pod: &Pod,
    name: &str,
    path: &str,
    change: impl FnOnce(&mut api::Mount),
) -> Result<Container> {
    let mut mount = api::Mount {
        host_path: path.to_owned(),
        container_path: path.to_owned(),
        selinux_relabel: true,
        ..Default::default()
    };
    change(&mut mount);
    let container = pod.container(name).minimal().with(|config| config.mounts = vec![mount]);
    container.with_security(|security| security.privileged = true).start().await
}

async fn privileged_pod(node: &Node) -> Result<Pod> {
    let pod = node.pod("mounts").minimal();
    pod.with_linux(|linux| linux.security_context.get_or_insert_default().privileged = true).run().await
}

#[test]
fn a_volume_is_reached_through_a_link_and_file_systems_in_a_read_only_one_stay_writable() -> Result<()> {
    on_node(async |node| {
        let pod = privileged_pod(node).await?;
        let directory = node.directory_for("linked")?;
        fs::write(format!("{directory}/flag"), "")?;
        let link = format!("{directory}-link");
        symlink(&directory, &link)?;
        let linked = with_volume(&pod, "linked", &link, |_| {}).await?;
        assert_eq!(linked.shell(&format!("ls -A {link}")).await?, "flag");

        let outer = node.directory_for("read-only")?;
        let inner = TestMount::tmpfs(&format!("{outer}/tmpfs"), "1m")?;
        let reader = with_volume(&pod, "reader", &outer, |mount| mount.readonly = true).await?;
        reader.shell(&format!("touch {outer}/tmpfs/file")).await?;
        assert!(fs::exists(format!("{outer}/tmpfs/file"))?);
        let output = reader.exec(["touch", &format!("{outer}/file")]).await?;
        assert!(output.exit_code == 1 && output.stderr.contains("Read-only file system"), "{output:?}");
        // One that may write beside it changes nothing for the one that may not.
        let writer = with_volume(&pod, "writer", &outer, |_| {}).await?;
        writer.shell(&format!("echo written > {outer}/file; echo more >> {outer}/tmpfs/file")).await?;
        assert_eq!(reader.shell(&format!("cat {outer}/file {outer}/tmpfs/file")).await?, "written\nmore");
        let output = reader.exec(["rm", &format!("{outer}/file")]).await?;
        assert!(output.exit_code == 1 && output.stderr.contains("Read-only file system"), "{output:?}");
        drop(inner);
        // Containers that still have what was mounted there do not keep its place from being removed.
        fs::remove_dir(format!("{outer}/tmpfs")).context("remove the place of a mount")?;
        Ok(())
    })
}

#[test]
fn mounts_of_either_side_reach_the_other_as_far_as_the_volume_says() -> Result<()> {
    use api::MountPropagation::{
        PropagationBidirectional as Bidirectional, PropagationHostToContainer as ToContainer,
        PropagationPrivate as Private,
    };
    on_node(async |node| {
        let pod = privileged_pod(node).await?;
        let mut kinds = vec![("private", Private, false), ("slave", ToContainer, true)];
        // Pericarp refuses it: `bidirectional_propagation_is_refused_with_the_reason`.
        if node.runtime == Runtime::Runc {
            kinds.push(("shared", Bidirectional, true));
        }
        for (name, propagation, reaches) in kinds {
            let volume = node.directory_for(name)?;
            let _volume = TestMount::tmpfs(&volume, "1m")?;
            let kind = if propagation == Private {
                MountPropagationFlags::PRIVATE
            } else {
                MountPropagationFlags::SHARED
            };
            mount_change(volume.as_str(), kind | MountPropagationFlags::REC)?;
            let (later, own) = (format!("{volume}/later"), format!("{volume}/own"));
            fs::create_dir(&later)?;
            let container =
                with_volume(&pod, name, &volume, |mount| mount.propagation = propagation.into()).await?;
            let known = container.status().await?.mounts;
            assert_eq!(known.first().map(api::Mount::propagation), Some(propagation), "{known:?}");

            let source = node.directory_for(&format!("{name}-source"))?;
            fs::write(format!("{source}/flag"), "")?;
            mount_bind_recursive(source.as_str(), later.as_str())?;
            let mounted = TestMount::existing(&later);
            let seen = container.shell(&format!("ls -A {later}")).await?;
            assert_eq!(seen == "flag", reaches, "{name}: the container sees {seen:?}");

            drop(mounted);
            // A guest may rely on what it knows for a second, as live updates of volumes say; this allows for three.
            let gone = format!(
                "for i in $(seq 30); do [ -n \"$(ls -A {later})\" ] || exit 0; sleep 0.1; done; exit 1"
            );
            container.shell(&gone).await.with_context(|| format!("{name}: after its end"))?;

            container.shell(&format!("mkdir {own} && mount --bind /etc {own} && ls {own}/passwd")).await?;
            let back = fs::read_dir(&own)?.count() > 0;
            assert_eq!(back, propagation == Bidirectional, "{name}: on the node");
            container.stop(0).await?;
        }
        Ok(())
    })
}
