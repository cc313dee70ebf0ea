//! A daemon in the model: its process runs the real core, and a loop that carries out the core's actions stage by stage.

use std::collections::BTreeSet;

use tidings_core::reason::Reason;
use tidings_core::{Core, DeliveryEnd, Environment, Event, Lane, Moment, Operation};

use super::invariant::Invariant;
use super::process::{BackgroundTask, ClaimStage, NotCompared, Process, Stage, Task};
use super::row::Place;
use super::server::Server;
use super::step::Ending;
use super::times::{DRAIN_RATE, SWEEP};

/// A daemon that serves some kinds, while its process runs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Daemon {
    number: usize,
    kinds: BTreeSet<usize>,
    process: Option<Process>,
}

impl Daemon {
    pub(super) fn new(number: usize, kinds: &[usize], now: u64) -> Self {
        let mut daemon = Self { number, kinds: kinds.iter().copied().collect(), process: None };
        daemon.start(now);
        daemon.load_plugins();
        daemon
    }

    pub(super) fn start(&mut self, now: u64) {
        self.process.get_or_insert_with(|| Process {
            // Every other daemon paces late rows.
            core: Core::new(Moment::from_millis(SWEEP), (self.number % 2 == 1).then_some(DRAIN_RATE)),
            started_at: now,
            stage: Stage::Deciding,
            background: Vec::new(),
            pending_wake: None,
            pending_notifications: Some(0),
            environment: Environment { broker_open: true, connections: 10, doubt: 0, knows_kinds: false },
            last_environment: Environment { broker_open: false, connections: 1, doubt: 0, knows_kinds: false },
            actions: 0,
            slowest_sweep: 0,
            statements: NotCompared(0),
            last_change: NotCompared((now, 0)),
            diary: None,
        });
    }

    /// Notes that all plugins are loaded.
    pub(super) fn load_plugins(&mut self) {
        if let Some(process) = self.process.as_mut().filter(|process| !process.environment.knows_kinds) {
            process.environment.knows_kinds = true;
            process.wake(Reason::Plugins);
        }
    }

    pub(super) fn kill(&mut self, now: u64, server: &mut Server) {
        if let Some(mut process) = self.process.take() {
            process.lose_sessions(now, server);
        }
    }

    pub(super) fn core(&self) -> Option<&Core> {
        self.process.as_ref().map(|process| &process.core)
    }

    pub(super) fn serves(&self, kind: usize) -> bool {
        self.process.is_some() && self.kinds.contains(&kind)
    }

    /// The kinds that other daemons know this daemon to serve.
    pub(super) fn announced_kinds(&self) -> impl Iterator<Item = usize> + '_ {
        self.kinds
            .iter()
            .copied()
            .filter(|_| self.process.as_ref().is_some_and(|process| process.pending_notifications.is_some()))
    }

    pub(super) fn notify(&mut self) {
        if let Some(Process { pending_notifications: Some(count), .. }) = &mut self.process {
            *count += 1;
        }
    }

    pub(super) fn has_notifications(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.pending_notifications.is_some_and(|count| count > 0))
    }

    /// Turns all notifications that have been sent meanwhile into one wake.
    pub(super) fn receive_notifications(&mut self) {
        if self.has_notifications()
            && let Some(process) = &mut self.process
        {
            process.pending_notifications = Some(0);
            process.wake(Reason::Notification);
        }
    }

    pub(super) fn lose_listener(&mut self) {
        self.process.iter_mut().for_each(|process| process.pending_notifications = None);
    }

    pub(super) fn restore_listener(&mut self) {
        if let Some(process) = self.process.as_mut().filter(|process| process.pending_notifications.is_none()) {
            process.pending_notifications = Some(0);
            process.wake(Reason::Doubt);
        }
    }

    pub(super) fn set_broker_open(&mut self, open: bool) {
        if let Some(process) = self.process.as_mut().filter(|process| process.environment.broker_open != open) {
            process.environment.broker_open = open;
            if open {
                process.wake(Reason::Broker);
            }
        }
    }

    pub(super) fn set_connections(&mut self, connections: usize) {
        self.process.iter_mut().for_each(|process| process.environment.connections = connections);
    }

    pub(super) fn add_doubt(&mut self) {
        self.process.iter_mut().for_each(|process| process.environment.doubt += 1);
    }

    /// Whether sessions were lost and the core has not been told yet, so that its mark proves nothing.
    pub(super) fn has_unreported_doubt(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.last_environment.doubt != process.environment.doubt)
    }

    /// Until when the daemon sleeps, if it could claim instead and no wake, notification or doubt is on its way to its core.
    pub(super) fn undisturbed_sleep_until(&self) -> Option<u64> {
        let process = self.process.as_ref()?;
        let Stage::Sleeping(until, _) = process.stage else { return None };
        let core = &process.core;
        let max_lanes = if core.refusal().is_some() || core.backs_off_until().is_some() { 1 } else { 3 };
        let undisturbed = process.environment.broker_open
            && process.pending_wake.is_none()
            && process.pending_notifications == Some(0)
            && !self.has_unreported_doubt()
            && self.lanes().count() < max_lanes.min(process.last_environment.connections)
            && core.backs_off_until().is_none_or(|backs_off_until| process.world_ms(backs_off_until) < until);
        undisturbed.then_some(until)
    }

    /// The busy lanes.
    pub(super) fn lanes(&self) -> impl Iterator<Item = Lane> + '_ {
        self.process.iter().flat_map(Process::lanes)
    }

    /// Until when the daemon sleeps, if it does.
    pub(super) fn sleeps_until(&self) -> Option<u64> {
        let process = self.process.as_ref()?;
        match &process.stage {
            Stage::Sleeping(until, _) => Some(*until),
            _ => None,
        }
    }

    /// Within how many ms after the last fault the daemon finds a row that only a sweep can find.
    pub(super) fn finds_within_ms(&self, now: u64) -> u64 {
        let Some(process) = &self.process else { return 0 };
        let backs_off = process.core.backs_off_until().map_or(0, |until| process.world_ms(until).saturating_sub(now));
        backs_off + 2 * SWEEP.max((100 * process.slowest_sweep).min(600_000)) + 2_000
    }

    /// Whether the core still remembers that a server has failed, or that PostgreSQL refuses to finish rows.
    pub(super) fn remembers_failure(&self) -> bool {
        self.core().is_some_and(|core| core.backs_off_until().is_some() || core.refusal().is_some())
    }

    pub(super) fn statements(&self) -> u32 {
        self.process.as_ref().map_or(0, |process| process.statements.0)
    }

    pub(super) fn background_tasks(&self) -> usize {
        self.process.as_ref().map_or(0, |process| process.background.len())
    }

    /// Whether the loop has something to do now.
    pub(super) fn can_continue(&self, now: u64) -> bool {
        self.process.as_ref().is_some_and(|process| match &process.stage {
            Stage::Sleeping(until, _) => *until <= now || process.pending_wake.is_some(),
            _ => true,
        })
    }

    /// Whether the loop's next stage changes nothing that another daemon or writer could see, while no time passes.
    pub(super) fn can_continue_unnoticed(&self) -> bool {
        self.process.as_ref().is_some_and(|process| {
            matches!(
                process.stage,
                Stage::Deciding
                    | Stage::Looking(_, Some(_))
                    | Stage::Claiming(_, ClaimStage::Requested(_) | ClaimStage::Answered(_))
            )
        })
    }

    pub(super) fn reset_actions(&mut self) {
        self.process.iter_mut().for_each(|process| process.actions = 0);
    }

    pub(super) fn start_diary(&mut self) {
        self.process.iter_mut().for_each(|process| process.diary = Some(Vec::new()));
    }

    pub(super) fn diary(&self) -> &[(Moment, String)] {
        self.process.as_ref().and_then(|process| process.diary.as_deref()).unwrap_or_default()
    }

    /// Runs the loop to its next stage.
    pub(super) fn run(&mut self, now: u64, server: &mut Server) -> Result<(), (Invariant, String)> {
        let kinds: Vec<usize> = self.kinds.iter().copied().collect();
        let Some(process) = &mut self.process else { return Ok(()) };
        let moment = process.moment(now);
        let event = match &mut process.stage {
            Stage::Deciding => {
                process.decide(moment)?;
                return process.check_activity(now, server);
            }
            Stage::Looking(asked_at, None) => {
                let look = server.look(now, &kinds, process.core.mark(), false);
                process.stage = Stage::Looking(*asked_at, Some(look));
                return Ok(());
            }
            Stage::Claiming(request, ClaimStage::Requested(asked_at)) => {
                process.stage = Stage::Claiming(*request, ClaimStage::Begun(*asked_at, server.clock(now)));
                return Ok(());
            }
            Stage::Claiming(request, ClaimStage::Begun(asked_at, begun_at)) => {
                let result = server.claim(now, *asked_at, *begun_at, &kinds, request);
                process.stage = Stage::Claiming(*request, ClaimStage::Answered(result));
                return Ok(());
            }
            Stage::Looking(asked_at, Some(look)) => Event::Looked(*asked_at, look.clone()),
            Stage::Claiming(request, ClaimStage::Answered(result)) => {
                if let Some(batch) = result.batch {
                    let lane = Lane { range: request.range, large: batch.large };
                    let task = Task::Delivery { lane, xid: batch.xid };
                    process.background.push(BackgroundTask { task, session_lost: false });
                }
                Event::Claimed(*result)
            }
            Stage::Sleeping(until, reason) => match process.pending_wake.take() {
                Some(reasons) => {
                    process.last_change = NotCompared((now, process.statements.0));
                    Event::Woken(reasons)
                }
                None if *until <= now => Event::Woken((*reason).into()),
                None => return Ok(()),
            },
        };
        process.handle(moment, event);
        Ok(())
    }

    /// Runs the task with this index beside the loop. Returns whether PostgreSQL notifies.
    pub(super) fn run_background(
        &mut self,
        now: u64,
        server: &mut Server,
        index: usize,
        ending: Ending,
        announced: &BTreeSet<usize>,
    ) -> bool {
        let kinds: Vec<usize> = self.kinds.iter().copied().collect();
        let Some(process) = self.process.as_mut().filter(|process| index < process.background.len()) else {
            return false;
        };
        // As in the real loop, the core is told of ended tasks only while the loop sleeps.
        if let Stage::Looking(..) | Stage::Claiming(..) | Stage::Deciding = process.stage {
            return false;
        }
        let moment = process.moment(now);
        let BackgroundTask { task, session_lost } = process.background.remove(index);
        if let Task::Sweep { asked_at, .. } = &task {
            let took = u64::try_from(moment.saturating_sub(*asked_at).as_millis()).expect("short");
            process.slowest_sweep = process.slowest_sweep.max(took);
        }
        let fails = session_lost || matches!(ending, Ending::Unsettled | Ending::Refused);
        let event = match task {
            Task::Delivery { lane, .. } if session_lost => Event::DeliveryEnded(lane, DeliveryEnd::Failed),
            Task::Delivery { lane, xid } => {
                let (place, moved, end) = match ending {
                    Ending::Settled => {
                        (Place::Settled, None, DeliveryEnd::Settled { some_left: true, some_stay: false })
                    }
                    Ending::Retried(ms) => {
                        let slot = server.clock(now + ms);
                        (
                            Place::Waiting,
                            Some((self.number, slot)),
                            DeliveryEnd::Settled { some_left: false, some_stay: true },
                        )
                    }
                    Ending::Unsettled => (Place::Waiting, None, DeliveryEnd::Unsettled),
                    Ending::Panicked => (Place::Waiting, None, DeliveryEnd::Panicked),
                    Ending::Refused => {
                        let end = DeliveryEnd::Refused { error: "disk full".to_owned(), back_off: true };
                        (Place::Waiting, Some((self.number, server.clock(now + 1_000))), end)
                    }
                };
                server.end_claim(now, xid, place, moved);
                Event::DeliveryEnded(lane, end)
            }
            Task::Hold if fails => Event::Failed(Operation::Hold),
            Task::Hold => Event::Held(server.hold(now, process.core.mark(), &self.kinds, announced)),
            Task::Release(_) if fails => Event::Failed(Operation::Release),
            Task::Release(held_kinds) => {
                server.release(now, self.number, &held_kinds);
                Event::Released
            }
            Task::Sweep { .. } if fails => Event::Swept(None),
            Task::Sweep { asked_at, mark, look: None } => {
                let mut look = server.look(now, &kinds, mark, true);
                let notifies = matches!(ending, Ending::Retried(_)) && server.move_up(now, &mut look);
                let task = Task::Sweep { asked_at, mark, look: Some(look) };
                process.background.push(BackgroundTask { task, session_lost: false });
                return notifies;
            }
            Task::Sweep { asked_at, look: Some(look), .. } => Event::Swept(Some((asked_at, look))),
        };
        process.actions = 0;
        if !matches!(event, Event::Held(false) | Event::Swept(_)) {
            process.note_change(now);
        }
        process.handle(moment, event);
        false
    }

    /// PostgreSQL ends all sessions of the daemon but the listening one: statements fail, and transactions are rolled back.
    pub(super) fn lose_sessions(&mut self, now: u64, server: &mut Server) {
        let Some(process) = &mut self.process else { return };
        process.environment.doubt += 1;
        process.note_change(now);
        process.lose_sessions(now, server);
        if let Stage::Looking(..) | Stage::Claiming(..) = process.stage {
            process.handle(process.moment(now), Event::Failed(Operation::LookOrClaim));
        }
    }
}
