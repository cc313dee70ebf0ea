//! The world around the core: rows, transactions that take a number early and commit late, notifications, several daemons whose
//! connections fail, brokers that close, a clock that is set. Time is virtual. After every step [`World::step`] says what is
//! wrong, by the name of the [`Invariant`].

use std::collections::BTreeSet;

use super::daemon::Daemon;
use super::invariant::{Invariant, Wrong};
use super::row::{Place, Row, Told};
use super::server::{self, Server};
use super::step::{Ends, Step};
use super::times::{PATIENCE, START, SWEEP};

/// Rows that others had locked are asked for again after at most so long, in ms.
const AGAIN: u64 = 1_000;
/// A transaction that found a promise and is open for longer is left to the sweep, in ms.
const SILENCE: u64 = 4_000;
/// Statements of a daemon in a minute in which nothing happens, at most: a sweep every 5 s, and one more.
const IDLE: u32 = 13;

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    /// In ms.
    pub(super) now: u64,
    pub(super) server: Server,
    pub(super) daemons: Vec<Daemon>,
    kinds: usize,
}

impl World {
    /// So many writers, and a daemon for each of `kinds`, which are those that it serves.
    pub(super) fn new(writers: usize, kinds: &[&[usize]]) -> Self {
        let daemons = kinds.iter().enumerate().map(|(number, kinds)| Daemon::new(number, kinds, START)).collect();
        let kinds = kinds.iter().flat_map(|kinds| kinds.iter()).max().map_or(0, |kind| kind + 1);
        Self { now: START, server: Server::new(writers), daemons, kinds }
    }

    /// A row of before, due so many ms ago.
    pub(super) fn with_row(mut self, kind: usize, ago: i64) -> Self {
        self.server.old_row(self.now, kind, ago);
        self
    }

    /// One step. What cannot happen now does not.
    ///
    /// # Errors
    ///
    /// What is wrong afterwards.
    pub(super) fn step(&mut self, step: Step) -> Result<(), Wrong> {
        let Self { now, server, daemons, .. } = self;
        let mut notifies = false;
        match step {
            Step::Pass(ms) => {
                *now += ms;
                if ms > 0 {
                    daemons.iter_mut().for_each(Daemon::time_passes);
                }
            }
            Step::Begin(writer) => server.begin(writer),
            Step::Write { writer, kind, large, due_in } => server.write(*now, writer, kind, large, due_in),
            Step::Commit(writer) => notifies = server.commit(*now, writer),
            Step::RollBack(writer) => server.roll_back(writer),
            Step::Other => drop(server.number()),
            Step::Run(daemon) => daemons[daemon]
                .run(*now, server)
                .map_err(|(invariant, what)| Wrong { invariant, what: format!("{what}\n{:?}", daemons[daemon]) })?,
            Step::RunBeside(daemon, work, ends) => {
                let announced: BTreeSet<usize> = daemons.iter().flat_map(Daemon::announces).collect();
                notifies = daemons[daemon].run_beside(*now, server, work, ends, &announced);
            }
            Step::Notify(daemon) => daemons[daemon].hear(),
            Step::Deafen(daemon) => daemons[daemon].deafen(),
            Step::Listen(daemon) => daemons[daemon].listen(),
            Step::Fail(daemon) => daemons[daemon].fail(*now, server),
            Step::Doubt(daemon) => daemons[daemon].doubt(),
            Step::Connections(daemon, connections) => daemons[daemon].connections(connections),
            Step::Close(daemon) => daemons[daemon].broker(false),
            Step::Open(daemon) => daemons[daemon].broker(true),
            Step::Kill(daemon) => daemons[daemon].kill(*now, server),
            Step::Start(daemon) => daemons[daemon].start(*now),
            Step::Learn(daemon) => daemons[daemon].learn(),
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
                    daemon.fail(*now, server);
                    daemon.deafen();
                }
            }
        }
        if notifies {
            daemons.iter_mut().for_each(Daemon::is_notified);
        }
        self.check()
    }

    /// What must be so in every state.
    fn check(&self) -> Result<(), Wrong> {
        for row in &self.server.rows {
            if row.settled > 1 {
                return Err(self.wrong(Invariant::Twice, &format!("{row:?}")));
            }
            // The clock that the claim went by may have been set since.
            if matches!(row.place, Place::Locked(_)) && row.slot > self.server.now(self.now) && !self.server.was_set() {
                return Err(self.wrong(Invariant::Early, &format!("{row:?}")));
            }
        }
        for (number, daemon) in self.daemons.iter().enumerate() {
            if let Some(what) = self.below_the_mark(daemon) {
                return Err(self.wrong(Invariant::Mark, &what));
            }
            if let Some(what) = self.asleep_over(number, daemon) {
                return Err(self.wrong(Invariant::Asleep, &what));
            }
        }
        Ok(())
    }

    fn wrong(&self, invariant: Invariant, what: &str) -> Wrong {
        let (now, clock) = (self.now - START, self.server.now(self.now));
        Wrong { invariant, what: format!("{what}\nat {now} ms, clock {clock}\n{:?}\n{:?}", self.daemons, self.server) }
    }

    /// The mark is never above a row that waits or may still appear, but for a transaction that is open for longer than a
    /// minute, for what was due a minute before the mark was given up and no sweep has looked for since, and for what was
    /// written while the clock was behind.
    fn below_the_mark(&self, daemon: &Daemon) -> Option<String> {
        let core = daemon.core()?;
        let (mark, long_ago) = (core.mark()?, self.server.highest(self.now) - i64::try_from(PATIENCE).ok()?);
        let row = self.server.rows.iter().find(|row| {
            // By the database's clock, which may have been set forward.
            let open_for_long = matches!(row.place, Place::Unseen(_)) && row.slot <= long_ago;
            let was_open_for_long = row.seen_at - row.written_at + self.server.set_forward() >= PATIENCE;
            let found_by_sweep = !core.is_swept() && row.slot < long_ago;
            row.is_in_the_queue()
                && server::at(row.slot) < mark
                && !open_for_long
                && !was_open_for_long
                && !found_by_sweep
                && !row.clock_behind
                && !daemon.will_doubt()
        })?;
        Some(format!("the mark {mark} is above {row:?}"))
    }

    /// Whether a daemon may claim it now.
    fn is_for(&self, row: &Row, daemon: &Daemon) -> bool {
        row.place == Place::Waits && daemon.serves(row.kind) && !self.server.is_paused(row.kind)
    }

    /// No daemon sleeps over a row that it could deliver, and was told of.
    fn asleep_over(&self, number: usize, daemon: &Daemon) -> Option<String> {
        let until = daemon.sleeps_undisturbed()?;
        let bound = |row: &Row| {
            let open_for = row.seen_at - row.written_at;
            let bound = match row.told {
                Told::Notified => self.now,
                Told::Daemon(mover) if mover == number => self.now,
                // It looks ever less often: a row is not found much later, after its commit, than its transaction was open.
                Told::Promised if open_for < SILENCE => {
                    let gap = 10 + self.server.since_promise(self.now);
                    (self.now + gap).max(row.seen_at + open_for + 120)
                }
                Told::Promised | Told::Daemon(_) | Told::Nobody => self.now + SWEEP,
            };
            // The daemon that had locked it rolled back, which notifies nobody. One that delivers others looks at their end.
            let again = if daemon.loads().next().is_some() { SWEEP } else { AGAIN };
            let bound = if row.clock_behind { bound.max(self.now + SWEEP) } else { bound };
            let bound = if row.was_locked { bound.max(self.now + again) } else { bound };
            // What the clock jumped over is found by the next look.
            bound.max(self.server.set_forward_at.map_or(0, |at| at + SWEEP + AGAIN))
        };
        // What may be below the mark is found by the sweep.
        let from = self.server.from(self.now, daemon.core()?.mark());
        let row = self.server.rows.iter().find(|row| {
            let is_due = row.slot <= self.server.now(self.now) && from <= server::at(row.slot);
            is_due
                && self.is_for(row, daemon)
                && !(row.large && daemon.loads().any(|load| load.large))
                && until > bound(row)
        })?;
        Some(format!("it sleeps until {} ms over {row:?}", until - START))
    }

    /// The first row that is due and served by somebody who lives and not paused, or held and served and not paused.
    fn unrest(&self) -> Option<&Row> {
        self.server.rows.iter().find(|row| {
            let is_due = row.slot <= self.server.now(self.now);
            let waits = match row.place {
                Place::Waits | Place::Locked(_) => is_due,
                Place::Held => true,
                Place::Unseen(_) | Place::Done => false,
            };
            waits && !self.server.is_paused(row.kind) && self.daemons.iter().any(|daemon| daemon.serves(row.kind))
        })
    }

    /// Ends all faults, and runs until nothing is due.
    ///
    /// # Errors
    ///
    /// What is wrong on the way, or that it does not come to rest in time.
    pub(super) fn come_to_rest(&mut self) -> Result<(), Wrong> {
        for writer in 0..self.server.writers() {
            self.step(Step::Commit(writer))?;
        }
        for kind in 0..self.kinds {
            self.step(Step::Resume(kind))?;
        }
        for daemon in 0..self.daemons.len() {
            for step in [Step::Start, Step::Learn, Step::Open, Step::Listen] {
                self.step(step(daemon))?;
            }
            self.step(Step::Connections(daemon, 10))?;
        }
        // A row falls due meanwhile, or is found by the sweep; each batch of the model is two rows.
        let since = self.now;
        loop {
            self.run_all()?;
            let Some(row) = self.unrest() else { return Ok(()) };
            let within = self.daemons.iter().map(|daemon| daemon.finds_within(since)).max().unwrap_or(0);
            let due_at = self.now - u64::try_from(self.server.now(self.now) - row.slot).unwrap_or(0);
            if self.now > since.max(due_at) + within {
                return Err(self.wrong(Invariant::Rest, &format!("{row:?} is not delivered within {within} ms")));
            }
            self.sleep(u64::MAX)?;
        }
    }

    /// Until the next daemon wakes, or until `end`.
    fn sleep(&mut self, end: u64) -> Result<(), Wrong> {
        let next = self.daemons.iter().filter_map(Daemon::until).min().unwrap_or(self.now + SWEEP).min(end);
        self.step(Step::Pass(next.saturating_sub(self.now).max(1)))
    }

    /// Goes on for a minute after it came to rest and some more, and counts the statements.
    ///
    /// # Errors
    ///
    /// What is wrong on the way, or that there are too many.
    pub(super) fn idle(&mut self) -> Result<(), Wrong> {
        let (far, too_far) = (self.now + 90_000, self.now + 1_800_000);
        while self.now < far || self.server.rows.iter().any(Row::is_in_the_queue) {
            if self.now > too_far {
                return Err(self.wrong(Invariant::Rest, "a row that nobody serves is still in the queue"));
            }
            self.sleep(u64::MAX)?;
            self.run_all()?;
        }
        let before: Vec<u32> = self.daemons.iter().map(Daemon::statements).collect();
        let end = self.now + 60_000;
        while self.now < end {
            self.sleep(end)?;
            self.run_all()?;
        }
        for (daemon, before) in self.daemons.iter().zip(before) {
            let statements = daemon.statements() - before;
            // One that looks and one that sweeps, if a sweep was slow.
            if statements > IDLE || daemon.is_troubled() {
                return Err(self.wrong(Invariant::Idle, &format!("{statements} statements in a minute by {daemon:?}")));
            }
        }
        Ok(())
    }

    /// Lets daemons go on as far as it makes no difference when they do.
    pub(super) fn run_by_themselves(&mut self) -> Result<(), Wrong> {
        for daemon in 0..self.daemons.len() {
            while self.daemons[daemon].is_by_itself(self.now) {
                self.step(Step::Run(daemon))?;
            }
        }
        Ok(())
    }

    /// Lets everything go on that can, until all daemons sleep.
    pub(super) fn run_all(&mut self) -> Result<(), Wrong> {
        for _ in 0..10_000 {
            let mut ran = false;
            for daemon in 0..self.daemons.len() {
                for work in (0..self.daemons[daemon].beside()).rev() {
                    ran = true;
                    self.step(Step::RunBeside(daemon, work, Ends::Settled))?;
                }
                while self.daemons[daemon].has_notifications() {
                    ran = true;
                    self.step(Step::Notify(daemon))?;
                }
                if self.daemons[daemon].is_busy(self.now) {
                    ran = true;
                    self.step(Step::Run(daemon))?;
                }
            }
            if !ran {
                return Ok(());
            }
        }
        Err(self.wrong(Invariant::Turns, "it never sleeps"))
    }
}
