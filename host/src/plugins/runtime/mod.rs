//! Running a guest: the wasmtime engine, what a guest may import, its limits, and one call into it.
//!
//! Must never trust a guest: its time, memory, stack, output and log lines are limited, and it reaches nothing outside.

pub(super) mod bindings;
pub(super) mod engine;
pub(super) mod host;
pub(super) mod instance;
pub(super) mod limits;
pub(super) mod stderr_tail;
