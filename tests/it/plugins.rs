//! Plugins: the three of the repository end to end, what is refused when the directory is loaded, and their settings.

use harness::world::World;
use serde_json::json;

const GAME: &str = "6f0f5e2e-6a2b-4b0e-9d0b-3a4f0a6b1c2d";

#[tokio::test]
async fn a_game_reminder_reaches_its_services_in_their_envelope_and_lives_until_the_game_starts() {
    let world = World::with(&["game-reminder"]).await;
    let mut inbox = world.inbox(&["game.#"]).await;
    let _daemon = world.daemon().await;

    world
        .sql(&format!(
            "SELECT tidings.schedule('game-reminder', now(), jsonb_build_object(
                'game_id', '{GAME}', 'title', 'chess', 'starts_at', now() + interval '2 hours', 'reminder_minutes', 120))"
        ))
        .await;

    let received = inbox.next().await;
    assert_eq!(received.delivery.routing_key.as_str(), "game.reminder_due");
    let mut event = received.json();
    assert!(event["timestamp"].take().as_str().is_some_and(|timestamp| timestamp.ends_with("+00:00")));
    assert_eq!(
        event,
        json!({"event_type": "game.reminder_due", "timestamp": null, "data": {"game_id": GAME, "reminder_minutes": 120}, "trace_id": null})
    );
    world.until("SELECT count(*) = 1 FROM tidings.deliveries").await;
    let starts_ms: i64 = world
        .value("SELECT floor(extract(epoch FROM (payload->>'starts_at')::timestamptz) * 1000)::bigint FROM tidings.deliveries")
        .await;
    // The plugin counts from its own now in whole milliseconds.
    assert!((received.number("tidings-expires-ms") - starts_ms).abs() <= 1, "the deadline is the game's start");
    let expiration: i64 =
        received.properties().expiration().as_ref().expect("one").as_str().parse().expect("an integer");
    assert!((starts_ms - received.at_ms - expiration).abs() < 20_000);
}

#[tokio::test]
async fn a_game_status_change_reaches_its_services_without_a_deadline_however_late() {
    let world = World::with(&["game-status"]).await;
    let mut inbox = world.inbox(&["game.status_transition_due"]).await;
    let _daemon = world.daemon().await;
    let data = json!({"game_id": GAME, "target_status": "IN_PROGRESS", "transition_time": "2020-01-01T10:00:00Z"});

    world.sql(&format!("SELECT tidings.schedule('game-status', '2020-01-01T10:00:00Z', '{data}')")).await;

    let received = inbox.next().await;
    assert_eq!(received.properties().expiration(), &None);
    assert_eq!(received.json()["data"], data);
    assert_eq!(received.json()["event_type"], "game.status_transition_due");
}

#[tokio::test]
async fn a_message_reaches_its_queue_as_the_payload_says() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["hello.*"]).await;
    let _daemon = world.daemon().await;

    world
        .sql(
            r#"SELECT tidings.schedule('message', now(), '{"routing_key":"hello.world","body":"Héllo","content_type":"text/x-greeting",
               "headers":{"lang":"fr","both":"event"},"ttl_ms":60000}', headers => '{"both":"row","traceparent":"00-1"}')"#,
        )
        .await;

    let received = inbox.next().await;
    assert_eq!(received.text(), "Héllo");
    assert_eq!(received.properties().content_type(), &Some("text/x-greeting".into()));
    let headers = received.headers();
    assert_eq!((&*headers["lang"], &*headers["both"], &*headers["traceparent"]), ("fr", "event", "00-1"));
}

#[tokio::test]
async fn a_file_that_cannot_serve_is_named_and_refused_and_the_others_serve() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let dir = &world.plugin_dir;
    let good = std::fs::read(dir.join("message.wasm")).expect("it is there");
    std::fs::write(dir.join("empty.wasm"), "").expect("written");
    std::fs::write(dir.join("core.wasm"), b"\0asm\x01\0\0\0").expect("written");
    std::fs::write(dir.join("text.wasm"), "(component)").expect("written");
    std::fs::write(dir.join("other.wasm"), "#!/bin/sh").expect("written");
    std::fs::write(dir.join("cut.wasm"), &good[..good.len() / 2]).expect("written");
    std::fs::write(dir.join("nothing.wasm"), b"\0asm\x0d\0\x01\0").expect("written");
    std::fs::create_dir(dir.join("directory.wasm")).expect("made");
    std::os::unix::fs::symlink("nowhere", dir.join("dangling.wasm")).expect("linked");
    std::os::unix::fs::symlink("/dev/zero", dir.join("device.wasm")).expect("linked");
    std::fs::copy(dir.join("message.wasm"), dir.join("second.wasm")).expect("copied");
    std::fs::copy(dir.join("message.wasm"), dir.join("unset.wasm")).expect("copied");
    std::fs::write(dir.join("unset.toml"), "[limits]\ncpu-ms = 0").expect("written");
    // None of our business.
    std::fs::write(dir.join(".hidden.wasm"), "").expect("written");
    std::fs::write(dir.join("README.md"), "").expect("written");

    let daemon = world.daemon().await;

    for (file, reason) in [
        ("empty.wasm", "it is empty, not a WebAssembly component"),
        ("core.wasm", "it is a core module, not a WebAssembly component; build it with"),
        ("text.wasm", "it is WebAssembly text"),
        ("other.wasm", "it is something else"),
        ("cut.wasm", "it is damaged"),
        ("nothing.wasm", "it does not export tidings:plugin/builder@0.1.0, nor anything else"),
        ("directory.wasm", "it is not a regular file"),
        ("dangling.wasm", "it cannot be read"),
        ("device.wasm", "it is not a regular file"),
        ("second.wasm", r#"the kind "message" is served by"#),
        ("unset.wasm", "[limits] cpu-ms is 0, not a number from 10 to 60000"),
    ] {
        let log = daemon.log();
        let line = log.lines().find(|line| line.contains(&format!("/{file}")) && line.contains("refused"));
        assert!(line.is_some_and(|line| line.contains(reason)), "{file}: {line:?}");
    }
    assert!(!daemon.log().contains("hidden"));
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key":"a","body":1}')"#).await;
    inbox.next().await;
}

#[tokio::test]
async fn a_plugin_is_configured_and_limited_by_the_file_beside_it() {
    let world = World::with(&["misbehave"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let settings = "[config]\ngreeting = \"Guten Tag\"\n[limits]\noutput-kib = 4096\nmemory-mib = 16\n";
    std::fs::write(world.plugin_dir.join("misbehave.toml"), settings).expect("written");
    let _daemon = world.daemon().await;

    world.sql("SELECT tidings.schedule('config', now())").await;
    assert_eq!(inbox.next().await.text(), "Guten Tag");
    // With the default it would have been refused.
    world.sql("SELECT tidings.schedule('flood', now())").await;
    assert_eq!(inbox.next().await.delivery.data.len(), 2_000_000);
    world.sql("SELECT tidings.schedule('grow', now())").await;
    world.until("SELECT coalesce(last_error LIKE '%may have 16 (memory-mib)%', false) FROM tidings.schedules").await;
}

#[tokio::test]
async fn what_a_plugin_logs_is_bounded_and_harmless() {
    let world = World::with(&["misbehave"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    // Writing all that takes its time, which is not what this is about.
    std::fs::write(world.plugin_dir.join("misbehave.toml"), "[limits]\ncpu-ms = 10000\nwall-ms = 20000\n")
        .expect("written");
    let daemon = world.daemon().await;

    world.sql("SELECT tidings.schedule('log', now())").await;

    inbox.next().await;
    let log = daemon.log();
    let lines: Vec<&str> =
        log.lines().filter(|line| line.contains("plugin=\"misbehave@1+") && line.contains("line ")).collect();
    assert_eq!(lines.len(), 100);
    assert!(lines.iter().all(|line| line.len() < 5_000 && !line.contains('\u{1b}')), "{}", lines[0]);
}
