//! What each event changes in the core.

use std::time::Duration;

use super::backoff::{Backoff, DATABASE, FINISH, LOCKED, RECONNECT};
use super::drain::LATE;
use super::low_water::Sample;
use super::queue::{Look, Outlook};
use super::reason::{Reason, Reasons};
use super::state::{Background, BackingOff, Queue};
use super::{Batch, ClaimRange, ClaimResult, Core, DeliveryEnd, Event, Lane, Moment, Operation, SHORTEST_SLEEP};

/// A row that PostgreSQL refuses to finish is tried again within this time. If no row was due for so long, none is left.
const REFUSAL_FORGOTTEN_AFTER: Duration = Duration::from_mins(1);
/// A claim that got nothing came too early if a row is due within this time.
pub(super) const ALMOST_DUE: Duration = Duration::from_micros(500);

impl Core {
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
                    // Rows may have been moved into lines.
                    self.request_look(now);
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
        // However much there is to deliver, each claim would step over such rows while they stay in the queue.
        if look.not_claimable_first {
            self.hold.request(());
        }
        self.claim_policy.note_head(look.not_claimable_first);
        self.drain.note_look(look);
        if self.drain.is_active() {
            self.claim_policy.begin_backlog(look.at);
        }
        self.has_limits = look.has_limits;
        self.turns.note_look(asked_at, look.turn_in);
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
        self.claim_policy.note_claim(range, at, outlook.due.then_some(behind), self.drain.is_active());
        if let Some(Batch { xid, large, rows: _ }) = batch {
            self.low_water.note_claim(now, Sample { at, xid });
            self.claim_policy.start_lane(Lane { range, large });
            // Other rows may have become due since, or be locked, or of a kind that no daemon serves.
            self.look_by(now + LOCKED.delay(0));
        }
        if range == ClaimRange::Turns {
            match batch {
                Some(_) => self.turns.begin(),
                None => self.turns.note_empty_claim(asked_at, now, outlook.next_in),
            }
        }
        match range {
            ClaimRange::Oldest | ClaimRange::ByKind => {
                let late_rows = batch.filter(|_| behind > LATE).map_or(0, |batch| batch.rows);
                self.drain.note_claim(now, late_rows, outlook.due);
            }
            ClaimRange::Newest(_) if self.drain.is_pausing(now) => {
                self.note_next_due(asked_at, outlook);
                let is_more = batch.is_some() && outlook.due;
                self.queue = if is_more { Queue::Expected(now) } else { Queue::Waiting { empty_claims: 0 } };
                return;
            }
            ClaimRange::Newest(_) | ClaimRange::Turns => return,
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
        if lane.range == ClaimRange::Turns {
            self.turns.end(now);
        }
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
        self.back_off(now, DATABASE);
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
