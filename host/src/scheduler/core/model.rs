//! A model of the world around the core: rows, transactions that take a number early and commit late, notifications, several
//! daemons whose connections fail, brokers that close, a clock that is set. It drives the real core in virtual time, and after
//! every step the model says what is wrong. [`server`] lists what it assumes of PostgreSQL.

mod daemon;
mod exhaustive;
mod random;
mod server;

use daemon::Daemon;
use server::{Place, Server};

use super::Moment;

/// The world begins here, so that no moment is ever before the beginning of anything.
const START: u64 = 3_600_000;
/// The longest time between two looks, in ms.
const SWEEP: u64 = 5_000;
/// Rows that others had locked are asked for again after at most so long, in ms.
const AGAIN: u64 = 1_000;
/// Between two sleeps no core takes more actions than this, if nothing happens meanwhile.
const TURNS: u32 = 16;
/// A transaction that is open for longer may have rows below the mark, in ms.
const PATIENCE: u64 = 60_000;

/// What may happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    /// Time goes by, in ms.
    Pass(u64),
    /// A writer writes a row of a kind, due so many ms from now.
    Write { writer: usize, kind: usize, due_in: i64 },
    /// A writer commits.
    Commit(usize),
    /// A writer rolls back.
    RollBack(usize),
    /// A transaction that has nothing to do with us takes a number, and is over at once.
    Other,
    /// A daemon goes on with what it is at: asks, is answered, decides.
    Run(usize),
    /// Work beside a daemon's loop goes on; if it is a delivery, it ends in this way.
    RunBeside(usize, usize, Ends),
    /// The next notification arrives at a daemon.
    Notify(usize),
    /// A daemon's session for notifications is lost, with what was on its way.
    Deafen(usize),
    /// It has another.
    Listen(usize),
    /// What a daemon is at fails, since its session is lost; with it every other session of its pool.
    Fail(usize),
    /// A daemon's broker is away.
    Close(usize),
    /// It is back.
    Open(usize),
    /// A daemon is killed. What it had locked is free.
    Kill(usize),
    /// It is started again.
    Start(usize),
    /// Somebody promises that all daemons look by themselves for a second.
    Promise,
    /// The database's clock is set, by so many ms.
    SetClock(i64),
}

/// How a delivery ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Ends {
    /// All rows have left the queue.
    Settled,
    /// Its rows are to be tried again, so many ms later.
    Again(u64),
    /// The broker did not confirm.
    Unsettled,
    /// PostgreSQL refuses to finish them.
    Refused,
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    /// In ms.
    now: u64,
    server: Server,
    daemons: Vec<Daemon>,
}

impl World {
    /// So many writers, and a daemon for each of `kinds`, which are those that it serves.
    fn new(writers: usize, kinds: &[&[usize]]) -> Self {
        let daemons = kinds.iter().map(|kinds| Daemon::new(kinds, START)).collect();
        Self { now: START, server: Server::new(writers), daemons }
    }

    /// A row of before, due so many ms ago.
    fn with_row(mut self, kind: usize, ago: i64) -> Self {
        self.server.old_row(self.now, kind, ago);
        self
    }

    /// One step. What cannot happen now does not.
    ///
    /// # Errors
    ///
    /// What is wrong afterwards.
    fn step(&mut self, step: Step) -> Result<(), String> {
        let Self { now, server, daemons } = self;
        match step {
            Step::Pass(ms) => {
                *now += ms;
                for daemon in daemons {
                    daemon.time_passes(*now);
                }
            }
            Step::Write { writer, kind, due_in } => server.write(*now, writer, kind, due_in),
            Step::Commit(writer) => {
                if server.commit(writer) {
                    daemons.iter_mut().for_each(Daemon::is_notified);
                }
            }
            Step::RollBack(writer) => server.roll_back(writer),
            Step::Other => drop(server.number()),
            Step::Run(daemon) => daemons[daemon].run(*now, server)?,
            Step::RunBeside(daemon, work, ends) => {
                let announced = announced(daemons);
                if daemons[daemon].run_beside(*now, server, work, ends, &announced) {
                    daemons.iter_mut().for_each(Daemon::is_notified);
                }
            }
            Step::Notify(daemon) => daemons[daemon].hear(),
            Step::Deafen(daemon) => daemons[daemon].deafen(),
            Step::Listen(daemon) => daemons[daemon].listen(),
            Step::Fail(daemon) => daemons[daemon].fail(*now, server),
            Step::Close(daemon) => daemons[daemon].broker(false),
            Step::Open(daemon) => daemons[daemon].broker(true),
            Step::Kill(daemon) => daemons[daemon].kill(server),
            Step::Start(daemon) => daemons[daemon].start(*now),
            Step::Promise => {
                server.promise(*now);
                daemons.iter_mut().for_each(Daemon::is_notified);
            }
            Step::SetClock(ms) => server.set_clock(ms),
        }
        self.check()
    }

    /// What must be so in every state.
    fn check(&self) -> Result<(), String> {
        for (number, daemon) in self.daemons.iter().enumerate() {
            if let Some(wrong) = self.below_the_mark(daemon).or_else(|| self.asleep_over(daemon)) {
                return Err(format!("daemon {number} at {}: {wrong}\n{daemon:?}\n{:?}", self.now - START, self.server));
            }
        }
        Ok(())
    }

    /// The mark is never above a row that waits or may still appear.
    fn below_the_mark(&self, daemon: &Daemon) -> Option<String> {
        if self.server.clock_was_set {
            // Only a sweep finds rows below the mark then.
            return None;
        }
        let core = daemon.core()?;
        let (mark, long_ago) = (core.mark()?, self.server.now(self.now) - i64::try_from(PATIENCE).ok()?);
        let row = self.server.rows.iter().find(|row| {
            let open_for_long = row.written_at + PATIENCE <= self.now;
            let found_by_sweep = !core.mark.is_swept() && row.slot < long_ago;
            row.is_in_the_queue() && server::at(row.slot) < mark && !open_for_long && !found_by_sweep
        })?;
        Some(format!("the mark {mark} is above {row:?}"))
    }

    /// No daemon sleeps over a row that it could deliver, and was notified of.
    fn asleep_over(&self, daemon: &Daemon) -> Option<String> {
        let until = daemon.sleeps_undisturbed()?;
        let row = self.server.rows.iter().find(|row| {
            row.place == Place::Waits
                && row.slot <= self.server.now(self.now)
                && daemon.serves(row.kind)
                && row.notified
        })?;
        // The daemon that had locked it rolled back, which notifies nobody.
        let bound = if row.was_locked { AGAIN } else { 0 };
        (until > self.now + bound && !self.server.clock_was_set)
            .then(|| format!("it sleeps until {} over {row:?}", until - START))
    }

    /// Whether nothing is due that somebody who lives serves, nothing is held that is served, and all sleep.
    fn is_at_rest(&self) -> bool {
        let served = |kind| self.daemons.iter().any(|daemon| daemon.serves(kind));
        let waits = self.server.rows.iter().any(|row| match row.place {
            Place::Waits | Place::Locked { .. } => row.slot <= self.server.now(self.now) && served(row.kind),
            Place::Held => served(row.kind),
            Place::Unseen(_) | Place::Done => false,
        });
        !waits
    }

    /// Ends all faults, and runs until nothing is due.
    ///
    /// # Errors
    ///
    /// What is wrong on the way, or that it does not come to rest.
    fn come_to_rest(&mut self) -> Result<(), String> {
        for writer in 0..self.server.writers() {
            self.step(Step::Commit(writer))?;
        }
        for daemon in 0..self.daemons.len() {
            self.step(Step::Start(daemon))?;
            self.step(Step::Open(daemon))?;
            self.step(Step::Listen(daemon))?;
        }
        // A sweep that was slow is followed by another as long after as it was slow a hundred times, 10 minutes at most; a server
        // that failed is left alone for up to 30 s; and in between rows fall due.
        let end = self.now + 15 * 60_000;
        while self.now < end {
            self.run_all()?;
            if self.is_at_rest() {
                return Ok(());
            }
            let next = self.daemons.iter().filter_map(Daemon::until).min().unwrap_or(end);
            self.step(Step::Pass(next.saturating_sub(self.now).max(1)))?;
        }
        Err(format!("it does not come to rest: {:?}\n{:?}", self.server, self.daemons))
    }

    /// Lets daemons go on as far as it makes no difference when they do.
    fn run_by_themselves(&mut self) -> Result<(), String> {
        for daemon in 0..self.daemons.len() {
            while self.daemons[daemon].is_by_itself() {
                self.step(Step::Run(daemon))?;
            }
        }
        Ok(())
    }

    /// Lets everything go on that can, until all daemons sleep.
    fn run_all(&mut self) -> Result<(), String> {
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
        Err(format!("it never sleeps: {:?}", self.daemons))
    }
}

/// The kinds that daemons announce which live.
fn announced(daemons: &[Daemon]) -> Vec<usize> {
    daemons.iter().flat_map(Daemon::announces).collect()
}

fn moment(now: u64, began: u64) -> Moment {
    // From the beginning of the world on, so that two daemons in the same state are the same state.
    Moment::from_millis(START + now - began)
}
