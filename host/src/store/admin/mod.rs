//! What people ask of the database, through commands, the page and the metrics: where a row is, what comes next, what is
//! parked or paused, whether the server is well; and scheduling by hand.
//!
//! Must never be needed by a loop in order to deliver, and must never read more than a bounded number of rows.

pub(super) mod backlog;
pub(super) mod doctor;
pub(super) mod find;
pub(super) mod parked;
pub(super) mod pauses;
pub(super) mod produce;
pub(super) mod upcoming;
