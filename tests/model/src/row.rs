//! A row of the model: where it is, and how a daemon finds it.

/// A row.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Row {
    pub(super) kind: usize,
    /// The row is so large that a claim takes it alone.
    pub(super) large: bool,
    /// The row's slot in the queue, by the database's clock, in ms.
    pub(super) slot: i64,
    pub(super) place: Place,
    /// When the row was written, in the world's time.
    pub(super) written_at: u64,
    /// When the row's transaction committed, in the world's time.
    pub(super) committed_at: u64,
    pub(super) found_by: FoundBy,
    /// A claim has had the row locked.
    pub(super) was_locked: bool,
    /// The database's clock showed an earlier time than before when the row was written, so only a sweep is sure to find it.
    pub(super) clock_behind: bool,
    /// How often the row was settled for good.
    pub(super) settled_count: u8,
}

/// How a daemon learns of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum FoundBy {
    /// The row's commit notified all daemons that listen.
    Notification,
    /// The row's trigger found a promise to poll and was silent.
    Polling,
    /// This daemon moved the row, so it knows of it. Others do not.
    Daemon(usize),
    /// Nothing tells of the row.
    Sweep,
}

/// Where a row is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Place {
    /// The transaction of this writer has not committed.
    Uncommitted(usize),
    /// In the queue, not locked.
    Waiting,
    /// In the queue, locked by the claim whose transaction has this number.
    Locked(i64),
    /// Out of the queue until a daemon serves the kind, or until its pause is over.
    Held,
    /// Delivered, or finished in another way.
    Settled,
}

impl Row {
    pub(super) fn is_in_queue(&self) -> bool {
        matches!(self.place, Place::Uncommitted(_) | Place::Waiting | Place::Locked(_))
    }
}
