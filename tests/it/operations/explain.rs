//! `tidings explain`: it finds a row in every state, and says where the row is and why.

use harness::world::World;
use serde_json::{Value, json};

use crate::operations::commands::{field_names, run_json};

/// Runs `tidings explain` for a row, and returns its JSON output.
async fn explain_row(world: &World, which: &str) -> Value {
    let (code, answer) = run_json(world, &["explain", which]).await;
    assert_eq!(code, 0, "{which}: {answer}");
    answer
}

#[tokio::test]
async fn explain_describes_rows_that_wait_are_due_locked_held_or_paused() {
    let world = World::with_plugins(&["message"]).await;
    let later = "SELECT tidings.schedule('message', '2030-01-01 00:00:00Z', key => 'a/b', subject => 's')";
    let id: uuid::Uuid = world.value(later).await;
    let answer = explain_row(&world, &id.to_string()).await;
    let fields =
        ["attempts", "due_at", "expires_at", "explanation", "id", "key", "kind", "pause", "state", "subject", "until"];
    assert_eq!(field_names(&answer), fields);
    assert_eq!((&answer["state"], &answer["until"]), (&json!("waiting"), &json!("2030-01-01T00:00:00Z")));
    assert_eq!(explain_row(&world, "message/a/b").await, answer, "by its key as well");

    // No daemon is running.
    world.sql("SELECT tidings.schedule('message', now(), key => 'due')").await;
    let answer = explain_row(&world, "message/due").await;
    assert_eq!((&answer["state"], &answer["daemons"]), (&json!("due"), &json!(0)));
    assert!(answer["explanation"].as_str().is_some_and(|text| text.contains("no daemon serves the kind message")));
    let mut session = world.db.begin().await.expect("a transaction");
    sqlx::query("SELECT FROM tidings.schedules WHERE key = 'due' FOR UPDATE")
        .execute(&mut *session)
        .await
        .expect("locked");
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *session).await.expect("a pid");
    let answer = explain_row(&world, "message/due").await;
    assert_eq!(answer["state"], json!("locked"));
    assert!(answer["by"].as_str().is_some_and(|by| by.contains(&format!("pid {pid}"))), "{answer}");
    session.rollback().await.expect("let go");
    assert_eq!(explain_row(&world, "message/due").await["state"], json!("due"), "the lock is gone");

    world.sql("INSERT INTO tidings.schedules (kind, key, due_at, held) VALUES ('nobody', 'k', now(), true)").await;
    let answer = explain_row(&world, "nobody/k").await;
    assert_eq!((&answer["state"], &answer["daemons"]), (&json!("held"), &json!(0)));

    assert_eq!(run_json(&world, &["pause", "message", "--for", "1h", "--reason", "why not"]).await.0, 0);
    let answer = explain_row(&world, "message/due").await;
    assert_eq!((&answer["state"], &answer["pause"]["reason"]), (&json!("paused"), &json!("why not")));
    let answer = explain_row(&world, "message/a/b").await;
    assert_eq!((&answer["state"], &answer["pause"]["by"]), (&json!("waiting"), &json!("postgres")));

    world.sql("INSERT INTO tidings.schedules (kind, key, due_at, expires_at) VALUES ('message', 'over', now() - interval '2 s', now())").await;
    let answer = explain_row(&world, "message/over").await;
    assert_eq!((&answer["state"], &answer["past_deadline"]), (&json!("due"), &json!(true)));
}

#[tokio::test]
async fn explain_describes_rows_that_were_delivered_skipped_expired_parked_or_retried() {
    let world = World::with_plugins(&["message", "misbehave"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let _daemon = world.start_daemon().await;
    world
        .sql(
            r#"SELECT tidings.schedule('message', now(), '{"routing_key": "k", "body": 1}', key => 'delivered'),
                tidings.schedule('message', now(), '{"routing_key": "nowhere", "body": 1}', key => 'refused'),
                tidings.schedule('invalid', now(), key => 'k'), tidings.schedule('skip', now(), key => 'k'),
                tidings.schedule('trap', now(), key => 'k')"#,
        )
        .await;
    world.sql("INSERT INTO tidings.schedules (kind, key, due_at, expires_at) VALUES ('message', 'expired', now() - interval '2 s', now())").await;
    inbox.next().await;
    world.wait_until("SELECT count(*) = 3 FROM tidings.deliveries").await;
    world.wait_until("SELECT count(*) = 1 FROM tidings.parked").await;
    world.wait_until("SELECT count(*) = 2 FROM tidings.schedules WHERE last_error IS NOT NULL").await;

    let answer = explain_row(&world, "message/delivered").await;
    assert_eq!(answer["state"], json!("delivered"));
    assert!(answer["plugin"].as_str().is_some_and(|plugin| plugin.starts_with("message@")), "{answer}");
    assert!(answer["late_seconds"].as_f64().is_some_and(|late| (0.0..30.0).contains(&late)), "{answer}");
    assert!(answer["explanation"].as_str().is_some_and(|text| text.contains("tidings dead list")), "{answer}");
    assert_eq!(explain_row(&world, answer["id"].as_str().expect("an id")).await, answer, "by its id as well");
    let answer = explain_row(&world, "message/expired").await;
    assert_eq!(answer["state"], json!("expired"));
    assert!(answer["reason"].as_str().is_some_and(|reason| reason.contains("deadline")), "{answer}");
    let answer = explain_row(&world, "skip/k").await;
    assert_eq!(answer["state"], json!("skipped"));
    let answer = explain_row(&world, "invalid/k").await;
    assert_eq!(answer["state"], json!("parked"));
    assert!(answer["explanation"].as_str().is_some_and(|text| text.contains("tidings parked retry")), "{answer}");
    // Both rows are retried within seconds, so either may be locked or due at the moment.
    harness::eventually("a row that backs off is found doing so", async || {
        let answer = explain_row(&world, "trap/k").await;
        let backs_off = answer["state"] == "backing_off" && answer["attempts"].as_i64() > Some(0);
        (backs_off && answer["last_error"].is_string() && answer["until"].is_string()).then_some(())
    })
    .await;
    harness::eventually("a row that no queue takes is found backing off", async || {
        let answer = explain_row(&world, "message/refused").await;
        (answer["state"] == "backing_off" && answer["last_error"].is_string()).then_some(())
    })
    .await;

    let (code, output) = world.tidings(["explain", "message/never"]).await;
    assert!(code == 66 && output.contains("nothing is known of the kind message with the key never"), "{output}");
    let (code, output) = world.tidings(["explain", "0199a6b2-1c2d-7000-8000-000000000001"]).await;
    assert!(code == 66 && output.contains("replaced") && output.contains("tidings dead list"), "{output}");
    let (_, output) = world.tidings(["explain", "message/delivered"]).await;
    for part in ["id       ", "kind     message", "key      delivered", "due      ", "delivered at "] {
        assert!(output.contains(part), "{part}:\n{output}");
    }
}
