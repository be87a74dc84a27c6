use super::*;
use crate::{
    memory,
    virtio::{
        F_VERSION_1,
        testing::{Buffer, Ring, threads},
    },
};

const START: u64 = 4 << 30;
const SIZE: u64 = 8 * BLOCK_SIZE;
const REQUEST: u64 = 0x10_0000;
const RESPONSE: u64 = 0x20_0000;

struct Guest {
    memory: GuestMemory,
    device: Mem,
    state: HotplugState,
    ring: Ring,
}

fn guest() -> Guest {
    let boot = memory::allocate(&[(GuestAddress(0), 16 << 20)]).unwrap();
    let memory = memory::extend(&boot, (GuestAddress(START), usize::try_from(SIZE).unwrap())).unwrap();
    let state = HotplugState::new(GuestAddress(START), SIZE);
    let mut device = Mem::new(state.clone());
    let (ring, queue) = Ring::new(&memory, 0x8000, QUEUE_SIZE);
    assert!(!state.is_active());
    device
        .activate(Activation {
            memory: memory.clone(),
            features: F_VERSION_1,
            queues: vec![Some(queue)],
            threads: threads(),
        })
        .unwrap();
    assert!(state.is_active());
    Guest { memory, device, state, ring }
}

impl Guest {
    /// Makes a request. Returns the response's type and state.
    fn request(&mut self, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
        self.memory.write_obj(kind, GuestAddress(REQUEST)).unwrap();
        self.memory.write_obj(address, GuestAddress(REQUEST + 8)).unwrap();
        self.memory.write_obj(blocks, GuestAddress(REQUEST + 16)).unwrap();
        assert_eq!(self.send(24, 10), Some(10));
        let read = |at| self.memory.read_obj(GuestAddress(at)).unwrap();
        (read(RESPONSE), read(RESPONSE + 8))
    }

    /// Sends a request and room for its response, of these lengths. Returns the number of bytes written.
    fn send(&mut self, request: u32, response: u32) -> Option<u32> {
        self.ring.add(&[
            Buffer { address: REQUEST, length: request, writable: false },
            Buffer { address: RESPONSE, length: response, writable: true },
        ]);
        self.device.notify(0);
        self.ring.used().map(|(_, written)| written)
    }

    fn config(&self, field: u64) -> u64 {
        let mut bytes = [0; 8];
        self.device.read_config(field * 8, &mut bytes);
        u64::from_le_bytes(bytes)
    }
}

#[test]
fn the_guest_plugs_what_is_requested_and_the_configuration_tells() {
    let mut guest = guest();
    guest.state.request(2 * BLOCK_SIZE);
    assert_eq!(
        [0, 2, 3, 4, 5, 6].map(|field| guest.config(field)),
        [BLOCK_SIZE, START, SIZE, SIZE, 0, 2 * BLOCK_SIZE]
    );
    assert_eq!(guest.request(REQUEST_PLUG, START, 2), (RESPONSE_ACK, 0));
    assert_eq!(guest.request(REQUEST_PLUG, START + 2 * BLOCK_SIZE, 1), (RESPONSE_NACK, 0));
    assert_eq!(guest.request(REQUEST_STATE, START + BLOCK_SIZE, 2), (RESPONSE_ACK, 2));
    assert_eq!((guest.config(5), guest.state.plugged_bytes()), (2 * BLOCK_SIZE, 2 * BLOCK_SIZE));
    assert_eq!(guest.state.wait_for_request(Duration::ZERO), Ok(2 * BLOCK_SIZE));
}

#[test]
fn what_is_unplugged_goes_back_to_the_host() {
    let mut guest = guest();
    guest.state.request(SIZE);
    guest.request(REQUEST_PLUG, START, 8);
    let before = memory::resident_bytes(&guest.memory);
    for block in 0..8 {
        guest.memory.write_obj(1u8, GuestAddress(START + block * BLOCK_SIZE)).unwrap();
    }
    let touched = memory::resident_bytes(&guest.memory);
    assert!(touched >= before + 8 * 4096);
    assert_eq!(guest.request(REQUEST_UNPLUG, START, 1), (RESPONSE_ACK, 0));
    assert!(memory::resident_bytes(&guest.memory) < touched);
    assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(START)).unwrap(), 0);
    assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(START + BLOCK_SIZE)).unwrap(), 1);
    assert_eq!(guest.request(REQUEST_UNPLUG_ALL, 0, 0), (RESPONSE_ACK, 0));
    assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(START + BLOCK_SIZE)).unwrap(), 0);
    assert_eq!(guest.state.plugged_bytes(), 0);
}

#[test]
fn requests_that_make_no_sense_are_errors() {
    let mut guest = guest();
    guest.state.request(SIZE);
    for (kind, address, blocks) in [
        (REQUEST_PLUG, 0, 1),
        (REQUEST_PLUG, START, 0),
        (REQUEST_PLUG, START + SIZE, 1),
        (REQUEST_PLUG, START + 1, 1),
        (REQUEST_UNPLUG, START, 1),
        (REQUEST_STATE, u64::MAX, u16::MAX),
        (4, START, 1),
        (u16::MAX, START, 1),
    ] {
        assert_eq!(guest.request(kind, address, blocks), (RESPONSE_ERROR, 0), "{kind} {address:#x} {blocks}");
    }
    assert_eq!((guest.send(23, 10), guest.send(24, 9), guest.send(0, 0)), (Some(0), Some(0), Some(0)));
    assert_eq!(guest.state.plugged_bytes(), 0);
}

#[test]
fn a_broken_queue_stops_the_device() {
    let mut guest = guest();
    guest.ring.set_available(1000);
    guest.device.notify(0);
    assert!(guest.device.active.is_none());
    guest.device.notify(0);
}

#[test]
fn waiting_ends_with_the_time_or_with_another_request() {
    let guest = guest();
    assert_eq!(guest.state.wait_for_request(Duration::ZERO), Ok(0));
    guest.state.request(BLOCK_SIZE);
    assert_eq!(
        guest.state.wait_for_request(Duration::from_millis(1)),
        Err(WaitError::TimedOut { plugged_bytes: 0 })
    );
    let state = guest.state.clone();
    let waiting = std::thread::spawn(move || state.wait_for_request(Duration::from_secs(10)));
    // The thread may not have begun to wait yet, so the request changes until it has ended.
    while !waiting.is_finished() {
        guest.state.request(if guest.state.requested_bytes() == BLOCK_SIZE { SIZE } else { BLOCK_SIZE });
    }
    assert_eq!(waiting.join().unwrap(), Err(WaitError::Superseded));
}

#[test]
fn whoever_asks_how_much_there_is_does_not_wait_for_the_guest() {
    let mut guest = guest();
    guest.state.request(2 * BLOCK_SIZE);
    assert_eq!(guest.request(REQUEST_PLUG, START, 1), (RESPONSE_ACK, 0));
    // A vCPU that gives memory back to the host holds the lock for a while.
    let busy = guest.state.clone();
    let _busy = busy.blocks();
    assert_eq!((guest.state.plugged_bytes(), guest.state.requested_bytes()), (BLOCK_SIZE, 2 * BLOCK_SIZE));
}
