//! Times and limits that worlds and invariants share.

/// The time at which a world begins, in ms: late enough that no computed time is negative.
pub(super) const START: u64 = 3_600_000;
/// The sweep interval of every daemon, in ms.
pub(super) const SWEEP: u64 = 5_000;
/// A core takes at most this many actions between two sleeps, if nothing happens meanwhile.
pub(super) const MAX_ACTIONS: u32 = 16;
/// Rows of a transaction that is open for longer than this, in ms, may be below the mark.
pub(super) const OPEN_FOR_LONG: u64 = 60_000;
