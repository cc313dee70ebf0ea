//! What consumers reject comes back, and what is the daemon's own in RabbitMQ is there.

pub(crate) mod admin;
pub(crate) mod hostile_headers;
pub(crate) mod listing;
pub(crate) mod passes;
pub(crate) mod replay;
pub(crate) mod topology;
