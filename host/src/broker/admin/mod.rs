//! What people ask of RabbitMQ: the checks of `tidings doctor` over AMQP, and RabbitMQ's HTTP management API for what
//! AMQP does not tell.
//!
//! Must never change anything in RabbitMQ, and must never delay the scheduler or a pass.

pub(super) mod doctor;
pub(super) mod management;
