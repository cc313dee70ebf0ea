//! Measures the time from a plugin's file to its first message, and how swaps of plugins, hostile plugins and held rows
//! affect the lateness of other rows.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use harness::guests::{spinning, well_behaved, with_custom_section};
use harness::world::World;

use crate::Bench;
use crate::load::Stage;
use crate::probe::{descriptors, resident_mib};
use crate::report::{Figure, Times, count};
use crate::rounds::median;

/// How many times a new plugin is added and its first message awaited.
const FILES: usize = 20;
/// The number of swaps under load.
const SWAPS: usize = 50;
/// The number of rows of the load, which fall due at 2,000 a second.
const LOAD: u32 = 12_000;
/// The number of single rows, which fall due one after another.
const SINGLES: u32 = 200;
/// The number of rows that are held meanwhile.
const HELD: u32 = 1_000_000;
/// The number of replacements after which memory and descriptors must not have grown.
const REPLACEMENTS: u32 = 1_000;

const MESSAGE: &str = r#"{"routing_key": "a", "body": {"order": 42, "lines": [1, 2, 3]}, "ttl_ms": 60000}"#;

/// Measures the time from the rename of a plugin's file to the arrival of the message of a held row.
pub(crate) async fn first_message(_: &Bench) -> Vec<Figure> {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    let daemon = world.start_daemon().await;
    let bytes = std::fs::read(World::built_plugin("message")).expect("it is there");
    let mut times = Vec::new();
    for round in 0..FILES {
        world.sql(&format!("SELECT tidings.schedule('message', now(), '{MESSAGE}')")).await;
        world.wait_until("SELECT count(*) = 1 FROM tidings.schedules WHERE held").await;
        // Each version has another digest, so that no compiled code is found in the cache.
        let version = with_custom_section(&bytes, &round.to_string());
        std::fs::write(world.plugin_dir.join(".message"), version).expect("written");
        let begun = Instant::now();
        std::fs::rename(world.plugin_dir.join(".message"), world.plugin_dir.join("message.wasm")).expect("renamed");
        inbox.next().await;
        times.push(begun.elapsed().as_secs_f64() * 1000.0);
        std::fs::remove_file(world.plugin_dir.join("message.wasm")).expect("removed");
        harness::eventually("the plugin is gone", async || {
            (daemon.log().matches(" removed ").count() > round).then_some(())
        })
        .await;
    }
    assert!(daemon.stop().await.success());
    world.remove().await;
    vec![Figure::new("file renamed to first message", "ms", times)]
}

/// Measures lateness at 2,000 rows a second, with and without replacements of the plugin.
pub(crate) async fn swaps(bench: &Bench) -> Vec<Figure> {
    let (mut swapped, mut still) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds() {
        still.push(measure_swaps(0).await);
        swapped.push(measure_swaps(SWAPS).await);
    }
    compare_percentiles("due to confirm, 50 swaps in 6 s", &swapped, "none", &still)
}

async fn measure_swaps(swaps: usize) -> Times {
    let stage = Stage::with_plugins(&["message"]).await;
    let mut inbox = stage.world.inbox(&["a"]).await;
    let daemon = stage.start_daemon().await;
    let bytes = std::fs::read(World::built_plugin("message")).expect("it is there");
    let insert = format!(
        "INSERT INTO tidings.schedules (kind, due_at, payload)
         SELECT 'message', clock_timestamp() + interval '2 s' + number * interval '500 microseconds', '{MESSAGE}'
         FROM generate_series(1, {LOAD}) AS number"
    );
    stage.world.sql(&insert).await;
    let swap = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        for swap in 0..swaps {
            stage.world.put("message.wasm", &with_custom_section(&bytes, &swap.to_string()));
            tokio::time::sleep(Duration::from_millis(115)).await;
        }
    };
    let receive = async {
        let mut ids = BTreeSet::new();
        for _ in 0..LOAD {
            let received = inbox.next().await;
            assert!(ids.insert(received.id()), "twice: {}", received.id());
        }
    };
    tokio::join!(swap, receive);
    stage.wait_until_finished(LOAD).await;
    let times = stage.lateness("true").await;
    assert!(daemon.stop().await.success());
    stage.remove().await;
    times
}

/// Measures the lateness of single rows: alone, beside a plugin that never returns, and with a million held rows.
pub(crate) async fn neighbours(bench: &Bench) -> Vec<Figure> {
    let (mut alone, mut hostile, mut held) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.rounds() {
        alone.push(measure_singles(false, 0).await);
        hostile.push(measure_singles(true, 0).await);
        held.push(measure_singles(false, bench.rows(HELD)).await);
    }
    let mut figures = compare_percentiles("beside a plugin that spins", &hostile, "alone", &alone);
    figures.extend(compare_percentiles("with a million held rows", &held, "alone", &alone));
    figures
}

async fn measure_singles(hostile: bool, held: u32) -> Times {
    let stage = Stage::with_plugins(&["message"]).await;
    if held > 0 {
        let hold = format!(
            "INSERT INTO tidings.schedules (kind, due_at, held) SELECT 'nobody', now(), true FROM generate_series(1, {held})"
        );
        stage.world.sql(&hold).await;
    }
    let daemon = stage.start_daemon().await;
    if hostile {
        stage.world.put("spin.wasm", &spinning("spin", &["spin"]));
        let is_loaded = |log: &str| log.lines().any(|line| line.contains("loaded ") && line.contains("spin.wasm"));
        harness::eventually("it is loaded", async || is_loaded(&daemon.log()).then_some(())).await;
    }
    let insert = format!("SELECT tidings.schedule('message', clock_timestamp() + interval '20 ms', '{MESSAGE}')");
    let mut pace = tokio::time::interval(Duration::from_millis(25));
    for _ in 0..SINGLES {
        pace.tick().await;
        if hostile {
            let spin = "INSERT INTO tidings.schedules (kind, due_at) SELECT 'spin', now() FROM generate_series(1, 3)";
            stage.world.sql(spin).await;
        }
        stage.world.sql(&insert).await;
    }
    stage.wait_until_finished(SINGLES).await;
    let times = stage.lateness("kind = 'message'").await;
    // Killed, because a stop would wait until the spinning call has hit its limit.
    drop(daemon);
    stage.remove().await;
    times
}

/// Replaces the same file again and again.
pub(crate) async fn replacements(bench: &Bench) -> Vec<Figure> {
    let world = World::empty().await;
    let bytes = well_behaved("p", &["p"], "p");
    world.put("p.wasm", &bytes);
    let daemon = world.start_daemon().await;
    let replacements = bench.rows(REPLACEMENTS).max(10);
    let (mut memory, mut files, mut times) = (Vec::new(), Vec::new(), Vec::new());
    for replacement in 1..=replacements {
        let begun = Instant::now();
        world.put("p.wasm", &with_custom_section(&bytes, &replacement.to_string()));
        harness::eventually("it is loaded", async || {
            daemon.log().contains(&format!("generation={}", replacement + 1)).then_some(())
        })
        .await;
        times.push(begun.elapsed().as_secs_f64() * 1000.0);
        if replacement == replacements / 10 || replacement == replacements {
            memory.push(resident_mib(daemon.pid()));
            files.push(count(descriptors(daemon.pid())));
        }
    }
    assert!(daemon.stop().await.success());
    world.remove().await;
    let after = format!("after {}", replacements / 10);
    vec![
        Figure::new(format!("memory after {replacements} replacements"), "MiB", [memory[1]])
            .beside(&*after, [memory[0]]),
        Figure::new("descriptors", "", [files[1]]).beside(&*after, [files[0]]),
        Figure::new("a replacement, seen and loaded", "ms", [median(times)]),
    ]
}

/// Figures of the median and the 99th percentile of each round, beside those of `others`.
fn compare_percentiles(label: &str, times: &[Times], other: &str, others: &[Times]) -> Vec<Figure> {
    [50, 99]
        .map(|percent| {
            Figure::new(format!("{label}, p{percent}"), "ms", times.iter().map(|times| times.percentile(percent)))
                .beside(other, others.iter().map(|times| times.percentile(percent)))
        })
        .into()
}
