//! Which blocks of the region the guest has plugged, and how much it should have plugged.

use super::BLOCK_SIZE;
use crate::memory;

/// A request is not done (virtio 1.2, section 5.15.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The guest would have plugged more than was requested. It may ask again when that has changed.
    Nack,
    /// The request is invalid.
    Error,
}

/// How many blocks of a range are plugged: all, none, or some.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    Plugged,
    Unplugged,
    Mixed,
}

/// The region's blocks.
#[derive(Debug)]
pub struct Blocks {
    /// Guest-physical address of the first block.
    start: u64,
    /// Whether each of them is plugged.
    plugged: Vec<bool>,
    /// Number of plugged blocks.
    plugged_count: u64,
    /// Bytes that the guest should have plugged, in whole blocks.
    pub requested: u64,
}

impl Blocks {
    /// A region without plugged blocks. `size` is in bytes.
    pub fn new(start: u64, size: u64) -> Self {
        let blocks = memory::to_usize(size / BLOCK_SIZE);
        Self { start, plugged: vec![false; blocks], plugged_count: 0, requested: 0 }
    }

    /// Bytes plugged.
    pub fn plugged(&self) -> u64 {
        self.plugged_count * BLOCK_SIZE
    }

    /// Plugs blocks that the guest wants to use. All of them must be unplugged.
    pub fn plug(&mut self, address: u64, blocks: u16) -> Result<(), Refusal> {
        if self.state(address, blocks)? != BlockState::Unplugged {
            return Err(Refusal::Error);
        }
        if (self.plugged_count + u64::from(blocks)) * BLOCK_SIZE > self.requested {
            return Err(Refusal::Nack);
        }
        self.set(address, blocks, true)
    }

    /// Unplugs blocks that the guest gives back. All of them must be plugged.
    pub fn unplug(&mut self, address: u64, blocks: u16) -> Result<(), Refusal> {
        if self.state(address, blocks)? != BlockState::Plugged {
            return Err(Refusal::Error);
        }
        self.set(address, blocks, false)
    }

    /// Unplugs all blocks.
    pub fn unplug_all(&mut self) {
        self.plugged.fill(false);
        self.plugged_count = 0;
    }

    /// The state of a range of blocks.
    pub fn state(&self, address: u64, blocks: u16) -> Result<BlockState, Refusal> {
        let range = self.range(address, blocks).ok_or(Refusal::Error)?;
        let asked = self.plugged.get(range).ok_or(Refusal::Error)?;
        Ok(match (asked.iter().any(|plugged| *plugged), asked.iter().all(|plugged| *plugged)) {
            (_, true) => BlockState::Plugged,
            (false, _) => BlockState::Unplugged,
            _ => BlockState::Mixed,
        })
    }

    fn set(&mut self, address: u64, blocks: u16, plugged: bool) -> Result<(), Refusal> {
        let range = self.range(address, blocks).ok_or(Refusal::Error)?;
        self.plugged.get_mut(range).ok_or(Refusal::Error)?.fill(plugged);
        // `plug` and `unplug` have checked that every one of these blocks changes.
        if plugged {
            self.plugged_count += u64::from(blocks);
        } else {
            self.plugged_count -= u64::from(blocks);
        }
        Ok(())
    }

    /// The indices of a range of blocks. `None` if there is no block in it, or if `address` is not a block's.
    fn range(&self, address: u64, blocks: u16) -> Option<std::ops::Range<usize>> {
        let distance = address.checked_sub(self.start)?;
        if blocks == 0 || !distance.is_multiple_of(BLOCK_SIZE) {
            return None;
        }
        let first = usize::try_from(distance / BLOCK_SIZE).ok()?;
        Some(first..first.checked_add(usize::from(blocks))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 4 << 30;

    /// Eight blocks, of which four may be plugged.
    fn blocks() -> Blocks {
        Blocks { requested: 4 * BLOCK_SIZE, ..Blocks::new(START, 8 * BLOCK_SIZE) }
    }

    #[test]
    fn blocks_are_plugged_up_to_what_is_requested() {
        let mut blocks = blocks();
        blocks.plug(START + BLOCK_SIZE, 3).unwrap();
        assert_eq!(blocks.plug(START + 4 * BLOCK_SIZE, 2), Err(Refusal::Nack));
        blocks.plug(START, 1).unwrap();
        assert_eq!(blocks.plugged(), 4 * BLOCK_SIZE);
        assert_eq!(blocks.state(START, 4), Ok(BlockState::Plugged));
        assert_eq!(blocks.state(START + 3 * BLOCK_SIZE, 2), Ok(BlockState::Mixed));
        assert_eq!(blocks.state(START + 4 * BLOCK_SIZE, 4), Ok(BlockState::Unplugged));
    }

    #[test]
    fn blocks_are_plugged_and_unplugged_once() {
        let mut blocks = blocks();
        blocks.plug(START, 2).unwrap();
        assert_eq!(blocks.plug(START + BLOCK_SIZE, 1), Err(Refusal::Error));
        assert_eq!(blocks.unplug(START + BLOCK_SIZE, 2), Err(Refusal::Error));
        blocks.unplug(START, 2).unwrap();
        assert_eq!(blocks.unplug(START, 1), Err(Refusal::Error));
        assert_eq!(blocks.plugged(), 0);
        blocks.plug(START, 4).unwrap();
        blocks.unplug_all();
        assert_eq!((blocks.plugged(), blocks.state(START, 8)), (0, Ok(BlockState::Unplugged)));
    }

    #[test]
    fn what_is_not_in_the_region_is_an_error() {
        let mut blocks = blocks();
        for (address, count) in [
            (START, 0),
            (START, 9),
            (START + 8 * BLOCK_SIZE, 1),
            (START + 4096, 1),
            (START - BLOCK_SIZE, 1),
            (0, 1),
            (u64::MAX - BLOCK_SIZE + 1, u16::MAX),
        ] {
            assert_eq!(blocks.plug(address, count), Err(Refusal::Error), "{address:#x}");
            assert_eq!(blocks.state(address, count), Err(Refusal::Error), "{address:#x}");
        }
    }
}
