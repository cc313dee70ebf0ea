//! Limits: rows of a limited kind wait for their turn, all daemons together keep to the limit, and no other row is delayed. How
//! evenly rows go is measured (`cargo measure -- limits`); here times are only ever compared with the earliest that are allowed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use harness::windows::excess;
use harness::world::World;
use nix::sys::signal::Signal;
use serde_json::Value;
use sqlx::AssertSqlSafe;
use uuid::Uuid;

use crate::operations::commands::run_json;

/// Schedules `rows` rows of the kind `message` that are due by now, one after the other, with bodies from 1 on, for a subject (an
/// SQL expression of `n`).
async fn schedule_rows(world: &World, rows: u32, subject: &str) {
    world
        .sql(&format!(
            "INSERT INTO tidings.schedules (kind, key, subject, due_at, payload)
               SELECT 'message', 'row-' || n, {subject}, now() - interval '1 s' + n * interval '1 us', jsonb_build_object('routing_key', 'k', 'body', n)
               FROM generate_series(1, {rows}) AS n"
        ))
        .await;
}

async fn schedule_other_kind(world: &World) -> Uuid {
    let game = r#"{"game_id": "7d8a6f5e-0000-4000-8000-000000000000", "target_status": "DONE", "transition_time": "2026-11-22T00:00:00Z"}"#;
    world.value(&format!("SELECT tidings.schedule('game-status', now(), '{game}')")).await
}

/// The sentence with which PostgreSQL refuses a statement.
async fn refusal(world: &World, sql: &str) -> String {
    let refused = sqlx::query(AssertSqlSafe(sql.to_owned())).execute(&world.db).await;
    refused.expect_err("it is refused").to_string()
}

/// When the messages were confirmed of the deliveries that a condition selects, in seconds, in order.
async fn sent_seconds(world: &World, which: &str) -> Vec<f64> {
    let sent =
        "SELECT array_agg(extract(epoch FROM finished_at)::float8 ORDER BY finished_at) FROM tidings.deliveries WHERE";
    world.value(&format!("{sent} {which}")).await
}

/// Waits until no row is left, and expects that each was delivered once.
async fn expect_all_delivered(world: &World, rows: u32) {
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    let delivered = format!("SELECT count(*) = {rows} AND count(DISTINCT id) = {rows} FROM tidings.deliveries");
    assert!(world.value::<bool>(&delivered).await);
}

#[tokio::test]
async fn two_daemons_together_never_deliver_more_rows_of_a_kind_than_its_limit_allows_and_each_once() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world.sql("SELECT tidings.limit('message', 50, burst => 5)").await;
    let (_one, _other) = (world.start_daemon().await, world.start_daemon().await);
    let begun = Instant::now();

    schedule_rows(&world, 100, "NULL").await;

    for _ in 0..100 {
        inbox.next().await;
    }
    // Five at once, and then one every 20 ms; a claim makes up for 20 ms at most.
    assert!(begun.elapsed() >= Duration::from_millis(95 * 20 - 20), "too fast: {:?}", begun.elapsed());
    expect_all_delivered(&world, 100).await;
    let sent = sent_seconds(&world, "true").await;
    assert!(excess(&sent, 50.0, 5.0) < 1.0, "in some time more went than may: {sent:?}");
    assert!(world.value::<bool>("SELECT bool_and(attempts = 0) FROM tidings.deliveries").await);
}

#[tokio::test]
async fn the_rows_of_a_line_go_in_the_order_in_which_they_were_due() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world.sql("SELECT tidings.limit('message', 100, burst => 3)").await;
    // One daemon, since several may move rows into the line at the same time.
    let _daemon = world.start_daemon().await;

    schedule_rows(&world, 30, "NULL").await;

    let mut bodies: Vec<i64> = Vec::new();
    for _ in 0..30 {
        bodies.push(inbox.next().await.json().as_i64().expect("a number"));
    }
    assert_eq!(bodies, (1..=30).collect::<Vec<i64>>());
}

#[tokio::test]
async fn with_a_limit_for_each_subject_no_subject_waits_for_the_backlog_of_another() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world.sql("SELECT tidings.limit('message', 5, by => 'subject')").await;
    let _daemon = world.start_daemon().await;
    // A subject of 1,000 rows, which takes more than three minutes, before four of one row, and two rows without a subject.
    let subject = "CASE WHEN n <= 1000 THEN 'large' WHEN n <= 1004 THEN 'small-' || n END";

    schedule_rows(&world, 1006, subject).await;

    let mut bodies: Vec<i64> = Vec::new();
    while !(1001..=1006).all(|body| bodies.contains(&body)) {
        bodies.push(inbox.next().await.json().as_i64().expect("a number"));
    }
    world.wait_until("SELECT count(*) >= 8 FROM tidings.deliveries WHERE subject = 'large'").await;
    let large = sent_seconds(&world, "subject = 'large'").await;
    assert!(excess(&large, 5.0, 1.0) < 1.0, "the large subject goes on at its own pace: {large:?}");
    let lines = "SELECT count(*) FROM tidings.lines";
    assert_eq!(world.value::<i64>(lines).await, 6, "large, four small ones, and the rows without a subject");
}

#[tokio::test]
async fn rows_of_other_kinds_pass_the_rows_that_wait_for_their_turn() {
    let world = World::with_plugins(&["message", "game-status"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world.sql("SELECT tidings.limit('message', 1, per => '1 hour')").await;
    let _daemon = world.start_daemon().await;
    schedule_rows(&world, 3, "NULL").await;
    assert_eq!(inbox.next().await.json(), 1);
    world.wait_until("SELECT count(*) = 2 FROM tidings.schedules WHERE line = ''").await;

    let other = schedule_other_kind(&world).await;

    assert_eq!(inbox.next().await.id(), other);
    let (code, found) = run_json(&world, &["explain", "message/row-3"]).await;
    assert_eq!((code, &found["state"], &found["before"]), (0, &"waits_for_turn".into(), &1.into()), "{found}");
    let in_seconds = found["in_seconds"].as_f64().expect("a number");
    assert!((7000.0..=7200.0).contains(&in_seconds), "{found}");
    let (code, next) = run_json(&world, &["next"]).await;
    assert_eq!(
        (code, &next["limits"][0]["kind"], &next["limits"][0]["waiting"]),
        (0, &"message".into(), &2.into()),
        "{next}"
    );
    assert_eq!(next["held"], Value::Array(Vec::new()), "{next}");
}

#[tokio::test]
async fn a_limit_holds_through_a_crash_and_its_rows_go_on() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world.sql("SELECT tidings.limit('message', 100)").await;
    let (mut one, _other) = (world.start_daemon().await, world.start_daemon().await);
    let begun = Instant::now();
    schedule_rows(&world, 200, "NULL").await;
    // Second copies of what was in flight take turns as well.
    let mut received: BTreeSet<Uuid> = BTreeSet::new();
    while received.len() < 50 {
        received.insert(inbox.next().await.id());
    }

    one.signal(Signal::SIGKILL);
    one.wait_for_end().await;

    while received.len() < 200 {
        received.insert(inbox.next().await.id());
    }
    assert!(begun.elapsed() >= Duration::from_millis(199 * 10 - 20), "too fast: {:?}", begun.elapsed());
    expect_all_delivered(&world, 200).await;
}

#[tokio::test]
async fn what_is_cancelled_moved_or_expires_leaves_its_line_and_costs_no_turn() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world.sql("SELECT tidings.limit('message', 1, per => '1 hour', burst => 2)").await;
    let _daemon = world.start_daemon().await;
    schedule_rows(&world, 5, "NULL").await;
    assert_eq!([inbox.next().await.json(), inbox.next().await.json()], [1, 2]);
    world.wait_until("SELECT count(*) = 3 FROM tidings.schedules WHERE line = ''").await;

    assert!(world.value::<bool>("SELECT tidings.cancel('message', 'row-3')").await);
    world.sql("SELECT tidings.reschedule('message', 'row-4', now() + interval '1 hour')").await;
    world.sql("UPDATE tidings.schedules SET expires_at = clock_timestamp() + interval '1 s' WHERE key = 'row-5'").await;

    let expired = "SELECT EXISTS (
        SELECT FROM tidings.deliveries
        WHERE key = 'row-5' AND outcome = 'expired' AND detail LIKE '%because it waited for its turn%'
    )";
    world.wait_until(expired).await;
    let waiting = "SELECT held OR line IS NOT NULL FROM tidings.schedules WHERE key = 'row-4'";
    assert!(!world.value::<bool>(waiting).await, "it is due in an hour");
    world.sql("SELECT tidings.unlimit('message')").await;
    world.sql("SELECT tidings.reschedule('message', 'row-4', now())").await;
    assert_eq!(inbox.next().await.json(), 4);
}

#[tokio::test]
async fn a_row_that_gets_another_subject_waits_in_the_line_of_that_subject() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world.sql("SELECT tidings.limit('message', 1, per => '1 day', by => 'subject')").await;
    let _daemon = world.start_daemon().await;
    schedule_rows(&world, 3, "'crowded'").await;
    assert_eq!(inbox.next().await.json(), 1);
    world.wait_until("SELECT count(*) = 2 FROM tidings.schedules WHERE line = 'crowded'").await;

    world.sql("UPDATE tidings.schedules SET subject = 'empty'").await;
    assert_eq!(inbox.next().await.json(), 2, "the other line has a turn at once");
    world.wait_until("SELECT count(*) = 1 FROM tidings.schedules WHERE line = 'empty'").await;
}

#[tokio::test]
async fn a_limit_that_is_changed_or_taken_back_holds_at_once_for_the_rows_that_wait() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    // The sweep comes only every ten minutes, so that it cannot be the cause.
    let _daemon = world.launch().with("TIDINGS_SWEEP_MS", 600_000).start_ready().await;
    world.sql("SELECT tidings.limit('message', 1, per => '1 day')").await;
    schedule_rows(&world, 12, "'subject-' || n % 2").await;
    assert_eq!(inbox.next().await.json(), 1);
    world.wait_until("SELECT count(*) = 11 FROM tidings.schedules WHERE line = ''").await;

    world.sql("SELECT tidings.limit('message', 100, per => '1 day', burst => 3)").await;
    assert_eq!([inbox.next().await.json(), inbox.next().await.json()], [2, 3]);

    // Each of the two subjects may have its own burst now.
    world.sql("SELECT tidings.limit('message', 1, per => '1 day', burst => 3, by => 'subject')").await;
    let mut bodies: Vec<i64> = Vec::new();
    for _ in 0..6 {
        bodies.push(inbox.next().await.json().as_i64().expect("a number"));
    }
    bodies.sort_unstable();
    assert_eq!(bodies, [4, 5, 6, 7, 8, 9]);
    world.wait_until("SELECT count(*) = 3 FROM tidings.schedules WHERE line LIKE 'subject-%'").await;

    assert!(world.value::<bool>("SELECT tidings.unlimit('message')").await);
    let mut bodies: Vec<i64> = Vec::new();
    for _ in 0..3 {
        bodies.push(inbox.next().await.json().as_i64().expect("a number"));
    }
    bodies.sort_unstable();
    assert_eq!(bodies, [10, 11, 12]);
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.lines) AND NOT EXISTS (SELECT FROM tidings.lifted)").await;
    assert!(!world.value::<bool>("SELECT tidings.unlimit('message')").await);
}

#[tokio::test]
async fn the_rows_of_a_limited_kind_wait_while_it_is_paused_and_a_limit_of_an_unserved_kind_is_kept() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world.sql("SELECT tidings.limit('message', 2, per => '10 ms')").await;
    world.sql("SELECT tidings.limit('nobody', 1)").await;
    let _daemon = world.start_daemon().await;
    let (code, _) = run_json(&world, &["pause", "message"]).await;
    assert_eq!(code, 0);
    schedule_rows(&world, 3, "NULL").await;
    world.sql("SELECT tidings.schedule('nobody', now())").await;
    world.wait_until("SELECT count(*) = 4 FROM tidings.schedules WHERE held").await;

    let (code, _) = run_json(&world, &["resume", "message"]).await;
    assert_eq!(code, 0);

    for _ in 0..3 {
        inbox.next().await;
    }
    assert!(world.value::<bool>("SELECT held FROM tidings.schedules WHERE kind = 'nobody'").await);
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.limits").await, 2);
}

#[tokio::test]
async fn the_lines_of_a_paused_kind_stand_still_while_those_of_other_kinds_go_on() {
    let world = World::with_plugins(&["message", "game-status"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world.sql("SELECT tidings.limit('message', 5), tidings.limit('game-status', 5)").await;
    let _daemon = world.start_daemon().await;
    schedule_rows(&world, 100, "NULL").await;
    inbox.next().await;
    world.sql("INSERT INTO tidings.pauses (kind) VALUES ('message')").await;
    // Until no claim from before the pause is under way, and the line would have had two more turns.
    world
        .wait_until(
            "SELECT free_at BETWEEN '2000-01-01' AND clock_timestamp() - interval '0.5 s'
                AND pg_try_advisory_xact_lock(hashtextextended('tidings.line message ', 0))
             FROM tidings.lines WHERE kind = 'message'",
        )
        .await;
    let waiting: i64 = world.value("SELECT count(*) FROM tidings.schedules WHERE kind = 'message'").await;

    let mut others = BTreeSet::new();
    for _ in 0..3 {
        others.insert(schedule_other_kind(&world).await);
    }

    while !others.is_empty() {
        others.remove(&inbox.next().await.id());
    }
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules WHERE kind = 'message'").await, waiting);
}

#[tokio::test]
async fn a_limit_that_cannot_be_is_refused_with_the_name_of_the_parameter() {
    let world = World::empty().await;
    for (limit, sentence) in [
        ("'message', 0", "count must be from 1 to 1000000"),
        ("'message', -1", "count must be from 1 to 1000000"),
        ("'message', 1, per => '0'", "per must be from 1 millisecond to 1 year"),
        ("'message', 1, per => '-1 s'", "per must be from 1 millisecond to 1 year"),
        ("'message', 1, burst => 0", "burst must be from 1 to 1000000"),
        ("'message', 1, by => 'key'", "by must be kind or subject"),
        ("'message', 1, by => NULL", "\"by\""),
        ("'message', NULL", "\"count\""),
        ("'A message', 1", "kind must match"),
    ] {
        let refused = refusal(&world, &format!("SELECT tidings.limit({limit})")).await;
        assert!(refused.contains(sentence), "{limit}: {refused}");
    }
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.limits").await, 0);
}
