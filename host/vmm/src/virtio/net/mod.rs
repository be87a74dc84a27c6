//! virtio-net (virtio 1.2, section 5.1) on a tap of the pod's network namespace.
//!
//! Frames go between the tap and the guest's memory by vectored reads and writes, without a copy in
//! between. The kernel's tap and the guest's driver speak the same header (`virtio_net_hdr_v1`), so
//! checksums and segmentation are left to whoever can do them. There is one queue pair, served by one
//! thread ([`worker`]); more pairs would each get a thread of their own.

mod tap;
mod worker;

use std::{io, thread::JoinHandle};

use vmm_sys_util::eventfd::EventFd;

pub use self::tap::TapError;
use self::{tap::Tap, worker::Worker};
use super::{ActivateError, Active, Counter, Device, F_EVENT_IDX, device_type, read_config_bytes};
use crate::config::NetConfig;

/// Receive and transmit queue.
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// Feature bits (virtio 1.2, section 5.1.3).
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

/// `VIRTIO_NET_S_LINK_UP`
const LINK_UP: u16 = 1;

/// What the control server reads while the worker counts.
#[derive(Clone, Default)]
struct Counters {
    rx_packets: Counter,
    rx_bytes: Counter,
    rx_dropped: Counter,
    tx_packets: Counter,
    tx_bytes: Counter,
    tx_dropped: Counter,
}

/// One network device of the guest's.
pub struct Net {
    /// `virtio_net_config` (virtio 1.2, section 5.1.4).
    config: [u8; 12],
    /// Taken by the worker.
    tap: Option<Tap>,
    counters: Counters,
    worker: Option<(JoinHandle<()>, EventFd)>,
}

impl Net {
    /// Attaches to the tap.
    pub fn new(config: &NetConfig) -> Result<Net, TapError> {
        Ok(Net::with_tap(config, Tap::open(&config.netns, &config.tap)?))
    }

    fn with_tap(config: &NetConfig, tap: Tap) -> Net {
        let mut space = [0; 12];
        space[..6].copy_from_slice(&config.mac);
        space[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
        // max_virtqueue_pairs, which means something only with more than one.
        space[8..10].copy_from_slice(&1u16.to_le_bytes());
        space[10..].copy_from_slice(&config.mtu.to_le_bytes());
        Net { config: space, tap: Some(tap), counters: Counters::default(), worker: None }
    }

    fn start(&mut self, active: Active) -> io::Result<()> {
        let tap = self.tap.take().ok_or(io::ErrorKind::NotConnected)?;
        // What the driver does not take must not come: it would drop it, or worse.
        tap.set_offload(tap::Offload {
            checksum: active.features & feature::GUEST_CSUM != 0,
            tso4: active.features & feature::GUEST_TSO4 != 0,
            tso6: active.features & feature::GUEST_TSO6 != 0,
        })?;
        let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let worker = Worker::new(active, tap, self.counters.clone(), &stop)?;
        let thread = std::thread::Builder::new().name("net".into()).spawn(move || worker.run())?;
        self.worker = Some((thread, stop));
        Ok(())
    }
}

impl Device for Net {
    fn name(&self) -> &'static str {
        "net"
    }

    fn device_type(&self) -> u32 {
        device_type::NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        use feature::{
            CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6, MAC, MRG_RXBUF, MTU, STATUS,
        };
        F_EVENT_IDX
            | CSUM
            | GUEST_CSUM
            | GUEST_TSO4
            | GUEST_TSO6
            | HOST_TSO4
            | HOST_TSO6
            | MAC
            | MRG_RXBUF
            | MTU
            | STATUS
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, active: Active) -> Result<(), ActivateError> {
        self.start(active).map_err(ActivateError::Worker)
    }

    fn stop(&mut self) {
        super::stop_worker(self.worker.take());
    }

    fn counters(&self) -> Vec<(&'static str, Counter)> {
        let counters = &self.counters;
        vec![
            ("rx_packets", counters.rx_packets.clone()),
            ("rx_bytes", counters.rx_bytes.clone()),
            ("rx_dropped", counters.rx_dropped.clone()),
            ("tx_packets", counters.tx_packets.clone()),
            ("tx_bytes", counters.tx_bytes.clone()),
            ("tx_dropped", counters.tx_dropped.clone()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_reads_its_address_and_mtu() {
        let (tap, _) = tap::pair();
        let config = NetConfig {
            netns: "/run/netns/x".into(),
            tap: "pericarp0".into(),
            mac: [2, 0, 0, 1, 2, 3],
            mtu: 1450,
        };
        let net = Net::with_tap(&config, tap);
        let mut space = [0; 12];
        net.read_config(0, &mut space);
        assert_eq!(space, [2, 0, 0, 1, 2, 3, 1, 0, 1, 0, 0xaa, 5]);
    }
}
