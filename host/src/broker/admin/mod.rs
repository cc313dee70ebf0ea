//! What people ask of RabbitMQ: `tidings doctor`'s checks over AMQP, and its HTTP management API for what AMQP does not tell.
//!
//! Must never change anything there, and must never be waited for by a loop.

pub(super) mod doctor;
pub(super) mod management;
