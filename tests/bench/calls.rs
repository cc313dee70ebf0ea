//! What a call of a plugin costs, beside the same function without WebAssembly, and in other languages.

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
use crate::report::{Figure, median};

/// Rows of one batch.
const BATCH: usize = 500;
/// Calls of which the median is taken, and batches.
const CALLS: usize = 101;
const BATCHES: usize = 11;
/// What the examples in other languages are given.
const NAME: &str = r#"{"name": "Ada"}"#;

/// The Rust plugin of the drain, with its payload.
pub(crate) async fn wasm(bench: &Bench) -> Vec<Figure> {
    let payload = payload();
    let (mut fresh, mut batch, mut native) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.rounds() {
        native.push(build::measured("message", &payload).as_secs_f64() * 1e6);
        let (one, many) = call(&World::built("message"), "message", &payload).await;
        fresh.push(one);
        batch.push(many);
    }
    let over: Vec<f64> = batch.iter().zip(&native).map(|(batch, native)| batch - native).collect();
    vec![
        Figure::new("a row in a batch of 500", "µs", batch).beside("the function itself", native),
        Figure::new("over the function itself", "µs", over).at_most(10.0),
        Figure::new("a row in a store of its own", "µs", fresh),
    ]
}

/// The examples in JavaScript and Python; their tools are installed first.
pub(crate) async fn languages(bench: &Bench) -> Vec<Figure> {
    let mut figures = Vec::new();
    for (language, file, kind) in [
        ("JavaScript", build::javascript().expect("it builds"), "greeting-js"),
        ("Python", build::python().expect("it builds"), "greeting-py"),
    ] {
        let (mut fresh, mut batch) = (Vec::new(), Vec::new());
        for _ in 0..bench.rounds() {
            let (one, many) = call(&file, kind, NAME).await;
            fresh.push(one);
            batch.push(many);
        }
        figures.push(Figure::new(format!("{language}, a row in a batch of 500"), "µs", batch));
        figures.push(Figure::new(format!("{language}, a row in a store of its own"), "µs", fresh));
    }
    figures
}

/// µs of a call in a store of its own, and of one of many.
async fn call(file: &Path, kind: &str, payload: &str) -> (f64, f64) {
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
        // A slow plugin does not get through all of them in the time that a batch has.
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
    }
}
