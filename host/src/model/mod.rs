//! The types that travel between the other folders (rows, events, messages, dead letters), and what every folder needs: the
//! database's time, backoff, wakes, health, and sentences about errors and rows.
//!
//! Must never do I/O, and must never use another folder of this crate.
//!
//! To change it, know two rules. Time is always the database's: read it through [`clock`], never from the host's wall clock.
//! And messages and events are part of the public contract (`host/docs/reference.md`): a field that changes here changes what
//! consumers receive.

pub mod backoff;
pub mod clock;
pub mod dead_letter;
pub mod display;
pub mod error_chain;
pub mod event;
pub mod health;
pub mod installation;
pub mod intake;
pub mod limit;
pub mod message;
pub mod properties;
pub mod recurrence;
pub mod relay;
pub mod row_status;
pub mod schedule;
pub mod secrets;
pub(crate) mod tls_error;
pub mod wake;
