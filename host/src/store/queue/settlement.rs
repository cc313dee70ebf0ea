//! What becomes of a claimed row. Must never touch the database.

use std::time::Duration;

use crate::broker::Confirmed;
use crate::model::schedule::Schedule;

/// What becomes of one claimed row. A row without a settlement stays as it is, due.
#[derive(Debug)]
pub struct Settlement {
    /// The row.
    pub row: Schedule,
    /// `name@version+digest8` of the plugin that was asked, if one was.
    pub plugin: Option<String>,
    /// What becomes of it.
    pub outcome: Outcome,
}

/// The ways to settle a row.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// RabbitMQ confirmed its message. Only the publisher makes a [`Confirmed`].
    Delivered {
        /// The confirm.
        confirmed: Confirmed,
        /// SHA-256 of the event.
        event_digest: String,
        /// The `now-ms` that the plugin was given, with which the event can be built again.
        built_ms: i64,
    },
    /// Its deadline came before its message was published. With the details.
    Expired(String),
    /// The plugin said that there is nothing to send. With its reason.
    Skipped(String),
    /// It is set aside for a person. With the reason.
    Parked(String),
    /// Its plugin failed, or asked for another attempt: due again later.
    Retry {
        /// Why, for people.
        error: String,
        /// From now.
        after: Duration,
        /// Whether the attempt counts towards the maximum.
        failed: bool,
    },
    /// Its plugin's breaker is open: due again later, without an attempt spent.
    Waits {
        /// Why, for people.
        error: String,
        /// From now.
        after: Duration,
    },
    /// The broker could not route its message or refused it: due again later, without an attempt spent.
    Refused {
        /// Why, for people.
        error: String,
        /// From now.
        after: Duration,
    },
}

impl Outcome {
    /// Whether the row leaves the queue for good.
    #[must_use]
    pub fn leaves_queue(&self) -> bool {
        match self {
            Self::Delivered { .. } | Self::Expired(_) | Self::Skipped(_) | Self::Parked(_) => true,
            Self::Retry { .. } | Self::Waits { .. } | Self::Refused { .. } => false,
        }
    }
}
