//! One life of a daemon in the model: the real core, and what its loop is at. It asks the core what is next, and tells it what
//! came of that.

use std::hash::{Hash, Hasher};

use tidings_core::queue::Look;
use tidings_core::reason::{Reason, Reasons};
use tidings_core::{Action, Claimed, Core, Environment, Event, Load, Moment, Wanted};
use time::OffsetDateTime;

use super::diary;
use super::invariant::Invariant;
use super::row::Place;
use super::server::Server;
use super::times::{START, TURNS};

/// What the loop is at.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum At {
    /// It asks its core.
    Decides,
    /// It has asked this at a moment; `Some` = the database has answered.
    Looks(Moment, Option<Look>),
    Claims(Wanted, Claim),
    /// Until this time, in ms.
    Sleeps(u64, Reason),
}

/// How far a claim is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Claim {
    Asked(Moment),
    /// The clock was read: this is what it showed.
    Begun(Moment, i64),
    Answered(Claimed),
}

/// Work beside the loop; and whether its session was lost.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Beside {
    pub(super) work: Task,
    pub(super) lost: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Task {
    Delivery { load: Load, xid: i64 },
    Hold,
    Release(Vec<String>),
    Sweep { asked_at: Moment, mark: Option<OffsetDateTime>, seen: Option<Look> },
}

/// From its start to its death.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Life {
    pub(super) core: Core,
    /// In ms.
    pub(super) began: u64,
    pub(super) at: At,
    pub(super) beside: Vec<Beside>,
    pub(super) woken: Option<Reasons>,
    /// On their way to it; `None` = it does not listen.
    pub(super) notifications: Option<u32>,
    pub(super) environment: Environment,
    /// What its core was told last.
    pub(super) told: Environment,
    /// Actions since it slept last or something happened.
    pub(super) turns: u32,
    /// The longest that a sweep took, in ms.
    pub(super) slowest_sweep: u64,
    pub(super) statements: Aside<u32>,
    /// When something happened last, and how many there were before.
    pub(super) happened: Aside<(u64, u32)>,
    /// What it did, if somebody wants to know.
    pub(super) diary: Option<Vec<(Moment, String)>>,
}

/// What is counted aside: two states that differ in it alone are the same.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Aside<T>(pub(super) T);

impl<T> PartialEq for Aside<T> {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl<T> Eq for Aside<T> {}

impl<T> Hash for Aside<T> {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

impl Life {
    pub(super) fn loads(&self) -> impl Iterator<Item = Load> + '_ {
        let load = |beside: &Beside| if let Task::Delivery { load, .. } = beside.work { Some(load) } else { None };
        self.beside.iter().filter_map(load)
    }

    pub(super) fn moment(&self, now: u64) -> Moment {
        // From the beginning of the world on, so that two daemons in the same state are the same state.
        Moment::from_millis(START + now - self.began)
    }

    pub(super) fn wake(&mut self, reason: Reason) {
        let before = self.woken.unwrap_or_default();
        self.woken = Some(before.and(reason.into()));
        self.turns = 0;
    }

    /// Something that is not its own doing.
    pub(super) fn happens(&mut self, now: u64) {
        self.turns = 0;
        self.happened = Aside((now, self.statements.0));
    }

    /// After a decision: whether it takes too many without sleeping, or asks too often while nothing happens.
    pub(super) fn check_pace(&mut self, now: u64, server: &Server) -> Result<(), (Invariant, String)> {
        self.turns += 1;
        if self.turns > TURNS {
            return Err((Invariant::Turns, "it does not sleep".to_owned()));
        }
        let Aside((since, before)) = self.happened;
        let elapsed = u32::try_from(now - since).unwrap_or(u32::MAX);
        // While a promise is open, and for some seconds after it, it looks every few ms; and each row falls due once.
        let promised = server.since_promise(now) < now - since + 15_000;
        let often = if promised { elapsed } else { elapsed / 20 };
        let rows = u32::try_from(server.rows.len()).expect("few");
        let asked = self.statements.0 - before;
        if asked > TURNS + 8 * rows + often {
            return Err((Invariant::Turns, format!("{asked} statements in {elapsed} ms in which nothing happened")));
        }
        Ok(())
    }

    /// What its transactions had locked is free.
    pub(super) fn lose_sessions(&mut self, now: u64, server: &mut Server) {
        for beside in &mut self.beside {
            beside.lost = true;
            if let Task::Delivery { xid, .. } = beside.work {
                server.let_go(now, xid, Place::Waits, None);
            }
        }
        if let At::Claims(_, Claim::Answered(Claimed { rows: Some(rows), .. })) = self.at {
            server.let_go(now, rows.xid, Place::Waits, None);
        }
    }

    /// A moment of this life, in ms of the world.
    pub(super) fn world(&self, moment: Moment) -> u64 {
        // A sleep is over when its time has come, and not before.
        let ms = moment.as_micros().div_ceil(1_000);
        u64::try_from(ms).unwrap_or(u64::MAX).saturating_add(self.began).saturating_sub(START)
    }

    fn write_down(&mut self, moment: Moment, what: impl FnOnce() -> String) {
        if let Some(diary) = &mut self.diary {
            diary.push((moment, what()));
        }
    }

    pub(super) fn handle(&mut self, moment: Moment, event: Event) {
        self.write_down(moment, || diary::event(&event));
        self.core.handle(moment, event);
        self.at = At::Decides;
    }

    pub(super) fn decide(&mut self, moment: Moment) -> Result<(), (Invariant, String)> {
        self.told = self.environment;
        let action = self.core.next(moment, self.environment);
        self.write_down(moment, || diary::action(&action));
        self.statements.0 += u32::from(!matches!(action, Action::Sleep(..)));
        self.at = match action {
            Action::Look => At::Looks(moment, None),
            Action::Claim(wanted) => {
                if !self.environment.broker_open {
                    return Err((Invariant::Away, format!("{wanted:?}")));
                }
                let lanes = self.loads().count();
                if lanes >= self.environment.connections {
                    return Err((Invariant::Lanes, format!("{lanes} of {}", self.environment.connections)));
                }
                At::Claims(wanted, Claim::Asked(moment))
            }
            Action::Sleep(until, why) => At::Sleeps(self.world(until), why),
            Action::Hold => self.begin(Task::Hold),
            Action::Release(kinds) => self.begin(Task::Release(kinds)),
            Action::Sweep => self.begin(Task::Sweep { asked_at: moment, mark: self.core.mark(), seen: None }),
        };
        Ok(())
    }

    fn begin(&mut self, work: Task) -> At {
        self.beside.push(Beside { work, lost: false });
        At::Decides
    }
}
