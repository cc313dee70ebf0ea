//! The list of what may serve, `allowed.sha256` in the plugin directory: what is not in it does not serve, whichever way it
//! came, and a changed list counts without a restart.

use std::process::Command;

use harness::daemon::Daemon;
use harness::guests::well_behaved;
use harness::world::World;

use crate::plugins::reload::{schedule, until_logged};

/// What sha256sum writes of these files of the plugin directory.
fn sums(world: &World, files: &[&str]) -> String {
    let output = Command::new("sha256sum").args(files).current_dir(&world.plugin_dir).output().expect("sha256sum");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// Makes the list what sha256sum writes of these files.
fn allow(world: &World, files: &[&str]) {
    world.put("allowed.sha256", sums(world, files).as_bytes());
}

async fn list(world: &World, daemon: &mut Daemon) -> String {
    let (code, list) = world.tidings(["plugin", "list", "--http-addr", &daemon.http_addr().await]).await;
    assert_eq!(code, 0, "{list}");
    list
}

#[tokio::test]
async fn only_what_the_list_names_serves_and_a_changed_list_counts_at_once() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    for name in ["a", "b"] {
        world.put(&format!("{name}.wasm"), &well_behaved(name, &[name], name));
    }
    allow(&world, &["a.wasm"]);
    let mut daemon = world.daemon().await;

    schedule(&world, "b", "{}").await;
    daemon.wait_for_line("held rows of the kind \"b\"").await;
    let said = list(&world, &mut daemon).await;
    let line = sums(&world, &["b.wasm"]);
    assert!(said.contains("b.wasm: does not serve") && said.contains("REFUSED  its digest is not in"), "{said}");
    assert!(said.contains(&format!("add the line: {}", line.trim_end())), "{said}");
    schedule(&world, "a", "{}").await;
    assert_eq!(inbox.next().await.text(), "a");

    allow(&world, &["a.wasm", "b.wasm"]);
    assert_eq!(inbox.next().await.text(), "b");

    allow(&world, &["b.wasm"]);
    daemon.wait_for_line("a.wasm is not allowed any more: rows of its kinds are held").await;
    schedule(&world, "a", "{}").await;
    daemon.wait_for_line("held rows of the kind \"a\"").await;

    // With a list that cannot be read nothing new serves, and what serves goes on.
    world.put("allowed.sha256", b"everything\n");
    until_logged(&daemon, "line 1 is not a digest", 2).await;
    assert!(list(&world, &mut daemon).await.contains("allowed.sha256 cannot be used: line 1 is not a digest"));
    world.put("b.wasm", &well_behaved("b", &["b"], "another b"));
    world.put("c.wasm", &well_behaved("c", &["c"], "c"));
    daemon.wait_for_line("c.wasm: the others serve").await;
    schedule(&world, "b", "{}").await;
    assert_eq!(inbox.next().await.text(), "b");

    std::fs::remove_file(world.plugin_dir.join("allowed.sha256")).expect("removed");
    assert_eq!(inbox.next().await.text(), "a");
    until_logged(&daemon, "loaded ", 5).await;
    schedule(&world, "b", "{}").await;
    assert_eq!(inbox.next().await.text(), "another b");
    assert!(!list(&world, &mut daemon).await.contains("REFUSED"));
}

#[tokio::test]
async fn what_was_taken_off_the_list_does_not_come_back_as_the_last_good_version() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("p.wasm", &well_behaved("p", &["p"], "old"));
    let daemon = world.daemon().await;
    schedule(&world, "p", "{}").await;
    assert_eq!(inbox.next().await.text(), "old");
    // Once its bytes are remembered, it would serve in place of a file that cannot.
    let remembered = world.state_dir().join("good");
    harness::eventually("a version to go back to", async || {
        let dirs = std::fs::read_dir(&remembered).ok()?;
        dirs.flatten().any(|dir| dir.path().join("kinds/p").exists()).then_some(())
    })
    .await;
    assert!(daemon.stop().await.success());

    world.put("p.wasm", b"broken");
    allow(&world, &["p.wasm"]);
    let mut daemon = world.daemon().await;
    daemon.wait_for_line("nor does the version that built rows last serve").await;
    schedule(&world, "p", "{}").await;
    daemon.wait_for_line("held rows of the kind \"p\"").await;
}

#[tokio::test]
async fn install_tells_the_line_that_the_list_lacks() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("allowed.sha256", b"# nothing yet\n");
    let daemon = world.daemon().await;
    let file = world.state_dir().with_extension("p.wasm");
    std::fs::write(&file, well_behaved("p", &["p"], "p")).expect("written");

    let (code, output) = world.tidings(["plugin", "install", &file.display().to_string()]).await;

    assert_eq!(code, 0, "{output}");
    let line = output.split("it does not serve yet: ").nth(1).and_then(|said| said.split("add the line: ").nth(1));
    let line = line.unwrap_or_else(|| panic!("no line in {output}")).trim();
    assert_eq!(line, sums(&world, &["p.wasm"]).trim_end());
    until_logged(&daemon, "its digest is not in", 1).await;
    world.put("allowed.sha256", format!("{line}\n").as_bytes());
    schedule(&world, "p", "{}").await;
    assert_eq!(inbox.next().await.text(), "p");
}
