//! Rows to events, on the guests' threads: through the breaker, in one store for the rows of a batch, each failure told to
//! whom it concerns.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tidings_core::reason::Reason;
use tokio::time::Instant;
use uuid::Uuid;

use crate::model::clock::{DatabaseClock, unix_ms};
use crate::model::event::{BuildError, BuiltEvent, Event, deadline_ms};
use crate::model::schedule::Schedule;
use crate::plugins::Build;
use crate::plugins::generation::breaker::{Admission, BreakerState, Failure};
use crate::plugins::generation::{Feedback, Plugin};
use crate::plugins::runtime::bindings::exports::tidings::plugin::builder as wit;
use crate::plugins::runtime::instance::{CallError, Instance, Used};
use crate::telemetry::CallResult;

/// As much of what a failed call said is remembered, in characters.
const SHOWN: usize = 1_000;

/// One row, built apart from the queue.
#[derive(Debug)]
pub struct TestRun {
    /// What became of it.
    pub outcome: Result<BuiltEvent, BuildError>,
    /// Wall-clock time of the start of the plugin and the call.
    pub took: Duration,
    /// Memory at its peak, in bytes.
    pub memory_bytes: usize,
    /// Instructions, if the engine counts them.
    pub fuel: Option<u64>,
}

impl Plugin {
    /// Builds `rows` one after the other, on the guests' threads. Rows that were not reached before `until`, or after
    /// `bodies` (the bytes left for bodies) was used up, have no outcome.
    pub(in crate::plugins) async fn build(
        self: Arc<Self>,
        rows: Vec<Schedule>,
        clock: DatabaseClock,
        until: Instant,
        bodies: Arc<AtomicUsize>,
    ) -> Vec<Build> {
        let plugin = Arc::clone(&self);
        let task = self.engine.guests().spawn(async move {
            let _measuring = plugin.engine.measure();
            let mut instance = plugin.spare.lock().expect("nobody panics with it").take();
            let mut builds = Vec::with_capacity(rows.len());
            let mut at = Instant::now();
            for schedule in rows {
                let enough = at >= until || bodies.load(Ordering::Relaxed) == 0;
                let outcome = if enough {
                    None
                } else {
                    let outcome = plugin.build_row(&mut instance, &schedule, clock, at, &bodies).await;
                    at = Instant::now();
                    Some(outcome)
                };
                builds.push(Build { schedule, plugin: Arc::clone(&plugin), outcome, at });
            }
            // After the answer, which the rows wait for.
            plugin.engine.guests().spawn(Arc::clone(&plugin).replace(instance));
            builds
        });
        // A panic of ours: the rows stay as they are, and are claimed again.
        task.await.unwrap_or_else(|panic| {
            tracing::error!(
                error = &panic as &dyn std::error::Error,
                plugin = &*self.label,
                "a build panicked, its rows stay"
            );
            Vec::new()
        })
    }

    /// Ends the instance of a batch, and starts the next one's. If it does not start, the next batch will say so.
    async fn replace(self: Arc<Self>, used: Option<Instance>) {
        drop(used);
        let _measuring = self.engine.measure();
        let spare = self.start().await.ok();
        *self.spare.lock().expect("nobody panics with it") = spare;
    }

    async fn start(&self) -> Result<Instance, String> {
        let (label, config) = (Arc::clone(&self.label), Arc::clone(&self.config));
        Instance::new(&self.engine, &self.pre, label, config, &self.limits).await
    }

    async fn build_row(
        &self,
        instance: &mut Option<Instance>,
        schedule: &Schedule,
        clock: DatabaseClock,
        now: Instant,
        bodies: &AtomicUsize,
    ) -> Result<BuiltEvent, BuildError> {
        if let Some(kind) = self.kinds.get(&schedule.kind)
            && let Admission::Wait(after) = kind.breaker.lock().expect("nobody panics with it").admit(now)
        {
            let reason =
                format!("plugin {}: it fails at row after row, so this one waits until one succeeds", self.label);
            return Err(BuildError::Unavailable(reason, after));
        }
        let now_ms = unix_ms(clock.at(now));
        let used = instance.as_ref().is_some_and(|instance| !instance.is_fresh());
        let outcome = self.try_build(instance, schedule, now_ms).await;
        // What went wrong in a store that others had used before may be their doing, a leak for instance: a row is
        // blamed only for what it does in a fresh one.
        let outcome = match outcome {
            Err(BuildError::Failed(_) | BuildError::TooLarge(_)) if used => {
                self.try_build(instance, schedule, now_ms).await
            }
            outcome => outcome,
        };
        if let Ok(built) = &outcome {
            let _ = bodies.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                Some(left.saturating_sub(built.event.body_len()))
            });
            self.peak.output_bytes.fetch_max(built.event.body_len(), Ordering::Relaxed);
        }
        self.count(schedule, &outcome);
        outcome
    }

    /// Tells the breaker, and the registry if it matters to it.
    fn count(&self, schedule: &Schedule, outcome: &Result<BuiltEvent, BuildError>) {
        let Some(kind) = self.kinds.get(&schedule.kind) else { return };
        let mut breaker = kind.breaker.lock().expect("nobody panics with it");
        let feedback = if let Err(BuildError::Failed(error) | BuildError::TooLarge(error)) = outcome {
            breaker.last_error = Some((Instant::now(), error.chars().take(SHOWN).collect()));
            match breaker.failed(schedule.id, schedule.failures == 0, Instant::now()) {
                Failure::Counted => return,
                Failure::Opened => {
                    tracing::warn!(
                        plugin = &*self.label,
                        generation = self.generation,
                        schedule.kind,
                        error,
                        "the breaker is open: rows of the kind wait until one succeeds"
                    );
                    return;
                }
                Failure::FromTheStart => Feedback::FailedFromTheStart(schedule.kind.clone(), error.clone()),
            }
        } else {
            if breaker.state() != BreakerState::Closed {
                tracing::info!(
                    plugin = &*self.label,
                    generation = self.generation,
                    schedule.kind,
                    "the breaker is closed: a row succeeded"
                );
            }
            breaker.answered();
            if breaker.answered > 1 {
                return;
            }
            Feedback::Answered(schedule.kind.clone())
        };
        drop(breaker);
        self.tell(feedback);
        self.feedback_wake.wake(Reason::Plugins);
    }

    /// Builds one row in a fresh store at `now_ms`, apart from the queue, the breaker and the history.
    pub async fn try_row(self: &Arc<Self>, schedule: Schedule, now_ms: i64) -> TestRun {
        let plugin = Arc::clone(self);
        let task = self.engine.guests().spawn(async move {
            let _measuring = plugin.engine.measure();
            let begun = Instant::now();
            let mut instance = None;
            let outcome = plugin.try_build(&mut instance, &schedule, now_ms).await;
            let took = begun.elapsed();
            let used = instance.as_ref().map(Instance::used).unwrap_or_default();
            TestRun { outcome, took, memory_bytes: used.memory_bytes, fuel: used.fuel }
        });
        task.await.unwrap_or_else(|panic| TestRun {
            outcome: Err(BuildError::Failed(panic.to_string())),
            took: Duration::ZERO,
            memory_bytes: 0,
            fuel: None,
        })
    }

    /// Calls the plugin, and counts it.
    async fn try_build(
        &self,
        instance: &mut Option<Instance>,
        schedule: &Schedule,
        now_ms: i64,
    ) -> Result<BuiltEvent, BuildError> {
        let begun = Instant::now();
        let outcome = self.call(instance, schedule, now_ms).await;
        if let Some(kind) = self.kinds.get(&schedule.kind) {
            kind.calls(self.name(), &schedule.kind).count(CallResult::from(&outcome), begun.elapsed());
        }
        outcome
    }

    async fn call(
        &self,
        instance: &mut Option<Instance>,
        schedule: &Schedule,
        now_ms: i64,
    ) -> Result<BuiltEvent, BuildError> {
        let failed = |text: String| BuildError::Failed(format!("plugin {}: {text}", self.label));
        let mut alive = match instance.take() {
            Some(alive) => alive,
            None => self.start().await.map_err(failed)?,
        };
        let mut id = Uuid::encode_buffer();
        let id = schedule.id.hyphenated().encode_lower(&mut id);
        let headers: Vec<_> = schedule.headers.iter().map(|(name, value)| (&**name, &**value)).collect();
        let row = row(schedule, id, &headers, now_ms);
        let answer = alive
            .call(&self.limits.with_payload(schedule.payload.len()), async |store, bindings| {
                bindings.tidings_plugin_builder().call_build(store, row).await
            })
            .await;
        let Used { memory_bytes, cpu_ms, .. } = alive.used();
        self.peak.memory_bytes.fetch_max(memory_bytes, Ordering::Relaxed);
        self.peak.cpu_ms.fetch_max(cpu_ms, Ordering::Relaxed);
        let answer = answer.map_err(|CallError { text, too_large }| match failed(text) {
            BuildError::Failed(text) if too_large => BuildError::TooLarge(text),
            failed => failed,
        })?;
        // It answered: it is well, whatever it said.
        *instance = Some(alive);
        let built = answer.map_err(|error| match error {
            wit::BuildError::Invalid(reason) | wit::BuildError::Other(reason) => BuildError::Invalid(reason),
            wit::BuildError::Retry(retry) => BuildError::Retry(retry.reason, retry.after_ms),
            wit::BuildError::Skip(reason) => BuildError::Skip(reason),
        })?;
        let wit::Built { event, ttl_ms } = built;
        let event = Event::new(event.routing_key, event.content_type, event.body, event.headers)
            .map_err(|error| failed(format!("its event cannot be published: {error}")))?;
        let expires_ms = ttl_ms.map(|ttl_ms| deadline_ms(now_ms, ttl_ms));
        Ok(BuiltEvent { event, built_ms: now_ms, expires_ms, plugin: Arc::clone(&self.label) })
    }
}

/// The row as the plugin sees it.
fn row<'a>(schedule: &'a Schedule, id: &'a str, headers: &'a [(&'a str, &'a str)], now_ms: i64) -> wit::Schedule<'a> {
    let unsigned = |ms: i64| u64::try_from(ms).unwrap_or(0);
    wit::Schedule {
        id,
        kind: &schedule.kind,
        key: schedule.key.as_deref(),
        subject: schedule.subject.as_deref(),
        due_ms: unsigned(schedule.due_ms()),
        now_ms: unsigned(now_ms),
        expires_ms: schedule.expires_ms().map(unsigned),
        attempt: schedule.attempt(),
        payload: &schedule.payload,
        headers,
    }
}
