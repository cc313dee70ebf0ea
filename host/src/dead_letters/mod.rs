//! Messages that consumers rejected or that expired in a consumer's queue, and what becomes of them: the daemon's passes
//! over `tidings.dead`, and what a person does to dead and parked messages with a command or on the page.
//!
//! Must never delay a row that is due, acknowledge a dead letter before the broker has confirmed its copy, or let two passes
//! run at the same time.

pub mod admin;
mod list;
pub mod replayer;
