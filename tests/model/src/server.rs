//! PostgreSQL, as the model has it. It assumes the following, and `tests/it/assumptions.rs` shows each on a real server:
//!
//! 1. a snapshot sees what was committed before it was taken, and of a transaction all or nothing;
//! 2. the lowest number that runs is not above that of any transaction which may still commit, and a reader has none;
//! 3. a row's slot is read from the clock after its transaction has its number, and is not before that time;
//! 4. `SKIP LOCKED` passes over what others have locked, and what a session had locked is free when it is gone;
//! 5. a notification is sent when its transaction commits, and reaches every session that listens then, and no other;
//! 6. a trigger that finds a promise is silent, and a promise is for a second;
//! 7. a claim's clock is read before its transaction has a number;
//! 8. after sessions have broken, a doubt is known before the next look, so that no mark outlives its server.

use std::collections::BTreeSet;

use tidings_core::queue::{Below, Look, Outlook, Promise};
use tidings_core::{Batch, Claimed, Moment, Turn, Wanted};
use time::OffsetDateTime;

use super::row::{Place, Row, Told};
use super::times::{PATIENCE, START};

/// The database.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Server {
    /// In the order in which they were written.
    pub(super) rows: Vec<Row>,
    /// The numbers of the transactions that are open, writers' first.
    writers: Vec<Option<i64>>,
    claims: Vec<i64>,
    next_xid: i64,
    polling_until: i64,
    paused: BTreeSet<usize>,
    /// How far the clock is ahead, in ms.
    ahead: i64,
    /// What it showed at most before it was set.
    highest: i64,
    /// When it was last set forward, by no clock that can be set; and by how much in all.
    pub(super) set_forward_at: Option<u64>,
    set_forward: u64,
    was_set: bool,
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
            claims: Vec::new(),
            next_xid: 10,
            polling_until: 0,
            paused: BTreeSet::new(),
            ahead: signed(10 * START),
            highest: 0,
            set_forward_at: None,
            set_forward: 0,
            was_set: false,
        }
    }

    /// The database's clock.
    pub(super) fn now(&self, now: u64) -> i64 {
        signed(now) + self.ahead
    }

    pub(super) fn set_clock(&mut self, now: u64, ms: i64) {
        self.highest = self.highest(now);
        self.ahead += ms;
        self.was_set = true;
        if ms > 0 {
            (self.set_forward_at, self.set_forward) = (Some(now), self.set_forward + ms.unsigned_abs());
        }
    }

    /// The highest time that the clock has shown.
    pub(super) fn highest(&self, now: u64) -> i64 {
        self.highest.max(self.now(now))
    }

    /// Whether the clock was ever set.
    pub(super) fn was_set(&self) -> bool {
        self.was_set
    }

    /// By how many ms the clock was set forward in all.
    pub(super) fn set_forward(&self) -> u64 {
        self.set_forward
    }

    /// A standby takes over, whose clock is behind, and which has given fewer numbers. Nothing that was committed is lost; all
    /// sessions are.
    pub(super) fn fail_over(&mut self, behind: i64) {
        for writer in 0..self.writers() {
            self.roll_back(writer);
        }
        self.ahead -= behind;
        self.was_set |= behind > 0;
        self.highest = 0;
        self.next_xid = (self.next_xid - 3).max(1);
    }

    pub(super) fn writers(&self) -> usize {
        self.writers.len()
    }

    pub(super) fn number(&mut self) -> i64 {
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

    pub(super) fn old_row(&mut self, now: u64, kind: usize, ago: i64) {
        self.rows.push(Row {
            kind,
            large: false,
            slot: self.now(now) - ago,
            place: Place::Waits,
            written_at: now,
            seen_at: now,
            told: Told::Nobody,
            was_locked: false,
            clock_behind: false,
            settled: 0,
        });
    }

    /// A writer takes its number, if it has none.
    pub(super) fn begin(&mut self, writer: usize) {
        if self.writers[writer].is_none() {
            self.writers[writer] = Some(self.number());
        }
    }

    pub(super) fn write(&mut self, now: u64, writer: usize, kind: usize, large: bool, due_in: i64) {
        self.begin(writer);
        let clock = self.now(now);
        self.rows.push(Row {
            kind,
            large,
            slot: clock.max(clock + due_in),
            place: Place::Unseen(writer),
            written_at: now,
            seen_at: now,
            told: match due_in {
                // The daemons look within that time anyway.
                30_001.. => Told::Nobody,
                _ if self.is_promised(now) => Told::Promised,
                _ => Told::Notified,
            },
            was_locked: false,
            clock_behind: clock < self.highest,
            settled: 0,
        });
    }

    /// Whether it notifies.
    pub(super) fn commit(&mut self, now: u64, writer: usize) -> bool {
        self.writers[writer] = None;
        let mut notifies = false;
        for row in self.rows.iter_mut().filter(|row| row.place == Place::Unseen(writer)) {
            (row.place, row.seen_at) = (Place::Waits, now);
            notifies |= row.told == Told::Notified;
        }
        notifies
    }

    pub(super) fn roll_back(&mut self, writer: usize) {
        self.writers[writer] = None;
        self.rows.retain(|row| row.place != Place::Unseen(writer));
    }

    pub(super) fn promise(&mut self, now: u64) {
        self.polling_until = self.now(now) + 1_000;
    }

    /// For how many ms no promise has been open.
    pub(super) fn since_promise(&self, now: u64) -> u64 {
        u64::try_from(self.now(now) - self.polling_until).unwrap_or(0)
    }

    fn is_promised(&self, now: u64) -> bool {
        (1..2_000).contains(&(self.polling_until - self.now(now)))
    }

    fn in_order(&self, seen: impl Fn(&Row) -> bool) -> Vec<usize> {
        let mut places: Vec<usize> = (0..self.rows.len()).filter(|place| seen(&self.rows[*place])).collect();
        places.sort_by_key(|place| self.rows[*place].slot);
        places
    }

    /// Everybody sees it in the queue.
    fn is_visible(row: &Row) -> bool {
        matches!(row.place, Place::Waits | Place::Locked(_))
    }

    /// Where a statement begins whose mark this is.
    pub(super) fn from(&self, now: u64, mark: Option<OffsetDateTime>) -> OffsetDateTime {
        mark.unwrap_or(at(self.now(now) - signed(PATIENCE)))
    }

    fn is_due(&self, now: u64, from: OffsetDateTime, row: &Row) -> bool {
        row.place == Place::Waits && row.slot <= self.now(now) && at(row.slot) >= from
    }

    pub(super) fn look(&self, now: u64, kinds: &[usize], mark: Option<OffsetDateTime>, sweep: bool) -> Look {
        let (clock, from) = (self.now(now), self.from(now, mark));
        let rows: Vec<&Row> = self.in_order(Self::is_visible).into_iter().map(|place| &self.rows[place]).collect();
        let head = rows.iter().find(|row| at(row.slot) >= from);
        let next = rows.iter().map(|row| row.slot).find(|slot| *slot > clock && at(*slot) >= from);
        let below: Vec<i64> = rows.iter().map(|row| row.slot).filter(|slot| sweep && at(*slot) < from).collect();
        let running = self.writers.iter().flatten().chain(&self.claims).copied();
        let held = |kind: &&usize| self.rows.iter().any(|row| row.place == Place::Held && row.kind == **kind);
        let is_due = head.is_some_and(|head| head.slot <= clock);
        Look {
            at: at(clock),
            from,
            first: head.map(|head| at(head.slot)),
            oldest_xid: running.min().unwrap_or(self.next_xid),
            outlook: outlook(is_due, next, clock),
            held_for_us: kinds
                .iter()
                .filter(|kind| !self.is_paused(**kind))
                .filter(held)
                .map(ToString::to_string)
                .collect(),
            paused_first: is_due && head.is_some_and(|head| kinds.contains(&head.kind) && self.is_paused(head.kind)),
            promise: Promise { until: at(self.polling_until), next_xid: self.next_xid },
            below: below.first().map(|first| Below {
                first: at(*first),
                rows: signed(below.len() as u64),
                go_back: true,
            }),
        }
    }

    /// The rows are locked by the number, which is the claim's. `read` = the clock, when the transaction began.
    pub(super) fn claim(&mut self, now: u64, asked_at: Moment, read: i64, kinds: &[usize], wanted: &Wanted) -> Claimed {
        let (clock, from) = (self.now(now), self.from(now, wanted.since));
        let mut places = self.in_order(|row| {
            self.is_due(now, from, row)
                && kinds.contains(&row.kind)
                && !self.is_paused(row.kind)
                && !(row.large && wanted.no_large)
        });
        let limit = if wanted.turn == Turn::Oldest { 2 } else { 1 };
        let candidates = places.len();
        let large = places.first().is_some_and(|first| self.rows[*first].large);
        if large {
            places.truncate(1);
        } else {
            places.retain(|place| !self.rows[*place].large);
        }
        places.truncate(limit);
        let behind = places.first().map_or(0, |place| clock - self.rows[*place].slot);
        let rows = (!places.is_empty()).then(|| Batch { xid: self.number(), large });
        for place in &places {
            let row = &mut self.rows[*place];
            (row.place, row.was_locked) = (Place::Locked(rows.expect("some").xid), true);
        }
        self.claims.extend(rows.map(|rows| rows.xid));
        let next =
            self.in_order(Self::is_visible).into_iter().map(|place| self.rows[place].slot).find(|at| *at > clock);
        Claimed {
            turn: wanted.turn,
            asked_at,
            begin: Moment::ZERO,
            at: at(read),
            outlook: outlook(places.len() == limit || places.len() < candidates || large, next, clock),
            behind: Moment::from_millis(behind.unsigned_abs()),
            rows,
        }
    }

    /// The claim with this number has ended: its rows stand there again, or are done.
    pub(super) fn let_go(&mut self, now: u64, xid: i64, place: Place, moved: Option<(usize, i64)>) {
        self.claims.retain(|claim| *claim != xid);
        let clock_behind = self.now(now) < self.highest;
        for row in self.rows.iter_mut().filter(|row| row.place == Place::Locked(xid)) {
            row.place = place;
            row.settled += u8::from(place == Place::Done);
            if let Some((daemon, slot)) = moved {
                // The daemon's own updates notify nobody.
                (row.slot, row.told, row.clock_behind) = (slot, Told::Daemon(daemon), clock_behind);
            }
        }
    }

    /// What a sweep saw below the mark is moved up to where its slot is now, but for what is locked. Whether that notifies.
    pub(super) fn move_up(&mut self, now: u64, look: &mut Look) -> bool {
        let Some(below) = &mut look.below else { return false };
        let (clock, from) = (self.now(now), look.from);
        let clock_behind = clock < self.highest;
        let (mut moved, mut left) = (false, false);
        for row in self.rows.iter_mut().filter(|row| Self::is_visible(row) && at(row.slot) < from) {
            if row.place == Place::Waits {
                (row.slot, row.told, row.clock_behind) = (clock, Told::Notified, clock_behind);
                (row.written_at, row.seen_at, moved) = (now, now, true);
            } else {
                left = true;
            }
        }
        below.go_back = left;
        moved
    }

    /// Whether there were any: paused ones of our own kinds, and what nobody announces.
    pub(super) fn hold(
        &mut self,
        now: u64,
        mark: Option<OffsetDateTime>,
        kinds: &BTreeSet<usize>,
        announced: &BTreeSet<usize>,
    ) -> bool {
        let from = self.from(now, mark);
        let places = self.in_order(|row| {
            let is_ours_and_paused = kinds.contains(&row.kind) && self.is_paused(row.kind);
            self.is_due(now, from, row) && (is_ours_and_paused || !announced.contains(&row.kind))
        });
        for place in &places {
            self.rows[*place].place = Place::Held;
        }
        !places.is_empty()
    }

    pub(super) fn release(&mut self, now: u64, daemon: usize, kinds: &[String]) {
        let clock = self.now(now);
        for row in self.rows.iter_mut().filter(|row| row.place == Place::Held) {
            if kinds.contains(&row.kind.to_string()) {
                (row.place, row.slot, row.written_at, row.seen_at) = (Place::Waits, clock, now, now);
                (row.told, row.clock_behind) = (Told::Daemon(daemon), clock < self.highest);
            }
        }
    }
}

fn outlook(due: bool, next: Option<i64>, clock: i64) -> Outlook {
    Outlook { due, next_in: next.map(|next| Moment::from_millis((next - clock).unsigned_abs())) }
}
