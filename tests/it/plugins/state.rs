//! A state directory that is full or read-only: the daemon loses its cache of compiled code and its record of good and
//! quarantined versions, and still delivers. Each daemon here runs in its own mount namespace, with a separate file
//! system for that directory.

use std::path::PathBuf;

use harness::daemon::{Daemon, Launch};
use harness::eventually;
use harness::guests::{trapping, well_behaved};
use harness::world::World;
use serde_json::Value;

/// How to run `tidings SUBCOMMAND` with a state directory on a tmpfs. The tmpfs is mounted with `options`, and the
/// script `prepare` runs in it first.
fn launch_on_tmpfs(world: &World, subcommand: &str, options: &str, prepare: &str) -> Launch {
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
        .with_program(&PathBuf::from("unshare"))
        .args(arguments)
}

/// The JSON answer of the daemon at `/readyz`.
async fn get_readyz(daemon: &mut Daemon) -> Value {
    let url = format!("http://{}/readyz", daemon.http_addr().await);
    let asked = tokio::task::spawn_blocking(move || {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        agent.get(&url).call().expect("an answer").body_mut().read_to_string().expect("text")
    });
    serde_json::from_str(&asked.await.expect("asked")).expect("JSON")
}

async fn get_notes(daemon: &mut Daemon) -> String {
    let answer = get_readyz(daemon).await;
    assert_eq!((&answer["ready"], &answer["reasons"]), (&true.into(), &Value::Array(vec![])), "{answer}");
    answer["notes"].to_string()
}

async fn check_serving(world: &World, plugin: &str, kind: &str) {
    let mut inbox = world.inbox(&[&format!("hostile.{plugin}")]).await;
    world.sql(&format!("SELECT tidings.schedule('{kind}', now())")).await;
    inbox.next().await;
}

/// The path at which this process sees the tmpfs inside the daemon's mount namespace.
fn state_dir_in_namespace(daemon: &Daemon, world: &World) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root{}", daemon.pid(), world.state_dir().display()))
}

#[tokio::test]
async fn a_full_state_directory_is_reported_and_every_plugin_serves() {
    let world = World::empty().await;
    world.put("one.wasm", &well_behaved("one", &["one"], "1"));
    world.put("two.wasm", &well_behaved("two", &["two"], "2"));
    // The file system is full, with and without an existing state directory.
    for prepare in ["mkdir state; head -c 9m /dev/zero >filler || true", "head -c 9m /dev/zero >filler || true"] {
        let mut daemon = launch_on_tmpfs(&world, "run", "size=256k", prepare).start_ready().await;

        check_serving(&world, "one", "one").await;
        check_serving(&world, "two", "two").await;
        let notes = get_notes(&mut daemon).await;
        let place = world.state_dir().join("state");
        for part in [place.to_str().expect("UTF-8"), "No space left on device"] {
            assert!(notes.contains(part), "{part}: {notes}");
        }
        assert!(!daemon.log().contains("refused"), "{}", daemon.log());
        // A new version is loaded while the daemon runs.
        world.put("two.wasm", &well_behaved("two", &["three"], &prepare.len().to_string()));
        eventually("the new version", async || daemon.log().contains("kinds=\"three\"").then_some(())).await;
        check_serving(&world, "two", "three").await;
        assert_eq!(daemon.log().matches("cannot be written").count(), 1, "{}", daemon.log());
        assert!(daemon.stop().await.success());
        world.put("two.wasm", &well_behaved("two", &["two"], "2"));
    }

    let prepare = "mkdir state; head -c 9m /dev/zero >filler || true";
    let (_, output) = launch_on_tmpfs(&world, "doctor", "size=256k", prepare).run_to_end().await;
    let line = output.lines().find(|line| line.contains("the state directory"));
    assert!(line.is_some_and(|line| line.starts_with("warn") && line.contains("No space left on device")), "{output}");
}

#[tokio::test]
async fn a_read_only_state_directory_is_reported_and_every_plugin_serves() {
    let world = World::empty().await;
    world.put("one.wasm", &well_behaved("one", &["one"], "1"));
    let mut daemon = launch_on_tmpfs(&world, "run", "ro", "true").start_ready().await;

    check_serving(&world, "one", "one").await;
    let notes = get_notes(&mut daemon).await;
    assert!(notes.contains("Read-only file system"), "{notes}");
    assert!(daemon.stop().await.success());
}

#[tokio::test]
async fn a_state_directory_with_room_again_gets_the_quarantine_and_compiled_code() {
    let world = World::empty().await;
    world.put("plugin.wasm", &well_behaved("plugin", &["kind"], "good"));
    let mut daemon = launch_on_tmpfs(&world, "run", "size=4m", "true").start_ready().await;
    check_serving(&world, "plugin", "kind").await;
    let state = state_dir_in_namespace(&daemon, &world).join("state");
    let good = || std::fs::read_dir(state.join("good")).into_iter().flatten().count();
    eventually("what built a row", async || (good() > 0).then_some(())).await;

    // The file system becomes full while the daemon runs, and a version is rolled back.
    let filler = state_dir_in_namespace(&daemon, &world).join("filler");
    let _ = std::fs::write(&filler, vec![0; 9 << 20]);
    world.put("plugin.wasm", &trapping("plugin", &["kind"]));
    daemon.wait_for_line("generation=2").await;
    world.sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'kind', now() FROM generate_series(1, 20)").await;
    daemon.wait_for_line("rolled back").await;
    daemon.wait_for_line("cannot be written").await;
    let quarantined = || std::fs::read_dir(state.join("quarantined")).expect("it is there").count();
    assert!(get_notes(&mut daemon).await.contains("No space left on device"));

    std::fs::remove_file(&filler).expect("removed");

    daemon.wait_for_line("can be written again").await;
    eventually("the quarantine", async || (quarantined() == 1).then_some(())).await;
    eventually("no note", async || (get_notes(&mut daemon).await == "[]").then_some(())).await;
    // Compiled code that could not be written leaves no files that block later writes.
    let modules = || std::fs::read_dir(state.join("cache/modules")).into_iter().flatten().filter_map(Result::ok);
    let files = || modules().flat_map(|dir| std::fs::read_dir(dir.path()).into_iter().flatten().filter_map(Result::ok));
    let before = files().filter(|file| !file.file_name().to_string_lossy().contains('.')).count();
    world.put("other.wasm", &well_behaved("other", &["other"], "o"));
    check_serving(&world, "other", "other").await;
    assert!(files().all(|file| !file.file_name().to_string_lossy().contains("wip-atomic-write-mod")), "leftovers");
    let after = files().filter(|file| !file.file_name().to_string_lossy().contains('.')).count();
    assert!(after > before, "{before} files, then {after}");
    assert!(daemon.stop().await.success());
}
