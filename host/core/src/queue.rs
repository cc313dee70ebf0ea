//! What the store reports about the queue, and the scheduler decides by: plain values. No I/O.

use std::time::Duration;

use time::OffsetDateTime;

/// How long one promise to poll lasts. Between two promises a few transactions notify again, which shows whether another is
/// worth it.
pub const PROMISE: Duration = Duration::from_secs(1);

/// What is due now and next, by the database's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Outlook {
    /// Rows are due. Some of them may be locked.
    pub due: bool,
    /// Time until the first row that is not due yet becomes due, or until a pause ends; `None` = neither will happen.
    pub next_in: Option<Duration>,
}

/// The last promise that all daemons poll, so that triggers need not notify.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Promise {
    /// When it ends.
    pub until: OffsetDateTime,
    /// No transaction had this number or a higher one at the look.
    pub next_xid: i64,
}

/// What a look at the queue saw.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Look {
    /// The database's time, before the look.
    pub at: OffsetDateTime,
    /// Where the look began: at the low-water mark or, without one, a minute ago.
    pub from: OffsetDateTime,
    /// The first slot from there on.
    pub first: Option<OffsetDateTime>,
    /// The lowest number of a running transaction.
    pub oldest_xid: i64,
    /// Whether rows are due now, and when to look again.
    pub outlook: Outlook,
    /// Kinds that this daemon serves, that are not paused and that have held rows: the daemon must release these.
    pub held_for_us: Vec<String>,
    /// The first row is due and of a kind that this daemon serves, and no claim of due rows may take it, because its kind is paused
    /// or limited; so each claim would step over it.
    pub not_claimable_first: bool,
    /// There are limits, so that many rows may stand at the head of the queue that no claim of due rows takes.
    pub has_limits: bool,
    /// Time until a line has its turn; `None` = no row waits for one.
    pub turn_in: Option<Duration>,
    /// Whether, and until when, triggers are silent.
    pub promise: Promise,
    /// Rows below `from`; only a sweep sees them.
    pub below: Option<Below>,
}

/// Rows below the low-water mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Below {
    /// The slot of the first.
    pub first: OffsetDateTime,
    /// How many there are; counted only up to the number that makes a backlog.
    pub rows: i64,
    /// The mark must go back to the first; otherwise the rows were moved up to where their slot is now.
    pub go_back: bool,
}
