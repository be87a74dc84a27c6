//! Offsets of the transport's registers in a device's page (virtio 1.2, section 4.2.2, table 4.1), by their names
//! there.

#![allow(
    dead_code,
    reason = "the table is complete; no device has shared memory or offers VIRTIO_F_RING_RESET"
)]

/// Reads "virt".
pub const MAGIC_VALUE: u64 = 0x000;
/// Reads 2: the transport of virtio 1.
pub const VERSION: u64 = 0x004;
/// Reads the device's type (virtio 1.2, section 5); 0 for a placeholder without a device.
pub const DEVICE_ID: u64 = 0x008;
pub const VENDOR_ID: u64 = 0x00c;
/// Reads 32 of the features that the device offers, as selected by [`DEVICE_FEATURES_SEL`].
pub const DEVICE_FEATURES: u64 = 0x010;
pub const DEVICE_FEATURES_SEL: u64 = 0x014;
/// Takes 32 of the features that the driver accepts, as selected by [`DRIVER_FEATURES_SEL`].
pub const DRIVER_FEATURES: u64 = 0x020;
pub const DRIVER_FEATURES_SEL: u64 = 0x024;
/// Selects the queue that the registers `QUEUE_*` are about, up to [`QUEUE_DEVICE_HIGH`], except [`QUEUE_NOTIFY`].
pub const QUEUE_SEL: u64 = 0x030;
/// Reads the largest size of the selected queue; 0 if there is no such queue.
pub const QUEUE_NUM_MAX: u64 = 0x034;
pub const QUEUE_NUM: u64 = 0x038;
pub const QUEUE_READY: u64 = 0x044;
/// Takes the index of a queue that has something for the device. KVM handles most of these writes by itself.
pub const QUEUE_NOTIFY: u64 = 0x050;
pub const INTERRUPT_STATUS: u64 = 0x060;
/// Takes the reasons for an interrupt that the driver has handled. KVM swallows most of these writes.
pub const INTERRUPT_ACK: u64 = 0x064;
/// The device status field: see [`status`](super::status).
pub const STATUS: u64 = 0x070;
/// Address of the descriptor area.
pub const QUEUE_DESC_LOW: u64 = 0x080;
pub const QUEUE_DESC_HIGH: u64 = 0x084;
/// Address of the driver area: the available ring.
pub const QUEUE_DRIVER_LOW: u64 = 0x090;
pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
/// Address of the device area: the used ring.
pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
pub const SHM_SEL: u64 = 0x0ac;
pub const SHM_LEN_LOW: u64 = 0x0b0;
pub const SHM_LEN_HIGH: u64 = 0x0b4;
pub const SHM_BASE_LOW: u64 = 0x0b8;
pub const SHM_BASE_HIGH: u64 = 0x0bc;
pub const QUEUE_RESET: u64 = 0x0c0;
/// Reads a number that changes with the configuration space, so that a driver can tell whether it has read all of it at
/// one moment.
pub const CONFIG_GENERATION: u64 = 0x0fc;
/// Start of the configuration space, which goes on to the end of the page.
pub const CONFIG: u64 = 0x100;
