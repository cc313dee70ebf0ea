//! What must be so in every state of a world.

use std::fmt;

/// What must be so in every state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Invariant {
    /// The mark is never above a row that waits or may still appear.
    Mark,
    /// No daemon sleeps over a row that it could deliver and was told of.
    Asleep,
    /// No core goes on without sleeping, or asks again and again while nothing happens.
    Turns,
    /// Nothing is claimed while the broker is away.
    Away,
    /// No more batches are on their way than there are connections.
    Lanes,
    /// No row is settled twice.
    Twice,
    /// Nothing is claimed before it is due.
    Early,
    /// Once faults end, each row that is due is claimed within the sweep, and each that is held and served is released.
    Rest,
    /// While nothing happens, hardly anything is asked, and no failure is remembered.
    Idle,
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Wrong {
    pub(super) invariant: Invariant,
    pub(super) what: String,
}

impl fmt::Display for Invariant {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            Self::Mark => "the mark is never above a row that waits or may still appear",
            Self::Asleep => "no daemon sleeps over a row that it could deliver and was told of",
            Self::Turns => "no core goes on without sleeping, or asks again and again while nothing happens",
            Self::Away => "nothing is claimed while the broker is away",
            Self::Lanes => "no more batches are on their way than there are connections",
            Self::Twice => "no row is settled twice",
            Self::Early => "nothing is claimed before it is due",
            Self::Rest => {
                "once faults end, each due row is claimed within a sweep, and each held row is released that a daemon serves"
            }
            Self::Idle => "while nothing happens, hardly anything is asked, and no failure is remembered",
        })
    }
}
