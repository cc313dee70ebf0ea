//! The nouns that travel between the folders above, and the little that every folder needs: time, waits, wakes, health, and
//! sentences about errors.
//!
//! Must never do I/O, and must never use another folder of this crate.

pub mod backoff;
pub mod clock;
pub mod dead_letter;
pub mod display;
pub mod error_chain;
pub mod event;
pub mod health;
pub mod http_token;
pub mod message;
pub mod row_status;
pub mod schedule;
pub mod secret_url;
pub(crate) mod tls_error;
pub mod wake;
