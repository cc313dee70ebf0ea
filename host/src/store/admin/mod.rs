//! What people ask of the database, through commands, the page and the metrics: where a row is, which rows are due
//! next, what is parked or paused, whether the server is well; and scheduling by hand.
//!
//! Must never be needed by a loop in order to deliver, nor lock a row only to look at it, nor read more than a bounded
//! number of rows, except where a person asks for them: all parked rows, or a key in the history.
//!
//! # "Why has my row not fired?"
//!
//! `Store::find` (in `find.rs`, for `tidings explain`) looks for the row in `tidings.schedules`, then in
//! `tidings.parked`, then in the history. For a row that waits it also asks:
//!
//! - which session has locked it. The row itself holds the number of the transaction that locked it; testing the lock
//!   by taking it would keep a claim from the row;
//! - how many daemons serve its kind, which is the number of sessions with the advisory lock of the kind;
//! - whether its kind is paused;
//! - where it stands in its line, if its kind is limited.
//!
//! `Pending::row_status` (`model/row_status.rs`) then decides which of these keeps the row longest.

pub(super) mod backlog;
pub(super) mod doctor;
pub(super) mod find;
pub(super) mod limits;
pub(super) mod parked;
pub(super) mod pauses;
pub(super) mod produce;
pub(super) mod upcoming;
