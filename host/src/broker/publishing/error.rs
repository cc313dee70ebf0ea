//! Why the connection that publishes, or one of its channels, can no longer be used.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use amq_protocol::protocol::connection;
use thiserror::Error;

/// The code with which RabbitMQ closes a channel because of a message (source: AMQP 0-9-1, `precondition-failed`).
pub(super) const PRECONDITION_FAILED: u16 = 406;
/// The code with which it closes one because the exchange does not exist.
pub(super) const NOT_FOUND: u16 = 404;

/// Why the connection that publishes, or one of its channels, can no longer be used.
#[derive(Clone, Debug, Error)]
pub enum PublishError {
    /// RabbitMQ closed the channel.
    #[error("RabbitMQ closed the channel: {text} ({code})")]
    ChannelClosed {
        /// The code of the protocol.
        code: u16,
        /// RabbitMQ's words.
        text: String,
    },
    /// RabbitMQ closed the connection.
    #[error("RabbitMQ closed the connection: {text} ({code})")]
    ConnectionClosed {
        /// The code of the protocol.
        code: u16,
        /// RabbitMQ's words.
        text: String,
    },
    /// The connection broke.
    #[error("the connection broke")]
    Io(#[source] Arc<std::io::Error>),
    /// RabbitMQ sent nothing, not even a heartbeat.
    #[error("RabbitMQ sent nothing for {} s, not even a heartbeat", .0.as_secs_f32())]
    Silent(Duration),
    /// RabbitMQ sent what AMQP 0-9-1 does not allow.
    #[error("what RabbitMQ sent is not AMQP 0-9-1: {0}")]
    Protocol(String),
    /// The daemon closed the connection.
    #[error("the daemon closed the connection")]
    Closed,
}

impl PublishError {
    /// Whether RabbitMQ closed the channel because of one of the messages on it.
    pub(super) fn is_caused_by_a_message(&self) -> bool {
        matches!(self, Self::ChannelClosed { code: PRECONDITION_FAILED, .. })
    }

    /// Whether the exchange does not exist.
    pub(super) fn is_missing_exchange(&self) -> bool {
        matches!(self, Self::ChannelClosed { code: NOT_FOUND, .. })
    }

    pub(super) fn protocol(what: impl Display) -> Self {
        Self::Protocol(what.to_string())
    }
}

impl From<std::io::Error> for PublishError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(Arc::new(error))
    }
}

/// The error of a connection that RabbitMQ closes.
pub(super) fn closed_connection(close: &connection::Close) -> PublishError {
    PublishError::ConnectionClosed { code: close.reply_code, text: close.reply_text.to_string() }
}
