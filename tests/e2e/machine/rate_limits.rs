//! Rate limits of a pod's devices, which its annotations set.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pericarp_tests::{HANG_LIMIT, Pod, PodBuilder, on_pericarp, wait_until};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::sleep,
};

use super::disks::{Loop, with_device};

/// How long a device's work is counted.
const MEASURED: Duration = Duration::from_secs(5);

/// Low limits, so that devices reach them on a slow node too.
const NET_BYTES: u64 = 100 << 10;
const FS_BYTES: u64 = 200 << 10;
const DISK_OPERATIONS: u64 = 10;
/// Bytes of files with which a container can start.
const FS_BURST: u64 = 6 << 20;

fn limited(pod: PodBuilder, limits: &[(&str, u64)]) -> PodBuilder {
    pod.with(|config| {
        for (name, value) in limits {
            config.annotations.insert(format!("io.pericarp.rate-limit.{name}"), value.to_string());
        }
    })
}

/// The counters of a pod's devices, read between two times.
struct Counters {
    before: Instant,
    after: Instant,
    devices: Value,
}

impl Counters {
    async fn read(pod: &Pod) -> Result<Self> {
        let before = Instant::now();
        let info = pod.info().await?;
        Ok(Self { before, after: Instant::now(), devices: info["pericarp"]["devices"].clone() })
    }

    fn get(&self, device: &str, counter: &str) -> Result<u64> {
        let count = self.devices[device][counter].as_u64();
        count.with_context(|| format!("{device} has no counter {counter}: {:#}", self.devices))
    }
}

/// What a device does that has more to do than its limit allows.
#[derive(Clone, Copy)]
struct Limit<'a> {
    device: &'a str,
    /// The counter of what is limited, and that of its throttle.
    counters: (&'a str, &'a str),
    per_second: u64,
}

impl Limit<'_> {
    /// Whether the device has done what its limit allows, between two readings. It is an error if it has done more.
    fn is_reached(&self, first: &Counters, last: &Counters) -> Result<bool> {
        let &Self { device, counters: (counter, throttled), per_second } = self;
        let grown = |counter: &str| anyhow::Ok(last.get(device, counter)? - first.get(device, counter)?);
        let (done, waits) = (grown(counter)?, grown(throttled)?);
        let in_time = |time: Duration| u128::from(per_second) * time.as_millis() / 1000;
        let maximum = in_time(last.after - first.before) * 11 / 10;
        let minimum = in_time(last.before - first.after) * 9 / 10;
        println!(
            "{device}: {done} of {counter}, where the limit is {minimum} to {maximum}; {waits} times throttled"
        );
        ensure!(u128::from(done) <= maximum, "{device} does {done} of {counter}, and its limit is {maximum}");
        Ok(u128::from(done) >= minimum && waits > 0)
    }
}

/// Counts what devices do until each has once done what its limit allows, and no device ever does more. A node that has
/// too much else to do needs several attempts. What a device may do at once, it has done before.
async fn assert_limited(pod: &Pod, limits: &[Limit<'_>]) -> Result<()> {
    let start = Instant::now();
    let mut left = limits.to_vec();
    sleep(Duration::from_secs(2)).await;
    let mut first = Counters::read(pod).await?;
    while !left.is_empty() {
        sleep(MEASURED).await;
        let last = Counters::read(pod).await?;
        for limit in limits {
            if limit.is_reached(&first, &last)? {
                left.retain(|other| other.counters != limit.counters);
            }
        }
        first = last;
        let names: Vec<_> = left.iter().map(|limit| limit.device).collect();
        ensure!(start.elapsed() < HANG_LIMIT, "{names:?} never did what their limits allow");
    }
    Ok(())
}

#[test]
fn a_pods_disks_and_files_keep_to_the_limits_of_its_annotations() -> Result<()> {
    on_pericarp(async |node| {
        let file = node.file("disk", "")?;
        fs::File::options().write(true).open(&file)?.set_len(4 << 20)?;
        let disk = Loop::of(&file)?;
        let limits = [
            ("disk.operations-per-second", DISK_OPERATIONS),
            ("fs.bytes-per-second", FS_BYTES),
            ("fs.bytes-burst", FS_BURST),
        ];
        let pod = limited(node.pod("limited"), &limits).run().await?;
        let load = "while :; do dd if=/dev/data of=/dev/null bs=4k iflag=direct; done 2> /dev/null &
            while :; do dd if=/dev/zero of=/written bs=16k count=64 conv=notrunc; done 2> /dev/null";
        let _busy = with_device(pod.container("busy").script(load), &disk, "r").start().await?;
        let read = Counters::read(&pod).await?;
        let devices = read.devices.as_object().context("the pod has devices")?;
        let name = devices.keys().find(|name| name.starts_with("disk")).context("the pod has a disk")?;
        // When the burst is used up, files have a limit.
        wait_until("files to be throttled", async || {
            Ok(Counters::read(&pod).await?.get("fs", "throttled")? > 0)
        })
        .await?;
        let disk = Limit { device: name, counters: ("reads", "throttled"), per_second: DISK_OPERATIONS };
        let files = Limit { device: "fs", counters: ("data_bytes", "throttled"), per_second: FS_BYTES };
        assert_limited(&pod, &[disk, files]).await
    })
}

#[test]
fn a_pods_network_keeps_to_the_limits_of_its_annotations_in_each_direction() -> Result<()> {
    on_pericarp(async |node| {
        let limits =
            [("net-receive.bytes-per-second", NET_BYTES), ("net-transmit.bytes-per-second", NET_BYTES)];
        let pod = limited(node.pod("limited"), &limits).run().await?;
        let server = pod.container("server").command(["peer", "serve", "[::]:8080"]).start().await?;
        server.wait_for_output("ready\n").await?;
        let address = pod.addresses().await?.into_iter().next().context("the pod has no address")?;

        let limit = |counters| Limit { device: "net0", counters, per_second: NET_BYTES };
        let mut stream = TcpStream::connect((address, 8080)).await?;
        stream.write_all(b"source 1000000000\n").await?;
        let receiving = tokio::spawn(async move {
            let mut buffer = vec![0; 1 << 18];
            while stream.read(&mut buffer).await.is_ok_and(|length| length > 0) {}
        });
        assert_limited(&pod, &[limit(("tx_bytes", "tx_throttled"))]).await?;
        receiving.abort();

        let mut stream = TcpStream::connect((address, 8080)).await?;
        stream.write_all(b"sink\n").await?;
        let sending = tokio::spawn(async move {
            let buffer = vec![b's'; 1 << 18];
            while stream.write_all(&buffer).await.is_ok() {}
        });
        assert_limited(&pod, &[limit(("rx_bytes", "rx_throttled"))]).await?;
        sending.abort();
        Ok(())
    })
}

#[test]
fn a_rate_limit_that_is_not_understood_is_refused_with_what_there_is() -> Result<()> {
    on_pericarp(async |node| {
        for (name, value, said) in [
            ("disk.bytes-per-second", "10M", "a whole number"),
            ("disk.iops", "10", "io.pericarp.rate-limit.disk.operations-per-second"),
            ("fs.bytes-burst", "10", "io.pericarp.rate-limit.fs.bytes-per-second"),
        ] {
            let pod = node.pod("odd").with(|config| {
                config.annotations.insert(format!("io.pericarp.rate-limit.{name}"), value.to_owned());
            });
            let error = pod.try_run().await?.err().context("the pod was made")?;
            let text = error.message();
            ensure!(text.contains(name) && text.contains(said), "{text}");
        }
        Ok(())
    })
}
