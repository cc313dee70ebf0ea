//! Plugins that come, change and go while the daemon runs: what serves, what is held, and what a bad file changes, which
//! is nothing.

use std::time::{Duration, Instant};

use harness::daemon::Daemon;
use harness::eventually;
use harness::guests::{slow, well_behaved, with_custom_section};
use harness::world::World;

/// Schedules a row that is due now.
pub(crate) async fn schedule(world: &World, kind: &str, payload: &str) -> uuid::Uuid {
    world.value(&format!("SELECT tidings.schedule('{kind}', now(), '{payload}')")).await
}

/// How many times a text stands in the log.
fn count(daemon: &Daemon, text: &str) -> usize {
    daemon.log().matches(text).count()
}

/// Waits until a text stands in the log `times` times.
pub(crate) async fn until_logged(daemon: &Daemon, text: &str, times: usize) {
    eventually(&format!("{times} × {text:?} in the log"), async || (count(daemon, text) >= times).then_some(())).await;
}

#[tokio::test]
async fn rows_of_an_unknown_kind_are_held_and_go_out_as_soon_as_their_plugin_is_dropped_in() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.daemon().await;
    let mut fastest = Duration::MAX;
    for kind in ["one", "two", "three", "four", "five"] {
        schedule(&world, kind, "{}").await;
        daemon.wait_for_line(&format!("held rows of the kind {kind:?}")).await;
        assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules WHERE held").await, 1);
        let (code, list) = world.tidings(["plugin", "list", "--http-addr", &daemon.http_addr().await]).await;
        assert!(code == 0 && list.contains(&format!("held: 1 rows of the kind {kind}")), "{list}");

        let dropped = Instant::now();
        world.put(&format!("{kind}.wasm"), &well_behaved(kind, &[kind], kind));

        assert_eq!(inbox.next().await.text(), kind);
        fastest = fastest.min(dropped.elapsed());
    }
    // The look every 5 s would have found it as well: at least once it was faster, as events make it.
    assert!(fastest < Duration::from_secs(1), "{fastest:?}");
}

#[tokio::test]
async fn a_replaced_file_serves_the_next_rows_and_a_row_in_flight_ends_as_it_began() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("p.wasm", &slow("p", &["p"], "old", Duration::from_millis(700)));
    let mut daemon = world.daemon().await;
    schedule(&world, "p", "{}").await;
    // The claim is in flight as soon as the row is locked.
    world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules FOR UPDATE SKIP LOCKED)").await;

    world.put("p.wasm", &well_behaved("p", &["p"], "new"));
    daemon.wait_for_line("generation=2").await;

    let first = inbox.next().await;
    assert_eq!(first.text(), "old");
    schedule(&world, "p", "{}").await;
    let second = inbox.next().await;
    assert_eq!(second.text(), "new");
    assert_ne!(first.headers()["tidings-plugin"], second.headers()["tidings-plugin"]);
}

#[tokio::test]
async fn a_file_that_cannot_serve_leaves_the_last_good_version_serving_until_it_is_mended() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    let good = well_behaved("p", &["p"], "good");
    world.put("p.wasm", &good);
    let daemon = world.daemon().await;
    let broken: [(&[u8], &str); 5] = [
        (b"", "it is empty"),
        (b"(component)", "it is WebAssembly text"),
        (b"\0asm\x01\0\0\0", "it is a core module"),
        (b"\x7fELF\x02\x01\x01", "native or precompiled code"),
        (&good[..good.len() - 10], "it is damaged"),
    ];
    for (bytes, reason) in broken {
        world.put("p.wasm", bytes);
        until_logged(&daemon, reason, 1).await;
        schedule(&world, "p", "{}").await;
        assert_eq!(inbox.next().await.text(), "good");
    }
    assert_eq!(count(&daemon, "p@1+"), count(&daemon, "still serves") + 1, "{}", daemon.log());

    // Straight into the file, in two parts: what is there between them is no component.
    let mended = well_behaved("p", &["p"], "mended");
    std::fs::write(world.plugin_dir.join("p.wasm"), &mended[..mended.len() / 2]).expect("written");
    until_logged(&daemon, "it is damaged", 2).await;
    std::fs::write(world.plugin_dir.join("p.wasm"), &mended).expect("written");
    until_logged(&daemon, "loaded ", 2).await;
    schedule(&world, "p", "{}").await;
    assert_eq!(inbox.next().await.text(), "mended");
}

#[tokio::test]
async fn the_same_bytes_again_change_nothing() {
    let world = World::empty().await;
    let bytes = well_behaved("p", &["p"], "p");
    world.put("p.wasm", &bytes);
    let daemon = world.daemon().await;

    for _ in 0..5 {
        world.put("p.wasm", &bytes);
    }
    world.put("q.wasm", &well_behaved("q", &["q"], "q"));
    until_logged(&daemon, "q.wasm", 1).await;

    assert_eq!(count(&daemon, "p.wasm"), 1, "{}", daemon.log());
}

#[tokio::test]
async fn rows_of_a_removed_plugin_are_held_and_released_when_it_comes_back() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    let bytes = well_behaved("p", &["p"], "p");
    world.put("p.wasm", &bytes);
    let mut daemon = world.daemon().await;
    schedule(&world, "p", "{}").await;
    inbox.next().await;

    std::fs::remove_file(world.plugin_dir.join("p.wasm")).expect("removed");
    daemon.wait_for_line("removed").await;
    for _ in 0..3 {
        schedule(&world, "p", "{}").await;
    }
    world.until("SELECT count(*) = 3 FROM tidings.schedules WHERE held AND slot_at = 'infinity'").await;

    world.put("p.wasm", &bytes);
    for _ in 0..3 {
        assert_eq!(inbox.next().await.text(), "p");
    }
    world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
}

#[tokio::test]
async fn a_renamed_file_serves_on_without_a_gap() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("old.wasm", &well_behaved("p", &["p"], "p"));
    let mut daemon = world.daemon().await;

    std::fs::rename(world.plugin_dir.join("old.wasm"), world.plugin_dir.join("new.wasm")).expect("renamed");
    daemon.wait_for_line("new.wasm").await;

    schedule(&world, "p", "{}").await;
    inbox.next().await;
    assert_eq!((count(&daemon, "removed"), count(&daemon, "held")), (0, 0), "{}", daemon.log());
}

#[tokio::test]
async fn settings_that_change_alone_are_a_new_generation_and_broken_ones_change_nothing() {
    let world = World::with(&["misbehave"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let settings = |text: &str| world.put("misbehave.toml", text.as_bytes());
    settings("[config]\ngreeting = \"Hello\"\n");
    let daemon = world.daemon().await;
    schedule(&world, "config", "{}").await;
    assert_eq!(inbox.next().await.text(), "Hello");

    settings("[config]\ngreeting = \"Good evening\"\n");
    until_logged(&daemon, "loaded ", 2).await;
    schedule(&world, "config", "{}").await;
    assert_eq!(inbox.next().await.text(), "Good evening");

    settings("[limits]\ncpu-ms = \"all\"\n");
    until_logged(&daemon, "misbehave.toml cannot be used", 1).await;
    schedule(&world, "config", "{}").await;
    assert_eq!(inbox.next().await.text(), "Good evening");

    std::fs::remove_file(world.plugin_dir.join("misbehave.toml")).expect("removed");
    until_logged(&daemon, "loaded ", 3).await;
    schedule(&world, "config", "{}").await;
    assert_eq!(inbox.next().await.text(), "");
}

#[tokio::test]
async fn a_second_file_with_a_kind_that_is_served_is_refused_and_loaded_when_the_first_is_gone() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("z.wasm", &well_behaved("first", &["p", "q"], "first"));
    let mut daemon = world.daemon().await;

    world.put("a.wasm", &well_behaved("second", &["r", "q"], "second"));
    let line = daemon.wait_for_line("refused").await;
    assert!(
        line.contains("/a.wasm") && line.contains(r#"the kind "q" is served by "#) && line.contains("/z.wasm already"),
        "{line}"
    );
    schedule(&world, "q", "{}").await;
    assert_eq!(inbox.next().await.text(), "first");

    std::fs::remove_file(world.plugin_dir.join("z.wasm")).expect("removed");
    daemon.wait_for_line("second@1+").await;
    schedule(&world, "q", "{}").await;
    assert_eq!(inbox.next().await.text(), "second");
}

#[tokio::test]
async fn what_no_event_tells_of_is_found_all_the_same() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    // As in a mounted ConfigMap: the plugin is a link through a link, and the latter is swapped.
    let outside = world.plugin_dir.with_extension("outside");
    for (version, tag) in [("v1", "one"), ("v2", "two")] {
        std::fs::create_dir_all(outside.join(version)).expect("made");
        std::fs::write(outside.join(version).join("p.wasm"), well_behaved("p", &["p"], tag)).expect("written");
    }
    let link = |version: &str| {
        let _ = std::fs::remove_file(outside.join(".data"));
        std::os::unix::fs::symlink(version, outside.join(".data")).expect("linked");
        std::fs::rename(outside.join(".data"), outside.join("data")).expect("renamed");
    };
    link("v1");
    std::os::unix::fs::symlink(outside.join("data/p.wasm"), world.plugin_dir.join("p.wasm")).expect("linked");
    let daemon = world.daemon().await;
    schedule(&world, "p", "{}").await;
    assert_eq!(inbox.next().await.text(), "one");

    link("v2");
    until_logged(&daemon, "loaded ", 2).await;
    schedule(&world, "p", "{}").await;
    assert_eq!(inbox.next().await.text(), "two");
}

#[tokio::test]
async fn a_plugin_directory_that_goes_away_stops_nothing_and_is_watched_again_when_it_is_back() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("p.wasm", &well_behaved("p", &["p"], "one"));
    let mut daemon = world.daemon().await;
    let away = world.plugin_dir.with_extension("away");

    std::fs::rename(&world.plugin_dir, &away).expect("renamed");
    daemon.wait_for_line("cannot be read, what serves goes on").await;
    schedule(&world, "p", "{}").await;
    assert_eq!(inbox.next().await.text(), "one");

    std::fs::create_dir(&world.plugin_dir).expect("made");
    world.put("p.wasm", &well_behaved("p", &["p"], "two"));
    until_logged(&daemon, "loaded ", 2).await;
    schedule(&world, "p", "{}").await;
    assert_eq!(inbox.next().await.text(), "two");
}

#[tokio::test]
async fn fifty_swaps_under_load_lose_and_double_nothing() {
    const ROWS: usize = 5_000;
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    let bytes = well_behaved("p", &["p"], "p");
    world.put("p.wasm", &bytes);
    let daemon = world.daemon().await;
    // Two rows are due every millisecond.
    world
        .sql(&format!(
            "INSERT INTO tidings.schedules (kind, due_at)
             SELECT 'p', clock_timestamp() + number * interval '500 microseconds' FROM generate_series(1, {ROWS}) AS number"
        ))
        .await;

    let swaps = async {
        for swap in 0..50 {
            world.put("p.wasm", &with_custom_section(&bytes, &swap.to_string()));
            // Each is awaited, so that there are fifty.
            until_logged(&daemon, "loaded ", swap + 2).await;
        }
    };
    let receive = async {
        let mut ids = std::collections::BTreeSet::new();
        let mut labels = std::collections::BTreeSet::new();
        for _ in 0..ROWS {
            let received = inbox.next().await;
            assert!(ids.insert(received.id()), "twice: {}", received.id());
            assert_eq!(received.number("tidings-attempt"), 1);
            labels.insert(received.headers()["tidings-plugin"].clone());
        }
        labels
    };
    let ((), labels) = tokio::join!(swaps, receive);

    assert!(labels.len() > 3, "several generations had their share: {labels:?}");
    world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    // In the history each row has one plugin, the one that its message names; and nothing came twice.
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.deliveries").await, i64::try_from(ROWS).expect("few"));
    assert!(inbox.within(Duration::from_millis(100)).await.is_none());
    // What was replaced is let go of: no file, no pipe, no thread of it remains.
    let process = std::path::PathBuf::from(format!("/proc/{}", daemon.pid()));
    let entries = |part: &str| std::fs::read_dir(process.join(part)).expect("it runs").count();
    assert!(entries("fd") < 60 && entries("task") < 60, "{} files, {} threads", entries("fd"), entries("task"));
}

#[tokio::test]
async fn compiled_code_that_was_damaged_or_cannot_be_kept_is_compiled_again() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    assert!(world.daemon().await.stop().await.success());
    let cache = world.state_dir().join("cache");
    let mut damaged = 0;
    let mut dirs = vec![cache.clone()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).expect("it is there").map(|entry| entry.expect("readable").path()) {
            if entry.is_dir() {
                dirs.push(entry);
            } else {
                std::fs::write(&entry, b"not what was compiled").expect("written");
                damaged += 1;
            }
        }
    }
    assert!(damaged > 0, "something was kept");

    let daemon = world.daemon().await;
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key":"a","body":1}')"#).await;
    inbox.next().await;
    assert!(daemon.stop().await.success());

    // A file where the directory should be: nothing can be kept.
    std::fs::remove_dir_all(&cache).expect("removed");
    std::fs::write(&cache, "").expect("written");
    let (code, output) = world.launch().finished().await;
    assert!(code == 1 && output.contains("the state directory") && output.contains("TIDINGS_STATE_DIR"), "{output}");
}
