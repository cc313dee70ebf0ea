//! A daemon in the model: the real core, and a loop around it that carries out what it decides, one stage at a time.

use std::collections::BTreeSet;

use time::OffsetDateTime;

use super::super::{Action, Claimed, Core, End, Event, Load, Outside, Wanted, Work};
use super::server::{Place, Server};
use super::{Ends, Moment, START, SWEEP, TURNS, moment};
use crate::queue::Look;
use crate::wake::{Reason, Reasons};

/// What the loop is at.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum At {
    /// It asks its core.
    Decides,
    /// It has asked this; `Some` = the database has answered.
    Looks(Moment, Option<Look>),
    Claims(Moment, Wanted, Option<Claimed>),
    /// Until this time, in ms.
    Sleeps(u64, Reason),
}

/// Work beside the loop.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Beside {
    Delivery { load: Load, xid: i64 },
    Hold,
    Release(Vec<String>),
    Sweep { asked_at: Moment, mark: Option<OffsetDateTime>, seen: Option<Look> },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Daemon {
    kinds: BTreeSet<usize>,
    lives: Option<Life>,
}

/// From its start to its death.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Life {
    core: Core,
    /// In ms.
    began: u64,
    at: At,
    beside: Vec<Beside>,
    woken: Option<Reasons>,
    /// On their way to it; `None` = it does not listen.
    notifications: Option<u32>,
    doubt: u64,
    broker_open: bool,
    /// Actions since it slept last or something happened.
    turns: u32,
}

impl Daemon {
    pub(super) fn new(kinds: &[usize], now: u64) -> Self {
        let mut daemon = Self { kinds: kinds.iter().copied().collect(), lives: None };
        daemon.start(now);
        daemon
    }

    pub(super) fn start(&mut self, now: u64) {
        self.lives.get_or_insert_with(|| Life {
            core: Core::new(Moment::from_millis(SWEEP)),
            began: now,
            at: At::Decides,
            beside: Vec::new(),
            woken: None,
            notifications: Some(0),
            doubt: 0,
            broker_open: true,
            turns: 0,
        });
    }

    pub(super) fn kill(&mut self, server: &mut Server) {
        let Some(life) = self.lives.take() else { return };
        for work in life.beside {
            if let Beside::Delivery { xid, .. } = work {
                server.let_go(xid, Place::Waits, None);
            }
        }
        if let At::Claims(_, _, Some(Claimed { rows: Some(rows), .. })) = life.at {
            server.let_go(rows.xid, Place::Waits, None);
        }
    }

    pub(super) fn core(&self) -> Option<&Core> {
        self.lives.as_ref().map(|life| &life.core)
    }

    pub(super) fn serves(&self, kind: usize) -> bool {
        self.lives.is_some() && self.kinds.contains(&kind)
    }

    /// What others know that it serves.
    pub(super) fn announces(&self) -> impl Iterator<Item = usize> + '_ {
        self.kinds.iter().copied().filter(|_| self.lives.as_ref().is_some_and(|life| life.notifications.is_some()))
    }

    pub(super) fn is_notified(&mut self) {
        if let Some(Life { notifications: Some(count), .. }) = &mut self.lives {
            *count += 1;
        }
    }

    pub(super) fn has_notifications(&self) -> bool {
        self.lives.as_ref().is_some_and(|life| life.notifications.is_some_and(|count| count > 0))
    }

    /// All that have come meanwhile are one wake.
    pub(super) fn hear(&mut self) {
        if self.has_notifications()
            && let Some(life) = &mut self.lives
        {
            life.notifications = Some(0);
            life.wake(Reason::Notification);
        }
    }

    pub(super) fn deafen(&mut self) {
        self.lives.iter_mut().for_each(|life| life.notifications = None);
    }

    pub(super) fn listen(&mut self) {
        if let Some(life) = self.lives.as_mut().filter(|life| life.notifications.is_none()) {
            life.notifications = Some(0);
            life.wake(Reason::Doubt);
        }
    }

    pub(super) fn broker(&mut self, open: bool) {
        if let Some(life) = self.lives.as_mut().filter(|life| life.broker_open != open) {
            life.broker_open = open;
            if open {
                life.wake(Reason::Broker);
            }
        }
    }

    /// Until when it sleeps, if it does, and could do otherwise, and nothing that was told to it is on its way.
    pub(super) fn sleeps_undisturbed(&self) -> Option<u64> {
        let life = self.lives.as_ref()?;
        let At::Sleeps(until, _) = life.at else { return None };
        let undisturbed = life.broker_open
            && life.woken.is_none()
            && life.notifications == Some(0)
            && life.beside.iter().all(|work| !matches!(work, Beside::Delivery { .. }))
            && life.core.rest.is_none_or(|rest| rest.until < moment(until, life.began));
        undisturbed.then_some(until)
    }

    /// Until when it sleeps, if it does, or waits to claim.
    pub(super) fn until(&self) -> Option<u64> {
        let life = self.lives.as_ref()?;
        match &life.at {
            At::Sleeps(until, _) => Some(*until),
            At::Claims(_, wanted, None) => Some(life.world(wanted.not_before)),
            _ => None,
        }
    }

    pub(super) fn beside(&self) -> usize {
        self.lives.as_ref().map_or(0, |life| life.beside.len())
    }

    /// Whether it goes on when it may.
    pub(super) fn is_busy(&self, now: u64) -> bool {
        self.lives.as_ref().is_some_and(|life| match &life.at {
            At::Sleeps(until, _) => *until <= now || life.woken.is_some(),
            At::Claims(_, wanted, None) => life.world(wanted.not_before) <= now,
            _ => true,
        })
    }

    /// Whether its next stage is a decision of its own, which no other step can change.
    pub(super) fn is_by_itself(&self) -> bool {
        self.lives
            .as_ref()
            .is_some_and(|life| matches!(life.at, At::Decides | At::Looks(_, Some(_)) | At::Claims(_, _, Some(_))))
    }

    pub(super) fn time_passes(&mut self, now: u64) {
        self.lives.iter_mut().filter(|life| now > life.began).for_each(|life| life.turns = 0);
    }

    /// The loop goes on.
    pub(super) fn run(&mut self, now: u64, server: &mut Server) -> Result<(), String> {
        let kinds: Vec<usize> = self.kinds.iter().copied().collect();
        let Some(life) = &mut self.lives else { return Ok(()) };
        let moment = moment(now, life.began);
        let event = match &mut life.at {
            At::Decides => {
                life.decide(moment);
                life.turns += 1;
                return if life.turns > TURNS { Err("it turns without sleeping".to_owned()) } else { Ok(()) };
            }
            At::Looks(_, seen @ None) => {
                *seen = Some(server.look(now, &kinds, life.core.mark(), false));
                return Ok(());
            }
            At::Claims(_, wanted, _) if moment < wanted.not_before => return Ok(()),
            At::Claims(asked_at, wanted, claimed @ None) => {
                let asked_at = (*asked_at).max(wanted.not_before);
                *claimed = Some(server.claim(now, asked_at, &kinds, wanted));
                return Ok(());
            }
            At::Looks(asked_at, Some(look)) => Event::Looked(*asked_at, look.clone()),
            At::Claims(_, wanted, Some(claimed)) => {
                if let Some(rows) = claimed.rows {
                    let load = Load { turn: wanted.turn, large: false };
                    life.beside.push(Beside::Delivery { load, xid: rows.xid });
                }
                Event::Claimed(*claimed)
            }
            At::Sleeps(until, why) => match life.woken.take() {
                Some(reasons) => Event::Woken(reasons),
                None if *until <= now => Event::Woken((*why).into()),
                None => return Ok(()),
            },
        };
        life.core.handle(moment, event);
        life.at = At::Decides;
        Ok(())
    }

    /// Work beside the loop goes on. Whether it notifies.
    pub(super) fn run_beside(
        &mut self,
        now: u64,
        server: &mut Server,
        work: usize,
        ends: Ends,
        announced: &[usize],
    ) -> bool {
        let kinds: Vec<usize> = self.kinds.iter().copied().collect();
        let Some(life) = self.lives.as_mut().filter(|life| work < life.beside.len()) else { return false };
        // As in the loop, what has ended is told while it sleeps.
        if let At::Looks(..) | At::Claims(..) | At::Decides = life.at {
            return false;
        }
        let moment = moment(now, life.began);
        let event = match life.beside.remove(work) {
            Beside::Delivery { load, xid } => {
                let (place, slot, end) = match ends {
                    Ends::Settled => (Place::Done, None, End::Settled { some_left: true, some_stay: false }),
                    Ends::Again(ms) => {
                        let slot = server.now(now + ms);
                        (Place::Waits, Some(slot), End::Settled { some_left: false, some_stay: true })
                    }
                    Ends::Unsettled => (Place::Waits, None, End::Unsettled),
                    Ends::Refused => {
                        (Place::Waits, Some(server.now(now + 1_000)), End::Refused { why: String::new(), rest: true })
                    }
                };
                server.let_go(xid, place, slot);
                Event::DeliveryEnded(load, end)
            }
            Beside::Hold => Event::Held(server.hold(now, life.core.mark(), announced)),
            Beside::Release(kinds) => {
                server.release(now, &kinds);
                Event::Released
            }
            Beside::Sweep { asked_at, mark, seen: None } => {
                let seen = Some(server.look(now, &kinds, mark, true));
                life.beside.push(Beside::Sweep { asked_at, mark, seen });
                return false;
            }
            Beside::Sweep { asked_at, seen: Some(look), .. } => Event::Swept(Some((asked_at, look))),
        };
        life.turns = 0;
        life.core.handle(moment, event);
        life.at = At::Decides;
        false
    }

    /// PostgreSQL ends all its sessions: the statements under way fail, and the transactions are rolled back.
    pub(super) fn fail(&mut self, now: u64, server: &mut Server) {
        let Some(life) = &mut self.lives else { return };
        let moment = moment(now, life.began);
        life.doubt += 1;
        life.turns = 0;
        match std::mem::replace(&mut life.at, At::Decides) {
            At::Looks(..) => life.core.handle(moment, Event::Failed(Work::Asking)),
            At::Claims(_, _, claimed) => {
                if let Some(rows) = claimed.and_then(|claimed| claimed.rows) {
                    server.let_go(rows.xid, Place::Waits, None);
                }
                life.core.handle(moment, Event::Failed(Work::Asking));
            }
            other => life.at = other,
        }
        if let At::Sleeps(..) = life.at {
            for work in std::mem::take(&mut life.beside) {
                let event = match work {
                    Beside::Delivery { load, xid } => {
                        server.let_go(xid, Place::Waits, None);
                        Event::DeliveryEnded(load, End::Failed)
                    }
                    Beside::Hold => Event::Failed(Work::Holding),
                    Beside::Release(_) => Event::Failed(Work::Releasing),
                    Beside::Sweep { .. } => Event::Swept(None),
                };
                life.core.handle(moment, event);
                life.at = At::Decides;
            }
        }
    }
}

impl Life {
    fn wake(&mut self, reason: Reason) {
        let before = self.woken.unwrap_or_default();
        self.woken = Some(before.and(reason.into()));
        self.turns = 0;
    }

    /// A moment of this life, in ms of the world.
    fn world(&self, moment: Moment) -> u64 {
        // A sleep is over when its time has come, and not before.
        let ms = moment.as_micros().div_ceil(1_000);
        u64::try_from(ms).unwrap_or(u64::MAX).saturating_add(self.began).saturating_sub(START)
    }

    fn decide(&mut self, moment: Moment) {
        let outside = Outside { broker_open: self.broker_open, connections: 10, doubt: self.doubt, knows_kinds: true };
        self.at = match self.core.next(moment, outside) {
            Action::Look => At::Looks(moment, None),
            Action::Claim(wanted) => At::Claims(moment, wanted, None),
            Action::Sleep(until, why) => At::Sleeps(self.world(until), why),
            Action::Hold => self.begin(Beside::Hold),
            Action::Release(kinds) => self.begin(Beside::Release(kinds)),
            Action::Sweep => {
                let mark = self.core.mark();
                self.begin(Beside::Sweep { asked_at: moment, mark, seen: None })
            }
        };
    }

    fn begin(&mut self, work: Beside) -> At {
        self.beside.push(work);
        At::Decides
    }
}
