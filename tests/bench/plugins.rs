//! What plugins do to everybody else: a file from its rename to its first message, and what swaps, hostile neighbours and
//! held rows do to lateness.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use harness::guests::{spinning, well_behaved, with_custom_section};
use harness::world::World;

use crate::Bench;
use crate::load::Stage;
use crate::probe::{descriptors, resident_mib};
use crate::report::{Figure, Times, count, median};

/// Files that are put into the directory until each had its first message.
const FILES: usize = 20;
/// Swaps under load.
const SWAPS: usize = 50;
/// Rows of the load, 2,000 a second.
const LOAD: u32 = 12_000;
/// Rows that are due one after the other.
const SINGLES: u32 = 200;
/// Rows that are held meanwhile.
const HELD: u32 = 1_000_000;
/// Replacements after which memory and descriptors must be what they were.
const REPLACEMENTS: u32 = 1_000;

const MESSAGE: &str = r#"{"routing_key": "a", "body": {"order": 42, "lines": [1, 2, 3]}, "ttl_ms": 60000}"#;

/// A row waits for its kind; from the rename of the file to the message in the consumer's hands.
pub(crate) async fn first_message(_: &Bench) -> Vec<Figure> {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    let daemon = world.daemon().await;
    let bytes = std::fs::read(World::built("message")).expect("it is there");
    let mut times = Vec::new();
    for round in 0..FILES {
        world.sql(&format!("SELECT tidings.schedule('message', now(), '{MESSAGE}')")).await;
        world.until("SELECT count(*) = 1 FROM tidings.schedules WHERE held").await;
        // Another digest each time: nothing is found compiled.
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

/// 2,000 rows a second while the plugin is replaced, and while it is not.
pub(crate) async fn swaps(bench: &Bench) -> Vec<Figure> {
    let (mut swapped, mut still) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds() {
        still.push(under_swaps(0).await);
        swapped.push(under_swaps(SWAPS).await);
    }
    beside("due to confirm, 50 swaps in 6 s", &swapped, "none", &still)
}

async fn under_swaps(swaps: usize) -> Times {
    let stage = Stage::with(&["message"]).await;
    let mut inbox = stage.world.inbox(&["a"]).await;
    let daemon = stage.daemon().await;
    let bytes = std::fs::read(World::built("message")).expect("it is there");
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
    stage.until_finished(LOAD).await;
    let times = stage.lateness("true").await;
    assert!(daemon.stop().await.success());
    stage.remove().await;
    times
}

/// Rows that are due one after the other, beside a plugin that never answers, and with a million held rows.
pub(crate) async fn neighbours(bench: &Bench) -> Vec<Figure> {
    let (mut alone, mut hostile, mut held) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.rounds() {
        alone.push(singles(false, 0).await);
        hostile.push(singles(true, 0).await);
        held.push(singles(false, bench.rows(HELD)).await);
    }
    let mut figures = beside("beside a plugin that spins", &hostile, "alone", &alone);
    figures.extend(beside("with a million held rows", &held, "alone", &alone));
    figures
}

async fn singles(hostile: bool, held: u32) -> Times {
    let stage = Stage::with(&["message"]).await;
    if held > 0 {
        let hold = format!(
            "INSERT INTO tidings.schedules (kind, due_at, held) SELECT 'nobody', now(), true FROM generate_series(1, {held})"
        );
        stage.world.sql(&hold).await;
    }
    let daemon = stage.daemon().await;
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
    stage.until_finished(SINGLES).await;
    let times = stage.lateness("kind = 'message'").await;
    // Where a plugin spins, it ends when that has been given up.
    drop(daemon);
    stage.remove().await;
    times
}

/// The same file replaced again and again.
pub(crate) async fn replacements(bench: &Bench) -> Vec<Figure> {
    let world = World::empty().await;
    let bytes = well_behaved("p", &["p"], "p");
    world.put("p.wasm", &bytes);
    let daemon = world.daemon().await;
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

/// Median and 99th percentile of each round, beside those of other rounds.
fn beside(what: &str, times: &[Times], other: &str, others: &[Times]) -> Vec<Figure> {
    [50, 99]
        .map(|percent| {
            Figure::new(format!("{what}, p{percent}"), "ms", times.iter().map(|times| times.at(percent)))
                .beside(other, others.iter().map(|times| times.at(percent)))
        })
        .into()
}
