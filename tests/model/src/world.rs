//! The world around the core, in virtual time: rows, transactions that take a number early and commit late, notifications,
//! several daemons whose connections fail, brokers that close, a clock that is set. After every step, [`World::step`] checks
//! each [`Invariant`] and returns the one that is violated.

use std::collections::BTreeSet;

use super::daemon::Daemon;
use super::invariant::{Invariant, Violation};
use super::row::{FoundBy, Place, Row};
use super::server::{self, Server};
use super::step::{Ending, Step};
use super::times::{OPEN_FOR_LONG, PACED_WITHIN, START, SWEEP};

/// A row that another session had locked is found within this many ms after it is free.
const RETRY_WITHIN: u64 = 1_000;
/// Rows of a transaction that found a promise and stayed open for longer than this, in ms, are left to the sweep.
const POLLED_FOR: u64 = 4_000;
/// A daemon sends at most this many statements in a minute in which nothing happens: a sweep every 5 s, and one more.
const MAX_IDLE_STATEMENTS: u32 = 13;

/// The state of the world.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    /// The time, in ms.
    pub(super) now: u64,
    pub(super) server: Server,
    pub(super) daemons: Vec<Daemon>,
    kinds: usize,
}

impl World {
    /// A world with this many writers, and a daemon for each entry of `kinds`, which lists the kinds that the daemon serves.
    pub(super) fn new(writers: usize, kinds: &[&[usize]]) -> Self {
        let daemons = kinds.iter().enumerate().map(|(number, kinds)| Daemon::new(number, kinds, START)).collect();
        let kinds = kinds.iter().flat_map(|kinds| kinds.iter()).max().map_or(0, |kind| kind + 1);
        Self { now: START, server: Server::new(writers), daemons, kinds }
    }

    /// Adds a row that was written before the beginning, due this many ms ago.
    pub(super) fn with_old_row(mut self, kind: usize, ago: i64) -> Self {
        self.server.add_old_row(self.now, kind, ago);
        self
    }

    /// Takes one step. A step that is impossible in this state changes nothing.
    ///
    /// # Errors
    ///
    /// The invariant that is violated afterwards.
    pub(super) fn step(&mut self, step: Step) -> Result<(), Violation> {
        let Self { now, server, daemons, .. } = self;
        let mut notifies = false;
        match step {
            Step::Pass(ms) => {
                *now += ms;
                if ms > 0 {
                    daemons.iter_mut().for_each(Daemon::reset_actions);
                }
            }
            Step::Begin(writer) => server.begin(writer),
            Step::Write { writer, kind, large, due_in } => server.write(*now, writer, kind, large, due_in),
            Step::Commit(writer) => notifies = server.commit(*now, writer),
            Step::RollBack(writer) => server.roll_back(writer),
            Step::OtherTransaction => drop(server.take_xid()),
            Step::Run(daemon) => daemons[daemon].run(*now, server).map_err(|(invariant, details)| Violation {
                invariant,
                details: format!("{details}\n{:?}", daemons[daemon]),
            })?,
            Step::RunBackground(daemon, task, ending) => {
                let announced: BTreeSet<usize> = daemons.iter().flat_map(Daemon::announced_kinds).collect();
                notifies = daemons[daemon].run_background(*now, server, task, ending, &announced);
            }
            Step::Notify(daemon) => daemons[daemon].receive_notifications(),
            Step::LoseListener(daemon) => daemons[daemon].lose_listener(),
            Step::RestoreListener(daemon) => daemons[daemon].restore_listener(),
            Step::LoseSessions(daemon) => daemons[daemon].lose_sessions(*now, server),
            Step::Doubt(daemon) => daemons[daemon].add_doubt(),
            Step::SetConnections(daemon, connections) => daemons[daemon].set_connections(connections),
            Step::CloseBroker(daemon) => daemons[daemon].set_broker_open(false),
            Step::OpenBroker(daemon) => daemons[daemon].set_broker_open(true),
            Step::Kill(daemon) => daemons[daemon].kill(*now, server),
            Step::Start(daemon) => daemons[daemon].start(*now),
            Step::LoadPlugins(daemon) => daemons[daemon].load_plugins(),
            Step::Pause(kind) | Step::Resume(kind) => {
                server.pause(kind, matches!(step, Step::Pause(_)));
                notifies = true;
            }
            Step::Promise => {
                server.promise(*now);
                notifies = true;
            }
            Step::SetClock(ms) => server.set_clock(*now, ms),
            Step::FailOver(behind) => {
                server.fail_over(behind);
                for daemon in daemons.iter_mut() {
                    daemon.lose_sessions(*now, server);
                    daemon.lose_listener();
                }
            }
        }
        if notifies {
            daemons.iter_mut().for_each(Daemon::notify);
        }
        self.check()
    }

    /// Checks the invariants of every state.
    fn check(&self) -> Result<(), Violation> {
        for row in &self.server.rows {
            if row.settled_count > 1 {
                return Err(self.violation(Invariant::SettledTwice, &format!("{row:?}")));
            }
            // If the clock was set, it may show an earlier time now than at the claim.
            if matches!(row.place, Place::Locked(_))
                && row.slot > self.server.clock(self.now)
                && !self.server.clock_was_set()
            {
                return Err(self.violation(Invariant::ClaimedEarly, &format!("{row:?}")));
            }
        }
        for (number, daemon) in self.daemons.iter().enumerate() {
            if let Some(details) = self.row_below_mark(daemon) {
                return Err(self.violation(Invariant::Mark, &details));
            }
            if let Some(details) = self.overslept_row(number, daemon) {
                return Err(self.violation(Invariant::Oversleeping, &details));
            }
        }
        Ok(())
    }

    fn violation(&self, invariant: Invariant, details: &str) -> Violation {
        let (now, clock) = (self.now - START, self.server.clock(self.now));
        Violation {
            invariant,
            details: format!("{details}\nat {now} ms, clock {clock}\n{:?}\n{:?}", self.daemons, self.server),
        }
    }

    /// A row that waits or may still appear and that the mark is above. Three kinds of rows do not count: rows of a
    /// transaction that is open for longer than a minute, rows that were due a minute before the mark was given up while no
    /// sweep has looked below it since, and rows that were written while the clock showed an earlier time than before.
    fn row_below_mark(&self, daemon: &Daemon) -> Option<String> {
        let core = daemon.core()?;
        let (mark, long_ago) = (core.mark()?, self.server.highest_clock(self.now) - i64::try_from(OPEN_FOR_LONG).ok()?);
        let row = self.server.rows.iter().find(|row| {
            // The mark goes by the database's clock, which may have been set forward.
            let open_for_long = matches!(row.place, Place::Uncommitted(_)) && row.slot <= long_ago;
            let was_open_for_long = row.committed_at - row.written_at + self.server.set_forward() >= OPEN_FOR_LONG;
            let found_by_sweep = !core.is_swept() && row.slot < long_ago;
            row.is_in_queue()
                && server::at(row.slot) < mark
                && !open_for_long
                && !was_open_for_long
                && !found_by_sweep
                && !row.clock_behind
                && !daemon.has_unreported_doubt()
        })?;
        Some(format!("the mark {mark} is above {row:?}"))
    }

    /// Whether a daemon may claim the row, once it is due.
    fn can_claim(&self, row: &Row, daemon: &Daemon) -> bool {
        row.place == Place::Waiting && daemon.serves(row.kind) && !self.server.is_paused(row.kind)
    }

    /// A due row that the daemon could deliver and should find before its sleep ends.
    fn overslept_row(&self, number: usize, daemon: &Daemon) -> Option<String> {
        let until = daemon.undisturbed_sleep_until()?;
        let bound = |row: &Row| {
            let open_for = row.committed_at - row.written_at;
            let bound = match row.found_by {
                FoundBy::Notification => self.now,
                FoundBy::Daemon(mover) if mover == number => self.now,
                // Looks become ever less frequent: a row is found after its commit within about the time for which its
                // transaction was open.
                FoundBy::Polling if open_for < POLLED_FOR => {
                    let interval = 10 + self.server.ms_since_promise(self.now);
                    (self.now + interval).max(row.committed_at + open_for + 120)
                }
                FoundBy::Polling | FoundBy::Daemon(_) | FoundBy::Sweep => self.now + SWEEP,
            };
            // A daemon that had locked the row and rolled back does not notify. A daemon that is delivering looks at the end
            // of that delivery.
            let retry = if daemon.lanes().next().is_some() { SWEEP } else { RETRY_WITHIN };
            let bound = if row.clock_behind { bound.max(self.now + SWEEP) } else { bound };
            let is_late = self.server.clock(self.now) - row.slot > 1_000;
            let bound = if is_late && number % 2 == 1 { bound.max(self.now + PACED_WITHIN) } else { bound };
            let bound = if row.was_locked { bound.max(self.now + retry) } else { bound };
            // Rows whose due time the clock jumped over are found by the next look.
            bound.max(self.server.set_forward_at.map_or(0, |at| at + SWEEP + RETRY_WITHIN))
        };
        // Rows that may be below the mark are found by the sweep.
        let from = self.server.scan_start(self.now, daemon.core()?.mark());
        let row = self.server.rows.iter().find(|row| {
            let is_due = row.slot <= self.server.clock(self.now) && from <= server::at(row.slot);
            is_due
                && self.can_claim(row, daemon)
                && !(row.large && daemon.lanes().any(|lane| lane.large))
                && until > bound(row)
        })?;
        Some(format!("it sleeps until {} ms over {row:?}", until - START))
    }

    /// The first row that is due or held, whose kind a running daemon serves and is not paused.
    fn unfinished_row(&self) -> Option<&Row> {
        self.server.rows.iter().find(|row| {
            let is_due = row.slot <= self.server.clock(self.now);
            let waits = match row.place {
                Place::Waiting | Place::Locked(_) => is_due,
                Place::Held => true,
                Place::Uncommitted(_) | Place::Settled => false,
            };
            waits && !self.server.is_paused(row.kind) && self.daemons.iter().any(|daemon| daemon.serves(row.kind))
        })
    }

    /// Ends all faults, and runs until no row is due.
    ///
    /// # Errors
    ///
    /// The invariant that is violated on the way, or [`Invariant::Recovery`] if a row is not delivered in time.
    pub(super) fn recover(&mut self) -> Result<(), Violation> {
        for writer in 0..self.server.writers() {
            self.step(Step::Commit(writer))?;
        }
        for kind in 0..self.kinds {
            self.step(Step::Resume(kind))?;
        }
        for daemon in 0..self.daemons.len() {
            for step in [Step::Start, Step::LoadPlugins, Step::OpenBroker, Step::RestoreListener] {
                self.step(step(daemon))?;
            }
            self.step(Step::SetConnections(daemon, 10))?;
        }
        // Rows become due meanwhile, or are found by the sweep. Each batch has two rows at most.
        let since = self.now;
        loop {
            self.run_until_asleep()?;
            let Some(row) = self.unfinished_row() else { return Ok(()) };
            let within = self.daemons.iter().map(|daemon| daemon.finds_within_ms(since)).max().unwrap_or(0);
            let late = u64::try_from(self.server.clock(self.now) - row.slot).unwrap_or(0);
            let due_at = self.now.saturating_sub(late);
            if self.now > since.max(due_at) + within {
                return Err(
                    self.violation(Invariant::Recovery, &format!("{row:?} is not delivered within {within} ms"))
                );
            }
            self.sleep_until_next(u64::MAX)?;
        }
    }

    /// Lets time pass until the next daemon wakes, or until `end`.
    fn sleep_until_next(&mut self, end: u64) -> Result<(), Violation> {
        let next = self.daemons.iter().filter_map(Daemon::sleeps_until).min().unwrap_or(self.now + SWEEP).min(end);
        self.step(Step::Pass(next.saturating_sub(self.now).max(1)))
    }

    /// Runs until the queue is empty, for 90 s at least, and then counts the statements of a minute.
    ///
    /// # Errors
    ///
    /// The invariant that is violated on the way, or [`Invariant::Idle`] if there are too many statements.
    pub(super) fn check_idle(&mut self) -> Result<(), Violation> {
        // After a clock was set back, rows may be due hours from now.
        let clock = self.server.clock(self.now);
        let furthest = self.server.rows.iter().filter(|row| row.is_in_queue()).map(|row| row.slot - clock).max();
        let until_furthest = furthest.and_then(|left| u64::try_from(left).ok()).unwrap_or(0);
        // And a promise to poll from before is in force again, for its second, when the clock shows that time again.
        let until_promise_ends = self.server.until_promise_ends(self.now);
        let (earliest, latest) =
            (self.now + until_promise_ends + 90_000, self.now + until_promise_ends.max(until_furthest) + 1_800_000);
        while self.now < earliest || self.server.rows.iter().any(Row::is_in_queue) {
            if self.now > latest {
                return Err(self.violation(Invariant::Recovery, "a row that no daemon serves is still in the queue"));
            }
            self.sleep_until_next(u64::MAX)?;
            self.run_until_asleep()?;
        }
        let before: Vec<u32> = self.daemons.iter().map(Daemon::statements).collect();
        let end = self.now + 60_000;
        while self.now < end {
            self.sleep_until_next(end)?;
            self.run_until_asleep()?;
        }
        for (daemon, before) in self.daemons.iter().zip(before) {
            let statements = daemon.statements() - before;
            // If a sweep was slow, looks and sweeps are separate statements.
            if statements > MAX_IDLE_STATEMENTS || daemon.remembers_failure() {
                return Err(
                    self.violation(Invariant::Idle, &format!("{statements} statements in a minute by {daemon:?}"))
                );
            }
        }
        Ok(())
    }

    /// Runs the loops of all daemons through stages that no other daemon or writer could notice.
    pub(super) fn run_unnoticed(&mut self) -> Result<(), Violation> {
        for daemon in 0..self.daemons.len() {
            while self.daemons[daemon].can_continue_unnoticed() {
                self.step(Step::Run(daemon))?;
            }
        }
        Ok(())
    }

    /// Runs loops and tasks, and delivers notifications, until all daemons sleep.
    pub(super) fn run_until_asleep(&mut self) -> Result<(), Violation> {
        for _ in 0..10_000 {
            let mut ran = false;
            for daemon in 0..self.daemons.len() {
                for task in (0..self.daemons[daemon].background_tasks()).rev() {
                    ran = true;
                    self.step(Step::RunBackground(daemon, task, Ending::Settled))?;
                }
                while self.daemons[daemon].has_notifications() {
                    ran = true;
                    self.step(Step::Notify(daemon))?;
                }
                if self.daemons[daemon].can_continue(self.now) {
                    ran = true;
                    self.step(Step::Run(daemon))?;
                }
            }
            if !ran {
                return Ok(());
            }
        }
        Err(self.violation(Invariant::Spinning, "it never sleeps"))
    }
}
