//! Bad input that stock containerd never sends, or that needs a broken installation: the Controller is called directly.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use pericarp_protos::sandbox::{
    ControllerCreateRequest, ControllerMetricsRequest, ControllerShutdownRequest, ControllerStartRequest,
    ControllerStatusRequest, ControllerStopRequest, ControllerWaitRequest,
};
use pericarp_tests::{
    direct::{
        controller::{self, Controller, pod_config},
        netns::NetworkNamespace,
    },
    node::{controller::NODE_CONTROLLER, machine::MachineProcess},
    on_pericarp,
};
use tonic::{Code, Status};

const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

#[test]
fn every_call_for_an_unknown_sandbox_says_that_it_is_unknown() -> Result<()> {
    on_pericarp(async |_| {
        let client = controller::connect(Path::new(NODE_CONTROLLER)).await?;
        let sandbox_id = ID.to_owned();
        macro_rules! unknown {
            ($call:ident, $request:ident) => {{
                let request = $request { sandbox_id: sandbox_id.clone(), ..Default::default() };
                let error = client.clone().$call(request).await.unwrap_err();
                assert_eq!(error.code(), Code::NotFound, "{}: {error}", stringify!($call));
                assert!(error.message().contains(ID), "{}: {error}", stringify!($call));
            }};
        }
        unknown!(start, ControllerStartRequest);
        unknown!(stop, ControllerStopRequest);
        unknown!(wait, ControllerWaitRequest);
        unknown!(status, ControllerStatusRequest);
        unknown!(shutdown, ControllerShutdownRequest);
        unknown!(metrics, ControllerMetricsRequest);
        Ok(())
    })
}

#[test]
fn a_sandbox_that_cannot_be_created_is_refused() -> Result<()> {
    on_pericarp(async |node| {
        let netns = NetworkNamespace::new(node.name()).await?;
        let mut client = controller::connect(Path::new(NODE_CONTROLLER)).await?;
        let good = ControllerCreateRequest {
            sandbox_id: format!("{ID}-{}", node.name()).chars().rev().take(64).collect(),
            options: Some(controller::options(&pod_config("created"))),
            netns_path: netns.path(),
            ..Default::default()
        };
        for id in ["", "../escape", "a/b", ".", "..", &"x".repeat(200)] {
            let request = ControllerCreateRequest { sandbox_id: id.to_owned(), ..good.clone() };
            let error = client.create(request).await.unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{id:?}: {error}");
        }
        let any =
            prost_types::Any { type_url: "runtime.v1.PodSandboxConfig".to_owned(), value: vec![0xff; 9] };
        for options in [None, Some(any)] {
            let request = ControllerCreateRequest { options, ..good.clone() };
            let error = client.create(request).await.unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{error}");
            assert!(error.message().contains(&good.sandbox_id), "{error}");
        }

        client.create(good.clone()).await?;
        let error = client.create(good.clone()).await.unwrap_err();
        assert_eq!(error.code(), Code::AlreadyExists, "{error}");
        assert!(error.message().contains(&good.sandbox_id), "{error}");
        let request = ControllerShutdownRequest { sandbox_id: good.sandbox_id, ..Default::default() };
        client.shutdown(request).await?;
        netns.remove().await
    })
}

/// Starts a pod with an installation that is broken by `settings`; returns the error after checking that nothing is
/// left.
async fn broken(what: &str, settings: &str) -> Result<Status> {
    let mut controller = Controller::serve(settings).await?;
    let netns = NetworkNamespace::new(&format!("netns-{what}")).await?;
    let pod = format!("pod-{what}");
    // The id differs from those of other tests, which look for their machines at the same time.
    let id = format!("{what:0<64}");
    let error = controller
        .start_pod(&id, &pod_config(&pod), &netns)
        .await
        .err()
        .context("this pod should not start")?;
    assert!(error.message().contains(&pod), "{pod:?} is not in: {error}");
    assert_eq!(controller.pod_directories()?, Vec::<String>::new(), "after {error}");
    assert_eq!(MachineProcess::of_pod(&id)?, None, "after {error}");
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    assert!(!mounts.contains(&controller.run_dir.display().to_string()), "after {error}");
    controller.stop().await?;
    netns.remove().await?;
    Ok(error)
}

#[test]
fn a_kernel_or_image_that_is_missing_or_not_an_elf_file_is_named() -> Result<()> {
    on_pericarp(async |node| {
        let error = broken("no-kernel", "kernel = '/no/such/vmlinux'").await?;
        assert!(error.message().contains("/no/such/vmlinux"), "{error}");
        let text = node.file("text", "not an ELF file\n")?;
        let error = broken("text", &format!("kernel = '{text}'")).await?;
        assert!(error.message().contains(&text) && error.message().contains("ELF"), "{error}");
        // A program is an ELF file and not a kernel: it cannot be loaded where a kernel is, or it ends soon.
        let error = broken("program", "kernel = '/usr/bin/busybox'").await?;
        let refused = error.message().contains("cannot load the guest kernel /usr/bin/busybox");
        assert!(refused || error.message().contains("ended before its guest was ready"), "{error}");
        let error = broken("no-image", "initramfs = '/no/such/initramfs'").await?;
        assert!(error.message().contains("/no/such/initramfs"), "{error}");
        Ok(())
    })
}

#[test]
fn a_guest_that_never_becomes_ready_is_given_up_with_the_end_of_its_console() -> Result<()> {
    on_pericarp(async |node| {
        // BusyBox as init finds nothing to start and waits for ever.
        let initramfs = node.file("hangs.cpio", "")?;
        fs::write(&initramfs, archive(&[("init", 0o100_755, &fs::read("/usr/bin/busybox")?)]))?;
        let start = Instant::now();
        let error =
            broken("hangs", &format!("initramfs = '{initramfs}'\nready_timeout_seconds = 20")).await?;
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
        assert!(error.message().contains("not ready"), "{error}");
        // BusyBox's last words.
        assert!(error.message().contains("/etc/init.d/rcS"), "{error}");
        let took = start.elapsed();
        assert!(took >= Duration::from_secs(20) && took < Duration::from_secs(120), "it took {took:?}");
        Ok(())
    })
}

#[test]
fn a_guest_that_dies_before_it_is_ready_is_reported_without_waiting() -> Result<()> {
    on_pericarp(async |node| {
        let initramfs = node.file("empty.cpio", "")?;
        fs::write(&initramfs, archive(&[]))?;
        let start = Instant::now();
        let error =
            broken("dies", &format!("initramfs = '{initramfs}'\nready_timeout_seconds = 120")).await?;
        assert!(error.message().contains("Kernel panic"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(100), "it took {:?}", start.elapsed());
        Ok(())
    })
}

/// A cpio archive in the "newc" format, as the kernel unpacks it.
pub fn archive(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (inode, (name, mode, content)) in (1..).zip(files.iter().copied().chain([("TRAILER!!!", 0, &[][..])]))
    {
        let (size, name_size) = (content.len(), name.len() + 1);
        // inode, mode, uid, gid, links, mtime, size, device (2), special device (2), size of the name, checksum
        let fields = [inode, mode as usize, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        archive.extend_from_slice(b"070701");
        for field in fields {
            archive.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}
