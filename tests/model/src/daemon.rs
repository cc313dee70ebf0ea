//! A daemon in the model: the real core, and a loop around it that carries out what it decides, one stage at a time.

use std::collections::BTreeSet;

use tidings_core::reason::Reason;
use tidings_core::{Core, End, Environment, Event, Load, Moment, Work};

use super::invariant::Invariant;
use super::life::{Aside, At, Beside, Claim, Life, Task};
use super::row::Place;
use super::server::Server;
use super::step::Ends;
use super::times::SWEEP;

/// What serves some kinds, while it lives.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Daemon {
    number: usize,
    kinds: BTreeSet<usize>,
    life: Option<Life>,
}

impl Daemon {
    pub(super) fn new(number: usize, kinds: &[usize], now: u64) -> Self {
        let mut daemon = Self { number, kinds: kinds.iter().copied().collect(), life: None };
        daemon.start(now);
        daemon.learn();
        daemon
    }

    pub(super) fn start(&mut self, now: u64) {
        self.life.get_or_insert_with(|| Life {
            core: Core::new(Moment::from_millis(SWEEP)),
            began: now,
            at: At::Decides,
            beside: Vec::new(),
            woken: None,
            notifications: Some(0),
            environment: Environment { broker_open: true, connections: 10, doubt: 0, knows_kinds: false },
            told: Environment { broker_open: false, connections: 1, doubt: 0, knows_kinds: false },
            turns: 0,
            slowest_sweep: 0,
            statements: Aside(0),
            happened: Aside((now, 0)),
            diary: None,
        });
    }

    /// Its plugins are complete.
    pub(super) fn learn(&mut self) {
        if let Some(life) = self.life.as_mut().filter(|life| !life.environment.knows_kinds) {
            life.environment.knows_kinds = true;
            life.wake(Reason::Plugins);
        }
    }

    pub(super) fn kill(&mut self, now: u64, server: &mut Server) {
        if let Some(mut life) = self.life.take() {
            life.lose_sessions(now, server);
        }
    }

    pub(super) fn core(&self) -> Option<&Core> {
        self.life.as_ref().map(|life| &life.core)
    }

    pub(super) fn serves(&self, kind: usize) -> bool {
        self.life.is_some() && self.kinds.contains(&kind)
    }

    /// What others know that it serves.
    pub(super) fn announces(&self) -> impl Iterator<Item = usize> + '_ {
        self.kinds.iter().copied().filter(|_| self.life.as_ref().is_some_and(|life| life.notifications.is_some()))
    }

    pub(super) fn is_notified(&mut self) {
        if let Some(Life { notifications: Some(count), .. }) = &mut self.life {
            *count += 1;
        }
    }

    pub(super) fn has_notifications(&self) -> bool {
        self.life.as_ref().is_some_and(|life| life.notifications.is_some_and(|count| count > 0))
    }

    /// All that have come meanwhile are one wake.
    pub(super) fn hear(&mut self) {
        if self.has_notifications()
            && let Some(life) = &mut self.life
        {
            life.notifications = Some(0);
            life.wake(Reason::Notification);
        }
    }

    pub(super) fn deafen(&mut self) {
        self.life.iter_mut().for_each(|life| life.notifications = None);
    }

    pub(super) fn listen(&mut self) {
        if let Some(life) = self.life.as_mut().filter(|life| life.notifications.is_none()) {
            life.notifications = Some(0);
            life.wake(Reason::Doubt);
        }
    }

    pub(super) fn broker(&mut self, open: bool) {
        if let Some(life) = self.life.as_mut().filter(|life| life.environment.broker_open != open) {
            life.environment.broker_open = open;
            if open {
                life.wake(Reason::Broker);
            }
        }
    }

    pub(super) fn connections(&mut self, connections: usize) {
        self.life.iter_mut().for_each(|life| life.environment.connections = connections);
    }

    pub(super) fn doubt(&mut self) {
        self.life.iter_mut().for_each(|life| life.environment.doubt += 1);
    }

    /// Whether it does not know yet that its sessions were lost, and that its mark says nothing.
    pub(super) fn will_doubt(&self) -> bool {
        self.life.as_ref().is_some_and(|life| life.told.doubt != life.environment.doubt)
    }

    /// Until when it sleeps, if it does, and could do otherwise, and nothing that was told to it is on its way.
    pub(super) fn sleeps_undisturbed(&self) -> Option<u64> {
        let life = self.life.as_ref()?;
        let until = match &life.at {
            At::Sleeps(until, _) => *until,
            // Nothing else is done until then.
            At::Claims(wanted, Claim::Asked(_)) => life.world(wanted.not_before),
            _ => return None,
        };
        let core = &life.core;
        let lanes = if core.refusal().is_some() || core.rests_until().is_some() { 1 } else { 3 };
        let undisturbed = life.environment.broker_open
            && life.woken.is_none()
            && life.notifications == Some(0)
            && !self.will_doubt()
            && self.loads().count() < lanes.min(life.told.connections)
            && core.rests_until().is_none_or(|rests_until| life.world(rests_until) < until);
        undisturbed.then_some(until)
    }

    /// What is on its way.
    pub(super) fn loads(&self) -> impl Iterator<Item = Load> + '_ {
        self.life.iter().flat_map(Life::loads)
    }

    /// Until when it sleeps, if it does, or waits to claim.
    pub(super) fn until(&self) -> Option<u64> {
        let life = self.life.as_ref()?;
        match &life.at {
            At::Sleeps(until, _) => Some(*until),
            At::Claims(wanted, Claim::Asked(_)) => Some(life.world(wanted.not_before)),
            _ => None,
        }
    }

    /// Once nothing fails, a row that only a sweep can find is found within so many ms.
    pub(super) fn finds_within(&self, now: u64) -> u64 {
        let Some(life) = &self.life else { return 0 };
        let rests = life.core.rests_until().map_or(0, |until| life.world(until).saturating_sub(now));
        rests + 2 * SWEEP.max((100 * life.slowest_sweep).min(600_000)) + 2_000
    }

    /// Whether its core still believes that a server has failed, or refuses.
    pub(super) fn is_troubled(&self) -> bool {
        self.core().is_some_and(|core| core.rests_until().is_some() || core.refusal().is_some())
    }

    pub(super) fn statements(&self) -> u32 {
        self.life.as_ref().map_or(0, |life| life.statements.0)
    }

    pub(super) fn beside(&self) -> usize {
        self.life.as_ref().map_or(0, |life| life.beside.len())
    }

    /// Whether it goes on when it may.
    pub(super) fn is_busy(&self, now: u64) -> bool {
        self.life.as_ref().is_some_and(|life| match &life.at {
            At::Sleeps(until, _) => *until <= now || life.woken.is_some(),
            At::Claims(wanted, Claim::Asked(_)) => life.world(wanted.not_before) <= now,
            _ => true,
        })
    }

    /// Whether its next stage makes no difference to anybody else, while no time passes.
    pub(super) fn is_by_itself(&self, now: u64) -> bool {
        self.life.as_ref().is_some_and(|life| match &life.at {
            At::Decides | At::Looks(_, Some(_)) | At::Claims(_, Claim::Answered(_)) => true,
            At::Claims(wanted, Claim::Asked(_)) => life.world(wanted.not_before) <= now,
            _ => false,
        })
    }

    pub(super) fn time_passes(&mut self) {
        self.life.iter_mut().for_each(|life| life.turns = 0);
    }

    pub(super) fn keep_diary(&mut self) {
        self.life.iter_mut().for_each(|life| life.diary = Some(Vec::new()));
    }

    pub(super) fn diary(&self) -> &[(Moment, String)] {
        self.life.as_ref().and_then(|life| life.diary.as_deref()).unwrap_or_default()
    }

    /// The loop goes on.
    pub(super) fn run(&mut self, now: u64, server: &mut Server) -> Result<(), (Invariant, String)> {
        let kinds: Vec<usize> = self.kinds.iter().copied().collect();
        let Some(life) = &mut self.life else { return Ok(()) };
        let moment = life.moment(now);
        let event = match &mut life.at {
            At::Decides => {
                life.decide(moment)?;
                return life.check_pace(now, server);
            }
            At::Looks(asked_at, None) => {
                let look = server.look(now, &kinds, life.core.mark(), false);
                life.at = At::Looks(*asked_at, Some(look));
                return Ok(());
            }
            At::Claims(wanted, Claim::Asked(_)) if moment < wanted.not_before => return Ok(()),
            At::Claims(wanted, Claim::Asked(asked_at)) => {
                life.at = At::Claims(*wanted, Claim::Begun((*asked_at).max(wanted.not_before), server.now(now)));
                return Ok(());
            }
            At::Claims(wanted, Claim::Begun(asked_at, read)) => {
                let claimed = server.claim(now, *asked_at, *read, &kinds, wanted);
                life.at = At::Claims(*wanted, Claim::Answered(claimed));
                return Ok(());
            }
            At::Looks(asked_at, Some(look)) => Event::Looked(*asked_at, look.clone()),
            At::Claims(wanted, Claim::Answered(claimed)) => {
                if let Some(rows) = claimed.rows {
                    let load = Load { turn: wanted.turn, large: rows.large };
                    life.beside.push(Beside { work: Task::Delivery { load, xid: rows.xid }, lost: false });
                }
                Event::Claimed(*claimed)
            }
            At::Sleeps(until, why) => match life.woken.take() {
                Some(reasons) => {
                    life.happened = Aside((now, life.statements.0));
                    Event::Woken(reasons)
                }
                None if *until <= now => Event::Woken((*why).into()),
                None => return Ok(()),
            },
        };
        life.handle(moment, event);
        Ok(())
    }

    /// Work beside the loop goes on. Whether it notifies.
    pub(super) fn run_beside(
        &mut self,
        now: u64,
        server: &mut Server,
        work: usize,
        ends: Ends,
        announced: &BTreeSet<usize>,
    ) -> bool {
        let all: Vec<usize> = self.kinds.iter().copied().collect();
        let Some(life) = self.life.as_mut().filter(|life| work < life.beside.len()) else { return false };
        // As in the loop, what has ended is told while it sleeps.
        if let At::Looks(..) | At::Claims(..) | At::Decides = life.at {
            return false;
        }
        let moment = life.moment(now);
        let Beside { work, lost } = life.beside.remove(work);
        if let Task::Sweep { asked_at, .. } = &work {
            let took = u64::try_from(moment.saturating_sub(*asked_at).as_millis()).expect("short");
            life.slowest_sweep = life.slowest_sweep.max(took);
        }
        let fails = lost || matches!(ends, Ends::Unsettled | Ends::Refused);
        let event = match work {
            Task::Delivery { load, .. } if lost => Event::DeliveryEnded(load, End::Failed),
            Task::Delivery { load, xid } => {
                let (place, moved, end) = match ends {
                    Ends::Settled => (Place::Done, None, End::Settled { some_left: true, some_stay: false }),
                    Ends::Again(ms) => {
                        let slot = server.now(now + ms);
                        (Place::Waits, Some((self.number, slot)), End::Settled { some_left: false, some_stay: true })
                    }
                    Ends::Unsettled => (Place::Waits, None, End::Unsettled),
                    Ends::Panicked => (Place::Waits, None, End::Panicked),
                    Ends::Refused => {
                        let end = End::Refused { why: "disk full".to_owned(), rest: true };
                        (Place::Waits, Some((self.number, server.now(now + 1_000))), end)
                    }
                };
                server.let_go(now, xid, place, moved);
                Event::DeliveryEnded(load, end)
            }
            Task::Hold if fails => Event::Failed(Work::Holding),
            Task::Hold => Event::Held(server.hold(now, life.core.mark(), &self.kinds, announced)),
            Task::Release(_) if fails => Event::Failed(Work::Releasing),
            Task::Release(kinds) => {
                server.release(now, self.number, &kinds);
                Event::Released
            }
            Task::Sweep { .. } if fails => Event::Swept(None),
            Task::Sweep { asked_at, mark, seen: None } => {
                let mut look = server.look(now, &all, mark, true);
                let notifies = matches!(ends, Ends::Again(_)) && server.move_up(now, &mut look);
                life.beside.push(Beside { work: Task::Sweep { asked_at, mark, seen: Some(look) }, lost: false });
                return notifies;
            }
            Task::Sweep { asked_at, seen: Some(look), .. } => Event::Swept(Some((asked_at, look))),
        };
        life.turns = 0;
        if !matches!(event, Event::Held(false) | Event::Swept(_)) {
            life.happens(now);
        }
        life.handle(moment, event);
        false
    }

    /// PostgreSQL ends all its sessions but the one that listens: its statements fail, and its transactions are rolled back.
    pub(super) fn fail(&mut self, now: u64, server: &mut Server) {
        let Some(life) = &mut self.life else { return };
        life.environment.doubt += 1;
        life.happens(now);
        life.lose_sessions(now, server);
        if let At::Looks(..) | At::Claims(..) = life.at {
            life.handle(life.moment(now), Event::Failed(Work::Asking));
        }
    }
}
