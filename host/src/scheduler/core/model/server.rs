//! PostgreSQL, as the model has it. It assumes, and a test against a real server shows each:
//!
//! - a snapshot sees what was committed before it was taken, and of a transaction all or nothing;
//! - the lowest number that is running is not above that of any transaction which may still commit;
//! - a row's slot is read from the clock after its transaction has its number, and is not before that time;
//! - `SKIP LOCKED` passes over what others have locked, and what a session had locked is free when it is gone;
//! - a notification is sent when its transaction commits, and reaches every session that listens then;
//! - a trigger that finds a promise is silent, and a promise is for a second.

use time::OffsetDateTime;

use super::super::{Batch, Claimed, Outlook, Turn, Wanted};
use super::{Moment, PATIENCE, START};
use crate::queue::{Below, Look, Promise};

/// A row.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Row {
    pub(super) kind: usize,
    /// Where it stands in the queue, by the database's clock in ms.
    pub(super) slot: i64,
    pub(super) place: Place,
    /// When it was written, by no clock that can be set.
    pub(super) written_at: u64,
    /// Its commit notified.
    pub(super) notified: bool,
    /// Somebody has had it locked.
    pub(super) was_locked: bool,
}

/// Where a row is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Place {
    /// Its writer has not committed.
    Unseen(usize),
    /// In the queue.
    Waits,
    /// In the queue, and claimed by the transaction with this number.
    Locked(i64),
    /// Out of the queue, until somebody serves its kind.
    Held,
    /// Settled for good.
    Done,
}

impl Row {
    pub(super) fn is_in_the_queue(&self) -> bool {
        matches!(self.place, Place::Unseen(_) | Place::Waits | Place::Locked(_))
    }
}

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
    /// How far the clock is ahead, in ms.
    ahead: i64,
    pub(super) clock_was_set: bool,
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
            next_xid: 1,
            polling_until: 0,
            ahead: signed(10 * START),
            clock_was_set: false,
        }
    }

    /// The database's clock.
    pub(super) fn now(&self, now: u64) -> i64 {
        signed(now) + self.ahead
    }

    pub(super) fn set_clock(&mut self, ms: i64) {
        self.ahead += ms;
        self.clock_was_set = true;
    }

    pub(super) fn writers(&self) -> usize {
        self.writers.len()
    }

    pub(super) fn number(&mut self) -> i64 {
        self.next_xid += 1;
        self.next_xid - 1
    }

    fn row(now: u64, kind: usize, slot: i64, place: Place) -> Row {
        Row { kind, slot, place, written_at: now, notified: false, was_locked: false }
    }

    pub(super) fn old_row(&mut self, now: u64, kind: usize, ago: i64) {
        let row = Self::row(now, kind, self.now(now) - ago, Place::Waits);
        self.rows.push(row);
    }

    pub(super) fn write(&mut self, now: u64, writer: usize, kind: usize, due_in: i64) {
        if self.writers[writer].is_none() {
            self.writers[writer] = Some(self.number());
        }
        let (clock, is_silent) = (self.now(now), self.is_promised(now));
        let mut row = Self::row(now, kind, clock.max(clock + due_in), Place::Unseen(writer));
        row.notified = !is_silent;
        self.rows.push(row);
    }

    /// Whether it notifies.
    pub(super) fn commit(&mut self, writer: usize) -> bool {
        self.writers[writer] = None;
        let mut notifies = false;
        for row in self.rows.iter_mut().filter(|row| row.place == Place::Unseen(writer)) {
            row.place = Place::Waits;
            notifies |= row.notified;
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

    fn is_promised(&self, now: u64) -> bool {
        (0..2_000).contains(&(self.polling_until - self.now(now)))
    }

    fn in_order(&self, seen: impl Fn(&Row) -> bool) -> Vec<usize> {
        let mut places: Vec<usize> = (0..self.rows.len()).filter(|place| seen(&self.rows[*place])).collect();
        places.sort_by_key(|place| self.rows[*place].slot);
        places
    }

    /// Everybody sees it.
    fn is_visible(row: &Row) -> bool {
        matches!(row.place, Place::Waits | Place::Locked(_))
    }

    pub(super) fn look(&self, now: u64, kinds: &[usize], mark: Option<OffsetDateTime>, sweep: bool) -> Look {
        let clock = self.now(now);
        let from = mark.unwrap_or(at(clock) - Moment::from_millis(PATIENCE));
        let slots: Vec<i64> = self.in_order(Self::is_visible).into_iter().map(|place| self.rows[place].slot).collect();
        let first = slots.iter().copied().find(|slot| at(*slot) >= from);
        let next = slots.iter().copied().find(|slot| *slot > clock && at(*slot) >= from);
        let below: Vec<i64> = slots.into_iter().filter(|slot| sweep && at(*slot) < from).collect();
        let running = self.writers.iter().flatten().chain(&self.claims).copied();
        let held = |kind: &&usize| self.rows.iter().any(|row| row.place == Place::Held && row.kind == **kind);
        Look {
            at: at(clock),
            from,
            first: first.map(at),
            oldest_xid: running.min().unwrap_or(self.next_xid),
            outlook: outlook(first.is_some_and(|first| first <= clock), next, clock),
            held_for_us: kinds.iter().filter(held).map(ToString::to_string).collect(),
            paused_first: false,
            promise: Promise { until: at(self.polling_until), next_xid: self.next_xid },
            below: below.first().map(|first| Below {
                first: at(*first),
                rows: signed(below.len() as u64),
                go_back: true,
            }),
        }
    }

    /// The rows are locked by the number, which is the claim's.
    pub(super) fn claim(&mut self, now: u64, asked_at: Moment, kinds: &[usize], wanted: &Wanted) -> Claimed {
        let clock = self.now(now);
        let from = wanted.since.unwrap_or(at(clock) - Moment::from_millis(PATIENCE));
        let due = |row: &Row| {
            row.place == Place::Waits && row.slot <= clock && at(row.slot) >= from && kinds.contains(&row.kind)
        };
        let limit = if wanted.turn == Turn::Oldest { 2 } else { 1 };
        let places: Vec<usize> = self.in_order(due).into_iter().take(limit).collect();
        let behind = places.first().map_or(0, |place| clock - self.rows[*place].slot);
        let rows = (!places.is_empty()).then(|| Batch { xid: self.number(), large: false });
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
            at: at(clock),
            outlook: outlook(places.len() == limit, next, clock),
            behind: Moment::from_millis(behind.unsigned_abs()),
            rows,
        }
    }

    /// The claim with this number has ended: its rows stand there again.
    pub(super) fn let_go(&mut self, xid: i64, place: Place, slot: Option<i64>) {
        self.claims.retain(|claim| *claim != xid);
        for row in self.rows.iter_mut().filter(|row| row.place == Place::Locked(xid)) {
            row.place = place;
            if let Some(slot) = slot {
                // The daemon's own updates notify nobody.
                (row.slot, row.notified) = (slot, false);
            }
        }
    }

    /// Whether there were any.
    pub(super) fn hold(&mut self, now: u64, mark: Option<OffsetDateTime>, announced: &[usize]) -> bool {
        let clock = self.now(now);
        let from = mark.unwrap_or(at(clock) - Moment::from_millis(PATIENCE));
        let mut some = false;
        for row in &mut self.rows {
            let due = row.place == Place::Waits && row.slot <= clock && at(row.slot) >= from;
            if due && !announced.contains(&row.kind) {
                (row.place, some) = (Place::Held, true);
            }
        }
        some
    }

    pub(super) fn release(&mut self, now: u64, kinds: &[String]) {
        let clock = self.now(now);
        for row in self.rows.iter_mut().filter(|row| row.place == Place::Held) {
            if kinds.contains(&row.kind.to_string()) {
                (row.place, row.slot, row.written_at, row.notified) = (Place::Waits, clock, now, false);
            }
        }
    }
}

fn outlook(due: bool, next: Option<i64>, clock: i64) -> Outlook {
    Outlook { due, next_in: next.map(|next| Moment::from_millis((next - clock).unsigned_abs())) }
}
