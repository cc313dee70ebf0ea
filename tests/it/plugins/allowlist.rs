//! The list of allowed plugins, `allowed.sha256` in the plugin directory: a plugin that is not in it does not serve,
//! and a changed list takes effect without a restart.

use std::process::Command;

use harness::daemon::Daemon;
use harness::guests::well_behaved;
use harness::world::World;

use crate::plugins::reload::{schedule_row, wait_for_log_count};

/// The output of sha256sum for these files of the plugin directory.
fn sha256_sums(world: &World, files: &[&str]) -> String {
    let output = Command::new("sha256sum").args(files).current_dir(&world.plugin_dir).output().expect("sha256sum");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// Writes the list with the digests of these files.
fn write_allowlist(world: &World, files: &[&str]) {
    world.put("allowed.sha256", sha256_sums(world, files).as_bytes());
}

async fn list_plugins(world: &World, daemon: &mut Daemon) -> String {
    let (code, list) = world.tidings(["plugin", "list", "--http-addr", &daemon.http_addr().await]).await;
    assert_eq!(code, 0, "{list}");
    list
}

#[tokio::test]
async fn only_plugins_in_the_list_serve_and_a_changed_list_takes_effect_at_once() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    for name in ["a", "b"] {
        world.put(&format!("{name}.wasm"), &well_behaved(name, &[name], name));
    }
    write_allowlist(&world, &["a.wasm"]);
    let mut daemon = world.start_daemon().await;

    schedule_row(&world, "b", "{}").await;
    daemon.wait_for_line("held rows of the kind \"b\"").await;
    let text = list_plugins(&world, &mut daemon).await;
    let line = sha256_sums(&world, &["b.wasm"]);
    assert!(text.contains("b.wasm: does not serve") && text.contains("REFUSED  its digest is not in"), "{text}");
    assert!(text.contains(&format!("add the line: {}", line.trim_end())), "{text}");
    schedule_row(&world, "a", "{}").await;
    assert_eq!(inbox.next().await.text(), "a");

    write_allowlist(&world, &["a.wasm", "b.wasm"]);
    assert_eq!(inbox.next().await.text(), "b");

    write_allowlist(&world, &["b.wasm"]);
    daemon.wait_for_line("a.wasm is not allowed any more: rows of its kinds are held").await;
    schedule_row(&world, "a", "{}").await;
    daemon.wait_for_line("held rows of the kind \"a\"").await;

    // While the list cannot be read, loaded plugins continue to serve and no new one is loaded.
    world.put("allowed.sha256", b"everything\n");
    wait_for_log_count(&daemon, "line 1 is not a digest", 2).await;
    assert!(list_plugins(&world, &mut daemon).await.contains("allowed.sha256 cannot be used: line 1 is not a digest"));
    world.put("b.wasm", &well_behaved("b", &["b"], "another b"));
    world.put("c.wasm", &well_behaved("c", &["c"], "c"));
    daemon.wait_for_line("c.wasm: the others serve").await;
    schedule_row(&world, "b", "{}").await;
    assert_eq!(inbox.next().await.text(), "b");

    std::fs::remove_file(world.plugin_dir.join("allowed.sha256")).expect("removed");
    assert_eq!(inbox.next().await.text(), "a");
    wait_for_log_count(&daemon, "loaded ", 5).await;
    schedule_row(&world, "b", "{}").await;
    assert_eq!(inbox.next().await.text(), "another b");
    assert!(!list_plugins(&world, &mut daemon).await.contains("REFUSED"));
}

#[tokio::test]
async fn a_plugin_removed_from_the_list_does_not_return_as_the_last_good_version() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("p.wasm", &well_behaved("p", &["p"], "old"));
    let daemon = world.start_daemon().await;
    schedule_row(&world, "p", "{}").await;
    assert_eq!(inbox.next().await.text(), "old");
    // As soon as the daemon has kept the file's bytes, this version would serve in place of a broken file.
    let remembered = world.state_dir().join("good");
    harness::eventually("a version to go back to", async || {
        let dirs = std::fs::read_dir(&remembered).ok()?;
        dirs.flatten().any(|dir| dir.path().join("kinds/p").exists()).then_some(())
    })
    .await;
    assert!(daemon.stop().await.success());

    world.put("p.wasm", b"broken");
    write_allowlist(&world, &["p.wasm"]);
    let mut daemon = world.start_daemon().await;
    daemon.wait_for_line("the version that built rows last cannot serve either").await;
    schedule_row(&world, "p", "{}").await;
    daemon.wait_for_line("held rows of the kind \"p\"").await;
}

#[tokio::test]
async fn install_prints_the_line_that_is_missing_in_the_list() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("allowed.sha256", b"# nothing yet\n");
    let daemon = world.start_daemon().await;
    let file = world.state_dir().with_extension("p.wasm");
    std::fs::write(&file, well_behaved("p", &["p"], "p")).expect("written");

    let (code, output) = world.tidings(["plugin", "install", &file.display().to_string()]).await;

    assert_eq!(code, 0, "{output}");
    let line = output.split("it does not serve yet: ").nth(1).and_then(|text| text.split("add the line: ").nth(1));
    let line = line.unwrap_or_else(|| panic!("no line in {output}")).trim();
    assert_eq!(line, sha256_sums(&world, &["p.wasm"]).trim_end());
    wait_for_log_count(&daemon, "its digest is not in", 1).await;
    world.put("allowed.sha256", format!("{line}\n").as_bytes());
    schedule_row(&world, "p", "{}").await;
    assert_eq!(inbox.next().await.text(), "p");
}
