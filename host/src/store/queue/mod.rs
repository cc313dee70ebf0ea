//! What the scheduler asks of the queue of due rows: look, claim, settle, sweep, hold and release.
//!
//! Must never scan: each statement reads a bounded number of index entries, however many rows wait. Must never fail because
//! of one row's data once its message may have been confirmed.

pub(super) mod canary;
pub(super) mod claim;
pub(super) mod kinds;
pub(super) mod large_payload;
pub(super) mod look;
pub(super) mod polling;
pub(super) mod settle;
pub(super) mod sweep;
