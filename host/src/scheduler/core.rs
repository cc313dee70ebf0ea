//! The scheduler's core: decides when to look at the queue, from where, what to claim, when to hold and release rows, when to
//! sweep, and how long to sleep. The [loop](super) carries out each [`Action`], and tells what came of it in an [`Event`].
//!
//! It never does I/O, never reads a clock and never rolls dice: the moment is an argument, counted from the start of the loop.

mod low_water;
mod pace;
mod polling;
mod protocol;
mod rest;
mod timers;
mod turns;

use std::time::Duration;

use time::OffsetDateTime;

use crate::backoff::LOCKED;
use crate::queue::{Look, Outlook};
use crate::wake::{Reason, Reasons};

use low_water::{LowWater, Sample};
use pace::Pace;
use polling::Polling;
pub use protocol::{Action, Batch, Claimed, End, Event, Moment, Outside, Wanted, Work};
use rest::Rest;
use timers::HEAD_START;
use turns::{Came, Turns};
pub use turns::{Load, Turn};

/// Batches that are delivered side by side: while one waits for the broker, another keeps the database busy. One more is for
/// rows that have just become due, while there is a backlog.
const LANES: usize = 3;
/// A row that PostgreSQL refuses to finish is tried again earlier than this. If none is due for so long, none is left.
const REFUSED_ARE_GONE: Duration = Duration::from_mins(1);
/// The shortest sleep, so that a clock that is a little behind does not make the loop turn as fast as it can.
const SHORTEST: Duration = Duration::from_micros(200);

/// What is known of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Queue {
    /// Something may have changed since it was looked at. `claimed` = only what we ourselves have claimed: rows that are due
    /// then are those.
    Unknown { claimed: bool },
    /// A row is believed to be due from this moment on: it is claimed without a look, which follows.
    Expected(Moment),
    /// A look saw rows that are due.
    Due,
    /// Rows are due that nobody could claim. Until this moment only what happens is a reason to try again.
    Stuck { until: Moment },
    /// Nothing is due that is not on its way.
    Waiting,
}

/// Work beside the loop.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
enum Beside<T> {
    #[default]
    Idle,
    Wanted(T),
    UnderWay,
}

/// What the scheduler knows, and all that it decides by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Core {
    /// The longest time between two looks, and the shortest between two sweeps that are cheap.
    sweep: Duration,
    outside: Outside,
    queue: Queue,
    /// Of the last look or claim: when it was asked for, and when the next row is due.
    asked_at: Moment,
    next_at: Option<Moment>,
    /// When the last look was asked for.
    looked_at: Option<Moment>,
    /// Claims in a row that came to nothing although rows are due.
    empty_claims: u32,
    /// We were notified, and no look has told yet whether a row is due.
    notified: bool,
    /// When we were notified the last time, one was.
    notified_of_due: bool,
    rest: Option<Rest>,
    /// When PostgreSQL last refused to finish rows, and in which words, if it has finished none since: their messages were sent,
    /// so little more is sent until it does.
    refused: Option<(Moment, String)>,
    /// How long the last two transactions took to begin.
    began: [Duration; 2],
    mark: LowWater,
    turns: Turns,
    polling: Polling,
    pace: Pace,
    hold: Beside<()>,
    release: Beside<Vec<String>>,
}

impl Core {
    /// Nothing is known yet. `sweep` is the longest time between two looks.
    #[must_use]
    pub fn new(sweep: Duration) -> Self {
        Self {
            sweep,
            outside: Outside { broker_open: false, connections: 1, doubt: 0, knows_kinds: false },
            queue: Queue::Unknown { claimed: false },
            asked_at: Moment::ZERO,
            next_at: None,
            looked_at: None,
            empty_claims: 0,
            notified: false,
            notified_of_due: false,
            rest: None,
            refused: None,
            began: [Duration::ZERO; 2],
            mark: LowWater::default(),
            turns: Turns::default(),
            polling: Polling::default(),
            pace: Pace::default(),
            hold: Beside::Idle,
            release: Beside::Idle,
        }
    }

    /// Looks and claims begin here; `None` = as long ago as our patience.
    #[must_use]
    pub fn mark(&self) -> Option<OffsetDateTime> {
        self.mark.mark()
    }

    /// The words in which PostgreSQL refuses to finish rows, if it does.
    #[must_use]
    pub fn refusal(&self) -> Option<&str> {
        self.refused.as_ref().map(|(_, why)| &**why)
    }

    /// What to do at this moment.
    pub fn next(&mut self, now: Moment, outside: Outside) -> Action {
        if outside.doubt != self.outside.doubt {
            self.mark.give_up();
        }
        self.outside = outside;
        if let Some(Rest { until, .. }) = self.rest
            && now < until
        {
            return Action::Sleep(until, Reason::Again);
        }
        if let Beside::Wanted(kinds) = &mut self.release {
            let kinds = std::mem::take(kinds);
            self.release = Beside::UnderWay;
            return Action::Release(kinds);
        }
        if self.hold == Beside::Wanted(()) && outside.knows_kinds {
            self.hold = Beside::UnderWay;
            return Action::Hold;
        }
        // The end of a delivery is an event, and so is the return of the broker.
        if !outside.broker_open {
            return Action::Sleep(now + self.sweep, Reason::Sweep);
        }
        if !self.has_free_lane() {
            let goes_on = matches!(self.queue, Queue::Expected(_) | Queue::Due);
            return if goes_on && self.is_look_old(now) {
                Action::Look
            } else {
                Action::Sleep(now + self.sweep, Reason::Sweep)
            };
        }
        self.time_passes(now);
        if self.until_sweep(now).is_zero() {
            let Some(_) = self.mark() else {
                // So that there is one, from which on others look meanwhile.
                return Action::Look;
            };
            if self.pace.begin(now, self.mark.known()) {
                self.looked_at = Some(now);
            }
            return Action::Sweep;
        }
        match self.queue {
            Queue::Unknown { .. } => Action::Look,
            Queue::Expected(not_before) => Action::Claim(self.wanted(not_before)),
            Queue::Due => Action::Claim(self.wanted(now)),
            Queue::Stuck { .. } | Queue::Waiting => {
                let (at, why) = self.timers(now).min_by_key(|(at, _)| *at).expect("there is always the next look");
                Action::Sleep(at.max(now + SHORTEST), why)
            }
        }
    }

    fn wanted(&self, not_before: Moment) -> Wanted {
        let careful = self.refused.is_some();
        let turn = if careful { Turn::Oldest } else { self.turns.next() };
        let since = if let Turn::Newest(since) = turn { Some(since) } else { None };
        let (limit, no_large) = (self.turns.limit(turn), self.turns.large_under_way());
        Wanted { turn, limit, since: since.max(self.mark()), no_large, not_before, careful }
    }

    /// After a failure there is only one lane, until it succeeds. Each keeps a connection, of which there may be few.
    fn has_free_lane(&self) -> bool {
        let lanes = if self.rest.is_none() && self.refused.is_none() { LANES } else { 1 };
        let lanes = lanes + usize::from(self.turns.newest_under_way());
        self.turns.lanes() < lanes.min(self.outside.connections)
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
                self.hold = Beside::Idle;
                if some {
                    self.something_happened();
                }
            }
            Event::Released => {
                self.release = Beside::Idle;
                self.something_happened();
            }
            Event::Failed(work) => {
                match work {
                    Work::Asking => self.queue = Queue::Unknown { claimed: false },
                    Work::Holding => self.hold = Beside::Idle,
                    Work::Releasing => self.release = Beside::Idle,
                }
                self.failed(now);
            }
        }
    }

    /// Another claim may come to something.
    fn something_happened(&mut self) {
        self.empty_claims = 0;
        if !matches!(self.queue, Queue::Expected(_) | Queue::Due) {
            self.queue = Queue::Unknown { claimed: false };
        }
    }

    fn woken(&mut self, now: Moment, reasons: Reasons) {
        // The others are our own timers.
        if !reasons.iter().any(Reason::is_from_others) {
            return;
        }
        self.something_happened();
        if reasons.iter().any(|reason| reason == Reason::Notification) {
            self.notified = true;
            if self.notified_of_due && matches!(self.queue, Queue::Unknown { .. }) {
                self.queue = Queue::Expected(now);
            }
        }
    }

    fn looked(&mut self, now: Moment, asked_at: Moment, look: &Look) {
        self.mark.seen(look, self.mark.known());
        self.note(asked_at, look);
        self.queue = match self.queue {
            _ if !look.outlook.due => Queue::Waiting,
            // Those rows are the ones that we have just claimed.
            Queue::Unknown { claimed: true } => Queue::Waiting,
            _ => Queue::Due,
        };
        if !look.outlook.due {
            (self.empty_claims, self.rest) = (0, None);
            if self.refused.as_ref().is_some_and(|(at, _)| now > *at + REFUSED_ARE_GONE) {
                self.refused = None;
            }
        }
    }

    /// What a look and a sweep say of the head of the queue.
    fn note(&mut self, asked_at: Moment, look: &Look) {
        self.polling.looked(look);
        if !look.held_for_us.is_empty() && self.release == Beside::Idle {
            self.release = Beside::Wanted(look.held_for_us.clone());
        }
        // However much there is to deliver, paused rows must not stay where each claim steps over them.
        if look.paused_first {
            self.hold();
        }
        if std::mem::take(&mut self.notified) {
            self.notified_of_due = look.outlook.due;
        }
        self.looked_at = Some(asked_at);
        self.ahead(asked_at, look.outlook);
    }

    fn hold(&mut self) {
        if self.hold == Beside::Idle {
            self.hold = Beside::Wanted(());
        }
    }

    fn ahead(&mut self, asked_at: Moment, outlook: Outlook) {
        self.asked_at = asked_at;
        self.next_at = outlook.next_in.map(|next_in| asked_at.saturating_add(next_in));
    }

    fn claimed(&mut self, now: Moment, claimed: Claimed) {
        let Claimed { turn, asked_at, begin, at, outlook, behind, rows } = claimed;
        self.began = [begin, self.began[0]];
        self.turns.claimed(turn, Came { at, more: outlook.due, behind });
        if let Some(Batch { xid, large }) = rows {
            self.mark.sample(Sample { at, xid }, self.mark.known());
            self.turns.under_way(Load { turn, large });
            self.empty_claims = 0;
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
            (Some(_), _) if self.is_look_old(now) => Queue::Unknown { claimed: true },
            (Some(_), _) => Queue::Waiting,
            // A look would be in its way; and a clock that is a little behind must not make the loop turn as fast as it can.
            (None, _) if is_early => {
                let next_at = self.next_at.take().unwrap_or(now);
                Queue::Expected(next_at.max(now + SHORTEST))
            }
            (None, Queue::Due) => {
                self.hold();
                self.empty_claims = self.empty_claims.saturating_add(1);
                Queue::Stuck { until: now + LOCKED.delay(self.empty_claims - 1) }
            }
            (None, _) => Queue::Unknown { claimed: false },
        };
    }

    fn delivery_ended(&mut self, now: Moment, load: Load, end: End) {
        self.turns.ended(load);
        match end {
            End::Settled { some_left, some_stay } => {
                if some_left {
                    self.refused = None;
                }
                self.rest = None;
                if some_stay {
                    // When they are due, only a look tells.
                    self.looked_at = None;
                }
                self.something_happened();
                if self.turns.more() && matches!(self.queue, Queue::Unknown { .. }) {
                    self.queue = Queue::Expected(now);
                }
            }
            // If the broker is away, its return is a wake. If it is there and confirms nothing, asking it again and again
            // would only make duplicates.
            End::Unsettled if !self.outside.broker_open => {}
            End::Unsettled | End::Panicked => self.rest(now),
            End::Refused { why, rest } => {
                self.refused = Some((now, why));
                self.looked_at = None;
                self.something_happened();
                // What was sent before waits by itself, and must not keep others from showing that they can be finished.
                if rest {
                    self.rest(now);
                }
            }
            End::Failed => self.failed(now),
        }
        if let Queue::Waiting | Queue::Unknown { .. } = self.queue {
            self.queue = Queue::Unknown { claimed: false };
        }
    }

    fn swept(&mut self, now: Moment, swept: Option<(Moment, Look)>) {
        let known = self.pace.end(now, swept.is_some());
        let (Some((asked_at, look)), Some(known)) = (swept, known) else { return };
        let found = look.below.is_some();
        self.mark.seen(&look, known);
        self.mark.swept(look.below.filter(|below| below.go_back).map(|below| below.first), known);
        // The loop may have looked meanwhile.
        if self.looked_at.is_none_or(|looked_at| looked_at <= asked_at) {
            self.note(asked_at, &look);
        }
        match self.queue {
            Queue::Waiting if found || look.outlook.due => self.queue = Queue::Expected(now),
            Queue::Stuck { .. } if found => self.queue = Queue::Expected(now),
            _ => {}
        }
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
