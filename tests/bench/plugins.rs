//! What plugins cost: a call in each language beside the same function without WebAssembly, a file from its rename to its
//! first message, and what swaps, hostile neighbours and held rows do to the lateness of everybody else.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use harness::build;
use harness::guests::{spinning, well_behaved, with_custom_section};
use harness::world::World;
use tidings::clock::DatabaseClock;
use tidings::plugins::{Engine, Metering, Plugin, PluginSet};
use tidings::schedule::Schedule;
use time::OffsetDateTime;
use uuid::Uuid;

/// Rows of one batch, as the daemon's.
const BATCH: usize = 500;
/// Calls and batches of which the median is taken.
const CALLS: usize = 101;
/// Swaps under load.
const SWAPS: usize = 50;
/// Rows of the load, 2,000 a second.
const LOAD: usize = 12_000;
/// Replacements after which memory and descriptors must be what they were.
const REPLACEMENTS: usize = 1_000;

const MESSAGE: &str = r#"{"routing_key": "a", "body": {"order": 42, "lines": [1, 2, 3]}, "ttl_ms": 60000}"#;

pub(crate) async fn plugins() {
    println!();
    calls().await;
    println!();
    first_message().await;
    under_swaps().await;
    beside_hostile().await;
    beside_held().await;
    replacements().await;
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

/// One call in a fresh store, and one of many in the store of a batch.
async fn calls() {
    println!("{:<14} {:>16} {:>22} {:>16}", "build a row", "in a fresh store", "in a batch of 500", "natively");
    let name = r#"{"name": "Ada"}"#;
    let settings = harness::target().join("measure.toml");
    std::fs::write(&settings, "[limits]\nmemory-mib = 256\ncpu-ms = 5000\nwall-ms = 20000\n").expect("written");
    let engine = Engine::new(None, Metering::Time).expect("an engine");
    let native = build::measured("message", MESSAGE);
    for (language, file, kind, payload) in [
        ("Rust", World::built("message"), "message", MESSAGE),
        ("JavaScript", build::javascript().expect("it builds"), "greeting-js", name),
        ("Python", build::python().expect("it builds"), "greeting-py", name),
    ] {
        let begun = Instant::now();
        let plugin = Arc::new(Plugin::open(&engine, &file, Some(&settings)).await.expect("it serves"));
        let compiled = begun.elapsed();
        let mut fresh = Vec::new();
        for _ in 0..CALLS {
            let trial = plugin.try_row(row(kind, payload), 0).await;
            assert!(trial.outcome.is_ok(), "{:?}", trial.outcome);
            fresh.push(trial.took);
        }
        let set = PluginSet::of([plugin]);
        let mut batch = Vec::new();
        for _ in 0..CALLS / 10 {
            let rows: Vec<Schedule> = (0..BATCH).map(|_| row(kind, payload)).collect();
            let clock = DatabaseClock::new(OffsetDateTime::now_utc(), tokio::time::Instant::now());
            let begun = Instant::now();
            let built = set.build(rows, clock).await;
            let took = begun.elapsed();
            let done = built.iter().filter(|build| matches!(build.outcome, Some(Ok(_)))).count();
            batch.push(took / u32::try_from(done).expect("few"));
        }
        let beside = if language == "Rust" { format!("{:.1} µs", micros(native)) } else { String::new() };
        println!(
            "{language:<14} {:>13.1} µs {:>12.1} µs a row {beside:>16}   (compiled in {:.1} s, {} KiB)",
            micros(median(fresh)),
            micros(median(batch)),
            compiled.as_secs_f64(),
            std::fs::metadata(&file).map_or(0, |metadata| metadata.len() / 1024)
        );
    }
}

/// A row waits for its kind; from the rename of the file to the message in the consumer's hands.
async fn first_message() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    let daemon = world.daemon().await;
    let bytes = std::fs::read(World::built("message")).expect("it is there");
    let mut times = Vec::new();
    for round in 0..20 {
        world.sql(&format!("SELECT tidings.schedule('message', now(), '{MESSAGE}')")).await;
        world.until("SELECT count(*) = 1 FROM tidings.schedules WHERE held").await;
        // Another digest each time: nothing is found compiled.
        let version = with_custom_section(&bytes, &round.to_string());
        std::fs::write(world.plugin_dir.join(".message"), version).expect("written");
        let begun = Instant::now();
        std::fs::rename(world.plugin_dir.join(".message"), world.plugin_dir.join("message.wasm")).expect("renamed");
        inbox.next().await;
        times.push(begun.elapsed());
        std::fs::remove_file(world.plugin_dir.join("message.wasm")).expect("removed");
        harness::eventually("the plugin is gone", async || {
            (daemon.log().matches(" removed ").count() > round).then_some(())
        })
        .await;
    }
    times.sort();
    println!(
        "{:<40} p50 {:>6.0} ms   most {:>6.0} ms   (Rust plugin of {} KiB, {} times; 300 ms expected)",
        "file renamed to first message",
        millis(times[times.len() / 2]),
        millis(times[times.len() - 1]),
        bytes.len() / 1024,
        times.len()
    );
}

/// 2,000 rows a second while the plugin is replaced, and while it is not.
async fn under_swaps() {
    for swaps in [0, SWAPS] {
        let world = World::with(&["message"]).await;
        let mut inbox = world.inbox(&["#"]).await;
        let daemon = world.daemon().await;
        let bytes = std::fs::read(World::built("message")).expect("it is there");
        world
            .sql(&format!(
                "INSERT INTO tidings.schedules (kind, due_at, payload)
                 SELECT 'message', clock_timestamp() + interval '2 s' + number * interval '500 microseconds', '{MESSAGE}'
                 FROM generate_series(1, {LOAD}) AS number"
            ))
            .await;
        let swap = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            for swap in 0..swaps {
                world.put("message.wasm", &with_custom_section(&bytes, &swap.to_string()));
                tokio::time::sleep(Duration::from_millis(115)).await;
            }
        };
        let receive = async {
            let mut ids = std::collections::BTreeSet::new();
            for _ in 0..LOAD {
                let received = inbox.next().await;
                assert!(ids.insert(received.id()), "twice: {}", received.id());
            }
        };
        tokio::join!(swap, receive);
        world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
        let generations: i64 = world.value("SELECT count(DISTINCT plugin) FROM tidings.deliveries").await;
        let loaded = daemon.log().matches(" loaded ").count();
        let (p50, p99, most) = lateness(&world).await;
        println!(
            "{:<40} p50 {p50:>6.1} ms   p99 {p99:>6.1} ms   most {most:>6.1} ms   ({generations} generations built rows, of {loaded} loaded; each row once)",
            format!("lateness at 2000 rows/s, {swaps} swaps")
        );
    }
}

/// Rows that are due one after the other, beside a plugin that never answers, and without.
async fn beside_hostile() {
    for hostile in [false, true] {
        let world = World::with(&["message"]).await;
        if hostile {
            world.put("spin.wasm", &spinning("spin", &["spin"]));
        }
        let _daemon = world.daemon().await;
        let _inbox = world.inbox(&["#"]).await;
        for _ in 0..200 {
            if hostile {
                world
                    .sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'spin', now() FROM generate_series(1, 3)")
                    .await;
            }
            world
                .sql(&format!("SELECT tidings.schedule('message', clock_timestamp() + interval '20 ms', '{MESSAGE}')"))
                .await;
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules WHERE kind = 'message')").await;
        let (p50, p99, most) = lateness(&world).await;
        let what = if hostile { "lateness beside a plugin that spins" } else { "lateness of a row every 25 ms" };
        println!("{what:<40} p50 {p50:>6.1} ms   p99 {p99:>6.1} ms   most {most:>6.1} ms   (200 rows)");
    }
}

/// The same with a million held rows.
async fn beside_held() {
    let world = World::with(&["message"]).await;
    world
        .sql(
            "INSERT INTO tidings.schedules (kind, due_at, held)
             SELECT 'nobody', now(), true FROM generate_series(1, 1000000)",
        )
        .await;
    // What the server does after a million inserts is not what this is about.
    world.sql("VACUUM ANALYZE tidings.schedules").await;
    world.sql("CHECKPOINT").await;
    let _daemon = world.daemon().await;
    let _inbox = world.inbox(&["#"]).await;
    for _ in 0..200 {
        world
            .sql(&format!("SELECT tidings.schedule('message', clock_timestamp() + interval '20 ms', '{MESSAGE}')"))
            .await;
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    world.until("SELECT count(*) = 200 FROM tidings.deliveries").await;
    let (p50, p99, most) = lateness(&world).await;
    println!(
        "{:<40} p50 {p50:>6.1} ms   p99 {p99:>6.1} ms   most {most:>6.1} ms   (200 rows)",
        "lateness with a million held rows"
    );
}

/// The same file replaced again and again.
async fn replacements() {
    let world = World::empty().await;
    let bytes = well_behaved("p", &["p"], "p");
    world.put("p.wasm", &bytes);
    let daemon = world.daemon().await;
    let mut after = Vec::new();
    let begun = Instant::now();
    for replacement in 1..=REPLACEMENTS {
        world.put("p.wasm", &with_custom_section(&bytes, &replacement.to_string()));
        harness::eventually("it is loaded", async || {
            daemon.log().contains(&format!("generation={}", replacement + 1)).then_some(())
        })
        .await;
        if replacement == REPLACEMENTS / 10 || replacement == REPLACEMENTS {
            after.push((replacement, resident_kib(daemon.pid()), open_files(daemon.pid())));
        }
    }
    let each = begun.elapsed() / u32::try_from(REPLACEMENTS).expect("few");
    for (replacement, kib, files) in after {
        println!(
            "{:<40} {:>8} MiB resident, {files} descriptors",
            format!("after {replacement} replacements"),
            kib / 1024
        );
    }
    println!("{:<40} {:>8.0} ms each", "a replacement, seen and loaded", millis(each));
}

/// The median, the 99th percentile and the most of the lateness of all deliveries, in ms.
pub(crate) async fn lateness(world: &World) -> (f64, f64, f64) {
    let of = |what: &str| format!("SELECT (extract(epoch FROM {what}) * 1000)::float8 FROM tidings.deliveries");
    let late = "finished_at - due_at";
    (
        world.value(&of(&format!("percentile_cont(0.5) WITHIN GROUP (ORDER BY {late})"))).await,
        world.value(&of(&format!("percentile_cont(0.99) WITHIN GROUP (ORDER BY {late})"))).await,
        world.value(&of(&format!("max({late})"))).await,
    )
}

pub(crate) fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it is there");
    line.split_whitespace().next().and_then(|kib| kib.parse().ok()).expect("a number")
}

fn open_files(pid: u32) -> usize {
    std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("fd")).expect("it runs").count()
}

fn median(times: impl IntoIterator<Item = Duration>) -> Duration {
    let mut times: Vec<Duration> = times.into_iter().collect();
    times.sort();
    times[times.len() / 2]
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
