//! The commands for plugin authors, in the order in which a user needs them: new, check, test, install, list, replay.

use std::path::{Path, PathBuf};

use harness::build;
use harness::guests::{trapping, well_behaved};
use harness::world::World;

/// Makes an empty directory for this test, under the target directory.
fn create_scratch_dir(world: &World) -> PathBuf {
    let dir = world.plugin_dir.with_extension("scratch");
    std::fs::create_dir_all(&dir).expect("made");
    dir
}

fn write_file(dir: &Path, file: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(file);
    std::fs::write(&path, bytes).expect("written");
    path
}

fn with_path<'a>(words: &[&'a str], path: &'a Path) -> Vec<&'a str> {
    [words, &[path.to_str().expect("UTF-8")]].concat()
}

#[tokio::test]
async fn a_new_plugin_builds_without_network_access_passes_its_tests_is_installed_and_serves() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.start_daemon().await;
    let dir = create_scratch_dir(&world).join("birthday-card");
    let (code, output) = world.tidings(with_path(&["plugin", "new", "birthday-card", "--dir"], &dir)).await;
    assert_eq!(code, 0, "{output}");

    let tested = build::cargo_test(&dir);
    assert!(tested.contains("3 passed"), "{tested}");
    let wasm = build::component(&dir, "birthday-card").expect("it builds");

    let (code, output) = world.tidings(with_path(&["plugin", "check"], &wasm)).await;
    assert!(code == 0 && output.contains("would serve as birthday-card@0.1.0+"), "{output}");
    assert!(output.contains("imports   tidings:plugin/host@0.1.0") && output.contains("cpu-ms = 100"), "{output}");

    let fixtures = dir.join("fixtures");
    let test = |more: &[&str]| {
        let words = [&["plugin", "test", "--fixtures", fixtures.to_str().expect("UTF-8")], more].concat();
        with_path(&words, &wasm).into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let (code, output) = world.tidings(test(&[])).await;
    assert!(code == 0 && output.contains("3 passed, 0 failed") && output.contains("instructions"), "{output}");
    let fixture = std::fs::read_to_string(fixtures.join("event.json")).expect("it is there");
    std::fs::write(fixtures.join("event.json"), fixture.replace(".due\"", ".never\"")).expect("written");
    let (code, output) = world.tidings(test(&[])).await;
    assert!(code == 1 && output.contains("2 passed, 1 failed"), "{output}");
    assert!(output.contains("-     \"routing-key\": \"birthday-card.never\""), "{output}");
    assert!(output.contains("+     \"routing-key\": \"birthday-card.due\""), "{output}");
    assert_eq!(world.tidings(test(&["--update"])).await.0, 0);
    assert_eq!(world.tidings(test(&[])).await.0, 0);
    std::fs::write(fixtures.join("event.json"), r#"{"row": {"kind": "other"}}"#).expect("written");
    let (code, output) = world.tidings(test(&[])).await;
    assert!(
        code == 1 && output.contains(r#"the plugin does not serve the kind "other", only birthday-card"#),
        "{output}"
    );

    let (code, output) = world.tidings(with_path(&["plugin", "install"], &wasm)).await;
    assert!(code == 0 && output.contains("birthday-card.wasm"), "{output}");
    daemon.wait_for_line("loaded ").await;
    world.sql(r#"SELECT tidings.schedule('birthday-card', now(), '{"for": "Ada"}')"#).await;
    let received = inbox.next().await;
    assert_eq!((received.delivery.routing_key.as_str(), received.text()), ("birthday-card.due", r#"{"for": "Ada"}"#));
    let addr = daemon.http_addr().await;
    let (code, list) = world.tidings(["plugin", "list", "--http-addr", &addr]).await;
    assert!(
        code == 0 && list.contains("birthday-card.wasm: birthday-card@0.1.0+") && list.contains("1 answered"),
        "{list}"
    );
}

#[tokio::test]
async fn new_refuses_an_invalid_name_and_never_overwrites_files() {
    let world = World::empty().await;
    let dir = create_scratch_dir(&world);
    let (code, output) = world.tidings(with_path(&["plugin", "new", "Birthday", "--dir"], &dir.join("b"))).await;
    assert!(code == 1 && output.contains(r#""Birthday" cannot be the name of a plugin"#), "{output}");
    let (code, output) = world.tidings(with_path(&["plugin", "new", "birthday", "--dir"], &dir)).await;
    assert!(code == 1 && output.contains("exists already"), "{output}");
    assert_eq!(std::fs::read_dir(&dir).expect("it is there").count(), 0);
}

#[tokio::test]
async fn check_gives_the_same_verdict_as_the_daemon_with_an_exit_code() {
    let world = World::empty().await;
    let dir = create_scratch_dir(&world);
    let core = write_file(&dir, "core.wasm", b"\0asm\x01\0\0\0");
    let (code, output) = world.tidings(with_path(&["plugin", "check"], &core)).await;
    assert!(code == 1 && output.contains("core.wasm would be refused: it is a core module"), "{output}");
    let (code, output) = world.tidings(with_path(&["plugin", "check"], &dir.join("missing.wasm"))).await;
    assert!(code == 66 && output.contains("missing.wasm would be refused: it cannot be read"), "{code} {output}");
    let good = write_file(&dir, "good.wasm", &well_behaved("good", &["good"], "tag"));
    write_file(&dir, "good.toml", b"[limits]\nmemory = 3\n");
    let (code, output) = world.tidings(with_path(&["plugin", "check"], &good)).await;
    assert!(
        code == 1 && output.contains("good.toml cannot be used") && output.contains("unknown field `memory`"),
        "{output}"
    );
}

#[tokio::test]
async fn install_refuses_what_the_daemon_would_refuse_and_leaves_the_directory_as_it_was() {
    let world = World::empty().await;
    let dir = create_scratch_dir(&world);
    world.put("old.wasm", &well_behaved("old", &["p"], "old"));
    for (name, bytes, reason) in [
        ("broken", b"\0asm".to_vec(), "would be refused: it is cut off"),
        ("rival", well_behaved("rival", &["q", "p"], "rival"), r#"the kind "p" is served by "#),
    ] {
        let file = write_file(&dir, &format!("{name}.wasm"), &bytes);
        let (code, output) = world.tidings(with_path(&["plugin", "install"], &file)).await;
        assert!(code == 1 && output.contains(reason), "{output}");
    }
    assert_eq!(std::fs::read_dir(&world.plugin_dir).expect("it is there").count(), 1);

    // A plugin with the same name is a new version. Its settings are installed with it.
    let file = write_file(&dir, "new.wasm", &well_behaved("old", &["p"], "new"));
    write_file(&dir, "new.toml", b"[limits]\ncpu-ms = 50\n");
    let (code, output) = world.tidings(with_path(&["plugin", "install"], &file)).await;
    assert!(code == 0 && output.contains("old.wasm"), "{output}");
    let mut files: Vec<_> = std::fs::read_dir(&world.plugin_dir)
        .expect("it is there")
        .map(|entry| entry.expect("readable").file_name())
        .collect();
    files.sort();
    assert_eq!(files, ["old.toml", "old.wasm"]);
}

#[tokio::test]
async fn list_reports_when_no_daemon_answers() {
    let world = World::empty().await;
    let (code, output) = world.tidings(["plugin", "list", "--http-addr", "127.0.0.1:1"]).await;
    assert!(code == 1 && output.contains("no daemon answers at 127.0.0.1:1"), "{code} {output}");
    let (code, output) = world.tidings(["plugin", "list", "--http-addr", "here"]).await;
    assert!(code == 64 && output.contains("TIDINGS_HTTP_ADDR is \"here\""), "{code} {output}");
}

#[tokio::test]
async fn replay_shows_row_by_row_how_events_would_differ_and_changes_nothing() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("p.wasm", &well_behaved("p", &["p"], "old words"));
    let daemon = world.start_daemon().await;
    for number in 0..4 {
        world.sql(&format!("SELECT tidings.schedule('p', now(), key => 'row {number}')")).await;
        inbox.next().await;
    }
    world.wait_until("SELECT count(*) = 4 FROM tidings.deliveries").await;
    assert!(daemon.stop().await.success());
    let dir = create_scratch_dir(&world);
    let replay = |file: &Path| {
        with_path(&["plugin", "replay", "--last", "3"], file).into_iter().map(str::to_owned).collect::<Vec<_>>()
    };

    let new = write_file(&dir, "new.wasm", &well_behaved("p", &["p"], "new words"));
    let (code, output) = world.tidings(replay(&new)).await;
    assert!(code == 0 && output.contains("0 same, 3 differ; 0 would not become an event any more"), "{output}");
    assert_eq!(output.matches("-     \"body\": \"old words\"").count(), 3, "{output}");
    assert_eq!(output.matches("+     \"body\": \"new words\"").count(), 3, "{output}");
    assert!(output.contains("row 3") && !output.contains("row 0"), "the last ones: {output}");

    let (code, output) = world.tidings(replay(&world.plugin_dir.join("p.wasm"))).await;
    assert!(code == 0 && output.contains("3 same, 0 differ"), "{output}");

    let worse = write_file(&dir, "worse.wasm", &trapping("p", &["p"]));
    let (code, output) = world.tidings(replay(&worse)).await;
    assert!(code == 1 && output.contains("3 differ; 3 would not become an event any more"), "{output}");
    assert!(output.contains("\"failed\": \"plugin p@1+"), "{output}");

    // Without the version that built the events, only their digests can be compared.
    std::fs::remove_file(world.plugin_dir.join("p.wasm")).expect("removed");
    let (_, output) = world.tidings(replay(&new)).await;
    assert!(output.contains("which cannot be built here any more"), "{output}");
    let other = write_file(&dir, "other.wasm", &well_behaved("other", &["other"], "x"));
    let (code, output) = world.tidings(replay(&other)).await;
    assert!(code == 1 && output.contains("no row of the kinds other is in the history"), "{output}");
    assert!(inbox.next_within(std::time::Duration::from_millis(100)).await.is_none(), "nothing was published");
}

#[tokio::test]
async fn replay_rebuilds_an_event_that_contains_the_time_exactly() {
    let world = World::with_plugins(&["game-status"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    world
        .sql(
            r#"SELECT tidings.schedule('game-status', now(), '{"game_id": "6f0f5e2e-6a2b-4b0e-9d0b-3a4f0a6b1c2d",
               "target_status": "COMPLETED", "transition_time": "2026-01-01T10:00:00Z"}')"#,
        )
        .await;
    inbox.next().await;
    world.wait_until("SELECT count(*) = 1 FROM tidings.deliveries").await;
    // The plugin directory is empty, so only the digest in the history shows that the event is the same.
    let alone = create_scratch_dir(&world);
    let file =
        write_file(&alone, "again.wasm", &std::fs::read(World::built_plugin("game-status")).expect("it is there"));
    let empty = alone.join("empty");
    std::fs::create_dir(&empty).expect("made");

    let words = ["plugin", "replay", "--plugin-dir", empty.to_str().expect("UTF-8")];
    let (code, output) = world.tidings(with_path(&words, &file)).await;

    assert!(code == 0 && output.contains("1 same, 0 differ"), "{output}");
}
