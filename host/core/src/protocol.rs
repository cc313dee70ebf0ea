//! The values that the loop and the core exchange: what to do next, and what came of it.

use std::time::Duration;

use time::OffsetDateTime;

use super::{ClaimRange, Lane};
use crate::queue::{Look, Outlook};
use crate::reason::{Reason, Reasons};

/// A moment, as the time since the loop began.
pub type Moment = Duration;

/// What the core must know of the servers and the plugins. The loop tells it each time it asks what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Environment {
    /// Messages can be published.
    pub broker_open: bool,
    /// How many connections claims may keep, at least 1.
    pub connections: usize,
    /// The number of the last doubt about the connections. After a new one, the server may be another.
    pub doubt: u64,
    /// Every plugin that was there at the start serves or was refused, so rows of other kinds may be held.
    pub knows_kinds: bool,
}

/// What the loop must do next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Look at the queue, from the mark on. Ends with [`Event::Looked`].
    Look,
    /// Claim due rows and, if there are any, begin to deliver them. Ends with [`Event::Claimed`].
    Claim(ClaimRequest),
    /// Begin to hold due rows that cannot be claimed, beside the loop. Ends with [`Event::Held`].
    Hold,
    /// Begin to release held rows of these kinds, beside the loop. Ends with [`Event::Released`].
    Release(Vec<String>),
    /// Begin a look that includes what lies below the mark, beside the loop. Ends with [`Event::Swept`].
    Sweep,
    /// Sleep until this moment or until something happens. Ends with [`Event::Woken`], or with the event of work that has
    /// ended.
    Sleep(Moment, Reason),
}

/// Which rows to claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClaimRequest {
    /// The oldest due rows, only the newest of a backlog, or rows whose turn has come.
    pub range: ClaimRange,
    /// The largest number of rows.
    pub limit: i64,
    /// Only rows whose slot is at this time or later; `None` = only those of the last minute.
    pub since: Option<OffsetDateTime>,
    /// Look at the first due rows only, because there are limits.
    pub bounded: bool,
    /// No row that would have to go alone.
    pub no_large: bool,
    /// PostgreSQL refuses to finish rows: one message is sent to try, and only if no sent row is there to be finished.
    pub careful: bool,
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Another part of the daemon woke the loop, or the sleep is over.
    Woken(Reasons),
    /// The result of a look that was asked for at this moment.
    Looked(Moment, Look),
    /// The result of a claim.
    Claimed(ClaimResult),
    /// The delivery of a claimed batch has ended.
    DeliveryEnded(Lane, DeliveryEnd),
    /// Holding has ended; whether any rows were held.
    Held(bool),
    /// Held rows of a kind that is served are back in the queue.
    Released,
    /// The result of a sweep that was asked for at this moment; `None` = it failed, and a look will find out why.
    Swept(Option<(Moment, Look)>),
    /// PostgreSQL did not complete this operation.
    Failed(Operation),
}

/// An operation that may fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// A look or a claim.
    LookOrClaim,
    /// Holding rows.
    Hold,
    /// Releasing rows.
    Release,
}

/// The result of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClaimResult {
    /// As requested.
    pub range: ClaimRange,
    /// When the claim was sent.
    pub asked_at: Moment,
    /// The database's time, read before the transaction took its number.
    pub at: OffsetDateTime,
    /// Whether more rows are due than were claimed, and when the next row is due, or another line has its turn.
    pub outlook: Outlook,
    /// For how long the first row had been due.
    pub behind: Duration,
    /// The claimed rows, which are being delivered now; `None` = no row could be locked.
    pub batch: Option<Batch>,
}

/// Claimed rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Batch {
    /// The number of the claim's transaction.
    pub xid: i64,
    /// The batch is a single row that is larger than a claim of several rows may be.
    pub large: bool,
    /// How many rows.
    pub rows: u32,
}

/// How a delivery ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DeliveryEnd {
    /// Rows were settled.
    Settled {
        /// Some of them have left the queue.
        some_left: bool,
        /// Some of them are still in the queue.
        some_stay: bool,
    },
    /// Nothing was settled: the broker did not confirm.
    Unsettled,
    /// PostgreSQL refuses to finish the rows.
    Refused {
        /// PostgreSQL's error.
        error: String,
        /// A message was sent to find that out, so the next attempt waits.
        back_off: bool,
    },
    /// PostgreSQL failed or did not answer.
    Failed,
    /// The delivery panicked.
    Panicked,
}
