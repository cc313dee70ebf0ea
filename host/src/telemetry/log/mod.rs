//! The log, on standard error: lines for people, or JSON objects for programs.
//!
//! Must never be waited for: a line that standard error does not take within 0.1 s is dropped and counted.
//!
//! To change it, know: `rate_limit` wraps the formatter of either form, and `stderr` is the only writer.

pub(super) mod json;
pub(super) mod rate_limit;
pub(super) mod stderr;
