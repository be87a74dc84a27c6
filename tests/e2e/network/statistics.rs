//! The statistics of a pod's traffic.

use anyhow::{Context, Result};
use pericarp_tests::{Pod, on_node, on_pericarp};
use serde_json::Value;

use super::{Server, ask};

/// How many bytes a test moves each way.
const BYTES: usize = 4_000_000;

/// Moves bytes from the pod to the node.
async fn take_bytes(server: &Server) -> Result<()> {
    let received = ask(server.address()?, &format!("source {BYTES}")).await?;
    assert_eq!(received.len(), BYTES);
    Ok(())
}

/// Moves bytes from the node to the pod.
async fn give_bytes(server: &Server) -> Result<()> {
    let sent = "s".repeat(BYTES);
    assert_eq!(ask(server.address()?, &format!("sink\n{sent}")).await?, (BYTES + 1).to_string());
    Ok(())
}

#[test]
fn the_pods_statistics_count_its_traffic() -> Result<()> {
    on_node(async |node| {
        let server = Server::pooled(node).await?;
        let counted = async || -> Result<(u64, u64)> {
            let stats = server.pod.stats().await?;
            let network = stats.linux.and_then(|linux| linux.network).context("network statistics")?;
            let interface = network.default_interface.context("of the main interface")?;
            assert_eq!(interface.name, "eth0");
            let value = |count: Option<pericarp_tests::api::UInt64Value>| count.map(|count| count.value);
            Ok((value(interface.rx_bytes).context("received")?, value(interface.tx_bytes).context("sent")?))
        };
        let before = counted().await?;
        take_bytes(&server).await?;
        give_bytes(&server).await?;
        let after = counted().await?;
        // From the pod's point of view, headers included.
        for (before, after) in [(before.0, after.0), (before.1, after.1)] {
            let grown = usize::try_from(after - before)?;
            assert!((BYTES..BYTES * 3 / 2).contains(&grown), "{grown} bytes are counted of {BYTES}");
        }
        Ok(())
    })
}

#[test]
fn large_segments_cross_the_machines_device_in_one_piece() -> Result<()> {
    on_pericarp(async |node| {
        let server = Server::pooled(node).await?;
        let at_first = device(&server.pod).await?;
        take_bytes(&server).await?;
        let in_between = device(&server.pod).await?;
        give_bytes(&server).await?;
        let at_last = device(&server.pod).await?;
        for (direction, before, after) in [("tx", &at_first, &in_between), ("rx", &in_between, &at_last)] {
            let grown = |what: &str| {
                let key = format!("{direction}_{what}");
                let count = |counters: &Value| counters[&key].as_u64().with_context(|| format!("no {key}"));
                anyhow::Ok(count(after)? - count(before)?)
            };
            let (bytes, packets) = (grown("bytes")?, grown("packets")?);
            assert!(bytes > BYTES as u64, "{direction}: {bytes} bytes");
            // Larger in the mean than any frame is on a wire with this MTU.
            let mean = bytes / packets;
            assert!(mean > 1_514, "{direction}: {packets} packets of {mean} bytes in the mean");
            assert_eq!(grown("dropped")?, 0, "{direction}");
        }
        Ok(())
    })
}

/// The counters of the machine's first network device, as verbose status shows them.
async fn device(pod: &Pod) -> Result<Value> {
    let info = pod.info().await?;
    let counters = info["pericarp"]["devices"]["net0"].clone();
    assert!(counters.is_object(), "no net0 in {info:#}");
    Ok(counters)
}
