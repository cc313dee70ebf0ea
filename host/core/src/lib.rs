//! The scheduler's core: decides when to look at the queue, from where, what to claim, when to hold and release rows, when to
//! sweep, and how long to sleep. The daemon's loop carries out each [`Action`], and tells what came of it in an [`Event`].
//!
//! It never does I/O, never reads a clock and never rolls dice: the moment is an argument, counted from the start of the loop.

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
pub use claim_policy::{Load, Turn};
use low_water::{LowWater, Sample};
use polling::Polling;
pub use protocol::{Action, Batch, Claimed, End, Environment, Event, Moment, Wanted, Work};
use queue::{Look, Outlook};
use reason::{Reason, Reasons};
use state::{Background, Queue, Rest};
use sweep_schedule::SweepSchedule;

/// Batches that are delivered side by side: while one waits for the broker, another keeps the database busy. One more is for
/// rows that have just become due, while there is a backlog.
const LANES: usize = 3;
/// A row that PostgreSQL refuses to finish is tried again earlier than this. If none is due for so long, none is left.
const REFUSED_ARE_GONE: Duration = Duration::from_mins(1);
/// The shortest sleep, so that a clock that is a little behind does not make the loop turn as fast as it can.
const SHORTEST: Duration = Duration::from_micros(200);
/// A transaction for a row that is due at a known moment is begun at least so long before it.
const HEAD_START: Duration = Duration::from_micros(500);

/// What the scheduler knows, and all that it decides by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Core {
    /// The longest time between two looks, and the shortest between two sweeps.
    sweep: Duration,
    environment: Environment,
    queue: Queue,
    /// When the next row is due, by the last look or claim.
    next_at: Option<Moment>,
    /// The next look is at this moment, if nothing happens before; and why.
    look_at: (Moment, Reason),
    /// When we were notified the last time, a row was due.
    notified_of_due: bool,
    rest: Option<Rest>,
    /// When PostgreSQL last refused to finish rows, and in which words, if it has finished none since: their messages were sent,
    /// so little more is sent until it does.
    refused: Option<(Moment, String)>,
    /// How long the last two transactions took to begin.
    began: [Duration; 2],
    mark: LowWater,
    claim_policy: ClaimPolicy,
    polling: Polling,
    sweep_schedule: SweepSchedule,
    hold: Background<()>,
    release: Background<Vec<String>>,
}

impl Core {
    /// Nothing is known yet. `sweep` is the longest time between two looks.
    #[must_use]
    pub fn new(sweep: Duration) -> Self {
        Self {
            sweep,
            environment: Environment { broker_open: false, connections: 1, doubt: 0, knows_kinds: false },
            queue: Queue::Unknown { notified: false },
            next_at: None,
            look_at: (Moment::ZERO, Reason::Sweep),
            notified_of_due: false,
            rest: None,
            refused: None,
            began: [Duration::ZERO; 2],
            mark: LowWater::default(),
            claim_policy: ClaimPolicy::default(),
            polling: Polling::default(),
            sweep_schedule: SweepSchedule::default(),
            hold: Background::Idle,
            release: Background::Idle,
        }
    }

    /// Looks and claims begin here; `None` = as long ago as our patience.
    #[must_use]
    pub fn mark(&self) -> Option<OffsetDateTime> {
        self.mark.mark()
    }

    /// Whether a sweep has looked below the mark since it was last given up.
    #[must_use]
    pub fn is_swept(&self) -> bool {
        self.mark.is_swept()
    }

    /// Until when nothing is tried, if a server did not see something through.
    #[must_use]
    pub fn rests_until(&self) -> Option<Moment> {
        self.rest.map(|rest| rest.until)
    }

    /// The words in which PostgreSQL refuses to finish rows, if it does.
    #[must_use]
    pub fn refusal(&self) -> Option<&str> {
        self.refused.as_ref().map(|(_, why)| &**why)
    }

    /// What to do at this moment.
    pub fn next(&mut self, now: Moment, environment: Environment) -> Action {
        if environment.doubt != self.environment.doubt {
            self.mark.give_up(now);
        }
        self.environment = environment;
        if let Some(until) = self.rests_until().filter(|until| now < *until) {
            return Action::Sleep(until, Reason::Again);
        }
        if let Some(kinds) = self.release.begin() {
            return Action::Release(kinds);
        }
        if environment.knows_kinds && self.hold.begin().is_some() {
            return Action::Hold;
        }
        // The end of a delivery is an event, and so is the return of the broker.
        let has_lane = self.has_free_lane();
        if !environment.broker_open || !has_lane && !self.goes_on_for_long(now) {
            return Action::Sleep(now + self.sweep, Reason::Sweep);
        }
        if !has_lane {
            return Action::Look;
        }
        if self.until_sweep(now).is_zero() {
            // So that there is a mark, from which on others look meanwhile.
            if self.mark().is_none() {
                return Action::Look;
            }
            if self.sweep_schedule.begin(now) && self.look_at.1 == Reason::Sweep {
                // One that is quick is a look as well.
                self.look_at.0 = now + self.sweep;
            }
            return Action::Sweep;
        }
        let (at, why) = self.next_timer(now);
        match self.queue {
            Queue::Unknown { .. } => Action::Look,
            Queue::Expected(not_before) => self.claim(not_before),
            Queue::Due { .. } => self.claim(now),
            Queue::Waiting { .. } if at > now => Action::Sleep(at.max(now + SHORTEST), why),
            Queue::Waiting { .. } => match self.next_at.take_if(|_| why == Reason::Due) {
                Some(next_at) => {
                    self.queue = Queue::Expected(next_at);
                    self.claim(next_at)
                }
                None => Action::Look,
            },
        }
    }

    fn claim(&self, not_before: Moment) -> Action {
        let careful = self.refused.is_some();
        let turn = if careful { Turn::Oldest } else { self.claim_policy.next() };
        let since = if let Turn::Newest(since) = turn { Some(since) } else { None };
        let (limit, no_large) = (self.claim_policy.limit(turn), self.claim_policy.large_under_way());
        Action::Claim(Wanted { turn, limit, since: since.max(self.mark()), no_large, not_before, careful })
    }

    /// After a failure there is only one lane, until it succeeds. Each keeps a connection, of which there may be few.
    fn has_free_lane(&self) -> bool {
        let lanes = if self.rest.is_none() && self.refused.is_none() { LANES } else { 1 };
        let lanes = lanes + usize::from(self.claim_policy.newest_under_way());
        self.claim_policy.lanes() < lanes.min(self.environment.connections)
    }

    /// Rows are claimed again and again, and it is time to look.
    fn goes_on_for_long(&self, now: Moment) -> bool {
        matches!(self.queue, Queue::Expected(_) | Queue::Due { .. }) && self.look_at.0 <= now
    }

    /// The next look is at this moment at the latest.
    fn look_again(&mut self, at: Moment) {
        if at < self.look_at.0 {
            self.look_at = (at, Reason::Again);
        }
    }

    /// Takes note of what has happened.
    pub fn handle(&mut self, now: Moment, event: Event) {
        match event {
            Event::Woken(reasons) => self.woken(now, reasons),
            Event::Looked(asked_at, look) => self.looked(now, asked_at, &look),
            Event::Claimed(claimed) => self.claimed(now, claimed),
            Event::DeliveryEnded(load, end) => self.delivery_ended(now, load, end),
            Event::Swept(look) => self.swept(now, look),
            Event::Held(some) => {
                self.hold = Background::Idle;
                if some {
                    self.something_happened();
                }
            }
            Event::Released => {
                self.release = Background::Idle;
                self.something_happened();
            }
            Event::Failed(work) => {
                match work {
                    Work::Asking => self.queue = Queue::Unknown { notified: false },
                    Work::Holding => self.hold = Background::Idle,
                    Work::Releasing => self.release = Background::Idle,
                }
                self.failed(now);
            }
        }
    }

    /// Another claim may come to something.
    fn something_happened(&mut self) {
        if !matches!(self.queue, Queue::Unknown { .. } | Queue::Expected(_)) {
            self.queue = Queue::Unknown { notified: false };
        }
    }

    fn woken(&mut self, now: Moment, reasons: Reasons) {
        // The others are our own timers.
        if !reasons.iter().any(Reason::is_from_others) {
            return;
        }
        self.something_happened();
        if let Queue::Unknown { notified } = &mut self.queue
            && reasons.iter().any(|reason| reason == Reason::Notification)
        {
            *notified = true;
            if self.notified_of_due {
                self.queue = Queue::Expected(now);
            }
        }
    }

    fn looked(&mut self, now: Moment, asked_at: Moment, look: &Look) {
        self.mark.looked(now, look);
        self.note(asked_at, look);
        if let Queue::Unknown { notified: true } = self.queue {
            self.notified_of_due = look.outlook.due;
        }
        self.queue = match self.queue {
            _ if !look.outlook.due => Queue::Waiting { tries: 0 },
            Queue::Waiting { tries } => Queue::Due { tries },
            _ => Queue::Due { tries: 0 },
        };
    }

    /// What a look and a sweep say of the head of the queue.
    fn note(&mut self, asked_at: Moment, look: &Look) {
        let every = self.polling.looked(look);
        self.look_at = match every.filter(|every| *every < self.sweep) {
            Some(every) => (asked_at + every, Reason::Polling),
            None => (asked_at + self.sweep, Reason::Sweep),
        };
        if !look.held_for_us.is_empty() {
            self.release.want(look.held_for_us.clone());
        }
        // However much there is to deliver, paused rows must not stay where each claim steps over them.
        if look.paused_first {
            self.hold.want(());
        }
        if !look.outlook.due {
            self.rest = None;
            self.refused.take_if(|(at, _)| asked_at > *at + REFUSED_ARE_GONE);
        }
        self.ahead(asked_at, look.outlook);
    }

    fn ahead(&mut self, asked_at: Moment, outlook: Outlook) {
        self.sweep_schedule.outdate();
        self.next_at = outlook.next_in.map(|next_in| asked_at.saturating_add(next_in));
    }

    fn claimed(&mut self, now: Moment, claimed: Claimed) {
        let Claimed { turn, asked_at, begin, at, outlook, behind, rows } = claimed;
        self.began = [begin, self.began[0]];
        self.claim_policy.claimed(turn, at, outlook.due.then_some(behind));
        if let Some(Batch { xid, large }) = rows {
            self.mark.claimed(now, Sample { at, xid });
            self.claim_policy.under_way(Load { turn, large });
            // Others may have become due, or be locked, or of a kind that nobody serves.
            self.look_again(now + LOCKED.delay(0));
        }
        if turn != Turn::Oldest {
            return;
        }
        let is_early = outlook.next_in.is_some_and(|next_in| next_in < HEAD_START);
        // A claim of nothing does not tell whether rows are due that others have locked.
        if rows.is_some() || is_early {
            self.ahead(asked_at, outlook);
        }
        self.queue = match (rows, self.queue) {
            (Some(_), _) if outlook.due => Queue::Expected(now),
            (Some(_), _) => Queue::Waiting { tries: 0 },
            // A look would be in its way; and a clock that is a little behind must not make the loop turn as fast as it can.
            (None, _) if is_early => {
                let next_at = self.next_at.take().unwrap_or(now);
                Queue::Expected(next_at.max(now + SHORTEST))
            }
            (None, Queue::Due { tries }) => {
                self.hold.want(());
                self.look_again(now + LOCKED.delay(tries));
                Queue::Waiting { tries: tries.saturating_add(1) }
            }
            (None, _) => Queue::Unknown { notified: true },
        };
    }

    fn delivery_ended(&mut self, now: Moment, load: Load, end: End) {
        self.claim_policy.ended(load);
        match end {
            End::Settled { some_left, some_stay } => {
                if some_left {
                    self.refused = None;
                }
                self.rest = None;
                if some_stay {
                    // When they are due, only a look tells.
                    self.want_look(now);
                }
                // What was locked is gone, and nothing else has changed, unless a claim has left something for this moment.
                if load.large || self.queue != (Queue::Waiting { tries: 0 }) {
                    self.something_happened();
                }
            }
            // If the broker is away, its return is a wake. If it is there and confirms nothing, asking it again and again
            // would only make duplicates.
            End::Unsettled if !self.environment.broker_open => self.something_happened(),
            End::Unsettled | End::Panicked => self.rest(now, RECONNECT),
            End::Refused { why, rest } => {
                self.refused = Some((now, why));
                self.want_look(now);
                // What was sent before waits by itself, and must not keep others from showing that they can be finished.
                if rest {
                    self.rest(now, FINISH);
                }
            }
            End::Failed => self.failed(now),
        }
    }

    fn want_look(&mut self, now: Moment) {
        self.sweep_schedule.outdate();
        self.look_again(now);
    }

    /// The database did not do it.
    fn failed(&mut self, now: Moment) {
        self.sweep_schedule.doubt();
        self.rest(now, RECONNECT);
    }

    /// Tries nothing for a while, longer each time until a batch succeeds. What fails together fails for the same reason.
    fn rest(&mut self, now: Moment, backoff: Backoff) {
        self.something_happened();
        let failures = self.rest.map_or(0, |rest| rest.failures);
        if self.rests_until().is_none_or(|until| until <= now) {
            self.rest = Some(Rest { failures: failures.saturating_add(1), until: now + backoff.delay(failures) });
        }
    }

    fn swept(&mut self, now: Moment, swept: Option<(Moment, Look)>) {
        let is_newest = self.sweep_schedule.end(now, swept.is_some());
        let Some((asked_at, look)) = swept else { return };
        self.mark.swept(asked_at, &look);
        if is_newest {
            let (at, why) = self.look_at;
            self.note(asked_at, &look);
            if why == Reason::Again {
                self.look_again(at);
            }
        }
        let is_news = look.below.is_some() || look.outlook.due && self.queue == (Queue::Waiting { tries: 0 });
        if is_news && matches!(self.queue, Queue::Waiting { .. }) {
            self.queue = Queue::Expected(now);
        }
    }
}

#[cfg(test)]
mod tests;
