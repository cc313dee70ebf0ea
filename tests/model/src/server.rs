//! PostgreSQL in the model. The model assumes the following, and `tests/it/on_time/assumptions.rs` shows each on a real
//! server:
//!
//! 1. a snapshot sees all transactions that committed before it was taken, each of them whole, and no other;
//! 2. the lowest running transaction number is not above that of any transaction that may still commit; a reader has no
//!    number;
//! 3. a row's slot is read from the clock after its transaction has taken its number, and is not before that time;
//! 4. `SKIP LOCKED` passes over rows that others have locked, and the rows that a session had locked are free when it is
//!    gone;
//! 5. a notification is sent when its transaction commits, to every session that listens then, and to no other;
//! 6. a trigger that finds a promise is silent, and a promise lasts for a second;
//! 7. a claim reads the clock before its transaction has a number;
//! 8. after sessions have broken, the core is told of the doubt before the next look, so no mark outlives its server.

use std::collections::BTreeSet;

use tidings_core::queue::{Below, Look, Outlook, Promise};
use tidings_core::{Batch, ClaimRange, ClaimRequest, ClaimResult, Moment};
use time::OffsetDateTime;

use super::row::{FoundBy, Place, Row};
use super::times::{OPEN_FOR_LONG, START};

/// The database.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Server {
    /// All rows, in the order in which they were written.
    pub(super) rows: Vec<Row>,
    /// The number of each writer's open transaction.
    writers: Vec<Option<i64>>,
    open_claims: Vec<i64>,
    next_xid: i64,
    polling_until: i64,
    paused: BTreeSet<usize>,
    /// How far the database's clock is ahead of the world's time, in ms.
    clock_ahead: i64,
    /// The latest time that the clock had shown when it was last set.
    highest_clock: i64,
    /// When the clock was last set forward, in the world's time.
    pub(super) set_forward_at: Option<u64>,
    /// By how many ms the clock was set forward in all.
    set_forward: u64,
    clock_was_set: bool,
}

/// A time of the database's clock.
pub(super) fn at(ms: i64) -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH + time::Duration::milliseconds(ms)
}

fn signed(ms: u64) -> i64 {
    i64::try_from(ms).expect("short")
}

impl Server {
    pub(super) fn new(writers: usize) -> Self {
        Self {
            rows: Vec::new(),
            writers: vec![None; writers],
            open_claims: Vec::new(),
            next_xid: 10,
            polling_until: 0,
            paused: BTreeSet::new(),
            clock_ahead: signed(10 * START),
            highest_clock: 0,
            set_forward_at: None,
            set_forward: 0,
            clock_was_set: false,
        }
    }

    /// The time that the database's clock shows, in ms.
    pub(super) fn clock(&self, now: u64) -> i64 {
        signed(now) + self.clock_ahead
    }

    pub(super) fn set_clock(&mut self, now: u64, ms: i64) {
        self.highest_clock = self.highest_clock(now);
        self.clock_ahead += ms;
        self.clock_was_set = true;
        if ms > 0 {
            (self.set_forward_at, self.set_forward) = (Some(now), self.set_forward + ms.unsigned_abs());
        }
    }

    /// The latest time that the clock has shown, in ms.
    pub(super) fn highest_clock(&self, now: u64) -> i64 {
        self.highest_clock.max(self.clock(now))
    }

    /// Whether the clock was ever set.
    pub(super) fn clock_was_set(&self) -> bool {
        self.clock_was_set
    }

    /// By how many ms the clock was set forward in all.
    pub(super) fn set_forward(&self) -> u64 {
        self.set_forward
    }

    /// A standby takes over. Its clock is `behind` ms late, and it has given fewer transaction numbers. No committed row is
    /// lost, but all sessions are.
    pub(super) fn fail_over(&mut self, behind: i64) {
        for writer in 0..self.writers() {
            self.roll_back(writer);
        }
        self.clock_ahead -= behind;
        self.clock_was_set |= behind > 0;
        self.highest_clock = 0;
        self.next_xid = (self.next_xid - 3).max(1);
    }

    pub(super) fn writers(&self) -> usize {
        self.writers.len()
    }

    pub(super) fn take_xid(&mut self) -> i64 {
        self.next_xid += 1;
        self.next_xid - 1
    }

    pub(super) fn pause(&mut self, kind: usize, paused: bool) {
        if paused {
            self.paused.insert(kind)
        } else {
            self.paused.remove(&kind)
        };
    }

    pub(super) fn is_paused(&self, kind: usize) -> bool {
        self.paused.contains(&kind)
    }

    pub(super) fn add_old_row(&mut self, now: u64, kind: usize, ago: i64) {
        self.rows.push(Row {
            kind,
            large: false,
            slot: self.clock(now) - ago,
            place: Place::Waiting,
            written_at: now,
            committed_at: now,
            found_by: FoundBy::Sweep,
            was_locked: false,
            clock_behind: false,
            settled_count: 0,
        });
    }

    /// A writer's transaction takes its number, if it has none.
    pub(super) fn begin(&mut self, writer: usize) {
        if self.writers[writer].is_none() {
            self.writers[writer] = Some(self.take_xid());
        }
    }

    pub(super) fn write(&mut self, now: u64, writer: usize, kind: usize, large: bool, due_in: i64) {
        self.begin(writer);
        let clock = self.clock(now);
        self.rows.push(Row {
            kind,
            large,
            slot: clock.max(clock + due_in),
            place: Place::Uncommitted(writer),
            written_at: now,
            committed_at: now,
            found_by: match due_in {
                // Triggers do not notify of rows that are due so late: a look comes before.
                30_001.. => FoundBy::Sweep,
                _ if self.is_promise_open(now) => FoundBy::Polling,
                _ => FoundBy::Notification,
            },
            was_locked: false,
            clock_behind: clock < self.highest_clock,
            settled_count: 0,
        });
    }

    /// Commits a writer's transaction. Returns whether PostgreSQL notifies.
    pub(super) fn commit(&mut self, now: u64, writer: usize) -> bool {
        self.writers[writer] = None;
        let mut notifies = false;
        for row in self.rows.iter_mut().filter(|row| row.place == Place::Uncommitted(writer)) {
            (row.place, row.committed_at) = (Place::Waiting, now);
            notifies |= row.found_by == FoundBy::Notification;
        }
        notifies
    }

    pub(super) fn roll_back(&mut self, writer: usize) {
        self.writers[writer] = None;
        self.rows.retain(|row| row.place != Place::Uncommitted(writer));
    }

    pub(super) fn promise(&mut self, now: u64) {
        self.polling_until = self.clock(now) + 1_000;
    }

    /// The time until the end of the last promise to poll, in ms.
    pub(super) fn until_promise_ends(&self, now: u64) -> u64 {
        u64::try_from(self.polling_until - self.clock(now)).unwrap_or(0)
    }

    /// How many ms ago the last promise ended; 0 while one is open.
    pub(super) fn ms_since_promise(&self, now: u64) -> u64 {
        u64::try_from(self.clock(now) - self.polling_until).unwrap_or(0)
    }

    fn is_promise_open(&self, now: u64) -> bool {
        (1..2_000).contains(&(self.polling_until - self.clock(now)))
    }

    /// The indexes of the rows that pass the filter, in the order of their slots.
    fn sorted_by_slot(&self, filter: impl Fn(&Row) -> bool) -> Vec<usize> {
        let mut indexes: Vec<usize> = (0..self.rows.len()).filter(|index| filter(&self.rows[*index])).collect();
        indexes.sort_by_key(|index| self.rows[*index].slot);
        indexes
    }

    /// Whether every session sees the row in the queue.
    fn is_visible(row: &Row) -> bool {
        matches!(row.place, Place::Waiting | Place::Locked(_))
    }

    /// The slot from which on a statement with this mark sees rows.
    pub(super) fn scan_start(&self, now: u64, mark: Option<OffsetDateTime>) -> OffsetDateTime {
        mark.unwrap_or(at(self.clock(now) - signed(OPEN_FOR_LONG)))
    }

    fn is_due(&self, now: u64, start: OffsetDateTime, row: &Row) -> bool {
        row.place == Place::Waiting && row.slot <= self.clock(now) && at(row.slot) >= start
    }

    pub(super) fn look(&self, now: u64, kinds: &[usize], mark: Option<OffsetDateTime>, sweep: bool) -> Look {
        let (clock, start) = (self.clock(now), self.scan_start(now, mark));
        let rows: Vec<&Row> =
            self.sorted_by_slot(Self::is_visible).into_iter().map(|index| &self.rows[index]).collect();
        let head = rows.iter().find(|row| at(row.slot) >= start);
        let next = rows.iter().map(|row| row.slot).find(|slot| *slot > clock && at(*slot) >= start);
        let below: Vec<i64> = rows.iter().map(|row| row.slot).filter(|slot| sweep && at(*slot) < start).collect();
        let running = self.writers.iter().flatten().chain(&self.open_claims).copied();
        let held = |kind: &&usize| self.rows.iter().any(|row| row.place == Place::Held && row.kind == **kind);
        let is_due = head.is_some_and(|head| head.slot <= clock);
        Look {
            at: at(clock),
            from: start,
            first: head.map(|head| at(head.slot)),
            oldest_xid: running.min().unwrap_or(self.next_xid),
            outlook: outlook(is_due, next, clock),
            held_for_us: kinds
                .iter()
                .filter(|kind| !self.is_paused(**kind))
                .filter(held)
                .map(ToString::to_string)
                .collect(),
            turn_in: None,
            has_limits: false,
            not_claimable_first: is_due
                && head.is_some_and(|head| kinds.contains(&head.kind) && self.is_paused(head.kind)),
            promise: Promise { until: at(self.polling_until), next_xid: self.next_xid },
            below: below.first().map(|first| Below {
                first: at(*first),
                rows: signed(below.len() as u64),
                go_back: true,
            }),
        }
    }

    /// Locks due rows, two at most, under the number of the claim's transaction, which began at `begun_at` by the database's
    /// clock.
    pub(super) fn claim(
        &mut self,
        now: u64,
        asked_at: Moment,
        begun_at: i64,
        kinds: &[usize],
        request: &ClaimRequest,
    ) -> ClaimResult {
        let (clock, start) = (self.clock(now), self.scan_start(now, request.since));
        let mut indexes = self.sorted_by_slot(|row| {
            self.is_due(now, start, row)
                && kinds.contains(&row.kind)
                && !self.is_paused(row.kind)
                && !(row.large && request.no_large)
        });
        let limit = if let ClaimRange::Newest(_) = request.range { 1 } else { 2 };
        let due_rows = indexes.len();
        let large = indexes.first().is_some_and(|first| self.rows[*first].large);
        if large {
            indexes.truncate(1);
        } else {
            indexes.retain(|index| !self.rows[*index].large);
        }
        indexes.truncate(limit);
        let behind = indexes.first().map_or(0, |index| clock - self.rows[*index].slot);
        let batch = (!indexes.is_empty()).then(|| Batch {
            xid: self.take_xid(),
            large,
            rows: u32::try_from(indexes.len()).expect("few"),
        });
        for index in &indexes {
            let row = &mut self.rows[*index];
            (row.place, row.was_locked) = (Place::Locked(batch.expect("some").xid), true);
        }
        self.open_claims.extend(batch.map(|batch| batch.xid));
        let next = self
            .sorted_by_slot(Self::is_visible)
            .into_iter()
            .map(|index| self.rows[index].slot)
            .find(|slot| *slot > clock);
        ClaimResult {
            range: request.range,
            asked_at,
            at: at(begun_at),
            outlook: outlook(indexes.len() == limit || indexes.len() < due_rows || large, next, clock),
            behind: Moment::from_millis(behind.unsigned_abs()),
            batch,
        }
    }

    /// Ends the claim with this number: its rows are in `place` now. `moved`: the daemon that moved them, and their new slot.
    pub(super) fn end_claim(&mut self, now: u64, xid: i64, place: Place, moved: Option<(usize, i64)>) {
        self.open_claims.retain(|claim| *claim != xid);
        let clock_behind = self.clock(now) < self.highest_clock;
        for row in self.rows.iter_mut().filter(|row| row.place == Place::Locked(xid)) {
            row.place = place;
            row.settled_count += u8::from(place == Place::Settled);
            if let Some((daemon, slot)) = moved {
                // A daemon's updates do not notify.
                (row.slot, row.found_by, row.clock_behind) = (slot, FoundBy::Daemon(daemon), clock_behind);
            }
        }
    }

    /// Moves the rows that a sweep saw below the mark up to where their slot is now, unless they are locked. Returns whether
    /// PostgreSQL notifies.
    pub(super) fn move_up(&mut self, now: u64, look: &mut Look) -> bool {
        let Some(below) = &mut look.below else { return false };
        let (clock, start) = (self.clock(now), look.from);
        let clock_behind = clock < self.highest_clock;
        let (mut moved, mut left) = (false, false);
        for row in self.rows.iter_mut().filter(|row| Self::is_visible(row) && at(row.slot) < start) {
            if row.place == Place::Waiting {
                (row.slot, row.found_by, row.clock_behind) = (clock, FoundBy::Notification, clock_behind);
                (row.written_at, row.committed_at, moved) = (now, now, true);
            } else {
                left = true;
            }
        }
        below.go_back = left;
        moved
    }

    /// Holds due rows of the daemon's own kinds that are paused, and of kinds that no daemon announces. Returns whether any
    /// row was held.
    pub(super) fn hold(
        &mut self,
        now: u64,
        mark: Option<OffsetDateTime>,
        kinds: &BTreeSet<usize>,
        announced: &BTreeSet<usize>,
    ) -> bool {
        let start = self.scan_start(now, mark);
        let indexes = self.sorted_by_slot(|row| {
            let is_ours_and_paused = kinds.contains(&row.kind) && self.is_paused(row.kind);
            self.is_due(now, start, row) && (is_ours_and_paused || !announced.contains(&row.kind))
        });
        for index in &indexes {
            self.rows[*index].place = Place::Held;
        }
        !indexes.is_empty()
    }

    pub(super) fn release(&mut self, now: u64, daemon: usize, kinds: &[String]) {
        let clock = self.clock(now);
        for row in self.rows.iter_mut().filter(|row| row.place == Place::Held) {
            if kinds.contains(&row.kind.to_string()) {
                (row.place, row.slot, row.written_at, row.committed_at) = (Place::Waiting, clock, now, now);
                (row.found_by, row.clock_behind) = (FoundBy::Daemon(daemon), clock < self.highest_clock);
            }
        }
    }
}

fn outlook(due: bool, next: Option<i64>, clock: i64) -> Outlook {
    Outlook { due, next_in: next.map(|next| Moment::from_millis((next - clock).unsigned_abs())) }
}
