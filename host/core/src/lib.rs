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
mod low_water;
mod polling;
mod protocol;
pub mod queue;
pub mod reason;
mod state;
mod sweep_schedule;
mod timers;

use std::time::Duration;

use ::time::OffsetDateTime;

use backoff::{Backoff, FINISH, LOCKED, RECONNECT};
use claim_policy::ClaimPolicy;
pub use claim_policy::{ClaimRange, Lane};
use low_water::{LowWater, Sample};
use polling::Polling;
pub use protocol::{Action, Batch, ClaimRequest, ClaimResult, DeliveryEnd, Environment, Event, Moment, Operation};
use queue::{Look, Outlook};
use reason::{Reason, Reasons};
use state::{Background, BackingOff, Queue};
use sweep_schedule::SweepSchedule;

/// Batches that are delivered at the same time: while one waits for confirms, another keeps PostgreSQL busy. During a backlog
/// there is one more lane, for rows that have just become due.
const LANES: usize = 3;
/// A row that PostgreSQL refuses to finish is tried again within this time. If no row was due for so long, none is left.
const REFUSAL_FORGOTTEN_AFTER: Duration = Duration::from_mins(1);
/// The shortest sleep: it keeps the loop from spinning when the database's clock is slightly behind.
const SHORTEST_SLEEP: Duration = Duration::from_micros(200);
/// A claim that got nothing came too early if a row is due within this time.
const ALMOST_DUE: Duration = Duration::from_micros(500);

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
    polling: Polling,
    sweep_schedule: SweepSchedule,
    hold: Background<()>,
    release: Background<Vec<String>>,
}

impl Core {
    /// A core that knows nothing yet. `sweep_interval` is the longest time between two looks.
    #[must_use]
    pub fn new(sweep_interval: Duration) -> Self {
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
        match self.queue {
            Queue::Unknown { .. } => Action::Look,
            Queue::Expected(at) if at > now => Action::Sleep(at, Reason::Due),
            Queue::Expected(_) | Queue::Due { .. } => self.claim(),
            // A row is claimed when it is due, however soon that is.
            Queue::Waiting { .. } if at > now && reason == Reason::Due => Action::Sleep(at, reason),
            Queue::Waiting { .. } if at > now => Action::Sleep(at.max(now + SHORTEST_SLEEP), reason),
            Queue::Waiting { .. } => match self.next_due_at.take_if(|_| reason == Reason::Due) {
                Some(next_due_at) => {
                    self.queue = Queue::Expected(next_due_at);
                    self.claim()
                }
                None => Action::Look,
            },
        }
    }

    fn claim(&self) -> Action {
        let careful = self.refusal.is_some();
        let range = if careful { ClaimRange::Oldest } else { self.claim_policy.next_range() };
        let since = if let ClaimRange::Newest(since) = range { Some(since) } else { None };
        let (limit, no_large) = (self.claim_policy.limit(range), self.claim_policy.is_large_row_in_delivery());
        Action::Claim(ClaimRequest { range, limit, since: since.max(self.mark()), no_large, careful })
    }

    /// Each busy lane keeps a connection, of which there may be few. After a failure there is one lane until it succeeds.
    fn has_free_lane(&self) -> bool {
        let lanes = if self.backing_off.is_none() && self.refusal.is_none() { LANES } else { 1 };
        let lanes = lanes + usize::from(self.claim_policy.is_newest_lane_busy());
        self.claim_policy.busy_lanes() < lanes.min(self.environment.connections)
    }

    /// Whether claims have followed each other for so long that the time for a look has passed.
    fn is_look_overdue(&self, now: Moment) -> bool {
        matches!(self.queue, Queue::Expected(_) | Queue::Due { .. }) && self.next_look.0 <= now
    }

    /// Moves the next look to this moment, unless it is earlier already.
    fn look_by(&mut self, at: Moment) {
        if at < self.next_look.0 {
            self.next_look = (at, Reason::Again);
        }
    }

    /// Updates the state by what has happened.
    pub fn handle(&mut self, now: Moment, event: Event) {
        match event {
            Event::Woken(reasons) => self.handle_wake(now, reasons),
            Event::Looked(asked_at, look) => self.handle_look(now, asked_at, &look),
            Event::Claimed(result) => self.handle_claim(now, result),
            Event::DeliveryEnded(lane, end) => self.handle_delivery_end(now, lane, end),
            Event::Swept(look) => self.handle_sweep(now, look),
            Event::Held(some) => {
                self.hold = Background::Idle;
                if some {
                    self.expect_changes();
                }
            }
            Event::Released => {
                self.release = Background::Idle;
                self.expect_changes();
            }
            Event::Failed(operation) => {
                match operation {
                    Operation::LookOrClaim => self.queue = Queue::Unknown { notified: false },
                    Operation::Hold => self.hold = Background::Idle,
                    Operation::Release => self.release = Background::Idle,
                }
                self.handle_database_failure(now);
            }
        }
    }

    /// Looks again, since the queue may have changed and a claim may get rows now.
    fn expect_changes(&mut self) {
        if !matches!(self.queue, Queue::Unknown { .. } | Queue::Expected(_)) {
            self.queue = Queue::Unknown { notified: false };
        }
    }

    fn handle_wake(&mut self, now: Moment, reasons: Reasons) {
        // All other reasons are the core's own timers.
        if !reasons.iter().any(Reason::is_from_others) {
            return;
        }
        self.expect_changes();
        if let Queue::Unknown { notified } = &mut self.queue
            && reasons.iter().any(|reason| reason == Reason::Notification)
        {
            *notified = true;
            if self.notified_of_due {
                self.queue = Queue::Expected(now);
            }
        }
    }

    fn handle_look(&mut self, now: Moment, asked_at: Moment, look: &Look) {
        self.low_water.note_look(now, look);
        self.note_queue_head(asked_at, look);
        if let Queue::Unknown { notified: true } = self.queue {
            self.notified_of_due = look.outlook.due;
        }
        self.queue = match self.queue {
            _ if !look.outlook.due => Queue::Waiting { empty_claims: 0 },
            Queue::Waiting { empty_claims } => Queue::Due { empty_claims },
            _ => Queue::Due { empty_claims: 0 },
        };
    }

    /// Notes what a look or a sweep saw at the head of the queue.
    fn note_queue_head(&mut self, asked_at: Moment, look: &Look) {
        let interval = self.polling.note_look(look);
        self.next_look = match interval.filter(|interval| *interval < self.sweep_interval) {
            Some(interval) => (asked_at + interval, Reason::Polling),
            None => (asked_at + self.sweep_interval, Reason::Sweep),
        };
        if !look.held_for_us.is_empty() {
            self.release.request(look.held_for_us.clone());
        }
        // However much there is to deliver, each claim would step over paused rows that stay in the queue.
        if look.paused_first {
            self.hold.request(());
        }
        if !look.outlook.due {
            self.backing_off = None;
            self.refusal.take_if(|(at, _)| asked_at > *at + REFUSAL_FORGOTTEN_AFTER);
        }
        self.note_next_due(asked_at, look.outlook);
    }

    fn note_next_due(&mut self, asked_at: Moment, outlook: Outlook) {
        self.sweep_schedule.mark_outdated();
        self.next_due_at = outlook.next_in.map(|next_in| asked_at.saturating_add(next_in));
    }

    fn handle_claim(&mut self, now: Moment, result: ClaimResult) {
        let ClaimResult { range, asked_at, at, outlook, behind, batch } = result;
        self.claim_policy.note_claim(range, at, outlook.due.then_some(behind));
        if let Some(Batch { xid, large }) = batch {
            self.low_water.note_claim(now, Sample { at, xid });
            self.claim_policy.start_lane(Lane { range, large });
            // Other rows may have become due since, or be locked, or of a kind that no daemon serves.
            self.look_by(now + LOCKED.delay(0));
        }
        if range != ClaimRange::Oldest {
            return;
        }
        let is_early = outlook.next_in.is_some_and(|next_in| next_in < ALMOST_DUE);
        // A claim that got nothing does not tell whether due rows are locked by other sessions.
        if batch.is_some() || is_early {
            self.note_next_due(asked_at, outlook);
        }
        self.queue = match (batch, self.queue) {
            (Some(_), _) if outlook.due => Queue::Expected(now),
            (Some(_), _) => Queue::Waiting { empty_claims: 0 },
            // A look would delay the next claim. The shortest sleep keeps the loop from spinning while the clock is behind.
            (None, _) if is_early => {
                let next_due_at = self.next_due_at.take().unwrap_or(now);
                Queue::Expected(next_due_at.max(now + SHORTEST_SLEEP))
            }
            (None, Queue::Due { empty_claims }) => {
                self.hold.request(());
                self.look_by(now + LOCKED.delay(empty_claims));
                Queue::Waiting { empty_claims: empty_claims.saturating_add(1) }
            }
            (None, _) => Queue::Unknown { notified: true },
        };
    }

    fn handle_delivery_end(&mut self, now: Moment, lane: Lane, end: DeliveryEnd) {
        self.claim_policy.end_lane(lane);
        match end {
            DeliveryEnd::Settled { some_left, some_stay } => {
                if some_left {
                    self.refusal = None;
                }
                self.backing_off = None;
                if some_stay {
                    // Only a look tells when the rows that stay are due.
                    self.request_look(now);
                }
                // Nothing else has changed, unless a claim left rows for now: the next large row, or rows that were locked.
                if lane.large || self.queue != (Queue::Waiting { empty_claims: 0 }) {
                    self.expect_changes();
                }
            }
            // The return of the broker is a wake. If it is open and does not confirm, trying again at once makes duplicates.
            DeliveryEnd::Unsettled if !self.environment.broker_open => self.expect_changes(),
            DeliveryEnd::Unsettled | DeliveryEnd::Panicked => self.back_off(now, RECONNECT),
            DeliveryEnd::Refused { error, back_off } => {
                self.refusal = Some((now, error));
                self.request_look(now);
                // A row that was sent before has its own delay. The next row may show at once that rows can be finished.
                if back_off {
                    self.back_off(now, FINISH);
                }
            }
            DeliveryEnd::Failed => self.handle_database_failure(now),
        }
    }

    fn request_look(&mut self, now: Moment) {
        self.sweep_schedule.mark_outdated();
        self.look_by(now);
    }

    fn handle_database_failure(&mut self, now: Moment) {
        self.sweep_schedule.discard_duration();
        self.back_off(now, RECONNECT);
    }

    /// Tries nothing for a while, longer each time until a batch succeeds. A failure meanwhile does not count again.
    fn back_off(&mut self, now: Moment, backoff: Backoff) {
        self.expect_changes();
        let failures = self.backing_off.map_or(0, |backing_off| backing_off.failures);
        if self.backs_off_until().is_none_or(|until| until <= now) {
            let until = now + backoff.delay(failures);
            self.backing_off = Some(BackingOff { failures: failures.saturating_add(1), until });
        }
    }

    fn handle_sweep(&mut self, now: Moment, swept: Option<(Moment, Look)>) {
        let is_newest = self.sweep_schedule.end(now, swept.is_some());
        let Some((asked_at, look)) = swept else { return };
        self.low_water.note_sweep(asked_at, &look);
        if is_newest {
            let (at, reason) = self.next_look;
            self.note_queue_head(asked_at, &look);
            if reason == Reason::Again {
                self.look_by(at);
            }
        }
        let is_news = look.below.is_some() || look.outlook.due && self.queue == (Queue::Waiting { empty_claims: 0 });
        if is_news && matches!(self.queue, Queue::Waiting { .. }) {
            self.queue = Queue::Expected(now);
        }
    }
}

#[cfg(test)]
mod tests;
