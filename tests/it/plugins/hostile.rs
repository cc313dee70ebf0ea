//! Hostile plugins: those that cannot serve are refused with a reason, those that misbehave fail with a reason, and
//! other kinds are always delivered.

use std::collections::BTreeMap;

use harness::daemon::Daemon;
use harness::guests::{Hostile, bit_flips, harmless, misbehaving, refused, truncations, well_behaved};
use harness::world::World;

fn install_all(world: &World, hostile: &[Hostile]) {
    for Hostile { name, bytes, .. } in hostile {
        world.put(&format!("{name}.wasm"), bytes);
    }
}

/// The lines of the log that refuse a file, by the stem of its name.
fn find_refusals(daemon: &Daemon) -> BTreeMap<String, String> {
    let log = daemon.log();
    let refusal = |line: &str| {
        let (_, path) = line.split_once("refused the plugin ")?;
        let (path, _) = path.split_once(".wasm")?;
        Some((path.rsplit('/').next()?.to_owned(), line.to_owned()))
    };
    log.lines().filter_map(refusal).collect()
}

async fn check_serving(world: &World) {
    let mut inbox =
        world.broker.inbox("tidings", "serves", &["hostile.good"], lapin::types::FieldTable::default()).await;
    world.sql("SELECT tidings.schedule('good', now())").await;
    assert_eq!(inbox.next().await.text(), "served");
}

#[tokio::test]
async fn plugins_that_cannot_serve_are_refused_with_a_reason_and_the_others_serve() {
    let world = World::empty().await;
    let hostile = refused();
    install_all(&world, &hostile);
    // The last file in the order of names.
    world.put("zzz.wasm", &well_behaved("good", &["good"], "served"));
    let mut daemon = world.start_daemon_with_many_plugins().await;

    let refusals = find_refusals(&daemon);
    let wrong: Vec<String> = hostile
        .iter()
        .filter(|hostile| !refusals.get(&hostile.name).is_some_and(|line| line.contains(hostile.expected)))
        .map(|hostile| format!("{hostile:?}\n    said: {:?}", refusals.get(&hostile.name)))
        .collect();
    assert!(wrong.is_empty(), "{} of {} have another reason:\n{}", wrong.len(), hostile.len(), wrong.join("\n"));
    check_serving(&world).await;
    let (_, list) = world.tidings(["plugin", "list", "--http-addr", &daemon.http_addr().await]).await;
    assert_eq!(list.matches("does not serve").count(), hostile.len(), "{list}");
    assert!(daemon.stop().await.success());
}

#[tokio::test]
async fn plugins_that_misbehave_fail_with_a_reason_and_the_others_serve() {
    let world = World::empty().await;
    let hostile = misbehaving();
    install_all(&world, &hostile);
    world.put("good.wasm", &well_behaved("good", &["good"], "served"));
    let _daemon = world.start_daemon_with_many_plugins().await;

    for Hostile { name, .. } in &hostile {
        world.sql(&format!("SELECT tidings.schedule('{name}', now())")).await;
    }
    check_serving(&world).await;
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules WHERE last_error IS NULL)").await;

    let mut wrong = Vec::new();
    for hostile in &hostile {
        // A row that exceeds the limit of memory or output is parked at once.
        let error: String = world
            .value(&format!(
                "SELECT last_error FROM tidings.schedules WHERE kind = '{0}' AND attempts > 0
                 UNION ALL SELECT reason FROM tidings.parked WHERE kind = '{0}'",
                hostile.name
            ))
            .await;
        if !error.contains(hostile.expected) {
            wrong.push(format!("{hostile:?}\n    said: {error}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {} have another reason:\n{}", wrong.len(), hostile.len(), wrong.join("\n"));
    check_serving(&world).await;
}

#[tokio::test]
async fn plugins_that_only_look_odd_serve() {
    let world = World::empty().await;
    let odd = harmless();
    install_all(&world, &odd);
    let mut inbox = world.inbox(&["hostile.#"]).await;
    let _daemon = world.start_daemon_with_many_plugins().await;

    for Hostile { name, expected, .. } in &odd {
        world.sql(&format!("SELECT tidings.schedule('{name}', now())")).await;
        let received = inbox.next().await;
        assert_eq!(received.delivery.routing_key.as_str(), format!("hostile.{name}"));
        assert!(String::from_utf8_lossy(&received.delivery.data).contains(expected), "{name}");
    }
}

#[tokio::test]
async fn a_truncated_or_damaged_plugin_file_never_stops_the_daemon() {
    let world = World::empty().await;
    world.put("good.wasm", &well_behaved("good", &["good"], "served"));
    let victim = well_behaved("victim", &["victim"], "v");
    let mut spoilt: Vec<Vec<u8>> = truncations(&victim).map(<[u8]>::to_vec).collect();
    let step = spoilt.len() / 60;
    spoilt = spoilt.into_iter().step_by(step.max(1)).chain(bit_flips(&victim, 1).take(40)).collect();
    for (number, bytes) in spoilt.iter().enumerate() {
        world.put(&format!("spoilt-{number}.wasm"), bytes);
    }
    let daemon = world.start_daemon_with_many_plugins().await;

    // Some flipped bits have no effect. Such a file is loaded, or is refused because another one already serves its
    // kind.
    let refused = find_refusals(&daemon).len();
    assert!(refused > spoilt.len() / 2, "{refused} of {}", spoilt.len());
    check_serving(&world).await;
    assert!(daemon.stop().await.success());
}

#[tokio::test]
async fn a_plugin_file_that_is_not_a_regular_file_is_refused() {
    let world = World::empty().await;
    world.put("good.wasm", &well_behaved("good", &["good"], "served"));
    let path = |name: &str| world.plugin_dir.join(name);
    let made = std::process::Command::new("mkfifo").arg(path("fifo.wasm")).status().expect("mkfifo runs");
    assert!(made.success());
    std::fs::create_dir(path("directory.wasm")).expect("made");
    std::os::unix::fs::symlink("/dev/zero", path("device.wasm")).expect("linked");
    std::os::unix::fs::symlink("nowhere", path("dangling.wasm")).expect("linked");
    std::fs::File::create(path("sparse.wasm")).and_then(|file| file.set_len(5 << 30)).expect("made");
    let daemon = world.start_daemon().await;

    let refusals = find_refusals(&daemon);
    for (name, reason) in [
        ("fifo", "it is not a regular file"),
        ("directory", "it is not a regular file"),
        ("device", "it is not a regular file"),
        ("dangling", "it cannot be read"),
        ("sparse", "it has 5368709120 bytes, more than 67108864"),
    ] {
        assert!(refusals.get(name).is_some_and(|line| line.contains(reason)), "{name}: {:?}", refusals.get(name));
    }
    check_serving(&world).await;
}

#[tokio::test]
async fn a_plugins_panic_is_in_the_log_and_in_last_error_with_message_file_and_line() {
    let world = World::with_plugins(&["misbehave"]).await;
    let mut daemon = world.start_daemon().await;
    world.sql("SELECT tidings.schedule('trap', now())").await;

    world.wait_until("SELECT coalesce(last_error LIKE '%as asked%', false) FROM tidings.schedules").await;
    let error: String = world.value("SELECT last_error FROM tidings.schedules").await;
    assert!(error.contains("panicked at ") && error.contains("src/lib.rs:"), "{error}");
    let line = daemon.wait_for_line("could not build").await;
    assert!(line.contains("as asked") && line.contains("src/lib.rs:"), "{line}");
}
