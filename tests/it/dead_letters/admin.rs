//! Work on dead letters and parked rows by hand with `tidings dead` and `tidings parked`, and the metrics that show
//! when it is needed.

use harness::eventually;
use harness::world::World;
use lapin::BasicProperties;

use crate::dead_letters::replay::{
    count_messages, force_pass_at_start, launch_with_frequent_passes, launch_with_hourly_passes, publish_message,
    reject_next, schedule_message, suppress_pass_at_start, wait_for_message_count,
};

/// Makes two dead letters of two kinds from two queues, with a daemon that makes no pass during the test.
async fn make_two_dead_letters() -> (World, harness::daemon::Daemon) {
    let world = World::with_plugins(&["message", "game-status"]).await;
    let mut first = world.inbox(&["k"]).await;
    let mut second = world.inbox(&["game.#"]).await;
    suppress_pass_at_start(&world).await;
    let daemon = launch_with_hourly_passes(&world).start_ready().await;
    schedule_message(&world, r#"{"routing_key": "k", "body": 1}"#).await;
    reject_next(&mut first).await;
    let game = r#"{"game_id": "7d8a6f5e-0000-4000-8000-000000000000", "target_status": "DONE", "transition_time": "2026-11-22T00:00:00Z"}"#;
    world.sql(&format!("SELECT tidings.schedule('game-status', now(), '{game}')")).await;
    reject_next(&mut second).await;
    wait_for_message_count(&world, "tidings.dead", 2).await;
    (world, daemon)
}

#[tokio::test]
async fn dead_list_counts_dead_letters_by_queue_kind_and_reason_and_leaves_them_in_place() {
    let (world, _daemon) = make_two_dead_letters().await;

    let (code, output) = world.tidings(["dead", "list"]).await;
    assert_eq!(code, 0, "{output}");
    for part in ["inbox.k ", "inbox.game.# ", "message", "game-status", "rejected", "2 of 2 dead letters"] {
        assert!(output.contains(part), "{part}:\n{output}");
    }
    let (_, output) = world.tidings(["dead", "list", "--kind", "message", "--since", "1h"]).await;
    assert!(output.contains("1 of 2") && !output.contains("game-status"), "{output}");
    let (_, output) = world.tidings(["dead", "list", "--queue", "nowhere"]).await;
    assert!(output.contains("0 of 2"), "{output}");
    assert_eq!(count_messages(&world, "tidings.dead").await, 2);
}

#[tokio::test]
async fn dead_replay_replays_only_the_chosen_dead_letters_and_a_dry_run_changes_nothing() {
    let (world, _daemon) = make_two_dead_letters().await;

    let (code, output) = world.tidings(["dead", "replay", "--dry-run"]).await;
    assert_eq!(code, 0, "{output}");
    assert!(output.contains("would go back into inbox.k") && output.contains("would be: 2 replayed"), "{output}");
    assert_eq!(count_messages(&world, "tidings.dead").await, 2);

    let (code, output) = world.tidings(["dead", "replay", "--kind", "message"]).await;
    assert_eq!(code, 0, "{output}");
    assert!(output.contains("1 replayed, 0 expired, 0 parked, 1 left"), "{output}");
    assert_eq!(count_messages(&world, "tidings.dead").await, 1);
    let (_, output) = world.tidings(["dead", "list"]).await;
    assert!(output.contains("game-status") && output.contains("1 of 1"), "{output}");
}

#[tokio::test]
async fn dead_drop_requires_a_selection_and_drops_only_that() {
    let (world, _daemon) = make_two_dead_letters().await;

    let (code, output) = world.tidings(["dead", "drop"]).await;
    assert_eq!(code, 64, "{output}");
    assert!(output.contains("--all"), "{output}");
    let (code, output) = world.tidings(["dead", "drop", "--queue", "inbox.k"]).await;
    assert!(code == 0 && output.contains("1 dropped"), "{output}");
    let (code, output) = world.tidings(["dead", "drop", "--since", "soon"]).await;
    assert_eq!(code, 64, "{output}");
    assert_eq!(count_messages(&world, "tidings.dead").await, 1);
}

#[tokio::test]
async fn a_command_on_dead_letters_waits_for_a_pass_and_fails_if_the_pass_takes_too_long() {
    let (world, _daemon) = make_two_dead_letters().await;
    let mut session = world.db.acquire().await.expect("a connection");
    sqlx::query("SELECT pg_advisory_lock(hashtextextended('tidings.dead tidings', 0))")
        .execute(&mut *session)
        .await
        .expect("locked");

    for subcommand in ["list", "replay"] {
        let (code, output) = world.tidings(["dead", subcommand]).await;
        assert_eq!(code, 1, "{output}");
        assert!(output.contains("somebody is making a pass"), "{output}");
    }
    assert_eq!(count_messages(&world, "tidings.dead").await, 2);

    // Most passes are short, so a command that runs during a pass waits for its end.
    let unlock = async {
        world.wait_until("SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)").await;
        sqlx::query("SELECT pg_advisory_unlock_all()").execute(&mut *session).await.expect("unlocked");
    };
    let ((code, output), ()) = tokio::join!(world.tidings(["dead", "list"]), unlock);
    assert_eq!(code, 0, "{output}");
}

#[tokio::test]
async fn dead_list_explains_a_missing_queue_and_declares_nothing() {
    let world = World::empty().await;

    let (code, output) = world.tidings(["dead", "list"]).await;

    assert_eq!(code, 1, "{output}");
    assert!(output.contains("the daemon declares their queue when it starts"), "{output}");
    let (code, output) =
        world.launch().subcommand("dead").args(["list"]).without("TIDINGS_AMQP_URL").run_to_end().await;
    assert!(code == 64 && output.contains("TIDINGS_AMQP_URL is not set"), "{output}");
}

#[tokio::test]
async fn parked_rows_and_letters_are_listed_together_and_retried_or_dropped_by_id() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let daemon = launch_with_frequent_passes(&world).with("TIDINGS_REPLAY_MAX", 1).start_ready().await;
    // A row whose payload is invalid, a dead letter that was replayed too often, and one without an `x-death` header.
    let row = schedule_message(&world, r#"{"no": "routing key"}"#).await;
    world.wait_until("SELECT EXISTS (SELECT FROM tidings.parked)").await;
    let letter = schedule_message(&world, r#"{"routing_key": "k", "body": "letter"}"#).await;
    for _ in 0..2 {
        reject_next(&mut inbox).await;
    }
    let lost = BasicProperties::default().with_message_id("lost".into());
    publish_message(&world, "tidings.dlx", "", b"lost", lost).await;
    wait_for_message_count(&world, "tidings.parking", 2).await;
    assert!(daemon.stop().await.success());

    let (code, output) = world.tidings(["parked", "list"]).await;
    assert_eq!(code, 0, "{output}");
    for part in [&row.to_string(), &letter.to_string(), "replayed 1 times", "no x-death", "1 rows and 2 letters"] {
        assert!(output.contains(part), "{part}:\n{output}");
    }
    let (code, output) = world.tidings(["parked", "retry", "nothing"]).await;
    assert_eq!(code, 66, "{output}");

    let (code, output) = world.tidings(["parked", "retry", &letter.to_string()]).await;
    assert!(code == 0 && output.contains("0 rows and 1 letters put back, 0 stay"), "{output}");
    let again = inbox.next().await;
    assert_eq!((again.id(), again.number("tidings-replay")), (letter, 2));
    assert!(!again.headers().contains_key("tidings-parked-reason"));

    let (code, output) = world.tidings(["parked", "retry", "--all"]).await;
    assert!(code == 1 && output.contains("lost stays: it has no x-death"), "{output}");
    assert!(output.contains("1 rows and 0 letters put back, 1 stay"), "{output}");
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.parked) AND EXISTS (SELECT FROM tidings.schedules)").await;

    let (code, output) = world.tidings(["parked", "drop", "lost"]).await;
    assert!(code == 0 && output.contains("0 rows and 1 letters dropped"), "{output}");
    assert_eq!(count_messages(&world, "tidings.parking").await, 0);
    let (_, output) = world.tidings(["parked", "list"]).await;
    assert!(output.contains("0 rows and 0 letters are parked"), "{output}");
}

#[tokio::test]
async fn parked_rows_are_retried_even_if_one_of_them_cannot_be() {
    let world = World::with_plugins(&["message"]).await;
    let daemon = launch_with_hourly_passes(&world).start_ready().await;
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"bad": 1}', key => 'key ' || n) FROM generate_series(1, 3) AS n"#).await;
    world.wait_until("SELECT count(*) = 3 FROM tidings.parked").await;
    assert!(daemon.stop().await.success());
    world.sql("SELECT tidings.schedule('message', now(), key => 'key 2')").await;

    let (code, output) = world.tidings(["parked", "retry", "--all"]).await;

    assert!(code == 1 && output.contains("stays") && output.contains("key"), "{output}");
    assert!(output.contains("2 rows and 0 letters put back, 1 stay"), "{output}");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules").await, 3);
    let (code, output) = world.tidings(["parked", "drop", "--all"]).await;
    assert!(code == 0 && output.contains("1 rows"), "{output}");
}

#[tokio::test]
async fn metrics_count_dead_letters_replays_and_where_messages_expired() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    suppress_pass_at_start(&world).await;
    let mut daemon = launch_with_hourly_passes(&world).start_ready().await;
    let url = format!("http://{}/metrics", daemon.http_addr().await);
    let metric = async |name: &str| -> f64 {
        let text = ureq::get(&url).call().expect("an answer").body_mut().read_to_string().expect("text");
        let line = text.lines().find(|line| line.starts_with(&format!("{name} ")));
        let line = line.unwrap_or_else(|| panic!("no {name}:\n{text}"));
        line.rsplit(' ').next().expect("a value").parse().expect("a number")
    };
    let until = async |name: &str, value: f64| {
        eventually(&format!("{name} {value}"), async || ((metric(name).await - value).abs() < 0.1).then_some(())).await;
    };
    // The series exist from the start, with the value 0.
    for outcome in ["replayed", "expired", "parked", "left"] {
        until(&format!("tidings_replays_total{{outcome=\"{outcome}\"}}"), 0.0).await;
    }
    for place in ["row", "event", "dead_letter"] {
        until(&format!("tidings_expired_total{{where=\"{place}\"}}"), 0.0).await;
    }
    for gauge in ["tidings_dead_letters", "tidings_parked_letters", "tidings_dead_letters_oldest_age_seconds"] {
        until(gauge, 0.0).await;
    }

    world.sql("INSERT INTO tidings.schedules (kind, due_at, expires_at) VALUES ('message', now() - interval '2 s', now() - interval '1 s')").await;
    until("tidings_expired_total{where=\"row\"}", 1.0).await;
    schedule_message(&world, r#"{"routing_key": "k", "body": 1, "ttl_ms": 0}"#).await;
    until("tidings_expired_total{where=\"event\"}", 1.0).await;
    schedule_message(&world, r#"{"routing_key": "k", "body": 1}"#).await;
    reject_next(&mut inbox).await;
    until("tidings_dead_letters", 1.0).await;
    assert!(daemon.stop().await.success());
    force_pass_at_start(&world).await;
    let mut daemon = launch_with_hourly_passes(&world).start_ready().await;
    inbox.next().await;
    daemon.wait_for_line("replayed=1").await;
    let url = format!("http://{}/metrics", daemon.http_addr().await);
    let text = ureq::get(&url).call().expect("an answer").body_mut().read_to_string().expect("text");
    assert!(text.contains("tidings_replays_total{outcome=\"replayed\"} 1"), "{text}");
    let oldest = text.lines().find(|line| line.starts_with("tidings_dead_letters_oldest_age_seconds ")).expect("it");
    let oldest: f64 = oldest.rsplit(' ').next().expect("a value").parse().expect("a number");
    assert!(oldest > 0.0 && oldest < 600.0, "{oldest}");
}
