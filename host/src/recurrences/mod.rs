//! Recurrences: rules that make rows. `rule.rs`, `zone.rs` and `instants.rs` say when; `plan.rs` decides what is made now;
//! `maker.rs` makes it. `preview.rs` shows people what a rule means.
//!
//! Must never deliver anything: an occurrence is a row of `tidings.schedules`, and the scheduler treats it as any other.
//! Except in `maker.rs` there must be no I/O and no clock.
//!
//! To change it, know: the database has the truth. `next_at` of a recurrence is its next instant whose occurrence is not made,
//! and moves on in the transaction that makes the occurrence. Daemons of two releases may compute instants by two releases of
//! the time zone database; each computes only what comes after `next_at`. `tidings.check_rule` (migration 0018) says in SQL
//! which rules can be read; a test compares it with `rule.rs`.

pub mod coming;
mod fields;
pub mod instants;
pub mod maker;
mod plan;
pub mod preview;
pub mod rule;
pub mod zone;
