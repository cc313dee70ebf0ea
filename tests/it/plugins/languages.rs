//! Every supported way to build a plugin: all toolchains for Rust from the same source, and one plugin each in
//! JavaScript and Python.

use harness::build;
use harness::world::World;
use serde_json::json;

#[tokio::test]
async fn every_rust_toolchain_builds_the_same_plugin_from_the_same_source() {
    // Built before anything connects to RabbitMQ: this blocks for minutes, in which no heartbeats would be sent.
    let component = build::cargo_component("message").expect("it builds");
    let others = build::for_every_target("message").expect("it builds");
    assert!(!others.is_empty());
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("message.wasm", &std::fs::read(component).expect("it was built"));
    let _daemon = world.start_daemon().await;
    let rows = [
        r#"{"routing_key": "a", "body": "text", "headers": {"b": "c"}, "ttl_ms": 60000}"#,
        r#"{"routing_key": "a", "body": {"n": 1.10}}"#,
    ];
    for row in rows {
        world.sql(&format!("SELECT tidings.schedule('message', now(), '{row}')")).await;
        inbox.next().await;
    }
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key": 7}')"#).await;
    world
        .wait_until(
            "SELECT count(*) = 1 FROM tidings.parked WHERE reason LIKE 'the payload is not a message: invalid type%'",
        )
        .await;
    world.wait_until("SELECT count(*) = 2 FROM tidings.deliveries").await;

    // Every component builds the same events, to the byte.
    for (triple, other) in others {
        let (code, output) = world.tidings(["plugin", "replay", other.to_str().expect("UTF-8")]).await;
        assert!(code == 0 && output.contains("2 same, 0 differ"), "{triple}: {output}");
    }
}

/// Checks a plugin in another language: its events, its settings, its errors and its panic.
async fn check_greeting_plugin(language: &str, wasm: &std::path::Path, panic: &str) {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    let kind = format!("greeting-{language}");
    // An interpreter needs more memory, and more time in its first call.
    let settings =
        "[config]\ngreeting = \"Good morning\"\n[limits]\nmemory-mib = 256\ncpu-ms = 5000\nwall-ms = 20000\n";
    world.put("greeting.toml", settings.as_bytes());
    world.put("greeting.wasm", &std::fs::read(wasm).expect("it was built"));
    let _daemon = world.start_daemon_with_many_plugins().await;
    let schedule = async |payload: &str| {
        world.sql(&format!("SELECT tidings.schedule('{kind}', '2026-01-01Z', '{payload}')")).await
    };

    schedule(r#"{"name": "Zoë"}"#).await;
    let received = inbox.next().await;
    assert_eq!(received.delivery.routing_key.as_str(), "greeting.due");
    assert_eq!(received.json(), json!({ "greeting": "Good morning, Zoë!", "due_ms": 1_767_225_600_000_i64 }));
    assert_eq!(received.headers()["lang"], language);
    assert!(received.properties().expiration().is_some());
    schedule(r#"{"name": "Ada", "later": true}"#).await;
    assert_eq!(inbox.next().await.number("tidings-attempt"), 2);
    schedule(r#"{"name": ""}"#).await;
    world
        .wait_until(
            "SELECT count(*) = 1 FROM tidings.deliveries WHERE outcome = 'skipped' AND detail = 'nobody to greet'",
        )
        .await;
    schedule(r#"{"name": 7}"#).await;
    world
        .wait_until("SELECT count(*) = 1 FROM tidings.parked WHERE reason = 'the payload is not a greeting: name must be a text'")
        .await;
    schedule(r#"{"name": "boom"}"#).await;
    world.wait_until(&format!("SELECT coalesce(last_error LIKE '%{panic}%', false) FROM tidings.schedules")).await;
    schedule(r#"{"name": "Bob"}"#).await;
    assert_eq!(inbox.next().await.json()["greeting"], "Good morning, Bob!");
}

#[tokio::test]
async fn a_plugin_in_javascript_is_built_from_its_package_and_serves() {
    check_greeting_plugin("js", &build::javascript().expect("it builds"), "Error: boom").await;
}

#[tokio::test]
async fn a_plugin_in_python_is_built_from_its_package_and_serves() {
    check_greeting_plugin("py", &build::python().expect("it builds"), "RuntimeError(%boom%) at %greeting_py.py:").await;
}
