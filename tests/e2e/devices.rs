//! What comes and goes while a guest runs: disks, processors, memory. Without containerd, on machines of their own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use pericarp_protos::{
    agent,
    host::{Disk, Layers, Node, Part, disk::Use},
    vmm::{
        InsertDiskRequest, InsertDiskResponse, RemoveDiskRequest, ResizeRequest, Segment, StatusRequest,
        WaitMemoryRequest,
    },
};
use pericarp_tests::{
    bare::{Bare, limit, make_rootfs},
    without_containerd,
};
use serde_json::{Value, json};

/// Makes an EROFS image of a directory.
fn image(directory: &Path, image: &Path, compression: &str) -> Result<()> {
    let output = Command::new("mkfs.erofs").arg(compression).args([image, directory]).output()?;
    ensure!(output.status.success(), "mkfs.erofs: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

async fn insert(bare: &Bare, paths: &[&Path], read_only: bool, serial: &str) -> Result<InsertDiskResponse> {
    let mut request = InsertDiskRequest::new();
    for path in paths {
        let mut segment = Segment::new();
        path.to_str().context("a path")?.clone_into(&mut segment.path);
        request.segments.push(segment);
    }
    request.read_only = read_only;
    request.serial = serial.to_owned();
    Ok(bare.machine.insert_disk(limit(), &request).await?)
}

async fn remove(bare: &Bare, device: u32) -> Result<()> {
    let mut request = RemoveDiskRequest::new();
    request.device = device;
    bare.machine.remove_disk(limit(), &request).await?;
    Ok(())
}

/// The layers of an image, of which each segment is one.
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
fn make_layers(bare: &Bare) -> Result<(PathBuf, PathBuf)> {
    let (lower, top) = (bare.file("base"), bare.file("top"));
    make_rootfs(&lower)?;
    fs::write(lower.join("name"), "base\n")?;
    fs::write(lower.join("base-only"), "from the base\n")?;
    fs::create_dir(&top)?;
    fs::write(top.join("name"), "top\n")?;
    let (base_image, top_image) = (bare.file("base.erofs"), bare.file("top.erofs"));
    image(&lower, &base_image, "-zlz4")?;
    image(&top, &top_image, "-T0")?;
    Ok((top_image, base_image))
}

#[test]
fn a_container_runs_from_layers_on_a_disk_and_its_slot_is_used_again() -> Result<()> {
    without_containerd(async || {
        let bare = Bare::start(json!({})).await?;
        let (top, lower) = make_layers(&bare)?;
        let mut first = None;
        for round in 0..3 {
            let inserted = insert(&bare, &[&top, &lower], true, "image").await?;
            ensure!(first.is_none_or(|first| first == inserted.device), "another slot: {inserted:?}");
            first = Some(inserted.device);
            let id = format!("round{round}");
            let upper = bare.share_directory(&format!("{id}/upper"))?;
            let work = bare.share_directory(&format!("{id}/work"))?;
            let commands =
                "cat /name /base-only; echo changed > /name; cat /name; rm /base-only; [ ! -e /base-only ]";
            bare.run(&id, commands, vec![layers(&inserted, upper, work)], |_| {})
                .await
                .with_context(|| bare.console())?;
            assert_eq!(fs::read_to_string(bare.out(&id))?, "top\nfrom the base\nchanged\n");
            assert_eq!(fs::read_to_string(bare.file(&format!("share/{id}/upper/name")))?, "changed\n");
            remove(&bare, inserted.device).await?;
        }
        // Without a place to write to.
        let inserted = insert(&bare, &[&lower], true, "image").await?;
        let disk = layers(&inserted, String::new(), String::new());
        bare.run("read-only", "cat /name; ! echo x 2>/dev/null > /name", vec![disk], |_| {}).await?;
        assert_eq!(fs::read_to_string(bare.out("read-only"))?, "base\n");
        let status = bare.machine.status(limit(), &StatusRequest::new()).await?;
        let disk = format!("disk{}", inserted.device);
        let counters = status.devices.iter().find(|device| device.device == disk).context("the disk")?;
        ensure!(counters.counters["reads"] > 0 && counters.counters["errors"] == 0, "{counters}");
        remove(&bare, inserted.device).await?;
        ensure!(remove(&bare, inserted.device).await.is_err(), "an empty slot was emptied");
        Ok(())
    })
}

#[test]
fn a_raw_disk_is_a_node_in_its_container_and_what_is_written_is_in_the_file() -> Result<()> {
    without_containerd(async || {
        let bare = Bare::start(json!({})).await?;
        let raw = bare.file("raw");
        fs::write(&raw, vec![b'.'; 1 << 20])?;
        let inserted = insert(&bare, &[&raw], false, "volume-1").await?;
        let commands = "dd if=/dev/data bs=1 count=4 2>/dev/null; echo; [ -b /dev/data ]
            echo written | dd of=/dev/data bs=512 seek=3 conv=notrunc,fsync 2>/dev/null
            stat -c %s /dev/data";
        bare.run("raw", commands, vec![node(inserted.device, "/dev/data")], with_device("/dev/data"))
            .await
            .with_context(|| format!("{:?} {}", fs::read_to_string(bare.out("raw")), bare.console()))?;
        assert_eq!(fs::read_to_string(bare.out("raw"))?, "....\n0\n");
        assert_eq!(&fs::read(&raw)?[3 * 512..3 * 512 + 8], b"written\n");
        remove(&bare, inserted.device).await
    })
}

#[test]
fn a_disk_is_taken_from_a_guest_that_still_uses_it() -> Result<()> {
    without_containerd(async || {
        let bare = Bare::start(json!({ "disk_slots": 2 })).await?;
        let raw = bare.file("raw");
        fs::write(&raw, vec![b'1'; 1 << 20])?;
        let inserted = insert(&bare, &[&raw], false, "1").await?;
        let disk = node(inserted.device, "/dev/data");
        bare.begin("user", "exec 3< /dev/data; sleep 1000", vec![disk], with_device("/dev/data")).await?;
        remove(&bare, inserted.device).await?;
        bare.kill("user").await?;
        bare.wait("user").await?;
        bare.delete("user").await?;
        // Others have the slot after it.
        fs::write(&raw, vec![b'2'; 1 << 20])?;
        let again = insert(&bare, &[&raw], false, "2").await?;
        assert_eq!(again.device, inserted.device);
        let commands = "dd if=/dev/data bs=1 count=4 2>/dev/null";
        bare.run("again", commands, vec![node(again.device, "/dev/data")], with_device("/dev/data"))
            .await
            .with_context(|| bare.console())?;
        assert_eq!(fs::read_to_string(bare.out("again"))?, "2222");

        insert(&bare, &[&raw], true, "3").await?;
        let error = insert(&bare, &[&raw], true, "4").await.unwrap_err().to_string();
        ensure!(error.contains("slots"), "{error}");
        let error = insert(&bare, &[Path::new("/no/such/file")], true, "").await.unwrap_err().to_string();
        ensure!(error.contains("slots") || error.contains("/no/such/file"), "{error}");
        Ok(())
    })
}

#[test]
fn a_container_whose_layers_are_no_image_fails_and_leaves_its_slots_usable() -> Result<()> {
    without_containerd(async || {
        let bare = Bare::start(json!({})).await?;
        let (top, lower) = make_layers(&bare)?;
        let nonsense = bare.file("nonsense");
        fs::write(&nonsense, vec![b'x'; 1 << 20])?;
        // Everything before the last layer has been done when it fails.
        let inserted = insert(&bare, &[&top, &lower, &nonsense], true, "bad").await?;
        let error = bare
            .begin("bad", "true", vec![layers(&inserted, String::new(), String::new())], |_| {})
            .await
            .unwrap_err();
        ensure!(error.to_string().contains("image layer"), "{error:#}");
        // A disk is bound once.
        remove(&bare, inserted.device).await?;
        let inserted = insert(&bare, &[&top, &lower], true, "good").await?;
        let disk = layers(&inserted, String::new(), String::new());
        let error =
            bare.begin("missing", "true", vec![disk, node(9999, "/dev/x")], |_| {}).await.unwrap_err();
        ensure!(error.to_string().contains("9999"), "{error:#}");
        remove(&bare, inserted.device).await?;

        let good = insert(&bare, &[&top, &lower], true, "good").await?;
        assert_eq!(good.device, inserted.device);
        let disk = layers(&good, String::new(), String::new());
        bare.run("good", "cat /name", vec![disk], |_| {}).await.with_context(|| bare.console())?;
        assert_eq!(fs::read_to_string(bare.out("good"))?, "top\n");
        Ok(())
    })
}

#[test]
fn processors_come_and_go() -> Result<()> {
    without_containerd(async || {
        let bare = Bare::start(json!({ "vcpus_max": 4 })).await?;
        assert_eq!(bare.shell("before", "nproc").await?, "1");
        for (count, created) in [(3, 3), (1, 3), (4, 4), (2, 4)] {
            let mut request = ResizeRequest::new();
            request.vcpus = count;
            let response = bare.machine.resize(limit(), &request).await?;
            assert_eq!(response.vcpus, created);
            let mut request = agent::ResizeRequest::new();
            request.vcpus = count;
            let online = bare.agent.resize(limit(), &request).await.with_context(|| bare.console())?.vcpus;
            assert_eq!(online, count);
            assert_eq!(bare.shell(&format!("with{count}"), "nproc").await?, count.to_string());
        }
        let mut request = ResizeRequest::new();
        request.vcpus = 5;
        let error = bare.machine.resize(limit(), &request).await.unwrap_err().to_string();
        ensure!(error.contains("can have 4"), "{error}");
        Ok(())
    })
}

/// `MemTotal` in KiB.
async fn total(bare: &Bare, id: &str) -> Result<u64> {
    let total = bare.shell(id, "awk '/MemTotal/ { print $2 }' /proc/meminfo").await?;
    total.parse().with_context(|| format!("MemTotal {total:?}"))
}

/// Has the guest have that many MiB; answers whether its device had to be bound.
async fn resize_memory(bare: &Bare, mib: u64) -> Result<bool> {
    let mut request = ResizeRequest::new();
    request.memory_bytes = mib << 20;
    let response = bare.machine.resize(limit(), &request).await?;
    assert_eq!(response.memory_bytes, mib << 20);
    let mut request = agent::ResizeRequest::new();
    request.memory_device = response.memory_device;
    if request.memory_device.is_some() {
        bare.agent.resize(limit(), &request).await.with_context(|| bare.console())?;
    }
    let mut request = WaitMemoryRequest::new();
    request.limit_ms = 60_000;
    let has = bare.machine.wait_memory(limit(), &request).await.with_context(|| bare.console())?;
    assert_eq!(has.memory_bytes, mib << 20);
    let status = bare.machine.status(limit(), &StatusRequest::new()).await?;
    assert_eq!((status.memory_bytes, status.requested_memory_bytes), (mib << 20, mib << 20));
    Ok(response.memory_device.is_some())
}

#[test]
fn memory_comes_and_goes() -> Result<()> {
    without_containerd(async || {
        let bare = Bare::start(json!({ "memory_mib": 256, "memory_max_mib": 1024 })).await?;
        let before = total(&bare, "before").await?;
        ensure!(resize_memory(&bare, 704).await?, "the device was there already");
        assert_eq!(total(&bare, "more").await?, before + (448 << 10));
        // More than there was at the start.
        bare.run("use", "dd if=/dev/zero of=/big/file bs=1M count=400", Vec::new(), |spec| {
            let big = json!({ "destination": "/big", "type": "tmpfs", "source": "tmpfs", "options": ["size=600m"] });
            spec["mounts"].as_array_mut().into_iter().for_each(|mounts| mounts.push(big.clone()));
        })
        .await
        .with_context(|| bare.console())?;
        let used = bare.machine.status(limit(), &StatusRequest::new()).await?.resident_bytes;
        ensure!(!resize_memory(&bare, 256).await?, "the device was bound twice");
        assert_eq!(total(&bare, "less").await?, before);
        let left = bare.machine.status(limit(), &StatusRequest::new()).await?.resident_bytes;
        println!("resident before unplugging {} MiB, after it {} MiB", used >> 20, left >> 20);
        ensure!(left + (250 << 20) < used, "the host has got back only {} bytes", used - left);
        resize_memory(&bare, 1024).await?;
        assert_eq!(total(&bare, "all").await?, before + (768 << 10));
        let mut request = ResizeRequest::new();
        request.memory_bytes = 1 << 31;
        let error = bare.machine.resize(limit(), &request).await.unwrap_err().to_string();
        ensure!(error.contains("can have"), "{error}");
        Ok(())
    })
}

/// Prints what it costs to be able to grow.
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
                let bare = Bare::start(change.clone()).await?;
                boots.push(bare.boot.as_millis());
                memory = bare.shell("memory", "grep -E 'MemTotal|MemFree|Percpu' /proc/meminfo").await?;
            }
            boots.sort_unstable();
            println!("{change}: boots in ms {boots:?}; {}", memory.replace('\n', ", "));
        }
        Ok(())
    })
}
