//! Parts of what the core knows.

use super::Moment;

/// What is known of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Queue {
    /// Something may have changed since it was looked at. `notified` = somebody said so, and a look will tell whether a row is
    /// due.
    Unknown { notified: bool },
    /// A row is believed to be due from this moment on: it is claimed without a look, which follows if there was none.
    Expected(Moment),
    /// A look saw rows that are due. `tries` = so many claims in a row came to nothing.
    Due { tries: u32 },
    /// Nothing is to be done before the next row's moment, or the next look: nothing is due, or what is due is locked, by our own
    /// claims or by others. `tries` as above.
    Waiting { tries: u32 },
}

/// Work beside the loop, of which there is one at a time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Background<T> {
    #[default]
    Idle,
    Wanted(T),
    UnderWay,
}

impl<T> Background<T> {
    pub(super) fn want(&mut self, what: T) {
        if let Self::Idle = self {
            *self = Self::Wanted(what);
        }
    }

    /// Takes what is wanted, and marks the work as under way.
    pub(super) fn begin(&mut self) -> Option<T> {
        match std::mem::replace(self, Self::UnderWay) {
            Self::Wanted(what) => Some(what),
            other => {
                *self = other;
                None
            }
        }
    }
}

/// A server did not see something through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Rest {
    /// How often in a row, at least once.
    pub(super) failures: u32,
    /// Nothing is tried before this moment.
    pub(super) until: Moment,
}
