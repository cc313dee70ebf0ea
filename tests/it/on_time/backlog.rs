//! Which rows go first while more rows are due than can be delivered at once: the kinds take turns, and within a kind priority
//! decides. The rows are older than a second, so that no claim of the newest rows takes them.

use harness::world::World;

use crate::on_time::queries::count_pages;

const CLAIM_BY_KIND: &str = concat!(
    include_str!("../../../host/src/store/queue/claim/shares.sql"),
    include_str!("../../../host/src/store/queue/claim/rows.sql"),
    include_str!("../../../host/src/store/queue/claim/due_by_kind.sql"),
    include_str!("../../../host/src/store/queue/claim/summary.sql"),
    include_str!("../../../host/src/store/queue/claim/due_outlook.sql"),
    include_str!("../../../host/src/store/queue/claim/shares_wanted.sql"),
);

/// Inserts rows that have been due for so many minutes, with the same key but for a number at its end.
async fn insert_rows(world: &World, kind: &str, key: &str, minutes: f64, priority: u8, rows: u32) {
    let payload = match kind {
        "message" => r#"{"routing_key": "a", "body": 1}"#,
        _ => {
            r#"{"game_id": "7d8a6f5e-0000-4000-8000-000000000000", "target_status": "DONE", "transition_time": "2026-11-22T00:00:00Z"}"#
        }
    };
    world
        .sql(&format!(
            "INSERT INTO tidings.schedules (kind, key, due_at, not_before, payload, priority)
             SELECT '{kind}', '{key}-' || n, due_at, due_at, '{payload}', {priority}
             FROM generate_series(1, {rows}) AS n
             CROSS JOIN LATERAL (SELECT now() - {minutes} * interval '1 minute' + n * interval '1 us' AS due_at) AS due"
        ))
        .await;
}

/// How many of the rows of one key were finished before half of the rows of another one were, in percent.
async fn percent_in_first_half(world: &World, key: &str, of: &str) -> i64 {
    world
        .value(&format!(
            "SELECT 100 * count(*) FILTER (WHERE finished_at < (
                 SELECT percentile_disc(0.5) WITHIN GROUP (ORDER BY finished_at) FROM tidings.deliveries WHERE key LIKE '{of}-%'
             )) / count(*) FROM tidings.deliveries WHERE key LIKE '{key}-%'"
        ))
        .await
}

#[tokio::test]
async fn in_a_backlog_the_kinds_take_turns() {
    let world = World::with_plugins(&["message", "game-status"]).await;
    let _inbox = world.inbox(&["#"]).await;
    insert_rows(&world, "message", "many", 60.0, 4, 8_000).await;
    insert_rows(&world, "game-status", "few", 30.0, 4, 300).await;

    let _daemon = world.start_daemon().await;

    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    assert_eq!(percent_in_first_half(&world, "few", "many").await, 100);
}

#[tokio::test]
async fn rows_of_a_higher_priority_go_first_and_a_minute_of_waiting_counts_like_a_step_of_priority() {
    let world = World::with_plugins(&["message"]).await;
    let _inbox = world.inbox(&["#"]).await;
    // The last time, the claims take turns of a line.
    for is_limited in [false, true] {
        insert_rows(&world, "message", "usual", 10.0, 4, 8_000).await;
        insert_rows(&world, "message", "urgent", 5.5, 9, 200).await;
        insert_rows(&world, "message", "old", 14.5, 0, 200).await;
        insert_rows(&world, "message", "unimportant", 10.0, 0, 200).await;
        if is_limited {
            world.sql("SELECT tidings.limit('message', 1000000, burst => 1000)").await;
        }

        let daemon = world.start_daemon().await;

        world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
        let (urgent, old) = (
            percent_in_first_half(&world, "urgent", "usual").await,
            percent_in_first_half(&world, "old", "usual").await,
        );
        let unimportant = percent_in_first_half(&world, "unimportant", "usual").await;
        assert_eq!((urgent, old, unimportant), (100, 100, 0), "limited: {is_limited}");
        drop(daemon);
        world.sql("DELETE FROM tidings.deliveries").await;
    }
}

#[tokio::test]
async fn with_a_drain_rate_late_rows_go_at_that_rate_and_rows_that_are_on_time_pass_them() {
    let world = World::with_plugins(&["message"]).await;
    let _inbox = world.inbox(&["#"]).await;
    insert_rows(&world, "message", "late", 60.0, 4, 1_000).await;
    let _daemon = world.launch().with("TIDINGS_DRAIN_RATE", 100).start_ready().await;
    world.wait_until("SELECT count(*) >= 10 FROM tidings.deliveries").await;

    for number in 1..=4 {
        let payload = r#"{"routing_key":"a","body":1}"#;
        world.sql(&format!("SELECT tidings.schedule('message', now(), '{payload}', key => 'on time-{number}')")).await;
        world
            .wait_until(&format!("SELECT count(*) = {number} FROM tidings.deliveries WHERE key LIKE 'on time-%'"))
            .await;
    }

    let left = "SELECT count(*) FROM tidings.schedules";
    assert!(world.value::<i64>(left).await > 100, "late rows are left");
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    let took = "SELECT extract(epoch FROM max(finished_at) - min(finished_at))::float8 FROM tidings.deliveries WHERE key LIKE 'late-%'";
    let took: f64 = world.value(took).await;
    assert!(
        took >= 9.7,
        "1,000 rows at 100 a second take 10 s, less the 100 ms that may be made up for, and a claim: {took}"
    );
}

#[tokio::test]
async fn a_row_keeps_its_priority_until_it_is_the_priority_of_its_message() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let payload = r#"{"routing_key":"a","body":1}"#;
    world.sql(&format!("SELECT tidings.schedule('message', now(), '{payload}', key => 'plain')")).await;
    world.sql(&format!("SELECT tidings.schedule('message', now(), '{payload}', key => 'high', priority => 0)")).await;
    world.sql(&format!("SELECT tidings.schedule('message', now(), '{payload}', key => 'high', priority => 9)")).await;
    let args = ["schedule", "message", "--in", "0s", "--key", "by hand", "--priority", "7", "--payload", payload];
    assert_eq!(world.tidings(args).await.0, 0);
    // One was parked, and is put back.
    world
        .sql(&format!(
            "INSERT INTO tidings.parked (id, kind, key, due_at, payload, headers, attempts, created_at, reason, priority)
             VALUES (tidings.uuid_v7(), 'message', 'parked', now(), '{payload}', '{{}}', 1, now(), 'x', 2)"
        ))
        .await;
    world.sql("SELECT tidings.unpark(id) FROM tidings.parked").await;

    let _daemon = world.start_daemon().await;

    let mut found = Vec::new();
    for _ in 0..4 {
        let message = inbox.next().await;
        let key = message.headers()["tidings-key"].clone();
        found.push((key, message.properties().priority().expect("it has one")));
    }
    found.sort();
    let expected = [("by hand", 7), ("high", 9), ("parked", 2), ("plain", 4)];
    assert_eq!(found, expected.map(|(key, priority)| (key.to_owned(), priority)));
}

#[tokio::test]
async fn a_priority_that_is_none_is_refused_with_a_sentence() {
    let world = World::empty().await;
    for (priority, shown) in [("-1", "-1"), ("10", "10"), ("null", "null")] {
        let error = world.expect_error(&format!("SELECT tidings.schedule('k', now(), priority => {priority})")).await;
        assert!(error.contains(&format!("priority must be from 0 to 9, not {shown}")), "{error}");
    }
    let error =
        world.expect_error("INSERT INTO tidings.schedules (kind, due_at, priority) VALUES ('k', now(), 10)").await;
    assert!(error.contains("priority must be from 0 to 9"), "{error}");
    let (code, output) = world.tidings(["schedule", "k", "--in", "1s", "--priority", "10"]).await;
    assert!(code == 64 && output.contains("--priority"), "{code} {output}");
}

#[tokio::test]
async fn a_claim_by_kind_reads_no_row_that_it_does_not_take_however_many_rows_wait() {
    let world = World::empty().await;
    world
        .sql(
            "INSERT INTO tidings.schedules (kind, due_at, not_before, priority)
             SELECT CASE number % 3 WHEN 0 THEN 'a' WHEN 1 THEN 'limited' ELSE 'paused' END, now() - number * interval '1 ms',
                 now() - number * interval '1 ms', number % 2
             FROM generate_series(1, 90000) AS number",
        )
        .await;
    world.sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'b', now() + interval '1 day' FROM generate_series(1, 50000)").await;
    world
        .sql("INSERT INTO tidings.schedules (kind, due_at, priority) SELECT 'b', now(), 9 FROM generate_series(1, 3)")
        .await;
    world.sql("INSERT INTO tidings.pauses (kind) VALUES ('paused')").await;
    world.sql("SELECT tidings.limit('limited', 1)").await;
    world.sql("ANALYZE tidings.schedules").await;

    let types = "text[], bigint, bigint, timestamptz, boolean";
    let arguments = "'{a,b,limited,paused}', 500, 2097152, '-infinity', false";
    let (pages, plan) = count_pages(&world, CLAIM_BY_KIND, types, arguments).await;

    // Each row is on a page of its own, which is read and then written; 20 places in the index are looked up.
    assert!(pages < 1_700 && !plan.contains("Seq Scan on schedules"), "{pages}\n{plan}");
    assert!(plan.contains("schedules_turn") && plan.contains("Append (actual") && plan.contains("rows=501 "), "{plan}");
}
