//! Parts of the core's state: what it knows of the queue, work beside the loop, and the wait after a failure.

use super::Moment;

/// What the core knows of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Queue {
    /// The queue may have changed since the last look. `notified`: a notification is the reason, so the next look tells
    /// whether notifications are about rows that are due.
    Unknown { notified: bool },
    /// A row should be due from this moment on: the core claims without a look, and looks if the claim gets nothing.
    Expected(Moment),
    /// A look saw rows that are due. `empty_claims`: how many claims in a row got nothing.
    Due { empty_claims: u32 },
    /// Nothing to do until the next row is due, or the next look: nothing is due, or the due rows are locked, by our own
    /// claims or by other sessions. `empty_claims` as above.
    Waiting { empty_claims: u32 },
}

/// Work beside the loop. One such task runs at a time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Background<T> {
    #[default]
    Idle,
    Requested(T),
    Running,
}

impl<T> Background<T> {
    /// Requests the work, unless it is requested or running already.
    pub(super) fn request(&mut self, work: T) {
        if let Self::Idle = self {
            *self = Self::Requested(work);
        }
    }

    /// Takes the requested work, if any, and marks it as running.
    pub(super) fn begin(&mut self) -> Option<T> {
        match std::mem::replace(self, Self::Running) {
            Self::Requested(work) => Some(work),
            other => {
                *self = other;
                None
            }
        }
    }
}

/// The wait after a failure of PostgreSQL or RabbitMQ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct BackingOff {
    /// Failures in a row, at least one.
    pub(super) failures: u32,
    /// Nothing is tried before this moment.
    pub(super) until: Moment,
}
