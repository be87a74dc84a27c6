//! virtio-net (virtio 1.2, section 5.1) on a tap that exists already: what the tap's interface sends,
//! the guest receives, and the other way round.
//!
//! The kernel does on the tap what a network card does in hardware: checksums and segmentation, as far
//! as the guest's driver has accepted them. Frames move between guest memory and the tap by vectored
//! I/O, without a copy in between.
//!
//! [`tap`] is the file descriptor, [`buffers`] guest memory as the kernel sees it, [`receive`] and
//! [`transmit`] one queue each, [`worker`] the thread that serves a pair of queues. There is one pair:
//! with more, each gets a worker and a queue of the tap's (`IFF_MULTI_QUEUE`) of its own, and the device
//! a control queue (`VIRTIO_NET_F_MQ`) that says how many are in use.

mod buffers;
mod receive;
mod tap;
mod transmit;
mod worker;

use std::{io, thread::JoinHandle};

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

pub use self::tap::TapError;
use self::{tap::Tap, worker::Worker};
use super::{
    ActivateError, Active, ActiveQueue, Counter, Device, F_EVENT_IDX, all_queues, device_type,
    read_config_bytes,
};
use crate::{config::NetConfig, memory::GuestMemory};

/// Feature bits (virtio 1.2, section 5.1.3).
mod feature {
    /// The device fills in checksums of the guest's frames.
    pub const CSUM: u64 = 1;
    /// The guest takes frames whose checksum is not filled in.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The configuration space tells the MTU.
    pub const MTU: u64 = 1 << 3;
    /// The configuration space tells the MAC address.
    pub const MAC: u64 = 1 << 5;
    /// The guest takes large TCP segments.
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// The device cuts the guest's large TCP segments.
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    /// A received frame may fill several buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// A frame's descriptors may lie in a table of their own, so that it takes one entry of the ring.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// The guest takes large UDP datagrams, to be cut into datagrams.
    pub const GUEST_USO4: u64 = 1 << 54;
    pub const GUEST_USO6: u64 = 1 << 55;
    /// The device cuts the guest's large UDP datagrams.
    pub const HOST_USO: u64 = 1 << 56;
}

/// Receive and transmit queue.
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// Size of `virtio_net_hdr`, with `num_buffers` (virtio 1.2, section 5.1.6).
const HEADER_SIZE: u8 = 12;
/// Largest frame with its header: an IP packet of 64 KiB in an Ethernet frame (virtio 1.2, section
/// 5.1.6.3.1).
const FRAME_MAX: usize = 65562;
/// Smallest IPv4 MTU (RFC 791): a Linux guest takes no device with less.
const MTU_MIN: u16 = 68;
/// A network device cannot be made.
#[derive(Debug, Error)]
pub enum NetError {
    #[error("an MTU of {mtu} bytes is asked for on the tap {tap}; the smallest is {MTU_MIN}")]
    Mtu { tap: String, mtu: u16 },
    #[error(transparent)]
    Tap(#[from] TapError),
}

/// What the control server reads while the worker counts, from the guest's point of view; bytes are of
/// Ethernet frames.
#[derive(Clone, Default)]
struct Counters {
    rx_packets: Counter,
    rx_bytes: Counter,
    /// Frames that did not fit the guest's buffers, and buffers that could not be used.
    rx_dropped: Counter,
    tx_packets: Counter,
    tx_bytes: Counter,
    /// Frames that the kernel did not take, or that were none.
    tx_dropped: Counter,
}

/// A network interface of the guest's.
pub struct Net {
    name: String,
    /// `struct virtio_net_config` (virtio 1.2, section 5.1.4), as far as the MTU.
    config: [u8; 12],
    features: u64,
    /// Taken by the worker.
    tap: Option<Tap>,
    counters: Counters,
    worker: Option<(JoinHandle<()>, EventFd)>,
}

impl Net {
    /// Attaches to the device's tap. `index` tells the machine's network devices apart.
    pub fn new(index: usize, config: &NetConfig) -> Result<Net, NetError> {
        if config.mtu < MTU_MIN {
            return Err(NetError::Mtu { tap: config.tap.clone(), mtu: config.mtu });
        }
        let tap = Tap::open(&config.netns, &config.tap)?;
        Ok(Net {
            name: format!("net{index}"),
            config: config_space(config),
            features: features(tap.segments_udp()),
            tap: Some(tap),
            counters: Counters::default(),
            worker: None,
        })
    }

    fn start(&mut self, memory: &GuestMemory, features: u64, queues: [ActiveQueue; 2]) -> io::Result<()> {
        let tap = self.tap.take().ok_or(io::ErrorKind::NotConnected)?;
        // Not before now: a driver must not get what it has not accepted.
        tap.set_offloads(features)?;
        let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let counters = self.counters.clone();
        let worker = Worker::new(self.name.clone(), memory, features, queues, tap, counters, &stop)?;
        let thread = std::thread::Builder::new().name(self.name.clone()).spawn(move || worker.run())?;
        self.worker = Some((thread, stop));
        Ok(())
    }
}

/// Not among them: explicit congestion notification in large segments, which the tap then segments
/// itself; a link status, because the link is up for as long as there is a machine.
fn features(segments_udp: bool) -> u64 {
    use feature::{
        CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, HOST_TSO4, HOST_TSO6, HOST_USO,
        INDIRECT_DESC, MAC, MRG_RXBUF, MTU,
    };
    let tcp = CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6;
    let udp = if segments_udp { GUEST_USO4 | GUEST_USO6 | HOST_USO } else { 0 };
    MAC | MTU | MRG_RXBUF | INDIRECT_DESC | F_EVENT_IDX | tcp | udp
}

fn config_space(config: &NetConfig) -> [u8; 12] {
    const LINK_UP: u16 = 1;
    const QUEUE_PAIRS: u16 = 1;
    let mut space = [0; 12];
    space[..6].copy_from_slice(&config.mac);
    space[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
    space[8..10].copy_from_slice(&QUEUE_PAIRS.to_le_bytes());
    space[10..].copy_from_slice(&config.mtu.to_le_bytes());
    space
}

impl Device for Net {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u32 {
        device_type::NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, active: Active) -> Result<(), ActivateError> {
        let queues = all_queues(active.queues)?;
        self.start(&active.memory, active.features, queues).map_err(ActivateError::Worker)
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
    fn the_configuration_tells_mac_link_one_pair_and_mtu() {
        let config = NetConfig {
            netns: "/run/netns/pod".into(),
            tap: "tap0".into(),
            mac: [2, 0, 0, 0, 0, 7],
            mtu: 9000,
        };
        assert_eq!(config_space(&config), [2, 0, 0, 0, 0, 7, 1, 0, 1, 0, 0x28, 0x23]);
    }

    #[test]
    fn udp_segmentation_is_offered_only_if_the_tap_does_it() {
        let udp = feature::GUEST_USO4 | feature::GUEST_USO6 | feature::HOST_USO;
        assert_eq!(features(true) ^ features(false), udp);
        assert_eq!(features(false) & udp, 0);
    }

    #[test]
    fn an_mtu_that_no_guest_takes_is_a_clear_error() {
        let config =
            NetConfig { netns: "/nonexistent".into(), tap: "tap0".into(), mac: [2, 0, 0, 0, 0, 7], mtu: 67 };
        let error = Net::new(0, &config).map(drop).unwrap_err().to_string();
        assert!(error.contains("67") && error.contains("tap0"), "{error}");
    }
}
