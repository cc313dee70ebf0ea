//! Serving plugins: the three of the repository from row to message, the files that are refused at the start, and the
//! settings of plugins.

use std::time::Duration;

use harness::guests::{slow_to_load, well_behaved};
use harness::world::World;
use serde_json::json;

use crate::operations::health::get_json;
use crate::plugins::reload::schedule_row;

const GAME: &str = "6f0f5e2e-6a2b-4b0e-9d0b-3a4f0a6b1c2d";

#[tokio::test]
async fn a_game_reminder_arrives_in_the_expected_envelope_and_expires_when_the_game_starts() {
    let world = World::with_plugins(&["game-reminder"]).await;
    let mut inbox = world.inbox(&["game.#"]).await;
    let _daemon = world.start_daemon().await;

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
    world.wait_until("SELECT count(*) = 1 FROM tidings.deliveries").await;
    let starts_ms: i64 = world
        .value("SELECT floor(extract(epoch FROM (payload->>'starts_at')::timestamptz) * 1000)::bigint FROM tidings.deliveries")
        .await;
    // The plugin computes the time to live from its `now-ms`, in whole milliseconds.
    assert!((received.number("tidings-expires-ms") - starts_ms).abs() <= 1, "the deadline is the game's start");
    let expiration: i64 =
        received.properties().expiration().as_ref().expect("one").as_str().parse().expect("an integer");
    assert!((starts_ms - received.at_ms - expiration).abs() < 20_000);
}

#[tokio::test]
async fn a_game_status_change_arrives_without_a_deadline_however_late_it_is() {
    let world = World::with_plugins(&["game-status"]).await;
    let mut inbox = world.inbox(&["game.status_transition_due"]).await;
    let _daemon = world.start_daemon().await;
    let data = json!({"game_id": GAME, "target_status": "IN_PROGRESS", "transition_time": "2020-01-01T10:00:00Z"});

    world.sql(&format!("SELECT tidings.schedule('game-status', '2020-01-01T10:00:00Z', '{data}')")).await;

    let received = inbox.next().await;
    assert_eq!(received.properties().expiration(), &None);
    assert_eq!(received.json()["data"], data);
    assert_eq!(received.json()["event_type"], "game.status_transition_due");
}

#[tokio::test]
async fn the_plugin_message_publishes_body_headers_and_content_type_of_the_payload() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["hello.*"]).await;
    let _daemon = world.start_daemon().await;

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
async fn the_plugin_message_accepts_every_payload_that_sql_accepts() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["large"]).await;
    let _daemon = world.start_daemon().await;
    let bodies = [
        // A string of which every line must be unescaped, and an array whose JSON text is longer than its stored form.
        "to_jsonb(repeat(repeat('x', 60) || E'\\n', 16777000 / 61))",
        "jsonb_agg(true) FROM generate_series(1, 4100000)",
    ];
    for body in bodies {
        let sent: i64 = world
            .value(&format!("SELECT octet_length((x #>> '{{}}')::text)::bigint FROM (SELECT {body}) AS y (x)"))
            .await;
        world
            .sql(&format!(
                "INSERT INTO tidings.schedules (kind, due_at, payload)
                 SELECT 'message', now(), jsonb_build_object('routing_key', 'large', 'body', x) FROM (SELECT {body}) AS y (x)"
            ))
            .await;
        let stored = "SELECT pg_column_size(payload) FROM tidings.schedules";
        assert!(sent > 16_000_000, "{sent}, stored in {}", world.value::<i32>(stored).await);

        assert_eq!(i64::try_from(inbox.next().await.delivery.data.len()).expect("it fits"), sent);
    }
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.parked").await, 0);
}

#[tokio::test]
async fn a_plugin_file_that_cannot_serve_is_refused_by_name_and_the_others_serve() {
    let world = World::with_plugins(&["message"]).await;
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
    // Files that the daemon ignores.
    std::fs::write(dir.join(".hidden.wasm"), "").expect("written");
    std::fs::write(dir.join("README.md"), "").expect("written");

    let daemon = world.start_daemon().await;

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
async fn the_toml_file_beside_a_plugin_sets_its_configuration_and_limits() {
    let world = World::with_plugins(&["misbehave"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let settings = "[config]\ngreeting = \"Guten Tag\"\n[limits]\noutput-kib = 4096\nmemory-mib = 16\n";
    std::fs::write(world.plugin_dir.join("misbehave.toml"), settings).expect("written");
    let _daemon = world.start_daemon().await;

    world.sql("SELECT tidings.schedule('config', now())").await;
    assert_eq!(inbox.next().await.text(), "Guten Tag");
    // With the default limit this would fail.
    world.sql("SELECT tidings.schedule('flood', now())").await;
    assert_eq!(inbox.next().await.delivery.data.len(), 2_000_000);
    world.sql("SELECT tidings.schedule('grow', now())").await;
    world.wait_until("SELECT count(*) = 1 FROM tidings.parked WHERE reason LIKE '%may have 16 (memory-mib)%'").await;
}

#[tokio::test]
async fn the_log_lines_of_a_plugin_are_limited_and_escaped() {
    let world = World::with_plugins(&["misbehave"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    // Writing so many lines takes longer than the default limits allow, which this test is not about.
    std::fs::write(world.plugin_dir.join("misbehave.toml"), "[limits]\ncpu-ms = 10000\nwall-ms = 20000\n")
        .expect("written");
    let daemon = world.start_daemon().await;

    world.sql("SELECT tidings.schedule('log', now())").await;

    inbox.next().await;
    let log = daemon.log();
    let lines: Vec<&str> =
        log.lines().filter(|line| line.contains("plugin=\"misbehave@1+") && line.contains("line ")).collect();
    assert_eq!(lines.len(), 100);
    assert!(lines.iter().all(|line| line.len() < 5_000 && !line.contains('\u{1b}')), "{}", lines[0]);
}

#[tokio::test]
async fn many_plugins_serve_when_the_daemon_is_ready_and_the_first_file_by_name_gets_a_shared_kind() {
    const PLUGINS: usize = 60;
    let world = World::empty().await;
    for number in 0..PLUGINS {
        let name = format!("p{number:02}");
        world.put(&format!("{name}.wasm"), &well_behaved(&name, &[&name], &name));
        // Each has a rival with a later name. At the second start half of the rivals are ready sooner, because their
        // compiled code is in the cache.
        world.put(&format!("q{number:02}.wasm"), &well_behaved("rival", &[&name], &name));
    }
    let mut inbox = world.inbox(&["hostile.#"]).await;

    for start in 1..=2 {
        let daemon = world.start_daemon_with_many_plugins().await;
        let log = daemon.log();
        assert_eq!(log.matches("refused the plugin ").count(), PLUGINS, "{log}");
        for number in 0..PLUGINS {
            world.sql(&format!("SELECT tidings.schedule('p{number:02}', now())")).await;
        }
        let mut keys = Vec::new();
        for _ in 0..PLUGINS {
            keys.push(inbox.next().await.delivery.routing_key.to_string());
        }
        keys.sort();
        let expected: Vec<String> = (0..PLUGINS).map(|number| format!("hostile.p{number:02}")).collect();
        assert_eq!(keys, expected, "start {start}");
        assert!(daemon.stop().await.success());
        // Half of the plugins are replaced and must be compiled at the next start.
        for number in (0..PLUGINS).step_by(2) {
            let name = format!("p{number:02}");
            world.put(&format!("{name}.wasm"), &well_behaved(&name, &[&name], "anew"));
        }
    }
}

#[tokio::test]
async fn each_plugin_serves_as_soon_as_it_is_loaded_and_rows_of_the_others_are_not_held_meanwhile() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("slow.wasm", &slow_to_load("slow", &["later"], "later", Duration::from_secs(8)));
    std::fs::write(world.plugin_dir.join("slow.toml"), "[limits]\nwall-ms = 60000\n").expect("written");
    // These rows are due first, and are far more than a claim takes.
    world.sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'later', now() FROM generate_series(1, 3000)").await;
    schedule_row(&world, "message", r#"{"routing_key":"a","body":"now"}"#).await;

    let mut daemon = world.launch().start();

    assert_eq!(inbox.next().await.text(), "now", "those that are due first wait for their plugin");
    let (status, body) = get_json(&mut daemon, "/readyz").await;
    assert!(status == 503 && body.to_string().contains("starting"), "{status} {body}");
    for _ in 0..3_000 {
        assert_eq!(inbox.next().await.text(), "later");
    }
    daemon.wait_for_line(" ready ").await;
    assert!(!daemon.log().contains("held rows"), "{}", daemon.log());
}
