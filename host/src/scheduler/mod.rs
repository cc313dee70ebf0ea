//! The scheduler: the loop that carries out what the [core](tidings_core) decides and reports the results to it, and the
//! parts around the loop. [`delivery`] delivers a claimed batch, [`listener`] turns notifications into wakes, [`hold`] takes
//! rows out of the queue that no daemon may deliver now, [`canary`] tests the whole path.
//!
//! A row leaves the queue only in the transaction that locked it, after its message was confirmed or its end was decided.
//! There is no lease, no status column and no rescuer: a dropped claim closes its connection, PostgreSQL rolls back, and the
//! row is due again. While RabbitMQ is away nothing is claimed. An error of a server loses nothing and is tried again.
//!
//! The loop must never decide anything: when to look, claim or sleep is decided in host/core, where a model checks it. It
//! must never contain SQL, AMQP or wasmtime: these are in the store, the broker and the plugins. Deliveries, holding,
//! releasing and sweeps run beside the loop; the core hears of their ends only while the loop sleeps.
//!
//! How a row that is due now is delivered:
//! 1. The INSERT's statement trigger finds a row that is due within 30 s, and notifies. At the commit the listener wakes the
//!    loop.
//! 2. The loop looks: one statement says that rows are due.
//! 3. The loop claims: BEGIN and up to 200 rows with `FOR UPDATE SKIP LOCKED`, or as many as have 2 MiB together. The same
//!    answer says when the next row is due. If the claim was full, the next claims take up to 500 rows each, for as many of
//!    the three lanes as are free.
//! 4. A lane delivers the batch: it builds with one store for each plugin, which was made before or has served small batches,
//!    publishes on a channel of its own, awaits each confirm, moves the confirmed rows into the history with one statement,
//!    and commits.
//! 5. The loop sleeps until the next row is due, and claims then. If no row becomes due, it sleeps until the next sweep. A look
//!    follows 0.1 s after a claim, so that it does not delay the next claim.
//!
//! After a notification, the loop claims at once and looks afterwards, if a row was due at the notification before.

pub mod canary;
mod clock_steps;
pub mod delivery;
pub mod hold;
pub mod listener;
pub mod look_notes;
pub mod notification_rate;
mod outcomes;
pub mod precise_timer;
mod relay;
pub mod sent_rows;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tidings_core::reason::Reason;
use tidings_core::{
    Action, Batch, ClaimRange, ClaimRequest, ClaimResult, Core, DeliveryEnd, Environment, Event, Lane, Moment,
    Operation,
};
use time::OffsetDateTime;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::broker::Broker;
use crate::model::display::show;
use crate::model::health::Health;
use crate::model::wake::Wake;
use crate::plugins::Registry;
use crate::store;
use crate::store::{Store, StoreError};
use crate::telemetry::{count_clock_step, count_wakes, note_next_due};
use clock_steps::{ClockSteps, Reading};
use delivery::{BatchOutcome, Delivery};
use hold::hold;
use look_notes::LookNotes;
use precise_timer::PreciseTimer;
use sent_rows::SentRows;

/// The subject of [`Health::trouble`] while PostgreSQL refuses to finish rows.
const FINISHING: &str = "finishing rows";
/// The subject of [`Health::note`] for an hour after PostgreSQL's clock was set.
const CLOCK: &str = "clock";
/// How long that is noted.
const CLOCK_NOTED_FOR: Duration = Duration::from_hours(1);

/// The parts and settings that the loop needs.
#[expect(missing_debug_implementations, reason = "the plugins have none")]
pub struct Scheduler {
    /// The database with the queue.
    pub store: Store,
    /// The broker that takes the messages.
    pub broker: Arc<Broker>,
    /// Wakes the loop.
    pub wake: Arc<Wake>,
    /// The plugins that build the events.
    pub plugins: Arc<Registry>,
    /// The sweep interval: the longest time between two looks.
    pub sweep: Duration,
    /// A row is parked after this many failures of its plugin.
    pub max_attempts: u32,
    /// How many late rows a second are claimed; `None` = as many as can be delivered.
    pub drain_rate: Option<u32>,
    /// Gets a heartbeat each time the loop goes round.
    pub health: Arc<Health>,
    /// For the due times of rows.
    pub timer: PreciseTimer,
    /// Gets what looks tell others than the core.
    pub notes: Arc<LookNotes>,
}

/// The running loop, and the tasks beside it.
struct SchedulerLoop {
    parts: Scheduler,
    started_at: Instant,
    delivery: Arc<Delivery>,
    clock_steps: ClockSteps,
    /// When the clock of PostgreSQL was last found to have been set, while that is noted.
    clock_step_at: Option<Instant>,
    /// Deliveries. When the loop ends, it waits for them.
    deliveries: JoinSet<Event>,
    /// Holding, releasing and sweeps. When the loop ends, they are aborted.
    background: JoinSet<Event>,
}

impl Scheduler {
    /// Runs until `shutdown`, and then until all deliveries have ended.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut core = Core::new(self.sweep, self.drain_rate);
        let mut running = SchedulerLoop::new(self);
        loop {
            running.parts.health.dispatcher.beat();
            let event = match core.next(running.now(), running.environment()) {
                Action::Look => Some(running.look(core.mark()).await),
                Action::Claim(request) => Some(running.claim(request).await),
                Action::Hold => running.hold(),
                Action::Release(kinds) => running.release(kinds),
                Action::Sweep => running.sweep(core.mark()),
                Action::Sleep(until, reason) => {
                    let sleep = running.started_at + until;
                    tokio::select! {
                    biased;
                    () = shutdown.cancelled() => break,
                    Some(Ok(ended)) = running.deliveries.join_next() => Some(ended),
                    Some(Ok(ended)) = running.background.join_next() => Some(ended),
                    reasons = running.parts.wake.woken() => Some(Event::Woken(reasons)),
                    () = running.parts.timer.sleep_until(sleep) => Some(Event::Woken(reason.into())),
                    }
                }
            };
            if let Some(event) = event {
                count_wake(&event);
                core.handle(running.now(), event);
            }
            running.report_state(&core);
        }
        running.background.abort_all();
        while running.deliveries.join_next().await.is_some() {}
    }
}

impl SchedulerLoop {
    fn new(parts: Scheduler) -> Self {
        let (broker, max_attempts) = (Arc::clone(&parts.broker), parts.max_attempts);
        let relay_targets = Arc::new(broker.intakes().iter().map(|intake| intake.to.clone()).collect());
        let delivery = Arc::new(Delivery { broker, max_attempts, relay_targets, sent_rows: SentRows::default() });
        let (deliveries, background) = (JoinSet::new(), JoinSet::new());
        let clock_steps = ClockSteps::default();
        Self { parts, started_at: Instant::now(), delivery, clock_steps, clock_step_at: None, deliveries, background }
    }

    fn now(&self) -> Moment {
        self.started_at.elapsed()
    }

    fn moment(&self, at: Instant) -> Moment {
        at.saturating_duration_since(self.started_at)
    }

    fn environment(&self) -> Environment {
        let Scheduler { store, broker, plugins, .. } = &self.parts;
        Environment {
            broker_open: broker.is_open(),
            connections: store.connections_for_claims(),
            doubt: store.last_doubt(),
            knows_kinds: plugins.is_complete(),
        }
    }

    async fn look(&mut self, mark: Option<OffsetDateTime>) -> Event {
        let (asked_at, asked) = (self.now(), Instant::now());
        match self.parts.store.look(self.parts.plugins.current().kinds(), mark).await {
            Ok(seen) => {
                self.parts.notes.note(asked, &seen);
                let look = seen.look;
                self.check_clock(asked_at, look.at);
                note_next_due(look.outlook.next_in);
                if !look.outlook.due {
                    // No row is due that could show whether RabbitMQ takes messages again.
                    self.parts.broker.clear_publish_refusal();
                }
                Event::Looked(asked_at, look)
            }
            Err(error) => report_failure(Operation::LookOrClaim, &error),
        }
    }

    async fn claim(&mut self, request: ClaimRequest) -> Event {
        let ClaimRequest { range, limit, since, bounded, no_large, careful } = request;
        let plugins = self.parts.plugins.current();
        let rows = match range {
            ClaimRange::Turns => store::Rows::Turns,
            ClaimRange::ByKind => store::Rows::Due { since, order: store::Order::Kind },
            ClaimRange::Oldest | ClaimRange::Newest(_) if bounded => {
                store::Rows::Due { since, order: store::Order::BoundedSlot }
            }
            ClaimRange::Oldest | ClaimRange::Newest(_) => store::Rows::Due { since, order: store::Order::Slot },
        };
        let wanted = store::Wanted { rows, limit, no_large };
        let claimed = match self.parts.store.claim(plugins.kinds(), wanted).await {
            Ok(claimed) => claimed,
            Err(error) => return report_failure(Operation::LookOrClaim, &error),
        };
        let store::Claimed { claim, outlook, behind, at, asked_at } = claimed;
        let batch = claim.as_ref().map(|claim| {
            let rows = u32::try_from(claim.rows.len()).unwrap_or(u32::MAX);
            Batch { xid: claim.xid, large: claim.large, rows }
        });
        if let Some(claim) = claim {
            let lane = Lane { range, large: claim.large };
            let (delivery, catch_ups) = (Arc::clone(&self.delivery), self.parts.notes.catch_ups());
            let delivered = async move {
                let delivered = delivery.deliver(claim, &plugins, &catch_ups, careful).await;
                Event::DeliveryEnded(lane, delivery_end(delivered))
            };
            let panicked = Event::DeliveryEnded(lane, DeliveryEnd::Panicked);
            spawn_in(&mut self.deliveries, "a delivery", panicked, delivered);
        }
        let asked_at = self.moment(asked_at);
        self.check_clock(asked_at, at);
        Event::Claimed(ClaimResult { range, asked_at, at, outlook, behind, batch })
    }

    /// Reports if the database's clock, which showed `at` after it was asked at this moment, was set since it was last read.
    fn check_clock(&mut self, asked_at: Moment, at: OffsetDateTime) {
        if let Some(step) = self.clock_steps.note(Reading { asked_at, answered_at: self.now(), at }) {
            count_clock_step();
            self.clock_step_at = Some(Instant::now());
            let how = if step.is_negative() { "back" } else { "forward" };
            let seconds = step.abs().as_seconds_f64();
            let sentence = format!(
                "the clock of PostgreSQL was set {how} by {seconds:.0} s: rows are due, and expire, by what it shows now (or this machine stood still meanwhile)"
            );
            warn!("{sentence}");
            self.parts.health.note(CLOCK, Some(format!("{sentence}, noticed when it showed {}", show(at))));
        } else if self.clock_step_at.take_if(|step_at| step_at.elapsed() > CLOCK_NOTED_FOR).is_some() {
            self.parts.health.note(CLOCK, None);
        }
    }

    fn hold(&mut self) -> Option<Event> {
        let (store, plugins) = (self.parts.store.clone(), self.parts.plugins.current());
        spawn_in(&mut self.background, "holding rows", Event::Failed(Operation::Hold), async move {
            match hold(&store, plugins.kinds()).await {
                Ok(held) => Event::Held(held.report()),
                Err(error) => report_failure(Operation::Hold, &error),
            }
        });
        None
    }

    fn release(&mut self, kinds: Vec<String>) -> Option<Event> {
        let (store, wake) = (self.parts.store.clone(), Arc::clone(&self.parts.wake));
        spawn_in(&mut self.background, "releasing held rows", Event::Failed(Operation::Release), async move {
            // There may be millions of rows, so each batch wakes the loop: its rows are due before the last are released.
            match store.release_held(&kinds, || wake.wake(Reason::Released)).await {
                Ok(released) => {
                    info!(released, "released held rows: a plugin serves them, and their kind is not paused");
                    Event::Released
                }
                Err(error) => report_failure(Operation::Release, &error),
            }
        });
        None
    }

    fn sweep(&mut self, mark: Option<OffsetDateTime>) -> Option<Event> {
        let (store, plugins, asked_at) = (self.parts.store.clone(), self.parts.plugins.current(), self.now());
        let (notes, asked) = (Arc::clone(&self.parts.notes), Instant::now());
        spawn_in(&mut self.background, "a sweep", Event::Swept(None), async move {
            match store.sweep(plugins.kinds(), mark).await {
                Ok(seen) => {
                    notes.note(asked, &seen);
                    Event::Swept(Some((asked_at, seen.look)))
                }
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "a sweep failed");
                    Event::Swept(None)
                }
            }
        });
        None
    }

    /// Reports the core's state to the other parts: the low-water mark to the store, and a refusal of PostgreSQL to the
    /// health and the log.
    fn report_state(&self, core: &Core) {
        self.parts.store.set_low_water_mark(core.mark());
        let sentence = core
            .refusal()
            .map(|why| format!("PostgreSQL refuses to finish rows whose messages RabbitMQ has confirmed: {why}"));
        match (self.parts.health.trouble(FINISHING, sentence), core.refusal()) {
            (true, Some(why)) => warn!(
                why,
                "PostgreSQL refuses to finish rows whose messages RabbitMQ has confirmed: these are not sent again, and finishing them is tried ever less often"
            ),
            (true, None) => info!("PostgreSQL finishes rows again"),
            (false, _) => {}
        }
    }
}

/// Counts the wake, if an event ended a sleep.
fn count_wake(event: &Event) {
    count_wakes(match event {
        Event::Woken(reasons) => *reasons,
        Event::DeliveryEnded(..) => Reason::Lane.into(),
        Event::Held(_) | Event::Failed(Operation::Hold) => Reason::Held.into(),
        Event::Released | Event::Failed(Operation::Release) => Reason::Released.into(),
        Event::Looked(..) | Event::Claimed(_) | Event::Swept(_) | Event::Failed(Operation::LookOrClaim) => return,
    });
}

/// Starts a task beside the loop. It ends with an event even if it panics.
fn spawn_in(
    tasks: &mut JoinSet<Event>,
    name: &'static str,
    panicked: Event,
    task: impl Future<Output = Event> + Send + 'static,
) {
    tasks.spawn(AssertUnwindSafe(task).catch_unwind().map(move |ended| {
        ended.unwrap_or_else(|_| {
            error!("{name} panicked: its rows stay as they are");
            panicked
        })
    }));
}

/// Logs an error of the database, and makes it an event.
fn report_failure(operation: Operation, error: &StoreError) -> Event {
    warn!(error = error as &dyn std::error::Error, "the database cannot be used, trying again");
    Event::Failed(operation)
}

/// How a delivery ended, for the core. Logs an error of the database.
fn delivery_end(delivered: Result<BatchOutcome, StoreError>) -> DeliveryEnd {
    match delivered {
        Ok(BatchOutcome::Settled { some_left, some_stay }) => DeliveryEnd::Settled { some_left, some_stay },
        Ok(BatchOutcome::Unsettled) => DeliveryEnd::Unsettled,
        Ok(BatchOutcome::Refused { error, sent }) => DeliveryEnd::Refused { error, back_off: sent },
        Err(error) => {
            if let Some(refusal) = error.refusal() {
                return DeliveryEnd::Refused { error: refusal.to_owned(), back_off: true };
            }
            warn!(error = &error as &dyn std::error::Error, "the database cannot be used, trying again");
            DeliveryEnd::Failed
        }
    }
}
