//! The low-water mark: looks and claims step over nothing that was delivered, and miss nothing. The sweep, which would find
//! what they missed, comes once an hour here.

use std::time::Duration;

use futures_util::future::join_all;
use harness::servers::Servers;
use harness::world::World;

use crate::operations::page_api::get;

/// Somebody who reads for a long time, as a dump does: nothing that is deleted meanwhile leaves the index.
async fn reader(world: &World) -> sqlx::Transaction<'static, sqlx::Postgres> {
    let mut reader = world.db.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await.expect("a transaction");
    sqlx::query("SELECT count(*) FROM tidings.schedules").fetch_one(&mut *reader).await.expect("a snapshot");
    reader
}

fn rows(count: u32) -> String {
    format!(
        r#"INSERT INTO tidings.schedules (kind, due_at, payload)
           SELECT 'message', now(), '{{"routing_key":"a","body":1}}' FROM generate_series(1, {count})"#
    )
}

/// So many rows that were due for long, up to two minutes ago.
fn old_rows(kind: &str, count: u32) -> String {
    format!(
        r#"INSERT INTO tidings.schedules (kind, due_at, not_before, payload)
           SELECT '{kind}', due_at, due_at, '{{"routing_key":"old","body":1}}'
           FROM (SELECT now() - interval '2 minutes' - n * interval '1 ms' AS due_at FROM generate_series(1, {count}) AS n) AS rows"#
    )
}

/// Entries of the queue's index that were read.
async fn entries_read(world: &World) -> i64 {
    let read = "SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = 'schedules_slot_at' AND schemaname = 'tidings'";
    world.value(read).await
}

/// On servers of its own: whatever is open and has written, in any database of the server, holds the mark back.
#[tokio::test]
async fn what_was_delivered_is_not_stepped_over_again_while_somebody_reads_for_long() {
    let servers = Servers::alone().await;
    let world = World::on(&servers, &["message"]).await;
    let _inbox = world.inbox(&["#"]).await;
    let daemon = world.launch().with("TIDINGS_SWEEP_MS", 3_600_000).ready().await;
    let reader = reader(&world).await;

    world.sql(&rows(4_000)).await;
    world.until("SELECT count(*) = 4000 FROM tidings.deliveries").await;
    for _ in 0..100 {
        world.sql(&rows(1)).await;
        world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    }
    // Its sessions hand in their counts at the latest when they end.
    assert!(daemon.stop().await.success());

    let read = entries_read(&world).await;
    drop(reader);
    // The claims of the first 4,000 step over each other (130,000 on one machine); from the very beginning each of the hundred
    // would step over those as well (1,500,000).
    assert!(read < 400_000, "{read} entries of the index were read");
}

#[tokio::test]
async fn rows_of_few_long_transactions_are_found_as_soon_as_they_are_committed() {
    let world = World::with(&["message"]).await;
    let _inbox = world.inbox(&["#"]).await;
    let _daemon = world.launch().with("TIDINGS_SWEEP_MS", 3_600_000).ready().await;
    let reader = reader(&world).await;

    // Short writers move the mark on, one after the other; long ones have rows below where it would be if it did not wait.
    let short = async {
        for _ in 0..120 {
            world.sql(&rows(3)).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let long = join_all((1..=3).map(|writer| {
        let world = &world;
        async move {
            for round in 0..3 {
                let mut transaction = world.db.begin().await.expect("a transaction");
                for step in 0..4 {
                    for sql in ["SAVEPOINT here".to_owned(), rows(2), "RELEASE here".into()] {
                        sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut *transaction).await.expect("written");
                    }
                    // How long it stays open is what the test is about.
                    tokio::time::sleep(Duration::from_millis(90 * writer + 40 * round + 10 * step)).await;
                }
                transaction.commit().await.expect("committed");
            }
        }
    }));
    tokio::join!(short, long);

    world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.deliveries").await, 120 * 3 + 3 * 3 * 4 * 2);
    drop(reader);
}

#[tokio::test]
async fn what_got_below_the_mark_is_found_by_the_next_sweep() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.launch().with("TIDINGS_SWEEP_MS", 500).ready().await;
    // The mark moves on.
    for _ in 0..3 {
        world.sql(&rows(1)).await;
        inbox.next().await;
    }

    // As a restore with the triggers off would write it: with a slot of long ago.
    let past = "now() - interval '1 hour'";
    world
        .sql(&format!(
            r#"INSERT INTO tidings.schedules (kind, due_at, not_before, payload)
               VALUES ('message', {past}, {past}, '{{"routing_key":"late","body":1}}')"#
        ))
        .await;

    assert_eq!(inbox.next().await.delivery.routing_key.as_str(), "late");
}

#[tokio::test]
async fn dead_rows_of_before_the_start_are_stepped_over_by_the_sweep_alone() {
    const DEAD: u32 = 100_000;
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let reader = reader(&world).await;
    world.sql(&old_rows("message", DEAD)).await;
    world.sql("DELETE FROM tidings.schedules").await;
    let before = entries_read(&world).await;

    let mut daemon = world.launch().with("TIDINGS_SWEEP_MS", 3_600_000).ready().await;
    let addr = daemon.http_addr().await;
    for number in 0..30 {
        world.sql(&rows(1)).await;
        inbox.next().await;
        world.sql(&format!("SELECT tidings.schedule('nobody', now(), key => '{number}')")).await;
        world.until(&format!("SELECT held FROM tidings.schedules WHERE kind = 'nobody' AND key = '{number}'")).await;
        for path in ["/readyz", "/api/overview"] {
            assert_eq!(get(&addr, path).await.0, 200);
        }
    }
    // Its sessions hand in their counts at the latest when they end.
    assert!(daemon.stop().await.success());

    let read = entries_read(&world).await - before;
    drop(reader);
    // From the very beginning each look, claim, hold and question for health would step over all of them.
    assert!(read < 3 * i64::from(DEAD), "{read} entries of the index were read");
}

#[tokio::test]
async fn what_a_sweep_finds_over_many_dead_rows_goes_its_way_and_is_no_dearer_for_the_others() {
    const DEAD: u32 = 60_000;
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let reader = reader(&world).await;
    world.sql(&old_rows("message", DEAD)).await;
    world.sql("DELETE FROM tidings.schedules").await;
    let _daemon = world.launch().with("TIDINGS_SWEEP_MS", 500).ready().await;
    world.sql(&rows(1)).await;
    assert_eq!(inbox.next().await.delivery.routing_key.as_str(), "a");

    // Past the triggers, a few, and a backlog; a kind that nobody serves; one whose deadline came while it was held.
    for sql in [
        old_rows("message", 3),
        old_rows("nobody", 2),
        "INSERT INTO tidings.schedules (kind, due_at, not_before, expires_at, held)
         SELECT 'nobody', now() - interval '1 hour', now() - interval '1 hour', now() - interval '30 minutes', true"
            .into(),
    ] {
        world.sql(&format!("DO $do$ BEGIN SET LOCAL session_replication_role = replica; {sql}; END $do$")).await;
    }
    for _ in 0..3 {
        assert_eq!(inbox.next().await.delivery.routing_key.as_str(), "old");
    }
    world.until("SELECT count(*) = 2 AND bool_and(held) FROM tidings.schedules").await;
    world.until("SELECT count(*) = 1 FROM tidings.deliveries WHERE outcome = 'expired'").await;
    let backlog = old_rows("message", 2_000);
    world.sql(&format!("DO $do$ BEGIN SET LOCAL session_replication_role = replica; {backlog}; END $do$")).await;
    world.until("SELECT count(*) = 2004 FROM tidings.deliveries WHERE outcome = 'delivered'").await;
    drop(reader);
}

#[tokio::test]
async fn a_row_that_is_locked_when_the_sweep_finds_it_is_delivered_when_it_is_let_go() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let reader = reader(&world).await;
    world.sql(&old_rows("message", 60_000)).await;
    world.sql("DELETE FROM tidings.schedules").await;
    world.sql(&old_rows("message", 2)).await;
    let mut busy = world.db.begin().await.expect("a transaction");
    sqlx::query("SELECT FROM tidings.schedules LIMIT 1 FOR UPDATE").execute(&mut *busy).await.expect("locked");
    let _daemon = world.launch().with("TIDINGS_SWEEP_MS", 3_600_000).ready().await;
    inbox.next().await;
    busy.rollback().await.expect("rolled back");

    inbox.next().await;
    drop(reader);
}

#[tokio::test]
async fn what_was_due_long_before_the_start_or_before_a_doubt_is_found_at_once() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world.sql(&old_rows("message", 3)).await;
    let mut daemon = world.launch().with("TIDINGS_SWEEP_MS", 3_600_000).ready().await;
    for _ in 0..3 {
        inbox.next().await;
    }
    world.sql(&rows(1)).await;
    inbox.next().await;
    world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;

    let sql = old_rows("message", 3);
    world.sql(&format!("DO $do$ BEGIN SET LOCAL session_replication_role = replica; {sql}; END $do$")).await;
    world
        .sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name = 'tidings'",
        )
        .await;
    for _ in 0..3 {
        inbox.next().await;
    }
    daemon.wait_for_line("lost the connection for notifications").await;
}
