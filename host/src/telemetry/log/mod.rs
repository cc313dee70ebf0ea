//! The log, on standard error: lines for people, or JSON objects for programs.
//!
//! Must never be waited for: a line that nobody reads is dropped and counted.

pub(super) mod json;
pub(super) mod rate_limit;
pub(super) mod stderr;
