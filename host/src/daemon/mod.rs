//! The composition root of `tidings run`: builds every part, waits until each is ready, and runs the loops until a
//! signal arrives or a loop ends although no signal asked it to.
//!
//! Must never contain a loop of its own, except the removal of old history, nor decide what the loops decide.
//!
//! To change it, know the order. It starts HTTP first, so that `/readyz` can say what is missing; then it waits for
//! PostgreSQL, RabbitMQ and the listener. The listener announces our kinds before the scheduler and the replayer start.
//!
//! On SIGTERM the token `shutdown` is cancelled. Every loop stops starting new work; the scheduler waits for the claims
//! that its lanes are delivering, and HTTP for actions that a person has begun. The connection to RabbitMQ, whose
//! confirms they still need, is closed last. After 15 s, or at a second signal, the process ends (see [`signals`]), and
//! PostgreSQL rolls back the transactions that were open: their rows are due again.

pub mod signals;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tidings_core::backoff::DATABASE;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{info, warn};
use uuid::Uuid;

use crate::broker::topology::watch::TopologyWatch;
use crate::broker::{Broker, Management};
use crate::config::{Config, find_service_links};
use crate::dead_letters::replayer::Replayer;
use crate::fleet::FleetWatch;
use crate::http::{Http, Sources};
use crate::intake::IntakeTask;
use crate::intake::status::IntakeStatuses;
use crate::model::backoff::jittered;
use crate::model::health::Health;
use crate::model::relay;
use crate::model::wake::Wake;
use crate::plugins;
use crate::plugins::{Engine, Metering, Registry, StateDir};
use crate::recurrences::maker::Maker;
use crate::scheduler::Scheduler;
use crate::scheduler::canary::Canary;
use crate::scheduler::listener::Listener;
use crate::scheduler::look_notes::LookNotes;
use crate::scheduler::precise_timer::PreciseTimer;
use crate::store::{SchemaError, Store};
use crate::telemetry;
use signals::{Signals, check_on_hangup};

/// How often old history is removed.
const RETENTION_INTERVAL: Duration = Duration::from_hours(1);

/// Runs the daemon until `shutdown` is cancelled. At each of `hangups` it checks the plugin directory and the servers
/// again.
///
/// # Errors
///
/// When it cannot start (the schema is not the one of this release, a queue or exchange has other arguments, the plugin
/// directory cannot be read), or a loop ended without `shutdown`. A server that does not answer is not an error: the
/// daemon waits for it.
pub async fn run(config: Config, hangups: Signals, shutdown: CancellationToken) -> anyhow::Result<()> {
    log_service_links();
    let wake = Arc::new(Wake::default());
    let health = Arc::new(Health::new(config.sweep));
    // The listener and a pass over the dead letters have one connection each outside the pool.
    let store =
        Store::new(&config.servers.database_url, config.database_connections - 2).with_settling(config.settling);
    let metrics = telemetry::start_metrics()?;
    let http = Http::bind(config.http_addr).await?;
    let broker = Arc::new(Broker::new(&config.servers.broker, Arc::clone(&wake)));
    let mut loops: JoinSet<anyhow::Result<()>> = JoinSet::new();

    // The rows in flight at the signal still need their confirms: the connection to RabbitMQ is closed last.
    let broker_shutdown = CancellationToken::new();
    let (broker_ready, connected) = oneshot::channel();
    loops.spawn({
        let (broker, shutdown) = (Arc::clone(&broker), broker_shutdown.clone());
        async move { Ok(broker.run(shutdown, || _ = broker_ready.send(())).await?) }
    });
    let state = StateDir::open(&config.state_dir)?;
    let engine = Engine::new(Some(&state), Metering::Time)?;
    // Without an intake there is no exchange to which they may go, and their rows are held.
    let intakes = &config.servers.broker.intakes;
    let built_in = if intakes.is_empty() { Vec::new() } else { vec![relay::KIND.to_owned()] };
    let registry = Registry::new(engine, &config.plugin_dir, built_in, state, Arc::clone(&wake), Arc::clone(&health));
    let statuses = Arc::new(IntakeStatuses::new(intakes, &health));
    let registry = Arc::new(registry);
    // From the beginning, so that /readyz says what is still missing.
    let sources = Sources {
        plugins: Arc::clone(&registry),
        store: store.clone(),
        broker: Arc::clone(&broker),
        metrics: metrics.clone(),
        health: Arc::clone(&health),
        notify: config.notify,
        token: config.http_token.clone(),
        replay_max: config.servers.replay_max,
        intakes: Arc::clone(&statuses),
    };
    loops.spawn(http.run(sources, shutdown.clone()));
    spawn(&mut loops, telemetry::upkeep(metrics, shutdown.clone()));
    let (plugins, probed_store, probed_broker) = (Arc::clone(&registry), store.clone(), Arc::clone(&broker));
    spawn(&mut loops, check_on_hangup(hangups, plugins, probed_store, probed_broker, shutdown.clone()));
    if unless_ended(&mut loops, &shutdown, wait_for_database(&store)).await?.transpose()?.is_none() {
        return drain(loops, &broker_shutdown).await;
    }
    loops.spawn(load_and_watch(Arc::clone(&registry), shutdown.clone()));
    if unless_ended(&mut loops, &shutdown, connected).await?.is_none() {
        return drain(loops, &broker_shutdown).await;
    }

    let management = config.management_url.as_ref().map(Management::of);
    let watch = TopologyWatch { broker: Arc::clone(&broker), management, health: Arc::clone(&health) };
    spawn(&mut loops, watch.run(shutdown.clone()));
    let daemon = Uuid::from_u128(fastrand::u128(..));
    let (listener_ready, listening) = oneshot::channel();
    let listener = Listener {
        store: store.clone(),
        wake: Arc::clone(&wake),
        kinds: registry.kinds(),
        daemon,
        notify: config.notify,
        health: Arc::clone(&health),
    };
    spawn(&mut loops, listener.run(shutdown.clone(), || _ = listener_ready.send(())));
    spawn(&mut loops, remove_old_history(store.clone(), config.history_age, shutdown.clone()));
    let (delivers, may_deliver) = oneshot::channel();
    let (fleet_broker, fleet_health, adopt) = (Arc::clone(&broker), Arc::clone(&health), config.adopt);
    let fleet = FleetWatch { store: store.clone(), broker: fleet_broker, health: fleet_health, daemon, adopt };
    spawn(&mut loops, fleet.run(shutdown.clone(), || _ = delivers.send(())));
    // The listener announces our kinds. Until it has, another daemon might hold their rows. And if the database is a copy,
    // nothing is delivered from it.
    if unless_ended(&mut loops, &shutdown, async { (listening.await, may_deliver.await) }).await?.is_none() {
        return drain(loops, &broker_shutdown).await;
    }
    spawn_replayer_and_intakes(&mut loops, &config, &store, &broker, &statuses, &shutdown);
    if let Some(interval) = config.canary {
        let canary =
            Canary { store: store.clone(), broker: Arc::clone(&broker), interval, health: Arc::clone(&health) };
        spawn(&mut loops, run_canary(canary, Arc::clone(&registry), shutdown.clone()));
    }
    let (look_tells, make_at) = watch::channel(None);
    let maker = Maker { store: store.clone(), broker: Arc::clone(&broker), make_at };
    spawn(&mut loops, maker.run(shutdown.clone()));
    let scheduler = Scheduler {
        store,
        broker,
        wake,
        plugins: Arc::clone(&registry),
        sweep: config.sweep,
        max_attempts: config.max_attempts,
        drain_rate: config.drain_rate,
        health: Arc::clone(&health),
        timer: PreciseTimer::new().context("could not make a timer")?,
        notes: Arc::new(LookNotes::new(look_tells)),
    };
    let ready = note_ready(&registry, &health);

    // The scheduler ends after `shutdown`, when nothing is in flight any more. It is a task, so that the other loops go on
    // while it waits; the task is aborted if this function returns for another reason.
    let scheduler = AbortOnDropHandle::new(tokio::spawn(scheduler.run(shutdown.clone())));
    tokio::select! {
        ended = scheduler => match ended {
            Ok(()) => drain(loops, &broker_shutdown).await,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        },
        ended = first_to_end(&mut loops, &shutdown) => ended,
        never = ready => match never {},
    }
}

/// Starts the passes over the dead letters, and the intakes.
fn spawn_replayer_and_intakes(
    loops: &mut JoinSet<anyhow::Result<()>>,
    config: &Config,
    store: &Store,
    broker: &Arc<Broker>,
    statuses: &IntakeStatuses,
    shutdown: &CancellationToken,
) {
    let replayer = Replayer {
        store: store.clone(),
        broker: Arc::clone(broker),
        interval: config.replay_interval,
        max: config.servers.replay_max,
    };
    spawn(loops, replayer.run(shutdown.clone()));
    let (rules, rate) = (Arc::new(config.intake_rules.clone()), config.intake_rate);
    for status in statuses.iter() {
        let (store, broker, rules, status) =
            (store.clone(), Arc::clone(broker), Arc::clone(&rules), Arc::clone(status));
        spawn(loops, IntakeTask { store, broker, rules, rate, status }.run(shutdown.clone()));
    }
}

/// Starts a loop that returns no error. It may still end without being asked to, for instance by a panic.
fn spawn(loops: &mut JoinSet<anyhow::Result<()>>, work: impl Future<Output = ()> + Send + 'static) {
    loops.spawn(async move {
        work.await;
        Ok(())
    });
}

/// Loads the plugins, while the other parts start, and keeps them up to date.
async fn load_and_watch(registry: Arc<Registry>, shutdown: CancellationToken) -> anyhow::Result<()> {
    let Some(loaded) = shutdown.run_until_cancelled(registry.load_all()).await else { return Ok(()) };
    loaded.with_context(|| format!("could not read the plugin directory {}", registry.dir().display()))?;
    if registry.current().kinds().is_empty() {
        warn!("no plugin in {}: every row is held until one comes", registry.dir().display());
    }
    plugins::watch(registry, shutdown).await;
    Ok(())
}

/// Notes that the daemon is ready, when the plugins have been loaded. Never ends.
async fn note_ready(registry: &Registry, health: &Health) -> std::convert::Infallible {
    registry.completed().await;
    health.started.store(true, Ordering::Relaxed);
    info!(kinds = registry.current().kinds().join(" "), "ready");
    std::future::pending().await
}

/// Runs the canary when the plugins have been loaded: it needs one of them.
async fn run_canary(canary: Canary, plugins: Arc<Registry>, shutdown: CancellationToken) {
    if shutdown.run_until_cancelled(plugins.completed()).await.is_some() {
        canary.run(shutdown).await;
    }
}

/// Logs which variables of the environment are ignored although they begin like settings, if there are any.
fn log_service_links() {
    let links = find_service_links();
    if !links.is_empty() {
        let names = links.join(", ");
        info!(names, "ignored variables that Kubernetes or Docker set for a service named tidings");
    }
}

/// Waits until the database can be used, and checks its schema.
async fn wait_for_database(store: &Store) -> Result<(), SchemaError> {
    let mut failures = 0;
    loop {
        let error = match store.check().await {
            Err(SchemaError::Store(error)) => error,
            Err(other) => return Err(other),
            Ok(()) => break,
        };
        warn!(error = &error as &dyn std::error::Error, "PostgreSQL cannot be used, trying again");
        tokio::time::sleep(jittered(&DATABASE, failures)).await;
        failures = failures.saturating_add(1);
    }
    info!(database = store.place(), "connected to PostgreSQL");
    Ok(())
}

/// Waits for `work`. Returns `None` if `shutdown` is cancelled first.
///
/// # Errors
///
/// When a loop ends first.
async fn unless_ended<T>(
    loops: &mut JoinSet<anyhow::Result<()>>,
    shutdown: &CancellationToken,
    work: impl Future<Output = T>,
) -> anyhow::Result<Option<T>> {
    tokio::select! {
        biased;
        () = shutdown.cancelled() => Ok(None),
        ended = first_to_end(loops, shutdown) => ended.map(|()| None),
        output = work => Ok(Some(output)),
    }
}

/// Waits for the first loop that ends without being asked to. That is an error even if the loop returned none.
async fn first_to_end(loops: &mut JoinSet<anyhow::Result<()>>, shutdown: &CancellationToken) -> anyhow::Result<()> {
    match loops.join_next().await {
        Some(ended) if !shutdown.is_cancelled() => {
            ended.context("a loop panicked")??;
            bail!("a loop ended, although nothing had asked it to")
        }
        // The loop was asked to end; the other loops are about to end as well.
        _ => std::future::pending().await,
    }
}

/// Waits after a signal until all loops have ended; closes the connection to RabbitMQ.
async fn drain(mut loops: JoinSet<anyhow::Result<()>>, broker_shutdown: &CancellationToken) -> anyhow::Result<()> {
    broker_shutdown.cancel();
    while let Some(ended) = loops.join_next().await {
        ended.context("a loop panicked")??;
    }
    info!("stopped");
    Ok(())
}

async fn remove_old_history(store: Store, age: Duration, shutdown: CancellationToken) {
    loop {
        match store.remove_history(age).await {
            Ok(0) => {}
            Ok(removed) => info!(removed, "removed old history"),
            Err(error) => {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "could not remove old history, trying again in an hour"
                );
            }
        }
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(RETENTION_INTERVAL) => {}
        }
    }
}

/// Whether an error of [`run`] is about the schema. The process then exits with a code of its own.
#[must_use]
pub fn is_schema_error(error: &anyhow::Error) -> bool {
    error.downcast_ref::<SchemaError>().is_some_and(|error| !matches!(error, SchemaError::Store(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The error when a loop ends with this result, while another loop runs.
    async fn error_after(result: anyhow::Result<()>) -> String {
        let mut loops = JoinSet::new();
        loops.spawn(std::future::pending());
        loops.spawn(async move { result });
        let ended = first_to_end(&mut loops, &CancellationToken::new()).await;
        format!("{:#}", ended.expect_err("it is an error"))
    }

    #[tokio::test]
    async fn a_loop_that_ends_without_shutdown_is_an_error_even_if_it_returns_none() {
        assert_eq!(error_after(Ok(())).await, "a loop ended, although nothing had asked it to");
        assert_eq!(error_after(Err(anyhow::anyhow!("the reason"))).await, "the reason");
    }

    #[tokio::test]
    async fn a_loop_that_panics_is_an_error() {
        let mut loops = JoinSet::new();
        spawn(&mut loops, std::future::pending());
        spawn(&mut loops, async { panic!("on purpose") });
        let ended = first_to_end(&mut loops, &CancellationToken::new()).await;
        assert!(format!("{:#}", ended.expect_err("it is an error")).starts_with("a loop panicked"));
    }
}
