//! Times and limits that worlds and invariants share.

/// The time at which a world begins, in ms: late enough that no computed time is negative.
pub(super) const START: u64 = 3_600_000;
/// The sweep interval of every daemon, in ms.
pub(super) const SWEEP: u64 = 5_000;
/// A core takes at most this many actions between two sleeps, if nothing happens meanwhile.
pub(super) const MAX_ACTIONS: u32 = 16;
/// Rows of a transaction that is open for longer than this, in ms, may be below the mark.
pub(super) const OPEN_FOR_LONG: u64 = 60_000;
/// Late rows a second, in daemons that pace them.
pub(super) const DRAIN_RATE: u32 = 20;
/// The longest time between two claims of late rows, in ms: that of the two rows of a claim.
pub(super) const PACED_WITHIN: u64 = 100;
