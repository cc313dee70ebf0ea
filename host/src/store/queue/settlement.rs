//! What becomes of a claimed row, and what is kept of it. Must never touch the database.

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

/// Which finished rows are written into the history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum History {
    /// Every row.
    All,
    /// Rows that were not delivered: expired and skipped ones.
    Undelivered,
    /// None.
    None,
}

impl History {
    /// The outcomes that are written, as in the column `outcome`.
    pub(super) fn outcomes(self) -> &'static [&'static str] {
        match self {
            Self::All => &["delivered", "expired", "skipped"],
            Self::Undelivered => &["expired", "skipped"],
            Self::None => &[],
        }
    }
}

/// How claims are settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settling {
    /// Which rows are written into the history.
    pub history: History,
    /// Whether the commit waits until it is on the disk. Otherwise a crash of the server may undo it, and its rows are
    /// delivered once more. No row is lost.
    pub synchronous_commit: bool,
}

impl Default for Settling {
    fn default() -> Self {
        Self { history: History::All, synchronous_commit: true }
    }
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
