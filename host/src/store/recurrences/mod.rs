//! `tidings.recurrences`: what the task that makes occurrences asks (`making.rs`), and what people ask (`admin.rs`).
//!
//! Must never compute an instant of a rule: `host/src/recurrences` does.

pub(super) mod admin;
pub(super) mod making;
