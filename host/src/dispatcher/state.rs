//! What the loop remembers from one look to the next, and what failures make of that. It asks no server anything.

use std::time::Duration;

use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;
use tracing::{error, warn};

use crate::backoff::{FINISH, RECONNECT};
use crate::delivery::Delivered;
use crate::held::Held;
use crate::polling::Polling;
use crate::store::{Look, Store, StoreError};
use crate::sweeps::Sweeps;
use crate::turns::{Load, Turns};
use crate::wake::{HeadStart, Outlook};

/// Batches that are delivered side by side: while one waits for the broker, another keeps the database busy. One more is for
/// rows that have just become due, while there is a backlog.
const LANES: usize = 3;

/// What the loop remembers between two looks.
#[derive(Default)]
pub(super) struct State {
    pub(super) lanes: JoinSet<(Load, Result<Delivered, StoreError>)>,
    pub(super) turns: Turns,
    pub(super) expected: Expected,
    pub(super) head_start: HeadStart,
    /// Whether rows are due, and when the next will be, by the last look or claim; and when that was asked for.
    pub(super) ahead: Option<(Outlook, Instant)>,
    /// Takes rows that cannot be claimed out of the queue.
    pub(super) hold: JoinSet<Result<Held, StoreError>>,
    /// Puts held rows back into the queue, if some were found whose plugin has arrived or whose pause is over.
    pub(super) release: JoinSet<Result<u64, StoreError>>,
    /// The last look, and when it was asked for.
    pub(super) look: Option<(Look, Instant)>,
    pub(super) polling: Polling,
    pub(super) sweeps: Sweeps,
    /// Nothing has happened for a whole interval.
    pub(super) quiet: bool,
    /// A sweep has just ended, which was a look as well.
    pub(super) swept: bool,
    /// The last claim came to nothing although rows are due: nothing is claimed until something has happened.
    pub(super) stuck: bool,
    /// Such claims in a row.
    pub(super) empty_claims: u32,
    /// Looks and batches in a row that a server did not see through.
    pub(super) failures: u32,
    /// When PostgreSQL last refused to finish rows, if it has finished none since: their messages were sent, so little more
    /// is sent until it does.
    pub(super) refused: Option<Instant>,
    /// Nothing is tried before this instant.
    pub(super) not_before: Option<Instant>,
}

/// Whether a row is due, as far as we know without a look.
#[derive(Default)]
pub(super) struct Expected {
    /// One is, from this instant on: claim, and look afterwards.
    pub(super) due: Option<Instant>,
    /// We were notified, and have not seen yet whether one is.
    pub(super) notified: bool,
    /// When we were notified the last time, one was.
    pub(super) notified_of_due: bool,
}

impl Expected {
    pub(super) fn due_now(&mut self, due: bool) {
        if due {
            self.due = Some(Instant::now());
        }
    }
}

impl State {
    /// After a failure there is only one lane, until it succeeds. Each keeps a connection, of which there may be few.
    pub(super) fn has_free_lane(&self, store: &Store) -> bool {
        let lanes = if self.failures == 0 && self.refused.is_none() { LANES } else { 1 };
        let lanes = lanes + usize::from(self.turns.newest_under_way());
        self.lanes.len() < lanes.min(store.connections_for_claims())
    }

    /// Something has happened: another claim may come to something.
    pub(super) fn go_on(&mut self) {
        self.stuck = false;
        self.empty_claims = 0;
    }

    /// What work beside the loop came to; `None` = it failed, and will be tried again.
    pub(super) fn ended<T>(&mut self, work: &str, ended: Result<Result<T, StoreError>, JoinError>) -> Option<T> {
        match ended {
            Ok(Ok(done)) => return Some(done),
            Ok(Err(error)) => drop(self.failed(&error)),
            Err(panic) => {
                error!(error = &panic as &dyn std::error::Error, "{work} panicked");
                self.rest();
            }
        }
        None
    }

    /// The database did not do it: a line for the operator, and a rest.
    pub(super) fn failed(&mut self, error: &StoreError) -> Duration {
        warn!(error = error as &dyn std::error::Error, "the database cannot be used, trying again");
        self.sweeps.doubt();
        self.rest()
    }

    /// How long nothing is to be tried.
    pub(super) fn resting(&self) -> Option<Duration> {
        let left = self.not_before?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// Tries nothing for a while, longer each time until a batch succeeds. Returns for how long.
    pub(super) fn rest(&mut self) -> Duration {
        // Lanes that fail together fail for the same reason.
        if let Some(left) = self.resting() {
            return left;
        }
        let backoff = if self.refused.is_some() { FINISH } else { RECONNECT };
        let delay = backoff.jittered(self.failures);
        self.failures = self.failures.saturating_add(1);
        self.not_before = Some(Instant::now() + delay);
        delay
    }
}
