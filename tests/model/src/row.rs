//! A row, where it is, and who knows of it.

/// A row.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Row {
    pub(super) kind: usize,
    /// It goes alone.
    pub(super) large: bool,
    /// Where it stands in the queue, by the database's clock in ms.
    pub(super) slot: i64,
    pub(super) place: Place,
    /// When it was written, by no clock that can be set.
    pub(super) written_at: u64,
    /// When its transaction committed.
    pub(super) seen_at: u64,
    pub(super) told: Told,
    /// Somebody has had it locked.
    pub(super) was_locked: bool,
    /// The clock was behind where it had been before, when it was written: only a sweep finds it for sure.
    pub(super) clock_behind: bool,
    /// So often it was settled for good.
    pub(super) settled: u8,
}

/// Who knows that a row is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Told {
    /// Its commit notified all who listen.
    Notified,
    /// Its trigger found a promise, and was silent.
    Promised,
    /// The daemon that moved it.
    Daemon(usize),
    Nobody,
}

/// Where a row is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Place {
    /// Its writer has not committed.
    Unseen(usize),
    /// In the queue.
    Waits,
    /// In the queue, and claimed by the transaction with this number.
    Locked(i64),
    /// Out of the queue, until somebody serves its kind, or its pause is over.
    Held,
    /// Settled for good.
    Done,
}

impl Row {
    pub(super) fn is_in_the_queue(&self) -> bool {
        matches!(self.place, Place::Unseen(_) | Place::Waits | Place::Locked(_))
    }
}
