//! The loop: looks at the queue, claims what is due, delivers it, and waits for a reason to look again.
//!
//! Woken by: a notification, the next row's due time, the broker coming back, a lane that ended, the sweep. Guarantees:
//! a row leaves the queue only in the transaction that locked it, after its message was confirmed or its end decided;
//! while the broker is away nothing is claimed; an error of a server loses nothing and is tried again.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::backoff::RECONNECT;
use crate::broker::Broker;
use crate::delivery::{Delivered, Delivery};
use crate::health::Health;
use crate::plugins::Registry;
use crate::store::{Store, StoreError};
use crate::telemetry::{count_held, count_wakes, note_next_due};
use crate::wake::{Reason, Wake, wait};

/// Batches that are delivered side by side: while one waits for the broker, another keeps the database busy.
pub const LANES: u32 = 4;

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

/// What the loop remembers between two looks.
#[derive(Default)]
struct State {
    lanes: JoinSet<Result<Delivered, StoreError>>,
    /// Puts held rows back into the queue, if some were found whose plugin has arrived.
    release: JoinSet<Result<u64, StoreError>>,
    /// Claims in a row that came to nothing although rows were due.
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
                    self.lane_ended(ended, &delivery, &mut state).await;
                    Reason::Lane.into()
                }
                Some(ended) = state.release.join_next() => {
                    state.release_ended(ended);
                    Reason::Released.into()
                }
                reasons = self.wake.woken() => {
                    state.empty_claims = 0;
                    reasons
                }
                () = tokio::time::sleep(wait) => why.into(),
            };
            count_wakes(reasons);
        }
        state.release.abort_all();
        while state.lanes.join_next().await.is_some() {}
    }

    /// Looks at the queue, starts a lane if rows are due, and says how long to wait, and why to look then.
    async fn look_and_start(&self, delivery: &Arc<Delivery>, state: &mut State) -> (Duration, Reason) {
        if let Some(left) = state.paused() {
            return (left, Reason::Again);
        }
        if !self.broker.is_open() {
            // Its return is a wake.
            return (self.sweep, Reason::Sweep);
        }
        let asked_at = Instant::now();
        let plugins = self.plugins.current();
        let look = match self.store.look(plugins.kinds()).await {
            Ok(look) => look,
            Err(error) => return (state.failed(&error), Reason::Again),
        };
        if look.held_for_us && state.release.is_empty() {
            // Beside the loop, since there may be millions; the first of them are due before the last are released.
            let (store, wake) = (self.store.clone(), Arc::clone(&self.wake));
            state
                .release
                .spawn(async move { store.release_held(plugins.kinds(), || wake.wake(Reason::Released)).await });
        }
        let outlook = look.outlook;
        note_next_due(outlook.next_in);
        if outlook.due {
            state.start(delivery);
        } else {
            state.failures = 0;
        }
        wait(outlook, asked_at.elapsed(), state.empty_claims, self.sweep)
    }

    async fn lane_ended(
        &self,
        ended: Result<Result<Delivered, StoreError>, tokio::task::JoinError>,
        delivery: &Arc<Delivery>,
        state: &mut State,
    ) {
        match ended {
            Ok(Ok(Delivered::Nothing)) => match self.store.hold_unserved(self.plugins.current().kinds()).await {
                Ok(held) if held.is_empty() => state.empty_claims = state.empty_claims.saturating_add(1),
                Ok(held) => {
                    for (kind, rows) in held {
                        count_held(rows.unsigned_abs());
                        warn!(schedule.kind = kind, rows, "held rows of the kind {kind:?}: no plugin serves it");
                    }
                }
                Err(error) => drop(state.failed(&error)),
            },
            // If the broker is away, its return is a wake. If it is there and confirms nothing, asking it again and again
            // would only make duplicates.
            Ok(Ok(Delivered::Unsettled)) if self.broker.is_open() => drop(state.pause()),
            Ok(Ok(Delivered::Unsettled)) => {}
            Ok(Ok(Delivered::Settled { more })) => {
                state.empty_claims = 0;
                state.failures = 0;
                state.not_before = None;
                // More is due than one lane takes at a time: two go on where one ended.
                if more && self.broker.is_open() {
                    state.start(delivery);
                    state.start(delivery);
                }
            }
            Ok(Err(error)) => drop(state.failed(&error)),
            Err(panic) => {
                tracing::error!(error = &panic as &dyn std::error::Error, "a lane panicked, its rows stay");
                state.pause();
            }
        }
    }
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

    /// Held rows were released, or some of them.
    fn release_ended(&mut self, ended: Result<Result<u64, StoreError>, tokio::task::JoinError>) {
        match ended {
            Ok(Ok(released)) => info!(released, "released held rows, their plugin is here"),
            Ok(Err(error)) => drop(self.failed(&error)),
            Err(panic) => {
                tracing::error!(error = &panic as &dyn std::error::Error, "releasing held rows panicked");
                self.pause();
            }
        }
    }

    /// The database did not do it: a line for the operator, and a pause.
    fn failed(&mut self, error: &StoreError) -> Duration {
        warn!(error = error as &dyn std::error::Error, "the database cannot be used, trying again");
        self.pause()
    }

    /// How long nothing is to be tried.
    fn paused(&self) -> Option<Duration> {
        let left = self.not_before?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// Tries nothing for a while, longer each time until a batch succeeds. Returns for how long.
    fn pause(&mut self) -> Duration {
        // Lanes that fail together fail for the same reason.
        if let Some(left) = self.paused() {
            return left;
        }
        let delay = RECONNECT.jittered(self.failures);
        self.failures = self.failures.saturating_add(1);
        self.not_before = Some(Instant::now() + delay);
        delay
    }
}
