//! A daemon's process in the model, from its start until it is killed: the real core, and the stage of the loop around it.
//! The loop asks the core for the next action, carries it out, and reports the result.

use std::hash::{Hash, Hasher};

use tidings_core::queue::Look;
use tidings_core::reason::{Reason, Reasons};
use tidings_core::{Action, ClaimRequest, ClaimResult, Core, Environment, Event, Lane, Moment};
use time::OffsetDateTime;

use super::diary;
use super::invariant::Invariant;
use super::row::Place;
use super::server::Server;
use super::times::{MAX_ACTIONS, START};

/// The stage of the loop.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    /// The loop is about to ask the core for an action.
    Deciding,
    /// A look was sent at this moment; `Some` = the database has answered.
    Looking(Moment, Option<Look>),
    Claiming(ClaimRequest, ClaimStage),
    /// The loop sleeps until this time, in ms.
    Sleeping(u64, Reason),
}

/// The stage of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ClaimStage {
    Requested(Moment),
    /// The transaction has begun; with the time that the database's clock showed, in ms.
    Begun(Moment, i64),
    Answered(ClaimResult),
}

/// A task beside the loop.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct BackgroundTask {
    pub(super) task: Task,
    /// PostgreSQL has ended the task's session, so the task will fail.
    pub(super) session_lost: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Task {
    Delivery { lane: Lane, xid: i64 },
    Hold,
    Release(Vec<String>),
    Sweep { asked_at: Moment, mark: Option<OffsetDateTime>, look: Option<Look> },
}

/// The state of a process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Process {
    pub(super) core: Core,
    /// The time of the start, in ms.
    pub(super) started_at: u64,
    pub(super) stage: Stage,
    pub(super) background: Vec<BackgroundTask>,
    pub(super) pending_wake: Option<Reasons>,
    /// Notifications that were sent to this process and have not arrived; `None` = it does not listen.
    pub(super) pending_notifications: Option<u32>,
    pub(super) environment: Environment,
    /// The environment that the core was told last.
    pub(super) last_environment: Environment,
    /// The core's actions since the loop last slept or something happened.
    pub(super) actions: u32,
    /// The duration of the slowest sweep, in ms.
    pub(super) slowest_sweep: u64,
    pub(super) statements: NotCompared<u32>,
    /// When something happened last, and how many statements there were before.
    pub(super) last_change: NotCompared<(u64, u32)>,
    /// The events and actions of this process, if they are to be printed.
    pub(super) diary: Option<Vec<(Moment, String)>>,
}

/// A value that does not count when states are compared: two states that differ only in it are the same state.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct NotCompared<T>(pub(super) T);

impl<T> PartialEq for NotCompared<T> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl<T> Eq for NotCompared<T> {}

impl<T> Hash for NotCompared<T> {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

impl Process {
    /// The busy lanes.
    pub(super) fn lanes(&self) -> impl Iterator<Item = Lane> + '_ {
        let lane = |work: &BackgroundTask| if let Task::Delivery { lane, .. } = work.task { Some(lane) } else { None };
        self.background.iter().filter_map(lane)
    }

    /// The moment of this process at a time of the world, in ms.
    pub(super) fn moment(&self, now: u64) -> Moment {
        // Every process starts at the same moment, so that two processes in equal states have equal moments.
        Moment::from_millis(START + now - self.started_at)
    }

    pub(super) fn wake(&mut self, reason: Reason) {
        let before = self.pending_wake.unwrap_or_default();
        self.pending_wake = Some(before.and(reason.into()));
        self.actions = 0;
    }

    /// Notes that something happened that this process did not cause by itself.
    pub(super) fn note_change(&mut self, now: u64) {
        self.actions = 0;
        self.last_change = NotCompared((now, self.statements.0));
    }

    /// Checks after a decision that the process has not decided too often without sleeping, and does not send too many
    /// statements while nothing happens.
    pub(super) fn check_activity(&mut self, now: u64, server: &Server) -> Result<(), (Invariant, String)> {
        self.actions += 1;
        if self.actions > MAX_ACTIONS {
            return Err((Invariant::Spinning, "it does not sleep".to_owned()));
        }
        let NotCompared((since, before)) = self.last_change;
        let elapsed = u32::try_from(now - since).unwrap_or(u32::MAX);
        // While a promise is open, and for some seconds after it, a look every few ms is right. Each row becomes due once.
        let polls = server.ms_since_promise(now) < now - since + 15_000;
        let allowed = if polls { elapsed } else { elapsed / 20 };
        let rows = u32::try_from(server.rows.len()).expect("few");
        let sent = self.statements.0 - before;
        if sent > MAX_ACTIONS + 8 * rows + allowed {
            return Err((Invariant::Spinning, format!("{sent} statements in {elapsed} ms in which nothing happened")));
        }
        Ok(())
    }

    /// Ends all sessions of this process. The rows that their transactions had locked are free.
    pub(super) fn lose_sessions(&mut self, now: u64, server: &mut Server) {
        for work in &mut self.background {
            work.session_lost = true;
            if let Task::Delivery { xid, .. } = work.task {
                server.end_claim(now, xid, Place::Waiting, None);
            }
        }
        if let Stage::Claiming(_, ClaimStage::Answered(ClaimResult { batch: Some(batch), .. })) = self.stage {
            server.end_claim(now, batch.xid, Place::Waiting, None);
        }
    }

    /// The time of the world at a moment of this process, in ms.
    pub(super) fn world_ms(&self, moment: Moment) -> u64 {
        // Rounded up: a sleep must not end early.
        let ms = moment.as_micros().div_ceil(1_000);
        u64::try_from(ms).unwrap_or(u64::MAX).saturating_add(self.started_at).saturating_sub(START)
    }

    fn record(&mut self, moment: Moment, entry: impl FnOnce() -> String) {
        if let Some(diary) = &mut self.diary {
            diary.push((moment, entry()));
        }
    }

    /// Reports an event to the core.
    pub(super) fn handle(&mut self, moment: Moment, event: Event) {
        self.record(moment, || diary::event(&event));
        self.core.handle(moment, event);
        self.stage = Stage::Deciding;
    }

    /// Asks the core for the next action, and begins it.
    pub(super) fn decide(&mut self, moment: Moment) -> Result<(), (Invariant, String)> {
        self.last_environment = self.environment;
        let action = self.core.next(moment, self.environment);
        self.record(moment, || diary::action(&action));
        self.statements.0 += u32::from(!matches!(action, Action::Sleep(..)));
        self.stage = match action {
            Action::Look => Stage::Looking(moment, None),
            Action::Claim(request) => {
                if !self.environment.broker_open {
                    return Err((Invariant::BrokerAway, format!("{request:?}")));
                }
                let lanes = self.lanes().count();
                if lanes >= self.environment.connections {
                    return Err((Invariant::Lanes, format!("{lanes} of {}", self.environment.connections)));
                }
                Stage::Claiming(request, ClaimStage::Requested(moment))
            }
            Action::Sleep(until, reason) => Stage::Sleeping(self.world_ms(until), reason),
            Action::Hold => self.start(Task::Hold),
            Action::Release(kinds) => self.start(Task::Release(kinds)),
            Action::Sweep => self.start(Task::Sweep { asked_at: moment, mark: self.core.mark(), look: None }),
        };
        Ok(())
    }

    fn start(&mut self, task: Task) -> Stage {
        self.background.push(BackgroundTask { task, session_lost: false });
        Stage::Deciding
    }
}
