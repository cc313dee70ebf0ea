//! A state directory without room, or that nothing may be written to: it is a cache and a memory, and the daemon delivers
//! without. Each daemon here is in a mount namespace of its own, with a file system of its own for that directory.

use std::path::PathBuf;

use harness::daemon::{Daemon, Launch};
use harness::eventually;
use harness::guests::{trapping, well_behaved};
use harness::world::World;
use serde_json::Value;

/// `tidings SUBCOMMAND` with a state directory on a tmpfs that is mounted with `options`, after `prepare` in it.
fn on_tmpfs(world: &World, subcommand: &str, options: &str, prepare: &str) -> Launch {
    let state = world.state_dir();
    std::fs::create_dir_all(&state).expect("made");
    let script = format!(
        "set -e; mount -t tmpfs -o {options} tmpfs {dir}; cd {dir}; {prepare}; cd /; exec \"$@\"",
        dir = state.display()
    );
    let mut arguments = vec!["--mount"];
    if !nix::unistd::geteuid().is_root() {
        arguments.extend(["--map-root-user", "--user"]);
    }
    let binary = World::binary();
    let binary = binary.to_str().expect("a path in UTF-8");
    arguments.extend(["sh", "-c", &script, "sh", binary, subcommand]);
    world
        .launch()
        .with("TIDINGS_SWEEP_MS", 600_000)
        .with("TIDINGS_STATE_DIR", state.join("state").display())
        .running(&PathBuf::from("unshare"))
        .args(arguments)
}

/// What the daemon answers at `/readyz`.
async fn readyz(daemon: &mut Daemon) -> Value {
    let url = format!("http://{}/readyz", daemon.http_addr().await);
    let asked = tokio::task::spawn_blocking(move || {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        agent.get(&url).call().expect("an answer").body_mut().read_to_string().expect("text")
    });
    serde_json::from_str(&asked.await.expect("asked")).expect("JSON")
}

async fn notes(daemon: &mut Daemon) -> String {
    let answer = readyz(daemon).await;
    assert_eq!((&answer["ready"], &answer["reasons"]), (&true.into(), &Value::Array(vec![])), "{answer}");
    answer["notes"].to_string()
}

async fn serves(world: &World, plugin: &str, kind: &str) {
    let mut inbox = world.inbox(&[&format!("hostile.{plugin}")]).await;
    world.sql(&format!("SELECT tidings.schedule('{kind}', now())")).await;
    inbox.next().await;
}

/// Where the daemon sees its state directory, as we see it.
fn inside(daemon: &Daemon, world: &World) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root{}", daemon.pid(), world.state_dir().display()))
}

#[tokio::test]
async fn without_room_for_compiled_code_every_plugin_serves_and_a_line_a_note_and_the_doctor_say_so() {
    let world = World::empty().await;
    world.put("one.wasm", &well_behaved("one", &["one"], "1"));
    world.put("two.wasm", &well_behaved("two", &["two"], "2"));
    // Nothing is left, whether the directories were there before or not.
    for prepare in ["mkdir state; head -c 9m /dev/zero >filler || true", "head -c 9m /dev/zero >filler || true"] {
        let mut daemon = on_tmpfs(&world, "run", "size=256k", prepare).ready().await;

        serves(&world, "one", "one").await;
        serves(&world, "two", "two").await;
        let notes = notes(&mut daemon).await;
        let place = world.state_dir().join("state");
        for part in [place.to_str().expect("UTF-8"), "No space left on device"] {
            assert!(notes.contains(part), "{part}: {notes}");
        }
        assert!(!daemon.log().contains("refused"), "{}", daemon.log());
        // A new version while it runs.
        world.put("two.wasm", &well_behaved("two", &["three"], &prepare.len().to_string()));
        eventually("the new version", async || daemon.log().contains("kinds=\"three\"").then_some(())).await;
        serves(&world, "two", "three").await;
        assert_eq!(daemon.log().matches("cannot be written").count(), 1, "{}", daemon.log());
        assert!(daemon.stop().await.success());
        world.put("two.wasm", &well_behaved("two", &["two"], "2"));
    }

    let prepare = "mkdir state; head -c 9m /dev/zero >filler || true";
    let (_, output) = on_tmpfs(&world, "doctor", "size=256k", prepare).finished().await;
    let line = output.lines().find(|line| line.contains("the state directory"));
    assert!(line.is_some_and(|line| line.starts_with("warn") && line.contains("No space left on device")), "{output}");
}

#[tokio::test]
async fn a_state_directory_that_is_read_only_from_the_start_keeps_nothing_and_everything_serves() {
    let world = World::empty().await;
    world.put("one.wasm", &well_behaved("one", &["one"], "1"));
    let mut daemon = on_tmpfs(&world, "run", "ro", "true").ready().await;

    serves(&world, "one", "one").await;
    let notes = notes(&mut daemon).await;
    assert!(notes.contains("Read-only file system"), "{notes}");
    assert!(daemon.stop().await.success());
}

#[tokio::test]
async fn a_state_directory_that_has_room_again_keeps_what_was_rolled_back_meanwhile_and_compiled_code() {
    let world = World::empty().await;
    world.put("plugin.wasm", &well_behaved("plugin", &["kind"], "good"));
    let mut daemon = on_tmpfs(&world, "run", "size=4m", "true").ready().await;
    serves(&world, "plugin", "kind").await;
    let state = inside(&daemon, &world).join("state");
    let good = || std::fs::read_dir(state.join("good")).into_iter().flatten().count();
    eventually("what built a row", async || (good() > 0).then_some(())).await;

    // It becomes full while it runs, and a version is rolled back.
    let filler = inside(&daemon, &world).join("filler");
    let _ = std::fs::write(&filler, vec![0; 9 << 20]);
    world.put("plugin.wasm", &trapping("plugin", &["kind"]));
    daemon.wait_for_line("generation=2").await;
    world.sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'kind', now() FROM generate_series(1, 20)").await;
    daemon.wait_for_line("rolled back").await;
    daemon.wait_for_line("cannot be written").await;
    let quarantined = || std::fs::read_dir(state.join("quarantined")).expect("it is there").count();
    assert!(notes(&mut daemon).await.contains("No space left on device"));

    std::fs::remove_file(&filler).expect("removed");

    daemon.wait_for_line("can be written again").await;
    eventually("the quarantine", async || (quarantined() == 1).then_some(())).await;
    eventually("no note", async || (notes(&mut daemon).await == "[]").then_some(())).await;
    // Code that could not be kept leaves nothing behind in the way of what can.
    let modules = || std::fs::read_dir(state.join("cache/modules")).into_iter().flatten().filter_map(Result::ok);
    let files = || modules().flat_map(|dir| std::fs::read_dir(dir.path()).into_iter().flatten().filter_map(Result::ok));
    let before = files().filter(|file| !file.file_name().to_string_lossy().contains('.')).count();
    world.put("other.wasm", &well_behaved("other", &["other"], "o"));
    serves(&world, "other", "other").await;
    assert!(files().all(|file| !file.file_name().to_string_lossy().contains("wip-atomic-write-mod")), "leftovers");
    let after = files().filter(|file| !file.file_name().to_string_lossy().contains('.')).count();
    assert!(after > before, "{before} files, then {after}");
    assert!(daemon.stop().await.success());
}
