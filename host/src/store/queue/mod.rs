//! What the scheduler asks of the queue of due rows: look, claim, settle, sweep, hold, release and line up.
//!
//! Must never:
//!
//! - scan. Each statement of the loops reads a bounded number of index entries, however many rows wait; a test fails if
//!   one of them reads the table;
//! - remove a row outside the transaction that locked it;
//! - fail because of one row's data once the row's message may have been confirmed.
//!
//! # The order of the queue
//!
//! The queue is `tidings.schedules` in the order of `slot_at`. That is a generated column, so no producer can get it
//! wrong, with the triggers or without: `greatest(due_at, not_before)`; for a held row the deadline, or infinity if
//! there is none. `not_before` defaults to `tidings.arrival()`, which makes the transaction take its number before it
//! reads the clock. The proof of the low-water mark needs that order.
//!
//! # Where looks and claims begin
//!
//! Looks and claims begin at the low-water mark, a `slot_at` below which no row waits. Below it lie index entries of
//! delivered rows, which PostgreSQL cannot remove while an old transaction is open, and which every statement would
//! step over. The transaction numbers of claims and looks prove the mark (`host/core/src/low_water.rs`). Each sweep
//! checks it by looking below it, beside the loop (`sweep.rs`). At any doubt the core gives it up. Without a mark,
//! looks and claims begin at the slots of a minute ago, and a sweep is due at once.
//!
//! # A backlog
//!
//! In a backlog a claim goes by kind (`claim/shares.sql`): by another index, in which each kind and priority has its rows in the
//! order of `slot_at`. The claim gives each kind a share, and within a kind takes each priority's rows in proportion to how many of
//! them are among the first by due time and priority.
//!
//! # Limits
//!
//! Rows of a kind in `tidings.limits` are not claimed from the queue. Once they are due they are moved into lines, and the claim of
//! turns takes as many of each line as its limit allows (`turns.rs`).
//!
//! # A row that is due in a month
//!
//! Its INSERT notifies no daemon: the triggers notify only about rows that are due within 30 s. Until then every look
//! costs the same few index pages. Once the row is the next of the queue, each look tells when it is due, and the
//! scheduler sleeps until then, or until a sweep if that comes first.

pub(super) mod canary;
pub(super) mod claim;
pub(super) mod commit_time;
pub(super) mod kinds;
pub(super) mod large_payload;
pub(super) mod look;
pub(super) mod moves;
pub(super) mod notifications;
pub(super) mod prepared;
pub(super) mod settle;
pub(super) mod settlement;
pub(super) mod sweep;
pub(super) mod turns;
