//! Runs guests, that is, the code of plugins: the wasmtime engine, the interfaces that a guest may import, its limits,
//! and one call into it.
//!
//! Must never trust a guest. Its CPU time, wall-clock time, memory, stack, output and log lines are limited. It reaches
//! no sockets, files, environment, clock or randomness: either the interface is not linked, or nothing is behind it.
//!
//! To change it, know that
//!
//! - guests run on a tokio runtime of their own, so that a guest that computes for long delays no task of the daemon;
//! - CPU time is limited by wasmtime's epochs: a thread advances the epoch every 10 ms while guests run. Epochs do not
//!   end a call that waits in a host function, so wall-clock time is limited as well, by a timeout around each call;
//! - a new import must be linked in `engine`, where `LINKED_INTERFACES` lists what a plugin may import;
//! - after any error the instance is dropped with its store, since wasmtime refuses further calls after a trap.

pub(super) mod bindings;
pub(super) mod engine;
pub(super) mod host;
pub(super) mod instance;
pub(super) mod limits;
pub(super) mod stderr_tail;
