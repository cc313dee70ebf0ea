//! The scheduler's core decides when to look at the queue and from where, what to claim, when to hold and release rows, when
//! to sweep, and how long to sleep. The daemon's loop carries out each [`Action`] and reports the result as an [`Event`].
//!
//! The core must never do I/O, read a clock or use randomness. The current moment is an argument, counted from the start of
//! the loop. So equal events at equal moments lead to equal actions, which `tests/model` checks. See also `README.md`.
//!
//! What a change must keep:
//! - A wake is a hint. A wake that never came costs time and no row: the sweep finds what no wake announced.
//! - A claim that got nothing is not repeated until something happens (a wake, the end of a delivery, held rows, a growing
//!   delay). The same rows are still due, so the loop would spin.
//! - No claim waits for a look that could only tell what is known, namely that a row is due now. Looks are for what a claim
//!   cannot tell: held rows, paused kinds, promises to poll, the low-water mark.

pub mod backoff;
mod claim_policy;
mod drain;
mod events;
mod low_water;
pub mod node_health;
mod polling;
mod protocol;
pub mod queue;
pub mod reason;
mod state;
mod sweep_schedule;
mod timers;
mod turns;

use std::time::Duration;

use ::time::OffsetDateTime;

use claim_policy::ClaimPolicy;
pub use claim_policy::{ClaimRange, Lane};
use drain::Drain;
use low_water::LowWater;
use polling::Polling;
pub use protocol::{Action, Batch, ClaimRequest, ClaimResult, DeliveryEnd, Environment, Event, Moment, Operation};
use reason::Reason;
use state::{Background, BackingOff, Queue};
use sweep_schedule::SweepSchedule;
use turns::Turns;

/// Batches that are delivered at the same time: while one waits for confirms, another keeps PostgreSQL busy. During a backlog
/// there is one more lane, for rows that have just become due.
const LANES: usize = 3;
/// The shortest sleep: it keeps the loop from spinning when the database's clock is slightly behind.
const SHORTEST_SLEEP: Duration = Duration::from_micros(200);

/// All that the scheduler knows and decides by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Core {
    /// The longest time between two looks, and the shortest between two sweeps.
    sweep_interval: Duration,
    environment: Environment,
    queue: Queue,
    /// When the next row is due, by the last look or claim.
    next_due_at: Option<Moment>,
    /// When the next look is, unless something happens before; and its reason.
    next_look: (Moment, Reason),
    /// At the last notification a row was due.
    notified_of_due: bool,
    backing_off: Option<BackingOff>,
    /// When PostgreSQL last refused to finish rows, and its error, unless it has finished rows since. The messages of refused
    /// rows were sent, so hardly any more are sent until PostgreSQL finishes rows again.
    refusal: Option<(Moment, String)>,
    low_water: LowWater,
    claim_policy: ClaimPolicy,
    drain: Drain,
    turns: Turns,
    /// By the last look there are limits.
    has_limits: bool,
    polling: Polling,
    sweep_schedule: SweepSchedule,
    hold: Background<()>,
    release: Background<Vec<String>>,
}

impl Core {
    /// A core that knows nothing yet. `sweep_interval` is the longest time between two looks. `drain_rate`: how many late rows a
    /// second are claimed; `None` = as many as can be delivered.
    #[must_use]
    pub fn new(sweep_interval: Duration, drain_rate: Option<u32>) -> Self {
        Self {
            sweep_interval,
            environment: Environment { broker_open: false, connections: 1, doubt: 0, knows_kinds: false },
            queue: Queue::Unknown { notified: false },
            next_due_at: None,
            next_look: (Moment::ZERO, Reason::Sweep),
            notified_of_due: false,
            backing_off: None,
            refusal: None,
            low_water: LowWater::default(),
            claim_policy: ClaimPolicy::default(),
            drain: Drain::new(drain_rate),
            turns: Turns::default(),
            has_limits: false,
            polling: Polling::default(),
            sweep_schedule: SweepSchedule::default(),
            hold: Background::Idle,
            release: Background::Idle,
        }
    }

    /// The low-water mark, where looks and claims begin; `None` = they begin a minute ago.
    #[must_use]
    pub fn mark(&self) -> Option<OffsetDateTime> {
        self.low_water.mark()
    }

    /// Whether a sweep has looked below the mark since the mark was last given up.
    #[must_use]
    pub fn is_swept(&self) -> bool {
        self.low_water.is_swept()
    }

    /// Until when nothing is tried, after a failure of PostgreSQL or RabbitMQ.
    #[must_use]
    pub fn backs_off_until(&self) -> Option<Moment> {
        self.backing_off.map(|backing_off| backing_off.until)
    }

    /// PostgreSQL's error, while it refuses to finish rows.
    #[must_use]
    pub fn refusal(&self) -> Option<&str> {
        self.refusal.as_ref().map(|(_, error)| &**error)
    }

    /// What to do at this moment.
    pub fn next(&mut self, now: Moment, environment: Environment) -> Action {
        if environment.doubt != self.environment.doubt {
            self.low_water.give_up(now);
        }
        self.environment = environment;
        if let Some(until) = self.backs_off_until().filter(|until| now < *until) {
            return Action::Sleep(until, Reason::Again);
        }
        if let Some(kinds) = self.release.begin() {
            return Action::Release(kinds);
        }
        if environment.knows_kinds && self.hold.begin().is_some() {
            return Action::Hold;
        }
        // No timer is needed here: the end of a delivery is an event, and so is the return of the broker.
        let has_lane = self.has_free_lane();
        if !environment.broker_open || !has_lane && !self.is_look_overdue(now) {
            return Action::Sleep(now + self.sweep_interval, Reason::Sweep);
        }
        if !has_lane {
            return Action::Look;
        }
        if self.time_until_sweep(now).is_zero() {
            // Without a mark, a look comes first: it sets one, from which looks and claims begin while the sweep runs.
            if self.mark().is_none() {
                return Action::Look;
            }
            if self.sweep_schedule.begin(now) && self.next_look.1 == Reason::Sweep {
                // A quick sweep takes the place of the look.
                self.next_look.0 = now + self.sweep_interval;
            }
            return Action::Sweep;
        }
        let (at, reason) = self.next_timer(now);
        if self.turns.next().is_some_and(|at| at <= now) {
            return self.claim_range(ClaimRange::Turns);
        }
        if self.drain.is_active() && !self.drain.is_pausing(now) && matches!(self.queue, Queue::Waiting { .. }) {
            self.queue = Queue::Expected(now);
        }
        match self.queue {
            Queue::Unknown { .. } => Action::Look,
            Queue::Expected(due) if due > now && matches!(reason, Reason::Turn | Reason::Drain) && at < due => {
                Action::Sleep(at, reason)
            }
            Queue::Expected(due) if due > now => Action::Sleep(due, Reason::Due),
            Queue::Expected(_) | Queue::Due { .. } => self.claim(now),
            // A row is claimed when it is due, however soon that is.
            Queue::Waiting { .. } if at > now && matches!(reason, Reason::Due | Reason::Turn | Reason::Drain) => {
                Action::Sleep(at, reason)
            }
            Queue::Waiting { .. } if at > now => Action::Sleep(at.max(now + SHORTEST_SLEEP), reason),
            Queue::Waiting { .. } => match self.next_due_at.take_if(|_| reason == Reason::Due) {
                Some(next_due_at) => {
                    self.queue = Queue::Expected(next_due_at);
                    self.claim(now)
                }
                None => Action::Look,
            },
        }
    }

    fn claim(&self, now: Moment) -> Action {
        let is_careful = self.refusal.is_some();
        let range = self.claim_policy.next_range(self.drain.is_pausing(now));
        self.claim_range(if is_careful { ClaimRange::Oldest } else { range })
    }

    fn claim_range(&self, range: ClaimRange) -> Action {
        let careful = self.refusal.is_some();
        let since = if let ClaimRange::Newest(since) = range { Some(since) } else { None };
        let (most, no_large) = (range.limit(), self.claim_policy.is_large_row_in_delivery());
        let limit = if let ClaimRange::Oldest | ClaimRange::ByKind = range { self.drain.limit(most) } else { most };
        let bounded = self.has_limits;
        Action::Claim(ClaimRequest { range, limit, since: since.max(self.mark()), bounded, no_large, careful })
    }

    /// Each busy lane keeps a connection, of which there may be few. After a failure there is one lane until it succeeds.
    fn has_free_lane(&self) -> bool {
        let lanes = if self.backing_off.is_none() && self.refusal.is_none() { LANES } else { 1 };
        let extra = [self.claim_policy.is_newest_lane_busy(), self.claim_policy.is_turns_lane_busy()];
        let lanes = lanes + extra.into_iter().filter(|is_busy| *is_busy).count();
        self.claim_policy.busy_lanes() < lanes.min(self.environment.connections)
    }

    /// Whether claims have followed each other for so long that the time for a look has passed.
    fn is_look_overdue(&self, now: Moment) -> bool {
        matches!(self.queue, Queue::Expected(_) | Queue::Due { .. }) && self.next_look.0 <= now
    }
}

#[cfg(test)]
mod tests;
