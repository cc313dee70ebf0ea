//! Plugins that are added, changed and removed while the daemon runs: which version serves, which rows are held, and
//! that a bad file changes nothing.

use std::time::{Duration, Instant};

use harness::daemon::Daemon;
use harness::eventually;
use harness::guests::{slow, well_behaved, with_custom_section};
use harness::world::World;

/// Schedules a row that is due now.
pub(crate) async fn schedule_row(world: &World, kind: &str, payload: &str) -> uuid::Uuid {
    world.value(&format!("SELECT tidings.schedule('{kind}', now(), '{payload}')")).await
}

/// How many times `text` occurs in the log.
fn count_in_log(daemon: &Daemon, text: &str) -> usize {
    daemon.log().matches(text).count()
}

/// Waits until `text` occurs in the log at least `times` times.
pub(crate) async fn wait_for_log_count(daemon: &Daemon, text: &str, times: usize) {
    eventually(&format!("{times} × {text:?} in the log"), async || {
        (count_in_log(daemon, text) >= times).then_some(())
    })
    .await;
}

#[tokio::test]
async fn rows_of_an_unknown_kind_are_held_and_delivered_as_soon_as_their_plugin_is_added() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.start_daemon().await;
    let mut fastest = Duration::MAX;
    for kind in ["one", "two", "three", "four", "five"] {
        schedule_row(&world, kind, "{}").await;
        daemon.wait_for_line(&format!("held rows of the kind {kind:?}")).await;
        assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules WHERE held").await, 1);
        let (code, list) = world.tidings(["plugin", "list", "--http-addr", &daemon.http_addr().await]).await;
        assert!(code == 0 && list.contains(&format!("held: 1 rows of the kind {kind}")), "{list}");

        let dropped = Instant::now();
        world.put(&format!("{kind}.wasm"), &well_behaved(kind, &[kind], kind));

        assert_eq!(inbox.next().await.text(), kind);
        fastest = fastest.min(dropped.elapsed());
    }
    // The check of the directory every 5 s would find the file too. At least one of the five was faster, thanks to file
    // events.
    assert!(fastest < Duration::from_secs(1), "{fastest:?}");
}

#[tokio::test]
async fn a_replaced_plugin_builds_later_rows_and_a_row_in_flight_keeps_the_old_version() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("p.wasm", &slow("p", &["p"], "old", Duration::from_millis(700)));
    let mut daemon = world.start_daemon().await;
    schedule_row(&world, "p", "{}").await;
    // As soon as the row is locked, the claim is in flight.
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules FOR UPDATE SKIP LOCKED)").await;

    world.put("p.wasm", &well_behaved("p", &["p"], "new"));
    daemon.wait_for_line("generation=2").await;

    let first = inbox.next().await;
    assert_eq!(first.text(), "old");
    schedule_row(&world, "p", "{}").await;
    let second = inbox.next().await;
    assert_eq!(second.text(), "new");
    assert_ne!(first.headers()["tidings-plugin"], second.headers()["tidings-plugin"]);
}

#[tokio::test]
async fn after_a_broken_file_the_last_good_version_serves_until_a_good_file_replaces_it() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    let good = well_behaved("p", &["p"], "good");
    world.put("p.wasm", &good);
    let daemon = world.start_daemon().await;
    let broken: [(&[u8], &str); 5] = [
        (b"", "it is empty"),
        (b"(component)", "it is WebAssembly text"),
        (b"\0asm\x01\0\0\0", "it is a core module"),
        (b"\x7fELF\x02\x01\x01", "native or precompiled code"),
        (&good[..good.len() - 10], "it is damaged"),
    ];
    for (bytes, reason) in broken {
        world.put("p.wasm", bytes);
        wait_for_log_count(&daemon, reason, 1).await;
        schedule_row(&world, "p", "{}").await;
        assert_eq!(inbox.next().await.text(), "good");
    }
    assert_eq!(count_in_log(&daemon, "p@1+"), count_in_log(&daemon, "still serves") + 1, "{}", daemon.log());

    // The file is written in place in two parts. The first part alone is not a component.
    let mended = well_behaved("p", &["p"], "mended");
    std::fs::write(world.plugin_dir.join("p.wasm"), &mended[..mended.len() / 2]).expect("written");
    wait_for_log_count(&daemon, "it is damaged", 2).await;
    std::fs::write(world.plugin_dir.join("p.wasm"), &mended).expect("written");
    wait_for_log_count(&daemon, "loaded ", 2).await;
    schedule_row(&world, "p", "{}").await;
    assert_eq!(inbox.next().await.text(), "mended");
}

#[tokio::test]
async fn writing_the_same_bytes_again_does_not_reload_a_plugin() {
    let world = World::empty().await;
    let bytes = well_behaved("p", &["p"], "p");
    world.put("p.wasm", &bytes);
    let daemon = world.start_daemon().await;

    for _ in 0..5 {
        world.put("p.wasm", &bytes);
    }
    world.put("q.wasm", &well_behaved("q", &["q"], "q"));
    wait_for_log_count(&daemon, "q.wasm", 1).await;

    assert_eq!(count_in_log(&daemon, "p.wasm"), 1, "{}", daemon.log());
}

#[tokio::test]
async fn rows_of_a_removed_plugin_are_held_and_delivered_when_it_is_added_again() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    let bytes = well_behaved("p", &["p"], "p");
    world.put("p.wasm", &bytes);
    let mut daemon = world.start_daemon().await;
    schedule_row(&world, "p", "{}").await;
    inbox.next().await;

    std::fs::remove_file(world.plugin_dir.join("p.wasm")).expect("removed");
    daemon.wait_for_line("removed").await;
    for _ in 0..3 {
        schedule_row(&world, "p", "{}").await;
    }
    world.wait_until("SELECT count(*) = 3 FROM tidings.schedules WHERE held AND slot_at = 'infinity'").await;

    world.put("p.wasm", &bytes);
    for _ in 0..3 {
        assert_eq!(inbox.next().await.text(), "p");
    }
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
}

#[tokio::test]
async fn a_renamed_plugin_file_serves_without_interruption() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("old.wasm", &well_behaved("p", &["p"], "p"));
    let mut daemon = world.start_daemon().await;

    std::fs::rename(world.plugin_dir.join("old.wasm"), world.plugin_dir.join("new.wasm")).expect("renamed");
    daemon.wait_for_line("new.wasm").await;

    schedule_row(&world, "p", "{}").await;
    inbox.next().await;
    assert_eq!((count_in_log(&daemon, "removed"), count_in_log(&daemon, "held")), (0, 0), "{}", daemon.log());
}

#[tokio::test]
async fn changed_settings_make_a_new_generation_and_invalid_settings_change_nothing() {
    let world = World::with_plugins(&["misbehave"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let settings = |text: &str| world.put("misbehave.toml", text.as_bytes());
    settings("[config]\ngreeting = \"Hello\"\n");
    let daemon = world.start_daemon().await;
    schedule_row(&world, "config", "{}").await;
    assert_eq!(inbox.next().await.text(), "Hello");

    settings("[config]\ngreeting = \"Good evening\"\n");
    wait_for_log_count(&daemon, "loaded ", 2).await;
    schedule_row(&world, "config", "{}").await;
    assert_eq!(inbox.next().await.text(), "Good evening");

    settings("[limits]\ncpu-ms = \"all\"\n");
    wait_for_log_count(&daemon, "misbehave.toml cannot be used", 1).await;
    schedule_row(&world, "config", "{}").await;
    assert_eq!(inbox.next().await.text(), "Good evening");

    std::fs::remove_file(world.plugin_dir.join("misbehave.toml")).expect("removed");
    wait_for_log_count(&daemon, "loaded ", 3).await;
    schedule_row(&world, "config", "{}").await;
    assert_eq!(inbox.next().await.text(), "");
}

#[tokio::test]
async fn a_file_whose_kind_is_already_served_is_refused_until_the_first_file_is_removed() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("z.wasm", &well_behaved("first", &["p", "q"], "first"));
    let mut daemon = world.start_daemon().await;

    world.put("a.wasm", &well_behaved("second", &["r", "q"], "second"));
    let line = daemon.wait_for_line("refused").await;
    assert!(
        line.contains("/a.wasm") && line.contains(r#"the kind "q" is served by "#) && line.contains("/z.wasm already"),
        "{line}"
    );
    schedule_row(&world, "q", "{}").await;
    assert_eq!(inbox.next().await.text(), "first");

    std::fs::remove_file(world.plugin_dir.join("z.wasm")).expect("removed");
    daemon.wait_for_line("second@1+").await;
    schedule_row(&world, "q", "{}").await;
    assert_eq!(inbox.next().await.text(), "second");
}

#[tokio::test]
async fn a_change_without_a_file_event_is_found() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    // As in a mounted ConfigMap: the plugin is a symbolic link through another symbolic link, which is replaced.
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
    let daemon = world.start_daemon().await;
    schedule_row(&world, "p", "{}").await;
    assert_eq!(inbox.next().await.text(), "one");

    link("v2");
    wait_for_log_count(&daemon, "loaded ", 2).await;
    schedule_row(&world, "p", "{}").await;
    assert_eq!(inbox.next().await.text(), "two");
}

#[tokio::test]
async fn plugins_serve_while_their_directory_is_missing_and_it_is_watched_again_when_it_is_back() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("p.wasm", &well_behaved("p", &["p"], "one"));
    let mut daemon = world.start_daemon().await;
    let away = world.plugin_dir.with_extension("away");

    std::fs::rename(&world.plugin_dir, &away).expect("renamed");
    daemon.wait_for_line("cannot be read, what serves goes on").await;
    schedule_row(&world, "p", "{}").await;
    assert_eq!(inbox.next().await.text(), "one");

    std::fs::create_dir(&world.plugin_dir).expect("made");
    world.put("p.wasm", &well_behaved("p", &["p"], "two"));
    wait_for_log_count(&daemon, "loaded ", 2).await;
    schedule_row(&world, "p", "{}").await;
    assert_eq!(inbox.next().await.text(), "two");
}

#[tokio::test]
async fn fifty_replacements_of_a_plugin_under_load_neither_lose_nor_duplicate_messages() {
    const ROWS: usize = 5_000;
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    let bytes = well_behaved("p", &["p"], "p");
    world.put("p.wasm", &bytes);
    let daemon = world.start_daemon().await;
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
            // Each swap is awaited, so that there are fifty generations.
            wait_for_log_count(&daemon, "loaded ", swap + 2).await;
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
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    // Each row is in the history once, and no message arrived twice.
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.deliveries").await, i64::try_from(ROWS).expect("few"));
    assert!(inbox.next_within(Duration::from_millis(100)).await.is_none());
    // Replaced generations leave no open files, pipes or threads behind.
    let process = std::path::PathBuf::from(format!("/proc/{}", daemon.pid()));
    let entries = |part: &str| std::fs::read_dir(process.join(part)).expect("it runs").count();
    assert!(entries("fd") < 60 && entries("task") < 60, "{} files, {} threads", entries("fd"), entries("task"));
}

#[tokio::test]
async fn damaged_compiled_code_is_compiled_again_and_an_unusable_cache_is_a_start_up_error() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    assert!(world.start_daemon().await.stop().await.success());
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

    let daemon = world.start_daemon().await;
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key":"a","body":1}')"#).await;
    inbox.next().await;
    assert!(daemon.stop().await.success());

    // A file in place of the directory: no compiled code can be kept.
    std::fs::remove_dir_all(&cache).expect("removed");
    std::fs::write(&cache, "").expect("written");
    let (code, output) = world.launch().run_to_end().await;
    assert!(code == 1 && output.contains("the state directory") && output.contains("TIDINGS_STATE_DIR"), "{output}");
}
