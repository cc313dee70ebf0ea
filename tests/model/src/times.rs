//! The times that the worlds and the invariants share.

/// The world begins here, so that no moment is ever before the beginning of anything.
pub(super) const START: u64 = 3_600_000;
/// The longest time between two looks, in ms.
pub(super) const SWEEP: u64 = 5_000;
/// Between two sleeps no core takes more actions than this, if nothing happens meanwhile.
pub(super) const TURNS: u32 = 16;
/// A transaction that is open for longer may have rows below the mark, in ms.
pub(super) const PATIENCE: u64 = 60_000;
