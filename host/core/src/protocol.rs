//! What the loop and its core say to each other: plain values.

use std::time::Duration;

use time::OffsetDateTime;

use super::{Load, Turn};
use crate::queue::{Look, Outlook};
use crate::reason::{Reason, Reasons};

/// A moment, as the time since the loop began.
pub type Moment = Duration;

/// What the loop tells the core of the servers and the plugins, each time it asks what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Environment {
    /// Messages can be published.
    pub broker_open: bool,
    /// How many connections claims may keep, at least 1.
    pub connections: usize,
    /// Which doubt about the connections was the last: after a new one the server may be another.
    pub doubt: u64,
    /// Every plugin that was there at the start serves or was refused: rows of other kinds may be held.
    pub knows_kinds: bool,
}

/// What the loop is to do next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Look at the queue, from the mark on; then [`Event::Looked`].
    Look,
    /// Claim due rows and, if there are some, have them delivered; then [`Event::Claimed`].
    Claim(Wanted),
    /// Begin to hold what is due and cannot be claimed, beside the loop; [`Event::Held`] at its end.
    Hold,
    /// Begin to release held rows of these kinds, beside the loop; [`Event::Released`] at its end.
    Release(Vec<String>),
    /// Begin to look below the mark as well, beside the loop; [`Event::Swept`] at its end.
    Sweep,
    /// Wait until this moment or until something happens; then [`Event::Woken`], or the event of the work that has ended.
    Sleep(Moment, Reason),
}

/// Which rows to claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Wanted {
    /// Whose turn it is.
    pub turn: Turn,
    /// At most so many.
    pub limit: i64,
    /// Of those whose slot is at this time or later; `None` = of those of the last minute.
    pub since: Option<OffsetDateTime>,
    /// None that would have to go alone.
    pub no_large: bool,
    /// Nothing is asked before this moment, at which a row is expected to be due.
    pub not_before: Moment,
    /// PostgreSQL refuses to finish rows: one is sent, and only if there is none to finish.
    pub careful: bool,
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Somebody woke the loop, or the sleep is over.
    Woken(Reasons),
    /// A look that was asked for at this moment saw this.
    Looked(Moment, Look),
    /// A claim came to this.
    Claimed(Claimed),
    /// A batch that was claimed has ended.
    DeliveryEnded(Load, End),
    /// What could not be claimed is held; whether that were any rows.
    Held(bool),
    /// Held rows of a kind that is served are back in the queue.
    Released,
    /// A sweep that was asked for at this moment saw this; `None` = it failed, and a look will find out why.
    Swept(Option<(Moment, Look)>),
    /// PostgreSQL did not see a look, a claim, or work beside the loop through.
    Failed(Work),
}

/// Work that may fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Work {
    /// A look or a claim.
    Asking,
    /// Rows are held.
    Holding,
    /// Rows are released.
    Releasing,
}

/// What a claim came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Claimed {
    /// Whose turn it was.
    pub turn: Turn,
    /// When it was asked for.
    pub asked_at: Moment,
    /// How long it took until it could be asked.
    pub begin: Duration,
    /// The database's time, before the number was taken.
    pub at: OffsetDateTime,
    /// More rows are due than were claimed; and when the next is.
    pub outlook: Outlook,
    /// For how long the first row had been due.
    pub behind: Duration,
    /// What is on its way now; `None` = there was nothing that nobody else has locked.
    pub rows: Option<Batch>,
}

/// Rows that are on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Batch {
    /// The number of the claim's transaction.
    pub xid: i64,
    /// A single row that is larger than a claim of several may be.
    pub large: bool,
}

/// How a delivery ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// Rows were settled; of these some have left the queue, and some are still in it.
    Settled {
        /// Some have left the queue.
        some_left: bool,
        /// Some are still in the queue.
        some_stay: bool,
    },
    /// Nothing was settled: the broker did not confirm.
    Unsettled,
    /// PostgreSQL refuses to finish the rows.
    Refused {
        /// Its words.
        why: String,
        /// Something was sent to find that out: the next is not tried at once.
        rest: bool,
    },
    /// PostgreSQL did not see it through.
    Failed,
    /// It ended in a way that nobody expects.
    Panicked,
}
