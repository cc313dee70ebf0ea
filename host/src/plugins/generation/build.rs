//! Builds the events of rows. Each row must be admitted by the breaker of its kind. The rows of a batch, and of small batches
//! one after the other, share one store until a call fails.
//!
//! Must never let a plugin delay the daemon's own tasks for longer than two ticks in a minute.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, MutexGuard};
use std::task::Poll;
use std::time::Duration;

use futures_util::FutureExt as _;
use rustix::time::{ClockId, clock_gettime};
use tidings_core::reason::Reason;
use tokio::time::Instant;
use uuid::Uuid;

use crate::model::clock::{DatabaseClock, unix_ms};
use crate::model::event::{BuildError, BuiltEvent, Event, deadline_ms};
use crate::model::schedule::Schedule;
use crate::plugins::Build;
use crate::plugins::generation::breaker::{Admission, BreakerState, FailureEffect};
use crate::plugins::generation::{Feedback, Plugin};
use crate::plugins::runtime::bindings::exports::tidings::plugin::builder as wit;
use crate::plugins::runtime::instance::{CallError, Instance, Usage};
use crate::telemetry::CallResult;

/// The most rows of a batch that is built on the daemon's own thread.
const MAX_ROWS_HERE: usize = 32;
/// If building on the daemon's own thread takes more processor time than this, the plugin is slow, for the time [`SLOW_FOR`].
const MAX_TIME_HERE: Duration = Duration::from_millis(1);
/// For how long the rows of a slow plugin are built elsewhere, however few they are.
const SLOW_FOR: Duration = Duration::from_mins(1);
/// How many characters of the last error are kept.
const MAX_ERROR_CHARS: usize = 1_000;

/// What building a batch returned, unless the daemon's own code panicked.
type CaughtBuilds = Result<Vec<Build>, Box<dyn Any + Send>>;

/// The result of a build outside the queue.
#[derive(Debug)]
pub struct TestRun {
    /// The event, or why there is none.
    pub outcome: Result<BuiltEvent, BuildError>,
    /// The wall-clock time of the plugin's start and the call.
    pub took: Duration,
    /// The plugin's memory at its peak, in bytes.
    pub memory_bytes: usize,
    /// The number of instructions, if the engine counts them.
    pub fuel: Option<u64>,
}

impl Plugin {
    /// Builds `rows` one after the other: a few of a quick plugin on the daemon's own thread, since handing them over would
    /// take longer, and others on the threads of the guests' runtime. Rows that were not reached before `until`, or before
    /// `body_bytes_left` was used up, have no outcome.
    pub(in crate::plugins) async fn build(
        self: Arc<Self>,
        rows: Vec<Schedule>,
        clock: DatabaseClock,
        until: Instant,
        body_bytes_left: Arc<AtomicUsize>,
    ) -> Vec<Build> {
        let can_build_here = rows.len() <= MAX_ROWS_HERE && Instant::now() >= *self.slow_until();
        let builds = Arc::clone(&self).build_rows(rows, clock, until, body_bytes_left);
        let mut builds = AssertUnwindSafe(builds).catch_unwind().boxed();
        let built = match if can_build_here { self.build_here(&mut builds).await } else { Poll::Pending } {
            Poll::Ready(built) => built.ok(),
            Poll::Pending => self.engine.guest_runtime().spawn(builds).await.ok().and_then(Result::ok),
        };
        // If the daemon's own code panics, the rows stay due and are claimed again.
        built.unwrap_or_else(|| {
            tracing::error!(plugin = &*self.label, "a build panicked: its rows stay due");
            Vec::new()
        })
    }

    /// Begins to build on the daemon's own thread. Is pending if a call does not end within two ticks, or the rows so far took
    /// long. A plugin that takes long builds on the threads of the guests' runtime for a while.
    async fn build_here(&self, builds: &mut (impl Future<Output = CaughtBuilds> + Unpin)) -> Poll<CaughtBuilds> {
        let begun = cpu_time();
        let built = futures_util::poll!(builds);
        if cpu_time().saturating_sub(begun) > MAX_TIME_HERE {
            *self.slow_until() = Instant::now() + SLOW_FOR;
        }
        built
    }

    fn slow_until(&self) -> MutexGuard<'_, Instant> {
        self.slow_until.lock().expect("no thread panics with this lock")
    }

    async fn build_rows(
        self: Arc<Self>,
        rows: Vec<Schedule>,
        clock: DatabaseClock,
        until: Instant,
        body_bytes_left: Arc<AtomicUsize>,
    ) -> Vec<Build> {
        let _ticking = self.engine.keep_ticking();
        let mut instance = self.spare_instance().take();
        let mut builds = Vec::with_capacity(rows.len());
        let mut at = Instant::now();
        let mut resumed = at;
        for schedule in rows {
            // Many calls that are each shorter than a tick would hold up the thread together.
            if at.saturating_duration_since(resumed) > MAX_TIME_HERE {
                tokio::task::yield_now().await;
                resumed = Instant::now();
            }
            let is_out_of_budget = at >= until || body_bytes_left.load(Ordering::Relaxed) == 0;
            let outcome = if is_out_of_budget {
                None
            } else {
                let outcome = self.build_row(&mut instance, &schedule, clock, at, &body_bytes_left).await;
                at = Instant::now();
                Some(outcome)
            };
            builds.push(Build { schedule, plugin: Arc::clone(&self), outcome, at });
        }
        match instance {
            Some(instance) if !instance.is_worn() => *self.spare_instance() = Some(instance),
            // The next instance is started by another task, so that the rows do not wait for it.
            used => drop(self.engine.guest_runtime().spawn(Arc::clone(&self).replace_spare(used))),
        }
        builds
    }

    fn spare_instance(&self) -> MutexGuard<'_, Option<Instance>> {
        self.spare_instance.lock().expect("no thread panics with this lock")
    }

    /// Drops the instance of a batch, and starts an instance for the next batch. If that fails, the next batch tries
    /// again and reports the error.
    async fn replace_spare(self: Arc<Self>, used: Option<Instance>) {
        drop(used);
        let _ticking = self.engine.keep_ticking();
        let next = self.start_instance().await.ok();
        *self.spare_instance() = next;
    }

    async fn start_instance(&self) -> Result<Instance, String> {
        let (label, config) = (Arc::clone(&self.label), Arc::clone(&self.config));
        Instance::new(&self.engine, &self.pre, label, config, &self.limits).await
    }

    async fn build_row(
        &self,
        instance: &mut Option<Instance>,
        schedule: &Schedule,
        clock: DatabaseClock,
        now: Instant,
        body_bytes_left: &AtomicUsize,
    ) -> Result<BuiltEvent, BuildError> {
        if let Some(kind) = self.kinds.get(&schedule.kind)
            && let Admission::Wait(after) = kind.breaker.lock().expect("no thread panics with this lock").admit(now)
        {
            let reason = format!(
                "plugin {}: it failed for several rows, so this row waits until another row succeeds",
                self.label
            );
            return Err(BuildError::Unavailable(reason, after));
        }
        let now_ms = unix_ms(clock.at(now));
        let is_used_store = instance.as_ref().is_some_and(|instance| !instance.is_fresh());
        let outcome = self.call_and_count(instance, schedule, now_ms).await;
        // A failure in a store that earlier rows have used may be caused by them, for instance by a leak. So the row is
        // built again in a fresh store, and only a failure there counts.
        let outcome = match outcome {
            Err(BuildError::Failed(_) | BuildError::TooLarge(_)) if is_used_store => {
                self.call_and_count(instance, schedule, now_ms).await
            }
            outcome => outcome,
        };
        if let Ok(built) = &outcome {
            let _ = body_bytes_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                Some(left.saturating_sub(built.event.body_len()))
            });
            self.peak.output_bytes.fetch_max(built.event.body_len(), Ordering::Relaxed);
        }
        self.record_outcome(schedule, &outcome);
        outcome
    }

    /// Records the outcome with the breaker, and as feedback for the registry if it is the first answer or opens the
    /// breaker early.
    fn record_outcome(&self, schedule: &Schedule, outcome: &Result<BuiltEvent, BuildError>) {
        let Some(kind) = self.kinds.get(&schedule.kind) else { return };
        let mut breaker = kind.breaker.lock().expect("no thread panics with this lock");
        let feedback = if let Err(BuildError::Failed(error) | BuildError::TooLarge(error)) = outcome {
            breaker.last_error = Some((Instant::now(), error.chars().take(MAX_ERROR_CHARS).collect()));
            match breaker.record_failure(schedule.id, schedule.failures == 0, Instant::now()) {
                FailureEffect::Counted => return,
                FailureEffect::Opened => {
                    tracing::warn!(
                        plugin = &*self.label,
                        generation = self.generation,
                        schedule.kind,
                        error,
                        "the breaker is open: rows of the kind wait until one succeeds"
                    );
                    return;
                }
                FailureEffect::OpenedFromTheStart => Feedback::FailedFromTheStart(schedule.kind.clone(), error.clone()),
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
            breaker.record_answer();
            if breaker.answered_calls > 1 {
                return;
            }
            Feedback::FirstAnswer(schedule.kind.clone())
        };
        drop(breaker);
        self.push_feedback(feedback);
        self.feedback_wake.wake(Reason::Plugins);
    }

    /// Builds one row in a fresh store at `now_ms`, without the queue, the breaker and the history.
    pub async fn try_row(self: &Arc<Self>, schedule: Schedule, now_ms: i64) -> TestRun {
        let plugin = Arc::clone(self);
        let task = self.engine.guest_runtime().spawn(async move {
            let _ticking = plugin.engine.keep_ticking();
            let begun = Instant::now();
            let mut instance = None;
            let outcome = plugin.call_and_count(&mut instance, &schedule, now_ms).await;
            let took = begun.elapsed();
            let used = instance.as_ref().map(Instance::usage).unwrap_or_default();
            TestRun { outcome, took, memory_bytes: used.memory_bytes, fuel: used.fuel }
        });
        task.await.unwrap_or_else(|panic| TestRun {
            outcome: Err(BuildError::Failed(panic.to_string())),
            took: Duration::ZERO,
            memory_bytes: 0,
            fuel: None,
        })
    }

    /// Calls the plugin, and counts the call in the metrics.
    async fn call_and_count(
        &self,
        instance: &mut Option<Instance>,
        schedule: &Schedule,
        now_ms: i64,
    ) -> Result<BuiltEvent, BuildError> {
        let begun = Instant::now();
        let outcome = self.call(instance, schedule, now_ms).await;
        if let Some(kind) = self.kinds.get(&schedule.kind) {
            kind.call_metrics(self.name(), &schedule.kind).count(CallResult::from(&outcome), begun.elapsed());
        }
        outcome
    }

    /// Calls the plugin in `instance`, or in a fresh one if there is none. After a failed call `instance` is `None`.
    async fn call(
        &self,
        instance: &mut Option<Instance>,
        schedule: &Schedule,
        now_ms: i64,
    ) -> Result<BuiltEvent, BuildError> {
        let failed = |text: String| BuildError::Failed(format!("plugin {}: {text}", self.label));
        let mut running = match instance.take() {
            Some(running) => running,
            None => self.start_instance().await.map_err(failed)?,
        };
        let mut id = Uuid::encode_buffer();
        let id = schedule.id.hyphenated().encode_lower(&mut id);
        let headers: Vec<_> = schedule.headers.iter().map(|(name, value)| (&**name, &**value)).collect();
        let row = wit_row(schedule, id, &headers, now_ms);
        let answer = running
            .call(&self.limits.with_payload(schedule.payload.len()), async |store, bindings| {
                bindings.tidings_plugin_builder().call_build(store, row).await
            })
            .await;
        let Usage { memory_bytes, cpu_ms, .. } = running.usage();
        self.peak.memory_bytes.fetch_max(memory_bytes, Ordering::Relaxed);
        self.peak.cpu_ms.fetch_max(cpu_ms, Ordering::Relaxed);
        let answer = answer.map_err(|CallError { text, is_too_large }| match failed(text) {
            BuildError::Failed(text) if is_too_large => BuildError::TooLarge(text),
            failed => failed,
        })?;
        // The plugin answered, with an event or with a build-error, so the instance can be used again.
        *instance = Some(running);
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

/// The processor time of this thread. By the wall clock, a plugin would seem slow whenever other processes take its core.
fn cpu_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

/// The row in the form in which the plugin gets it.
fn wit_row<'a>(
    schedule: &'a Schedule,
    id: &'a str,
    headers: &'a [(&'a str, &'a str)],
    now_ms: i64,
) -> wit::Schedule<'a> {
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
