//! The loop: looks at the queue, claims what is due, delivers it, and waits for a reason to look again.
//!
//! Woken by: a notification, the next row's due time, the end of a pause, the broker coming back, a lane that ended, the
//! sweep. Guarantees: a row leaves the queue only in the transaction that locked it, after its message was confirmed or
//! its end decided; while the broker is away nothing is claimed; an error of a server loses nothing and is tried again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::backoff::RECONNECT;
use crate::broker::Broker;
use crate::delivery::{Delivered, Delivery};
use crate::health::Health;
use crate::plugins::Registry;
use crate::polling::Polling;
use crate::store::{Look, Store, StoreError};
use crate::telemetry::{count_held, count_wakes, note_next_due};
use crate::wake::{Outlook, Reason, Wake, wait};

/// Batches that are delivered side by side: while one waits for the broker, another keeps the database busy.
pub const LANES: u32 = 3;

/// What the dispatcher works with.
#[expect(missing_debug_implementations, reason = "the plugins have none")]
pub struct Dispatcher {
    /// Where the rows are.
    pub store: Store,
    /// Where the messages go.
    pub broker: Arc<Broker>,
    /// Reasons to look again.
    pub wake: Arc<Wake>,
    /// What builds the events.
    pub plugins: Arc<Registry>,
    /// The longest time between two looks.
    pub sweep: Duration,
    /// Failures of a plugin after which a row is parked.
    pub max_attempts: u32,
    /// Told of every sign of life.
    pub health: Arc<Health>,
}

/// How many rows were held, by kind.
#[derive(Default)]
struct Held {
    /// Since no daemon serves it.
    unserved: BTreeMap<String, i64>,
    /// Since it is paused.
    paused: BTreeMap<String, i64>,
}

/// What the loop remembers between two looks.
#[derive(Default)]
struct State {
    lanes: JoinSet<Result<Delivered, StoreError>>,
    /// Takes rows that cannot be claimed out of the queue.
    hold: JoinSet<Result<Held, StoreError>>,
    /// Puts held rows back into the queue, if some were found whose plugin has arrived or whose pause is over.
    release: JoinSet<Result<u64, StoreError>>,
    /// The last look, and when it was asked for.
    look: Option<(Look, Instant)>,
    /// What promises the looks have seen, and for how long at most to wait for the sake of one.
    polling: (Polling, Option<Duration>),
    /// When the whole queue was last looked at, from its very beginning.
    swept: Option<Instant>,
    /// The last claim came to nothing although rows are due: nothing is claimed until something has happened.
    stuck: bool,
    /// Such claims in a row.
    empty_claims: u32,
    /// Looks and batches in a row that a server did not see through.
    failures: u32,
    /// Nothing is tried before this instant.
    not_before: Option<Instant>,
}

impl Dispatcher {
    /// Runs until `shutdown`, and then until the batches in flight have ended.
    pub async fn run(self, shutdown: CancellationToken) {
        let delivery = Arc::new(Delivery {
            store: self.store.clone(),
            broker: Arc::clone(&self.broker),
            plugins: Arc::clone(&self.plugins),
            max_attempts: self.max_attempts,
        });
        let mut state = State::default();
        loop {
            self.health.dispatcher.beat();
            let (wait, why) = self.look_and_start(&delivery, &mut state).await;
            let reasons = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(ended) = state.lanes.join_next() => {
                    self.lane_ended(ended, &delivery, &mut state);
                    Reason::Lane.into()
                }
                Some(ended) = state.hold.join_next() => {
                    state.hold_ended(ended);
                    Reason::Held.into()
                }
                Some(ended) = state.release.join_next() => {
                    state.release_ended(ended);
                    Reason::Released.into()
                }
                reasons = self.wake.woken() => {
                    state.go_on();
                    reasons
                }
                () = tokio::time::sleep(wait) => {
                    state.stuck = false;
                    why.into()
                }
            };
            count_wakes(reasons);
        }
        state.hold.abort_all();
        state.release.abort_all();
        while state.lanes.join_next().await.is_some() {}
    }

    /// Looks at the queue, starts a lane if rows are due, and says how long to wait, and why to look then.
    async fn look_and_start(&self, delivery: &Arc<Delivery>, state: &mut State) -> (Duration, Reason) {
        if let Some(left) = state.resting() {
            return (left, Reason::Again);
        }
        if !self.broker.is_open() {
            // Its return is a wake.
            return (self.sweep, Reason::Sweep);
        }
        // Another look would find the same rows due, and the loop would turn as fast as it can.
        if let Some((look, asked_at)) = state.look.as_ref().filter(|_| state.stuck) {
            return self.wait(look.outlook, *asked_at, state);
        }
        let asked_at = Instant::now();
        let plugins = self.plugins.current();
        let sweep = state.until_sweep(self.sweep).is_zero();
        let look = match self.store.look(plugins.kinds(), sweep).await {
            Ok(look) => look,
            Err(error) => return (state.failed(&error), Reason::Again),
        };
        if sweep {
            state.swept = Some(asked_at);
        }
        state.polling.1 = state.polling.0.looked(look.promise);
        if !look.held_for_us.is_empty() && state.release.is_empty() {
            // Beside the loop, since there may be millions; the first of them are due before the last are released.
            let (store, wake, kinds) = (self.store.clone(), Arc::clone(&self.wake), look.held_for_us.clone());
            state.release.spawn(async move { store.release_held(&kinds, || wake.wake(Reason::Released)).await });
        }
        let outlook = look.outlook;
        note_next_due(outlook.next_in);
        state.look = Some((look, asked_at));
        if outlook.due {
            state.start(delivery);
        } else {
            state.failures = 0;
        }
        self.wait(outlook, asked_at, state)
    }

    fn wait(&self, outlook: Outlook, asked_at: Instant, state: &State) -> (Duration, Reason) {
        wait(outlook, asked_at.elapsed(), state.empty_claims, state.polling.1, state.until_sweep(self.sweep))
    }

    fn lane_ended(
        &self,
        ended: Result<Result<Delivered, StoreError>, tokio::task::JoinError>,
        delivery: &Arc<Delivery>,
        state: &mut State,
    ) {
        match ended {
            Ok(Ok(Delivered::Nothing)) => {
                state.stuck = true;
                state.empty_claims = state.empty_claims.saturating_add(1);
                self.start_holding(state);
            }
            // If the broker is away, its return is a wake. If it is there and confirms nothing, asking it again and again
            // would only make duplicates.
            Ok(Ok(Delivered::Unsettled)) if self.broker.is_open() => drop(state.rest()),
            Ok(Ok(Delivered::Unsettled)) => {}
            Ok(Ok(Delivered::Settled { more })) => {
                state.go_on();
                state.failures = 0;
                state.not_before = None;
                // However much there is to deliver, paused rows must not stay where each claim steps over them.
                if state.look.as_ref().is_some_and(|(look, _)| look.paused_first) {
                    self.start_holding(state);
                }
                // More is due than one lane takes at a time: two go on where one ended.
                if more && self.broker.is_open() {
                    state.start(delivery);
                    state.start(delivery);
                }
            }
            Ok(Err(error)) => drop(state.failed(&error)),
            Err(panic) => {
                tracing::error!(error = &panic as &dyn std::error::Error, "a lane panicked, its rows stay");
                state.rest();
            }
        }
    }

    /// Takes what we cannot claim out of the queue, beside the loop, since there may be millions.
    fn start_holding(&self, state: &mut State) {
        if state.hold.is_empty() {
            let (store, plugins) = (self.store.clone(), self.plugins.current());
            state.hold.spawn(async move { hold(&store, plugins.kinds()).await });
        }
    }
}

/// Holds what is due, and is paused or not served, batch by batch.
async fn hold(store: &Store, our_kinds: &[String]) -> Result<Held, StoreError> {
    let mut held = Held::default();
    while add(&mut held.paused, store.hold_paused(our_kinds).await?) {}
    while add(&mut held.unserved, store.hold_unserved(our_kinds).await?) {}
    Ok(held)
}

/// Adds the rows of a batch, and says whether there were any.
fn add(held: &mut BTreeMap<String, i64>, batch: Vec<(String, i64)>) -> bool {
    let some = !batch.is_empty();
    for (kind, rows) in batch {
        *held.entry(kind).or_default() += rows;
    }
    some
}

impl State {
    /// Starts a lane, if one is free. After a failure there is only one, until it succeeds.
    fn start(&mut self, delivery: &Arc<Delivery>) {
        let lanes = if self.failures == 0 { LANES as usize } else { 1 };
        if self.lanes.len() < lanes {
            let delivery = Arc::clone(delivery);
            self.lanes.spawn(async move { delivery.deliver_batch().await });
        }
    }

    /// Something has happened: another claim may come to something.
    fn go_on(&mut self) {
        self.stuck = false;
        self.empty_claims = 0;
    }

    /// Rows were held, or there were none.
    fn hold_ended(&mut self, ended: Result<Result<Held, StoreError>, tokio::task::JoinError>) {
        match ended {
            Ok(Ok(Held { unserved, paused })) => {
                if !unserved.is_empty() || !paused.is_empty() {
                    self.go_on();
                }
                for (kind, rows) in unserved.iter().chain(&paused) {
                    count_held(kind, rows.unsigned_abs());
                }
                for (kind, rows) in unserved {
                    warn!(schedule.kind = kind, rows, "held rows of the kind {kind:?}: no plugin serves it");
                }
                for (kind, rows) in paused {
                    debug!(schedule.kind = kind, rows, "held rows of the kind {kind:?}: it is paused");
                }
            }
            Ok(Err(error)) => drop(self.failed(&error)),
            Err(panic) => {
                tracing::error!(error = &panic as &dyn std::error::Error, "holding rows panicked");
                self.rest();
            }
        }
    }

    /// Held rows were released, or some of them.
    fn release_ended(&mut self, ended: Result<Result<u64, StoreError>, tokio::task::JoinError>) {
        match ended {
            Ok(Ok(released)) => {
                self.go_on();
                info!(released, "released held rows: a plugin serves them, and their kind is not paused");
            }
            Ok(Err(error)) => drop(self.failed(&error)),
            Err(panic) => {
                tracing::error!(error = &panic as &dyn std::error::Error, "releasing held rows panicked");
                self.rest();
            }
        }
    }

    /// The database did not do it: a line for the operator, and a rest.
    fn failed(&mut self, error: &StoreError) -> Duration {
        warn!(error = error as &dyn std::error::Error, "the database cannot be used, trying again");
        self.rest()
    }

    /// How long until the next sweep is due, if one is every `sweep`.
    fn until_sweep(&self, sweep: Duration) -> Duration {
        self.swept.map_or(Duration::ZERO, |swept| sweep.saturating_sub(swept.elapsed()))
    }

    /// How long nothing is to be tried.
    fn resting(&self) -> Option<Duration> {
        let left = self.not_before?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// Tries nothing for a while, longer each time until a batch succeeds. Returns for how long.
    fn rest(&mut self) -> Duration {
        // Lanes that fail together fail for the same reason.
        if let Some(left) = self.resting() {
            return left;
        }
        let delay = RECONNECT.jittered(self.failures);
        self.failures = self.failures.saturating_add(1);
        self.not_before = Some(Instant::now() + delay);
        delay
    }
}
