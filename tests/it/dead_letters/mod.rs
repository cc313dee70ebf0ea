//! Tests of dead letters: rejected messages are replayed, and the exchanges and queues that the daemon owns exist.

pub(crate) mod admin;
pub(crate) mod hostile_headers;
pub(crate) mod listing;
pub(crate) mod passes;
pub(crate) mod replay;
pub(crate) mod topology;
