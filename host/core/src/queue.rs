//! What the store says of the queue, and the scheduler decides by: plain values. No I/O.

use std::time::Duration;

use time::OffsetDateTime;

/// How long one promise to look without being notified lasts. Between two, a few transactions notify again, which tells
/// whether it is worth another.
pub const PROMISE: Duration = Duration::from_secs(1);

/// What lies ahead, by the database's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Outlook {
    /// Rows are due. Some of them may be locked.
    pub due: bool,
    /// Time until the first row that is not due yet, or until the end of a pause; `None` = there is none.
    pub next_in: Option<Duration>,
}

/// Whether somebody promised that all daemons look without being notified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Promise {
    /// Until when.
    pub until: OffsetDateTime,
    /// No transaction had this number or a higher one.
    pub next_xid: i64,
}

/// What a look at the queue saw.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Look {
    /// The database's time, before the look.
    pub at: OffsetDateTime,
    /// Where it began: at the low-water mark or, where there is none, a minute ago.
    pub from: OffsetDateTime,
    /// The first slot from there on.
    pub first: Option<OffsetDateTime>,
    /// The lowest number of a transaction that was running.
    pub oldest_xid: i64,
    /// Rows due now, and when to look again: at the next row's time, or when a pause ends.
    pub outlook: Outlook,
    /// Kinds that we serve and nobody has paused, of which rows are held: they were waiting for us.
    pub held_for_us: Vec<String>,
    /// The first row of the queue is of a kind of ours that is paused, and in the way of the others.
    pub paused_first: bool,
    /// Whether somebody promised that we look without being notified.
    pub promise: Promise,
    /// What waits below `from`; only a sweep sees it.
    pub below: Option<Below>,
}

/// Rows below the low-water mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Below {
    /// The slot of the first.
    pub first: OffsetDateTime,
    /// How many, up to what makes them a backlog.
    pub rows: i64,
    /// Claims must go back to the first; otherwise the rows were moved up to where their slot is now.
    pub go_back: bool,
}
