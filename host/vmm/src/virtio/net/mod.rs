//! virtio-net (virtio 1.2, section 5.1) on a tap, which must exist already. What the tap's interface sends, the guest
//! receives, and the other way round.
//!
//! The kernel does on the tap what a network card does in hardware: checksums and segmentation, as far as the guest's
//! driver has accepted them. Frames move between guest memory and the tap by vectored I/O, without a copy in between.
//!
//! [`tap`] is the file descriptor; [`iovecs`] is guest memory as the kernel sees it; [`receive`] and [`transmit`] serve
//! one queue each; [`worker`] is the thread that serves a pair of queues.
//!
//! With more than one pair, each has a thread and a queue of the tap (`IFF_MULTI_QUEUE`) of its own, so that the
//! machine serves as many vCPUs at the same time. The driver finds the pairs by `VIRTIO_NET_F_MQ` and says through the
//! control queue ([`control_queue`], a thread too) how many it uses; the kernel gives frames to those alone
//! ([`steering`]). Until then, and with a driver without the feature, the first pair is in use. [`queues`] assigns the
//! queues to pairs. All queues share the transport's one interrupt: the guest handles received frames on one vCPU,
//! unless it distributes them itself (receive packet steering). With one pair there is no control queue.
//!
//! Trust: the guest is hostile, and so are the frames from the pod's network. Neither is looked at here: the kernel
//! checks the header of each frame against the frame. What is checked is that every buffer lies in guest memory.

mod control_queue;
mod iovecs;
mod queues;
mod receive;
mod steering;
mod tap;
mod transmit;
mod worker;

#[cfg(test)]
mod multi_queue_tests;
#[cfg(test)]
mod testing;

use std::{io, sync::Arc};

use thiserror::Error;

pub use self::tap::TapError;
use self::{
    control_queue::ControlQueue,
    queues::{NetQueues, QueuePair},
    receive::Receiver,
    steering::Steering,
    tap::Tap,
    transmit::Transmitter,
    worker::Worker,
};
use super::{
    ActivateError, Activation, Counter, Device, F_EVENT_IDX, RunningWorker, device_type, read_config_bytes,
    throttle::Throttle,
};
use crate::{
    config::{NetConfig, RateLimits},
    memory::GuestMemory,
    thread_kind::ThreadKind,
    threads::ThreadSpawner,
};

/// Feature bits (virtio 1.2, section 5.1.3).
mod feature {
    /// The device fills in the checksums of the guest's frames.
    pub const CSUM: u64 = 1;
    /// The guest takes frames whose checksum is not filled in.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The configuration space contains the MTU.
    pub const MTU: u64 = 1 << 3;
    /// The configuration space contains the MAC address.
    pub const MAC: u64 = 1 << 5;
    /// The guest takes large TCP segments.
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// The device cuts the guest's large TCP segments.
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    /// A received frame may fill several buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// There is a control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// There may be several pairs of queues, and the configuration space contains their number.
    pub const MQ: u64 = 1 << 22;
    /// A frame's descriptors may lie in a table of their own, so that it takes one entry of the ring.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// The guest takes large UDP datagrams, to be cut into datagrams.
    pub const GUEST_USO4: u64 = 1 << 54;
    pub const GUEST_USO6: u64 = 1 << 55;
    /// The device cuts the guest's large UDP datagrams.
    pub const HOST_USO: u64 = 1 << 56;
}

/// Size of `virtio_net_hdr`, with `num_buffers` (virtio 1.2, section 5.1.6).
const HEADER_SIZE: u8 = 12;
/// Largest frame with its header: an IP packet of 64 KiB in an Ethernet frame (virtio 1.2, section
/// 5.1.6.3.1).
const FRAME_MAX: usize = 65562;
/// Smallest IPv4 MTU (RFC 791): a Linux guest takes no device with less.
const MTU_MIN: u16 = 68;

/// A network device cannot be set up.
#[derive(Debug, Error)]
pub enum NetError {
    #[error("an MTU of {mtu} bytes is asked for on the tap {tap}; the smallest is {MTU_MIN}")]
    Mtu { tap: String, mtu: u16 },
    #[error(
        "{pairs} queue pairs are asked for on the tap {tap}; there can be 1 to {}",
        NetConfig::QUEUE_PAIRS_MAX
    )]
    QueuePairs { tap: String, pairs: u16 },
    #[error(transparent)]
    Tap(#[from] TapError),
}

/// Counted by the workers of all pairs together, read by the control service. Directions are the guest's; bytes are
/// those of Ethernet frames.
#[derive(Clone, Default)]
struct Counters {
    rx_packets: Counter,
    rx_bytes: Counter,
    /// Frames that did not fit the guest's buffers, and buffers that could not be used.
    rx_dropped: Counter,
    tx_packets: Counter,
    tx_bytes: Counter,
    /// Frames that the kernel did not take, or that were invalid.
    tx_dropped: Counter,
}

/// The rate limits of the directions, which the workers of all pairs keep together.
#[derive(Clone, Default)]
struct Throttles {
    receive: Throttle,
    transmit: Throttle,
}

/// A network interface of the guest.
pub struct Net {
    name: String,
    /// `struct virtio_net_config` (virtio 1.2, section 5.1.4), up to the MTU.
    config: [u8; 12],
    features: u64,
    queue_sizes: Vec<u16>,
    /// The tap's queues, one for each pair. They go to the workers when the device is activated.
    taps: Vec<Tap>,
    counters: Counters,
    throttles: Throttles,
    /// The workers of the pairs and of the control queue.
    workers: Vec<RunningWorker>,
}

impl Net {
    /// Attaches to the device's tap. `index` distinguishes the machine's network devices.
    pub fn new(index: usize, config: &NetConfig, limits: &RateLimits) -> Result<Self, NetError> {
        if config.mtu < MTU_MIN {
            return Err(NetError::Mtu { tap: config.tap.clone(), mtu: config.mtu });
        }
        let pairs = config.queue_pairs;
        if !(1..=NetConfig::QUEUE_PAIRS_MAX).contains(&pairs) {
            return Err(NetError::QueuePairs { tap: config.tap.clone(), pairs });
        }
        let taps = Tap::open(&config.netns, &config.tap, pairs)?;
        Ok(Self {
            name: format!("net{index}"),
            config: config_space(config),
            features: features(taps.iter().all(Tap::segments_udp), pairs),
            queue_sizes: queues::sizes(pairs),
            taps,
            counters: Counters::default(),
            throttles: Throttles {
                receive: Throttle::new(&limits.net_receive),
                transmit: Throttle::new(&limits.net_transmit),
            },
            workers: Vec::new(),
        })
    }

    fn start(
        &mut self,
        threads: &ThreadSpawner,
        memory: &GuestMemory,
        features: u64,
        queues: NetQueues,
    ) -> io::Result<()> {
        let taps = std::mem::take(&mut self.taps);
        // Not before now, because a driver must not receive frames of a kind that it has not accepted.
        taps.first().ok_or(io::ErrorKind::NotConnected)?.set_offloads(features)?;
        let mut other_taps = Vec::new();
        // The tap's queues of pairs that the driver cannot use are closed.
        for (index, (pair, tap)) in queues.pairs.into_iter().zip(taps).enumerate() {
            let tap = Arc::new(tap);
            let name = if index == 0 {
                self.name.clone()
            } else {
                other_taps.push(Arc::downgrade(&tap));
                format!("{}.{index}", self.name)
            };
            self.start_pair(threads, &name, memory, features, pair, tap)?;
        }
        if let Some(queue) = queues.control {
            let steering = (features & feature::MQ != 0).then(|| Steering::new(other_taps));
            let name = format!("{}.control", self.name);
            let memory = memory.clone();
            self.workers.push(super::start_worker(threads, ThreadKind::Net, &name, |stop| {
                let control = ControlQueue::new(name.clone(), memory, queue, steering, stop)?;
                Ok(move || control.run())
            })?);
        }
        Ok(())
    }

    fn start_pair(
        &mut self,
        threads: &ThreadSpawner,
        name: &str,
        memory: &GuestMemory,
        features: u64,
        pair: QueuePair,
        tap: Arc<Tap>,
    ) -> io::Result<()> {
        let (counters, throttles) = (self.counters.clone(), self.throttles.clone());
        let receiver = Receiver::new(pair.receive, memory, features, counters.clone(), throttles.receive);
        let transmitter = Transmitter::new(pair.transmit, memory, counters, throttles.transmit);
        self.workers.push(super::start_worker(threads, ThreadKind::Net, name, |stop| {
            let worker = Worker::new(name.to_owned(), receiver, transmitter, tap, stop)?;
            Ok(move || worker.run())
        })?);
        Ok(())
    }
}

/// The features of a device. Explicit congestion notification in large segments is not among them, as the tap segments
/// those itself; nor is a link status, because the link is up for as long as there is a machine.
fn features(segments_udp: bool, pairs: u16) -> u64 {
    use feature::{
        CSUM, CTRL_VQ, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, HOST_TSO4, HOST_TSO6,
        HOST_USO, INDIRECT_DESC, MAC, MQ, MRG_RXBUF, MTU,
    };
    let tcp = CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6;
    let udp = if segments_udp { GUEST_USO4 | GUEST_USO6 | HOST_USO } else { 0 };
    let multi_queue = if pairs > 1 { CTRL_VQ | MQ } else { 0 };
    MAC | MTU | MRG_RXBUF | INDIRECT_DESC | F_EVENT_IDX | tcp | udp | multi_queue
}

/// The configuration space up to the MTU.
fn config_space(config: &NetConfig) -> [u8; 12] {
    const LINK_UP: u16 = 1;
    let mut space = [0; 12];
    space[..6].copy_from_slice(&config.mac);
    space[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
    space[8..10].copy_from_slice(&config.queue_pairs.to_le_bytes());
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
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, threads } = activation;
        let queues = NetQueues::assign(queues, features).ok_or(ActivateError::Queues)?;
        self.start(&threads, &memory, features, queues).map_err(|error| {
            // Some of the workers may have started.
            self.stop();
            ActivateError::Worker(error)
        })
    }

    fn stop(&mut self) {
        for worker in self.workers.drain(..) {
            super::stop_worker(Some(worker));
        }
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
            ("rx_throttled", self.throttles.receive.throttled()),
            ("tx_throttled", self.throttles.transmit.throttled()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> NetConfig {
        NetConfig {
            netns: "/nonexistent".into(),
            tap: "tap0".into(),
            mac: [2, 0, 0, 0, 0, 7],
            mtu: 9000,
            queue_pairs: 1,
        }
    }

    #[test]
    fn the_configuration_tells_mac_link_pairs_and_mtu() {
        assert_eq!(config_space(&config()), [2, 0, 0, 0, 0, 7, 1, 0, 1, 0, 0x28, 0x23]);
        let config = NetConfig { queue_pairs: 3, ..config() };
        assert_eq!(config_space(&config), [2, 0, 0, 0, 0, 7, 1, 0, 3, 0, 0x28, 0x23]);
    }

    #[test]
    fn multi_queue_is_offered_only_with_several_pairs() {
        assert_eq!(features(true, 1) ^ features(true, 2), feature::CTRL_VQ | feature::MQ);
        assert_eq!(features(true, 1) & (feature::CTRL_VQ | feature::MQ), 0);
    }

    #[test]
    fn udp_segmentation_is_offered_only_if_the_tap_does_it() {
        let udp = feature::GUEST_USO4 | feature::GUEST_USO6 | feature::HOST_USO;
        assert_eq!(features(true, 1) ^ features(false, 1), udp);
        assert_eq!(features(false, 1) & udp, 0);
    }

    #[test]
    fn an_mtu_that_no_guest_takes_is_a_clear_error() {
        let config = NetConfig { mtu: 67, ..config() };
        let error = Net::new(0, &config, &RateLimits::default()).map(drop).unwrap_err().to_string();
        assert!(error.contains("67") && error.contains("tap0"), "{error}");
    }

    #[test]
    fn a_number_of_pairs_that_there_cannot_be_is_a_clear_error() {
        for queue_pairs in [0, NetConfig::QUEUE_PAIRS_MAX + 1, u16::MAX] {
            let error = Net::new(0, &NetConfig { queue_pairs, ..config() }, &RateLimits::default())
                .map(drop)
                .unwrap_err();
            assert!(matches!(&error, NetError::QueuePairs { tap, .. } if tap == "tap0"), "{error}");
        }
    }
}
