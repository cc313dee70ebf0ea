//! The invariants that the model checks, in the words of `host/core/README.md`.

use std::fmt;

/// An invariant. [`fmt::Display`] has its sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Invariant {
    Mark,
    Oversleeping,
    Spinning,
    BrokerAway,
    Lanes,
    SettledTwice,
    ClaimedEarly,
    Recovery,
    Idle,
}

/// A violated invariant, and the state that violates it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Violation {
    pub(super) invariant: Invariant,
    pub(super) details: String,
}

impl fmt::Display for Invariant {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Mark => "the low-water mark is never above a row that waits in the queue or may still appear there",
            Self::Oversleeping => "no daemon goes on sleeping while a row is due that it could deliver and knows of",
            Self::Spinning => "no loop spins: it sleeps after a few actions, and sends few statements while nothing happens",
            Self::BrokerAway => "nothing is claimed while RabbitMQ is away",
            Self::Lanes => "a daemon never delivers more batches at a time than it has connections for",
            Self::SettledTwice => "no row is settled twice",
            Self::ClaimedEarly => "no row is claimed before it is due",
            Self::Recovery => {
                "after the last fault, each due row is claimed within a sweep, and each held row of a kind that a daemon serves is released"
            }
            Self::Idle => "while nothing happens, a daemon sends hardly any statements and remembers no failure",
        })
    }
}
