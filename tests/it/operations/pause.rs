//! Paused kinds: no daemon delivers their rows, rows of other kinds are not delayed, and delivery continues at once
//! when the kind is resumed or the pause ends. In most tests the sweep comes only every ten minutes, so that it cannot
//! be the cause.

use harness::world::World;
use serde_json::Value;
use sqlx::{AssertSqlSafe, Row as _};

use crate::on_time::delivery::start_row_in_flight;
use crate::operations::commands::run_json;

/// Schedules a row of the kind `message` that is due now.
async fn schedule_message(world: &World, body: &str) -> uuid::Uuid {
    let payload = format!(r#"{{"routing_key": "k", "body": "{body}"}}"#);
    world.value(&format!("SELECT tidings.schedule('message', now(), '{payload}', key => '{body}')")).await
}

/// Schedules a row of another kind.
async fn schedule_other_kind(world: &World) -> uuid::Uuid {
    let game = r#"{"game_id": "7d8a6f5e-0000-4000-8000-000000000000", "target_status": "DONE", "transition_time": "2026-11-22T00:00:00Z"}"#;
    world.value(&format!("SELECT tidings.schedule('game-status', now(), '{game}')")).await
}

async fn pause_kind(world: &World, arguments: &[&str]) -> Value {
    let (code, answer) = run_json(world, &[&["pause"], arguments].concat()).await;
    assert_eq!(code, 0, "{answer}");
    answer
}

async fn resume_kind(world: &World, kind: &str) {
    let (code, answer) = run_json(world, &["resume", kind]).await;
    assert_eq!((code, &answer["resumed"]), (0, &Value::Bool(true)), "{answer}");
}

#[tokio::test]
async fn rows_of_a_paused_kind_are_held_by_all_daemons_and_delivered_as_soon_as_it_is_resumed() {
    let world = World::with_plugins(&["message", "game-status"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let (_one, _other) = (world.start_daemon().await, world.start_daemon().await);

    let paused = pause_kind(&world, &["message", "--reason", "the mail server is down"]).await;
    assert_eq!((&paused["kind"], &paused["daemons"], &paused["until"]), (&"message".into(), &2.into(), &Value::Null));
    assert_eq!((&paused["by"], &paused["reason"]), (&"postgres".into(), &"the mail server is down".into()));
    let mut ids = Vec::new();
    for body in ["a", "b", "c"] {
        ids.push(schedule_message(&world, body).await);
    }
    let other = schedule_other_kind(&world).await;

    assert_eq!(inbox.next().await.id(), other, "another kind goes on");
    world.wait_until("SELECT count(*) = 3 FROM tidings.schedules WHERE held").await;
    // An edit makes a held row due again, and the pause holds it again.
    world.sql("UPDATE tidings.schedules SET headers = '{\"edited\": \"yes\"}' WHERE key = 'a'").await;
    world.wait_until("SELECT held FROM tidings.schedules WHERE key = 'a'").await;
    let seen: bool = world.value("SELECT bool_and(due_at <= now() AND last_error = 'held: the kind \"message\" is paused') FROM tidings.schedules").await;
    assert!(seen, "they stay due and visible");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.deliveries").await, 1);

    resume_kind(&world, "message").await;

    let mut received = Vec::new();
    for _ in 0..3 {
        received.push(inbox.next().await.id());
    }
    received.sort();
    ids.sort();
    assert_eq!(received, ids);
    let (code, _) = run_json(&world, &["resume", "message"]).await;
    assert_eq!(code, 66, "it is not paused any more");
}

#[tokio::test]
async fn a_pause_with_an_end_ends_by_itself() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    pause_kind(&world, &["message", "--for", "2s"]).await;
    let until_ms: i64 = world.value("SELECT (extract(epoch FROM until) * 1000)::int8 FROM tidings.pauses").await;

    let id = schedule_message(&world, "a").await;

    let received = inbox.next().await;
    assert_eq!(received.id(), id);
    assert!(received.at_ms >= until_ms, "{} before {until_ms}", received.at_ms);
}

#[tokio::test]
async fn a_pause_works_without_notifications() {
    let world = World::with_plugins(&["message", "game-status"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let launch = world.launch().with("TIDINGS_NOTIFY", "off").with("TIDINGS_SWEEP_MS", 50);
    let _daemon = launch.start_ready().await;
    pause_kind(&world, &["message"]).await;

    let id = schedule_message(&world, "a").await;
    let other = schedule_other_kind(&world).await;

    assert_eq!(inbox.next().await.id(), other);
    world.wait_until("SELECT held FROM tidings.schedules WHERE key = 'a'").await;
    resume_kind(&world, "message").await;
    assert_eq!(inbox.next().await.id(), id);
}

#[tokio::test]
async fn a_row_in_flight_when_its_kind_is_paused_is_delivered_and_the_next_row_is_held() {
    let world = World::with_plugins(&["misbehave"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let (_daemon, id) = start_row_in_flight(&world).await;

    pause_kind(&world, &["echo"]).await;
    world.sql("SELECT tidings.schedule('echo', now(), key => 'next')").await;

    assert_eq!(inbox.next().await.id(), id);
    world.wait_until("SELECT held FROM tidings.schedules WHERE kind = 'echo' AND key = 'next'").await;
}

#[tokio::test]
async fn a_row_of_a_paused_kind_expires_at_its_deadline() {
    let world = World::with_plugins(&["message"]).await;
    let _daemon = world.start_daemon().await;
    pause_kind(&world, &["message"]).await;

    world
        .sql("SELECT tidings.schedule('message', now(), expires_at => clock_timestamp() + interval '2 seconds', key => 'k')")
        .await;
    world.wait_until("SELECT held FROM tidings.schedules WHERE key = 'k'").await;

    world.wait_until("SELECT count(*) = 1 FROM tidings.deliveries WHERE outcome = 'expired'").await;
    let late: f64 =
        world.value("SELECT extract(epoch FROM finished_at - expires_at)::float8 FROM tidings.deliveries").await;
    assert!((0.0..5.0).contains(&late), "{late}");
}

#[tokio::test]
async fn rows_of_a_paused_kind_stay_held_when_its_plugin_is_added() {
    let world = World::with_plugins(&["game-status"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.start_daemon().await;
    let id = schedule_message(&world, "a").await;
    world.wait_until("SELECT held FROM tidings.schedules WHERE key = 'a'").await;
    pause_kind(&world, &["message"]).await;

    world.install("message");
    daemon.wait_for_line("message@").await;
    // When this later row is held, the daemon has looked with the new plugin.
    let later = schedule_message(&world, "later").await;
    world.wait_until("SELECT held FROM tidings.schedules WHERE key = 'later'").await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.deliveries").await, 0);
    resume_kind(&world, "message").await;

    let mut received = [inbox.next().await.id(), inbox.next().await.id()];
    received.sort();
    let mut sent = [id, later];
    sent.sort();
    assert_eq!(received, sent);
}

#[tokio::test]
async fn twenty_thousand_due_rows_of_a_paused_kind_neither_delay_others_nor_cause_table_scans() {
    let world = World::with_plugins(&["message", "game-status"]).await;
    let mut inbox = world.inbox(&["game.#"]).await;
    pause_kind(&world, &["message"]).await;
    world
        .sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'message', now() - interval '1 hour' FROM generate_series(1, 20000)")
        .await;
    world.sql("ANALYZE tidings.schedules").await;
    let scans = "SELECT seq_scan FROM pg_stat_user_tables WHERE relid = 'tidings.schedules'::regclass";
    let before: i64 = world.value(scans).await;

    let daemon = world.launch().with("TIDINGS_SWEEP_MS", 20).start_ready().await;
    for _ in 0..10 {
        let other = schedule_other_kind(&world).await;
        assert_eq!(inbox.next().await.id(), other);
    }
    // This query uses the index, because it must not read the whole table either.
    let mut session = world.db.acquire().await.expect("a connection");
    sqlx::query("SET enable_seqscan = off").execute(&mut *session).await.expect("set");
    harness::eventually("all of them are out of the queue", async || {
        let due = "SELECT count(*) FROM tidings.schedules WHERE slot_at <= now()";
        let row = sqlx::query(AssertSqlSafe(due)).fetch_one(&mut *session).await.expect("a count");
        (row.get::<i64, _>(0) == 0).then_some(())
    })
    .await;
    for _ in 0..10 {
        let other = schedule_other_kind(&world).await;
        assert_eq!(inbox.next().await.id(), other);
    }
    // A session reports its statistics when it ends at the latest.
    assert!(daemon.stop().await.success());

    world.wait_until("SELECT idx_scan > 20 FROM pg_stat_user_tables WHERE relid = 'tidings.schedules'::regclass").await;
    assert_eq!(world.value::<i64>(scans).await, before, "a statement of the daemon read the whole table");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules WHERE held").await, 20_000);
}
