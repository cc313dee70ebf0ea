//! Measures what a call of a plugin costs, compared with the same function in native code, and for plugins in other
//! languages.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use harness::build;
use harness::world::World;
use tidings::model::clock::DatabaseClock;
use tidings::model::schedule::Schedule;
use tidings::plugins::{Engine, Metering, Plugin, PluginSet};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::Bench;
use crate::load::payload;
use crate::report::Figure;
use crate::rounds::median;

/// The number of rows in one batch.
const BATCH: usize = 500;
/// The numbers of calls and of batches, of which medians are taken.
const CALLS: usize = 101;
const BATCHES: usize = 11;
/// The payload for the plugins in other languages.
const NAME: &str = r#"{"name": "Ada"}"#;

/// Measures the Rust plugin of the drain, with the same payload.
pub(crate) async fn wasm(bench: &Bench) -> Vec<Figure> {
    let payload = payload();
    let (mut fresh, mut batch, mut native) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.rounds() {
        native.push(build::measure_native_call("message", &payload).as_secs_f64() * 1e6);
        let (single, batched) = measure_call(&World::built_plugin("message"), "message", &payload).await;
        fresh.push(single);
        batch.push(batched);
    }
    let over: Vec<f64> = batch.iter().zip(&native).map(|(batch, native)| batch - native).collect();
    vec![
        Figure::new("a row in a batch of 500", "µs", batch).beside("the function itself", native),
        Figure::new("over the function itself", "µs", over).at_most(10.0),
        Figure::new("a row in a store of its own", "µs", fresh),
    ]
}

/// Measures the plugins in JavaScript and Python; installs their tools if need be.
pub(crate) async fn languages(bench: &Bench) -> Vec<Figure> {
    let mut figures = Vec::new();
    for (language, file, kind) in [
        ("JavaScript", build::javascript().expect("it builds"), "greeting-js"),
        ("Python", build::python().expect("it builds"), "greeting-py"),
    ] {
        let (mut fresh, mut batch) = (Vec::new(), Vec::new());
        for _ in 0..bench.rounds() {
            let (single, batched) = measure_call(&file, kind, NAME).await;
            fresh.push(single);
            batch.push(batched);
        }
        figures.push(Figure::new(format!("{language}, a row in a batch of 500"), "µs", batch));
        figures.push(Figure::new(format!("{language}, a row in a store of its own"), "µs", fresh));
    }
    figures
}

/// Measures a call in a fresh store, and a call in a batch, in µs.
async fn measure_call(file: &Path, kind: &str, payload: &str) -> (f64, f64) {
    let settings = harness::target().join("measure.toml");
    std::fs::write(&settings, "[limits]\nmemory-mib = 256\ncpu-ms = 5000\nwall-ms = 20000\n").expect("written");
    let engine = Engine::new(None, Metering::Time).expect("an engine");
    let plugin = Arc::new(Plugin::open(&engine, file, Some(&settings)).await.expect("it serves"));
    let mut fresh = Vec::new();
    for _ in 0..CALLS {
        let trial = plugin.try_row(row(kind, payload), 0).await;
        assert!(trial.outcome.is_ok(), "{:?}", trial.outcome);
        fresh.push(trial.took.as_secs_f64() * 1e6);
    }
    let set = PluginSet::of([plugin]);
    let mut batches = Vec::new();
    for _ in 0..BATCHES {
        let rows: Vec<Schedule> = (0..BATCH).map(|_| row(kind, payload)).collect();
        let clock = DatabaseClock::new(OffsetDateTime::now_utc(), tokio::time::Instant::now());
        let begun = Instant::now();
        let built = set.build(rows, clock).await;
        let took = begun.elapsed().as_secs_f64() * 1e6;
        // A slow plugin does not build all rows within the time limit of a batch.
        let done = built.iter().filter(|build| matches!(build.outcome, Some(Ok(_)))).count();
        batches.push(took / crate::report::count(done));
    }
    (median(fresh), median(batches))
}

fn row(kind: &str, payload: &str) -> Schedule {
    Schedule {
        id: Uuid::new_v4(),
        kind: kind.to_owned(),
        key: None,
        subject: None,
        due_at: OffsetDateTime::now_utc(),
        expires_at: None,
        payload: payload.to_owned(),
        headers: Vec::new(),
        attempts: 0,
        failures: 0,
        refusals: 0,
        untried_since: None,
        recurrence: None,
        nominal_at: None,
        line: None,
        priority: 4,
    }
}
