//! Hotplug of disks, processors and memory, on machines that a test runs without containerd.

use std::{
    fs::{self, File},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Context as _, Result, ensure};
use pericarp_protos::{
    agent, descriptors,
    host::{Disk, Layers, Node, Part, disk::Use},
    vmm::{
        InsertDiskRequest, InsertDiskResponse, RemoveDiskRequest, ResizeRequest, StatusRequest,
        WaitMemoryRequest,
    },
};
use pericarp_tests::{
    direct::machine::{DirectMachine, call_context, make_rootfs},
    without_containerd,
};
use serde_json::{Value, json};

/// Makes an EROFS image of a directory.
fn image(directory: &Path, image: &Path, compression: &str) -> Result<()> {
    let output = Command::new("mkfs.erofs").arg(compression).args([image, directory]).output()?;
    ensure!(output.status.success(), "mkfs.erofs: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

async fn insert(
    machine: &DirectMachine,
    paths: &[&Path],
    read_only: bool,
    serial: &str,
) -> Result<InsertDiskResponse> {
    static TICKET: AtomicU64 = AtomicU64::new(1);
    let open = |path: &&Path| File::options().read(true).write(!read_only).open(path);
    let files = paths.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut request = InsertDiskRequest::new();
    request.ticket = TICKET.fetch_add(1, Ordering::Relaxed);
    descriptors::give(&machine.file("descriptors.sock"), request.ticket, &files)?;
    request.read_only = read_only;
    request.serial = serial.to_owned();
    Ok(machine.control.insert_disk(call_context(), &request).await?)
}

async fn remove(machine: &DirectMachine, device: u32) -> Result<()> {
    let mut request = RemoveDiskRequest::new();
    request.device = device;
    machine.control.remove_disk(call_context(), &request).await?;
    Ok(())
}

/// The layers of an image; each segment of the disk is one.
fn layers(inserted: &InsertDiskResponse, upper: String, work: String) -> Disk {
    let mut layers = Layers::new();
    (layers.upper, layers.work) = (upper, work);
    let mut disk = Disk::new();
    disk.device = inserted.device;
    for extent in &inserted.extents {
        let mut part = Part::new();
        (part.offset, part.length) = (extent.offset, extent.length);
        disk.parts.push(part);
    }
    disk.use_ = Some(Use::Layers(layers));
    disk
}

fn node(device: u32, path: &str) -> Disk {
    let mut node = Node::new();
    path.clone_into(&mut node.path);
    let mut disk = Disk::new();
    disk.device = device;
    disk.use_ = Some(Use::Node(node));
    disk
}

fn with_device(path: &'static str) -> impl FnOnce(&mut Value) {
    move |spec| {
        spec["linux"]["devices"] =
            json!([{ "path": path, "type": "b", "major": 7, "minor": 99, "fileMode": 0o660 }]);
    }
}

/// The layers of a small image: the top one and the one below it.
fn make_layers(machine: &DirectMachine) -> Result<(PathBuf, PathBuf)> {
    let (lower, top) = (machine.file("base"), machine.file("top"));
    make_rootfs(&lower)?;
    fs::write(lower.join("name"), "base\n")?;
    fs::write(lower.join("base-only"), "from the base\n")?;
    fs::create_dir(&top)?;
    fs::write(top.join("name"), "top\n")?;
    let (base_image, top_image) = (machine.file("base.erofs"), machine.file("top.erofs"));
    image(&lower, &base_image, "-zlz4")?;
    image(&top, &top_image, "-T0")?;
    Ok((top_image, base_image))
}

#[test]
fn a_container_runs_from_layers_on_a_disk_and_its_slot_is_used_again() -> Result<()> {
    without_containerd(async || {
        let machine = DirectMachine::start(json!({})).await?;
        let (top, lower) = make_layers(&machine)?;
        let mut first = None;
        for round in 0..3 {
            let inserted = insert(&machine, &[&top, &lower], true, "image").await?;
            ensure!(first.is_none_or(|first| first == inserted.device), "another slot: {inserted:?}");
            first = Some(inserted.device);
            let id = format!("round{round}");
            let upper = machine.share_directory(&format!("{id}/upper"))?;
            let work = machine.share_directory(&format!("{id}/work"))?;
            let commands =
                "cat /name /base-only; echo changed > /name; cat /name; rm /base-only; [ ! -e /base-only ]";
            machine
                .run_container(&id, commands, vec![layers(&inserted, upper, work)], |_| {})
                .await
                .with_context(|| machine.console())?;
            assert_eq!(fs::read_to_string(machine.out(&id))?, "top\nfrom the base\nchanged\n");
            assert_eq!(fs::read_to_string(machine.file(&format!("share/{id}/upper/name")))?, "changed\n");
            remove(&machine, inserted.device).await?;
        }
        // Without a place to write to.
        let inserted = insert(&machine, &[&lower], true, "image").await?;
        let disk = layers(&inserted, String::new(), String::new());
        machine
            .run_container("read-only", "cat /name; ! echo x 2>/dev/null > /name", vec![disk], |_| {})
            .await?;
        assert_eq!(fs::read_to_string(machine.out("read-only"))?, "base\n");
        let status = machine.control.status(call_context(), &StatusRequest::new()).await?;
        let disk = format!("disk{}", inserted.device);
        let counters = status.devices.iter().find(|device| device.device == disk).context("the disk")?;
        ensure!(counters.counters["reads"] > 0 && counters.counters["errors"] == 0, "{counters}");
        remove(&machine, inserted.device).await?;
        ensure!(remove(&machine, inserted.device).await.is_err(), "an empty slot was emptied");
        Ok(())
    })
}

#[test]
fn a_raw_disk_is_a_node_in_its_container_and_what_is_written_is_in_the_file() -> Result<()> {
    without_containerd(async || {
        let machine = DirectMachine::start(json!({})).await?;
        let raw = machine.file("raw");
        fs::write(&raw, vec![b'.'; 1 << 20])?;
        let inserted = insert(&machine, &[&raw], false, "volume-1").await?;
        let commands = "dd if=/dev/data bs=1 count=4 2>/dev/null; echo; [ -b /dev/data ]
            echo written | dd of=/dev/data bs=512 seek=3 conv=notrunc,fsync 2>/dev/null
            stat -c %s /dev/data";
        machine
            .run_container(
                "raw",
                commands,
                vec![node(inserted.device, "/dev/data")],
                with_device("/dev/data"),
            )
            .await
            .with_context(|| format!("{:?} {}", fs::read_to_string(machine.out("raw")), machine.console()))?;
        assert_eq!(fs::read_to_string(machine.out("raw"))?, "....\n0\n");
        assert_eq!(&fs::read(&raw)?[3 * 512..3 * 512 + 8], b"written\n");
        remove(&machine, inserted.device).await
    })
}

#[test]
fn a_disk_is_taken_from_a_guest_that_still_uses_it() -> Result<()> {
    without_containerd(async || {
        let machine = DirectMachine::start(json!({ "disk_slots": 2 })).await?;
        let raw = machine.file("raw");
        fs::write(&raw, vec![b'1'; 1 << 20])?;
        let inserted = insert(&machine, &[&raw], false, "1").await?;
        let disk = node(inserted.device, "/dev/data");
        machine
            .start_container("user", "exec 3< /dev/data; sleep 1000", vec![disk], with_device("/dev/data"))
            .await?;
        remove(&machine, inserted.device).await?;
        machine.kill_container("user").await?;
        machine.wait_container("user").await?;
        machine.delete_container("user").await?;
        // Others have the slot after it.
        fs::write(&raw, vec![b'2'; 1 << 20])?;
        let again = insert(&machine, &[&raw], false, "2").await?;
        assert_eq!(again.device, inserted.device);
        let commands = "dd if=/dev/data bs=1 count=4 2>/dev/null";
        machine
            .run_container("again", commands, vec![node(again.device, "/dev/data")], with_device("/dev/data"))
            .await
            .with_context(|| machine.console())?;
        assert_eq!(fs::read_to_string(machine.out("again"))?, "2222");

        insert(&machine, &[&raw], true, "3").await?;
        let error = insert(&machine, &[&raw], true, "4").await.unwrap_err().to_string();
        ensure!(error.contains("slots"), "{error}");
        let without_files = machine.control.insert_disk(call_context(), &InsertDiskRequest::new()).await;
        let error = without_files.unwrap_err().to_string();
        ensure!(error.contains("no files have arrived"), "{error}");
        Ok(())
    })
}

#[test]
fn a_container_whose_layers_are_no_image_fails_and_leaves_its_slots_usable() -> Result<()> {
    without_containerd(async || {
        let machine = DirectMachine::start(json!({})).await?;
        let (top, lower) = make_layers(&machine)?;
        let nonsense = machine.file("nonsense");
        fs::write(&nonsense, vec![b'x'; 1 << 20])?;
        // Everything before the last layer has been done when it fails.
        let inserted = insert(&machine, &[&top, &lower, &nonsense], true, "bad").await?;
        let error = machine
            .start_container("bad", "true", vec![layers(&inserted, String::new(), String::new())], |_| {})
            .await
            .unwrap_err();
        ensure!(error.to_string().contains("image layer"), "{error:#}");
        // A disk is bound once.
        remove(&machine, inserted.device).await?;
        let inserted = insert(&machine, &[&top, &lower], true, "good").await?;
        let disk = layers(&inserted, String::new(), String::new());
        let error = machine
            .start_container("missing", "true", vec![disk, node(9999, "/dev/x")], |_| {})
            .await
            .unwrap_err();
        ensure!(error.to_string().contains("9999"), "{error:#}");
        remove(&machine, inserted.device).await?;

        let good = insert(&machine, &[&top, &lower], true, "good").await?;
        assert_eq!(good.device, inserted.device);
        let disk = layers(&good, String::new(), String::new());
        machine
            .run_container("good", "cat /name", vec![disk], |_| {})
            .await
            .with_context(|| machine.console())?;
        assert_eq!(fs::read_to_string(machine.out("good"))?, "top\n");
        Ok(())
    })
}

#[test]
fn processors_come_and_go() -> Result<()> {
    without_containerd(async || {
        let machine = DirectMachine::start(json!({ "vcpus_max": 4 })).await?;
        assert_eq!(machine.shell("before", "nproc").await?, "1");
        for (count, created) in [(3, 3), (1, 3), (4, 4), (2, 4)] {
            let mut request = ResizeRequest::new();
            request.vcpus = count;
            let response = machine.control.resize(call_context(), &request).await?;
            assert_eq!(response.vcpus, created);
            let mut request = agent::ResizeRequest::new();
            request.vcpus = count;
            let online = machine
                .agent
                .resize(call_context(), &request)
                .await
                .with_context(|| machine.console())?
                .vcpus;
            assert_eq!(online, count);
            assert_eq!(machine.shell(&format!("with{count}"), "nproc").await?, count.to_string());
        }
        let mut request = ResizeRequest::new();
        request.vcpus = 5;
        let error = machine.control.resize(call_context(), &request).await.unwrap_err().to_string();
        ensure!(error.contains("can have 4"), "{error}");
        Ok(())
    })
}

/// `MemTotal` in KiB.
async fn total(machine: &DirectMachine, id: &str) -> Result<u64> {
    let total = machine.shell(id, "awk '/MemTotal/ { print $2 }' /proc/meminfo").await?;
    total.parse().with_context(|| format!("MemTotal {total:?}"))
}

/// Gives the guest that many MiB of memory; returns whether the agent had to bind the device.
async fn resize_memory(machine: &DirectMachine, mib: u64) -> Result<bool> {
    let mut request = ResizeRequest::new();
    request.memory_bytes = mib << 20;
    let response = machine.control.resize(call_context(), &request).await?;
    assert_eq!(response.memory_bytes, mib << 20);
    let mut request = agent::ResizeRequest::new();
    request.memory_device = response.memory_device;
    if request.memory_device.is_some() {
        machine.agent.resize(call_context(), &request).await.with_context(|| machine.console())?;
    }
    let mut request = WaitMemoryRequest::new();
    request.limit_ms = 60_000;
    let has =
        machine.control.wait_memory(call_context(), &request).await.with_context(|| machine.console())?;
    assert_eq!(has.memory_bytes, mib << 20);
    let status = machine.control.status(call_context(), &StatusRequest::new()).await?;
    assert_eq!((status.memory_bytes, status.requested_memory_bytes), (mib << 20, mib << 20));
    Ok(response.memory_device.is_some())
}

#[test]
fn memory_comes_and_goes() -> Result<()> {
    without_containerd(async || {
        let machine = DirectMachine::start(json!({ "memory_mib": 256, "memory_max_mib": 1024 })).await?;
        let before = total(&machine, "before").await?;
        ensure!(resize_memory(&machine, 704).await?, "the device was there already");
        assert_eq!(total(&machine, "more").await?, before + (448 << 10));
        // More than there was at the start.
        machine.run_container("use", "dd if=/dev/zero of=/big/file bs=1M count=400", Vec::new(), |spec| {
            let big = json!({ "destination": "/big", "type": "tmpfs", "source": "tmpfs", "options": ["size=600m"] });
            spec["mounts"].as_array_mut().into_iter().for_each(|mounts| mounts.push(big.clone()));
        })
        .await
        .with_context(|| machine.console())?;
        let used = machine.control.status(call_context(), &StatusRequest::new()).await?.resident_bytes;
        ensure!(!resize_memory(&machine, 256).await?, "the device was bound twice");
        assert_eq!(total(&machine, "less").await?, before);
        let left = machine.control.status(call_context(), &StatusRequest::new()).await?.resident_bytes;
        println!("resident before unplugging {} MiB, after it {} MiB", used >> 20, left >> 20);
        ensure!(left + (250 << 20) < used, "the host has got back only {} bytes", used - left);
        resize_memory(&machine, 1024).await?;
        assert_eq!(total(&machine, "all").await?, before + (768 << 10));
        let mut request = ResizeRequest::new();
        request.memory_bytes = 1 << 31;
        let error = machine.control.resize(call_context(), &request).await.unwrap_err().to_string();
        ensure!(error.contains("can have"), "{error}");
        Ok(())
    })
}

/// Prints what a machine costs that can grow.
#[test]
#[ignore = "measures; run by its name"]
fn figures() -> Result<()> {
    without_containerd(async || {
        for change in [
            json!({ "disk_slots": 0 }),
            json!({ "disk_slots": 8 }),
            json!({ "disk_slots": 15 }),
            json!({ "disk_slots": 0, "vcpus_max": 8 }),
            json!({ "disk_slots": 0, "vcpus_max": 32 }),
            json!({ "disk_slots": 0, "memory_max_mib": 4096 }),
        ] {
            let (mut boots, mut memory) = (Vec::new(), String::new());
            for _ in 0..8 {
                let machine = DirectMachine::start(change.clone()).await?;
                boots.push(machine.boot.as_millis());
                memory = machine.shell("memory", "grep -E 'MemTotal|MemFree|Percpu' /proc/meminfo").await?;
            }
            boots.sort_unstable();
            println!("{change}: boots in ms {boots:?}; {}", memory.replace('\n', ", "));
        }
        Ok(())
    })
}
