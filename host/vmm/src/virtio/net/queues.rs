//! The order of the device's queues (virtio 1.2, section 5.1.2): receiveq1, transmitq1, receiveq2, transmitq2, … and
//! the control queue behind the last pair.

use super::feature;
use crate::virtio::ActiveQueue;

/// Sizes of a receive and a transmit queue.
const PAIR_SIZES: [u16; 2] = [256, 256];
/// Size of the control queue. A driver gives one command at a time.
const CONTROL_SIZE: u16 = 16;

/// The sizes of the queues of a device with this many pairs. With a single pair there is no control queue.
pub fn sizes(pairs: u16) -> Vec<u16> {
    let mut sizes = PAIR_SIZES.repeat(pairs.into());
    if pairs > 1 {
        sizes.push(CONTROL_SIZE);
    }
    sizes
}

/// A receive and a transmit queue.
pub struct QueuePair {
    pub receive: ActiveQueue,
    pub transmit: ActiveQueue,
}

/// The queues that a driver has set up.
pub struct NetQueues {
    /// The pairs that the driver can use, at least one.
    pub pairs: Vec<QueuePair>,
    /// The control queue, if the driver uses it.
    pub control: Option<ActiveQueue>,
}

impl NetQueues {
    /// Assigns a device's queues to pairs, according to the features that its driver has accepted. `None` if the first
    /// pair is not complete.
    ///
    /// A driver that leaves out other queues can use neither them nor any pair after them. Without the control queue it
    /// has no means to use more than the first pair.
    pub fn assign(queues: Vec<Option<ActiveQueue>>, features: u64) -> Option<Self> {
        let has_control = features & feature::CTRL_VQ != 0;
        let has_multi_queue = has_control && features & feature::MQ != 0;
        // Without the feature the control queue lies behind the first pair.
        let most = if has_multi_queue { queues.len() / PAIR_SIZES.len() } else { 1 };
        let mut queues = queues.into_iter();
        let mut pairs = Vec::with_capacity(most);
        let mut complete = true;
        for _ in 0..most {
            let pair = queues.next().flatten().zip(queues.next().flatten());
            complete &= pair.is_some();
            if let Some((receive, transmit)) = pair.filter(|_| complete) {
                pairs.push(QueuePair { receive, transmit });
            }
        }
        let control = queues.next().flatten().filter(|_| has_control);
        if control.is_none() {
            pairs.truncate(1);
        }
        (!pairs.is_empty()).then_some(Self { pairs, control })
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::QueueT as _;

    use super::*;
    use crate::virtio::testing::{RING_SIZE, Ring, guest_memory};

    const MULTI_QUEUE: u64 = feature::CTRL_VQ | feature::MQ;

    /// Numbers of the queues in each pair, and of the control queue.
    type Assigned = (Vec<(u64, u64)>, Option<u64>);

    /// How a device with three pairs is used by a driver that leaves out some of its queues.
    fn assigned(features: u64, left_out: &[u64]) -> Option<Assigned> {
        let memory = guest_memory();
        let queue =
            |index| (!left_out.contains(&index)).then(|| Ring::new(&memory, (index + 1) * RING_SIZE, 16).1);
        let index = |queue: &ActiveQueue| queue.queue.desc_table() / RING_SIZE - 1;
        let queues = NetQueues::assign((0..7).map(queue).collect(), features)?;
        let pairs = queues.pairs.iter().map(|pair| (index(&pair.receive), index(&pair.transmit))).collect();
        Some((pairs, queues.control.as_ref().map(index)))
    }

    #[test]
    fn a_single_pair_has_no_control_queue() {
        assert_eq!(sizes(1), [256, 256]);
        assert_eq!(sizes(2), [256, 256, 256, 256, 16]);
    }

    #[test]
    fn the_control_queue_comes_behind_all_pairs() {
        assert_eq!(assigned(MULTI_QUEUE, &[]), Some((vec![(0, 1), (2, 3), (4, 5)], Some(6))));
    }

    #[test]
    fn a_driver_without_multi_queue_has_one_pair_and_the_control_queue_behind_it() {
        assert_eq!(assigned(0, &[]), Some((vec![(0, 1)], None)));
        assert_eq!(assigned(0, &[2, 3, 4, 5, 6]), Some((vec![(0, 1)], None)));
        assert_eq!(assigned(feature::CTRL_VQ, &[3, 4, 5, 6]), Some((vec![(0, 1)], Some(2))));
        // It would need the control queue (virtio 1.2, section 5.1.3.1).
        assert_eq!(assigned(feature::MQ, &[]), Some((vec![(0, 1)], None)));
    }

    #[test]
    fn pairs_from_the_first_incomplete_one_on_cannot_be_used() {
        assert_eq!(assigned(MULTI_QUEUE, &[3]), Some((vec![(0, 1)], Some(6))));
        assert_eq!(assigned(MULTI_QUEUE, &[4]), Some((vec![(0, 1), (2, 3)], Some(6))));
        assert_eq!(assigned(MULTI_QUEUE, &[6]), Some((vec![(0, 1)], None)));
        assert_eq!(assigned(MULTI_QUEUE, &[1]), None);
    }
}
