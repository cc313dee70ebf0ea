//! A kind that a person stops: no daemon delivers its rows, nobody else's are hidden or late, and they go on at once when it
//! is resumed or its time has come. The sweep of ten minutes switches off every other way.

use harness::world::World;
use serde_json::Value;
use sqlx::{AssertSqlSafe, Row as _};

use crate::on_time::delivery::row_in_flight;
use crate::operations::commands::json;

/// Schedules a row of the kind `message` that is due now.
async fn send(world: &World, body: &str) -> uuid::Uuid {
    let payload = format!(r#"{{"routing_key": "k", "body": "{body}"}}"#);
    world.value(&format!("SELECT tidings.schedule('message', now(), '{payload}', key => '{body}')")).await
}

/// Schedules a row of another kind.
async fn send_other(world: &World) -> uuid::Uuid {
    let game = r#"{"game_id": "7d8a6f5e-0000-4000-8000-000000000000", "target_status": "DONE", "transition_time": "2026-11-22T00:00:00Z"}"#;
    world.value(&format!("SELECT tidings.schedule('game-status', now(), '{game}')")).await
}

async fn pause(world: &World, arguments: &[&str]) -> Value {
    let (code, answer) = json(world, &[&["pause"], arguments].concat()).await;
    assert_eq!(code, 0, "{answer}");
    answer
}

async fn resume(world: &World, kind: &str) {
    let (code, answer) = json(world, &["resume", kind]).await;
    assert_eq!((code, &answer["resumed"]), (0, &Value::Bool(true)), "{answer}");
}

#[tokio::test]
async fn no_daemon_delivers_rows_of_a_paused_kind_until_it_is_resumed_and_then_all_at_once() {
    let world = World::with(&["message", "game-status"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let (_one, _other) = (world.daemon().await, world.daemon().await);

    let paused = pause(&world, &["message", "--reason", "the mail server is down"]).await;
    assert_eq!((&paused["kind"], &paused["daemons"], &paused["until"]), (&"message".into(), &2.into(), &Value::Null));
    assert_eq!((&paused["by"], &paused["reason"]), (&"postgres".into(), &"the mail server is down".into()));
    let mut ids = Vec::new();
    for body in ["a", "b", "c"] {
        ids.push(send(&world, body).await);
    }
    let other = send_other(&world).await;

    assert_eq!(inbox.next().await.id(), other, "another kind goes on");
    world.until("SELECT count(*) = 3 FROM tidings.schedules WHERE held").await;
    // An edit puts a row back into the queue, and it is no less paused.
    world.sql("UPDATE tidings.schedules SET headers = '{\"edited\": \"yes\"}' WHERE key = 'a'").await;
    world.until("SELECT held FROM tidings.schedules WHERE key = 'a'").await;
    let seen: bool = world.value("SELECT bool_and(due_at <= now() AND last_error = 'held: the kind \"message\" is paused') FROM tidings.schedules").await;
    assert!(seen, "they stay due and visible");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.deliveries").await, 1);

    resume(&world, "message").await;

    let mut received = Vec::new();
    for _ in 0..3 {
        received.push(inbox.next().await.id());
    }
    received.sort();
    ids.sort();
    assert_eq!(received, ids);
    let (code, _) = json(&world, &["resume", "message"]).await;
    assert_eq!(code, 66, "it is not paused any more");
}

#[tokio::test]
async fn a_pause_ends_by_itself_at_its_time() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.daemon().await;
    pause(&world, &["message", "--for", "2s"]).await;
    let until_ms: i64 = world.value("SELECT (extract(epoch FROM until) * 1000)::int8 FROM tidings.pauses").await;

    let id = send(&world, "a").await;

    let received = inbox.next().await;
    assert_eq!(received.id(), id);
    assert!(received.at_ms >= until_ms, "{} before {until_ms}", received.at_ms);
}

#[tokio::test]
async fn a_pause_holds_and_ends_without_notifications_too() {
    let world = World::with(&["message", "game-status"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let launch = world.launch().with("TIDINGS_NOTIFY", "off").with("TIDINGS_SWEEP_MS", 50);
    let _daemon = launch.ready().await;
    pause(&world, &["message"]).await;

    let id = send(&world, "a").await;
    let other = send_other(&world).await;

    assert_eq!(inbox.next().await.id(), other);
    world.until("SELECT held FROM tidings.schedules WHERE key = 'a'").await;
    resume(&world, "message").await;
    assert_eq!(inbox.next().await.id(), id);
}

#[tokio::test]
async fn what_is_in_flight_when_its_kind_is_paused_is_finished_and_the_next_row_waits() {
    let world = World::with(&["misbehave"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let (_daemon, id) = row_in_flight(&world).await;

    pause(&world, &["echo"]).await;
    world.sql("SELECT tidings.schedule('echo', now(), key => 'next')").await;

    assert_eq!(inbox.next().await.id(), id);
    world.until("SELECT held FROM tidings.schedules WHERE kind = 'echo' AND key = 'next'").await;
}

#[tokio::test]
async fn a_row_of_a_paused_kind_expires_at_its_deadline() {
    let world = World::with(&["message"]).await;
    let _daemon = world.daemon().await;
    pause(&world, &["message"]).await;

    world
        .sql("SELECT tidings.schedule('message', now(), expires_at => clock_timestamp() + interval '2 seconds', key => 'k')")
        .await;
    world.until("SELECT held FROM tidings.schedules WHERE key = 'k'").await;

    world.until("SELECT count(*) = 1 FROM tidings.deliveries WHERE outcome = 'expired'").await;
    let late: f64 =
        world.value("SELECT extract(epoch FROM finished_at - expires_at)::float8 FROM tidings.deliveries").await;
    assert!((0.0..5.0).contains(&late), "{late}");
}

#[tokio::test]
async fn a_kind_without_a_plugin_that_is_paused_and_then_gets_one_waits_for_the_end_of_its_pause() {
    let world = World::with(&["game-status"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.daemon().await;
    let id = send(&world, "a").await;
    world.until("SELECT held FROM tidings.schedules WHERE key = 'a'").await;
    pause(&world, &["message"]).await;

    world.install("message");
    daemon.wait_for_line("message@").await;
    // It has looked with the new plugin when it delivers something that came after.
    let later = send(&world, "later").await;
    world.until("SELECT held FROM tidings.schedules WHERE key = 'later'").await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.deliveries").await, 0);
    resume(&world, "message").await;

    let mut received = [inbox.next().await.id(), inbox.next().await.id()];
    received.sort();
    let mut sent = [id, later];
    sent.sort();
    assert_eq!(received, sent);
}

#[tokio::test]
async fn twenty_thousand_due_rows_of_a_paused_kind_neither_hide_another_kind_nor_make_anybody_read_the_table() {
    let world = World::with(&["message", "game-status"]).await;
    let mut inbox = world.inbox(&["game.#"]).await;
    pause(&world, &["message"]).await;
    world
        .sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'message', now() - interval '1 hour' FROM generate_series(1, 20000)")
        .await;
    world.sql("ANALYZE tidings.schedules").await;
    let scans = "SELECT seq_scan FROM pg_stat_user_tables WHERE relid = 'tidings.schedules'::regclass";
    let before: i64 = world.value(scans).await;

    let daemon = world.launch().with("TIDINGS_SWEEP_MS", 20).ready().await;
    for _ in 0..10 {
        let other = send_other(&world).await;
        assert_eq!(inbox.next().await.id(), other);
    }
    // By the index: this question must not read the whole table either.
    let mut session = world.db.acquire().await.expect("a connection");
    sqlx::query("SET enable_seqscan = off").execute(&mut *session).await.expect("set");
    harness::eventually("all of them are out of the queue", async || {
        let due = "SELECT count(*) FROM tidings.schedules WHERE slot_at <= now()";
        let row = sqlx::query(AssertSqlSafe(due)).fetch_one(&mut *session).await.expect("a count");
        (row.get::<i64, _>(0) == 0).then_some(())
    })
    .await;
    for _ in 0..10 {
        let other = send_other(&world).await;
        assert_eq!(inbox.next().await.id(), other);
    }
    // A session hands in its statistics at its end at the latest.
    assert!(daemon.stop().await.success());

    world.until("SELECT idx_scan > 20 FROM pg_stat_user_tables WHERE relid = 'tidings.schedules'::regclass").await;
    assert_eq!(world.value::<i64>(scans).await, before, "a statement of the daemon read the whole table");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules WHERE held").await, 20_000);
}
