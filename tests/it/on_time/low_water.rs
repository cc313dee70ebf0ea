//! The low-water mark: looks and claims do not step over index entries of delivered rows, and miss no row. In most of
//! these tests the sweep, which would find missed rows, comes only once an hour.

use std::time::Duration;

use futures_util::future::join_all;
use harness::servers::Servers;
use harness::world::World;

use crate::operations::page_api::get_json;

/// Opens a transaction with a snapshot, as a dump does. Until it ends, index entries of rows that are deleted meanwhile
/// remain.
async fn open_long_reader(world: &World) -> sqlx::Transaction<'static, sqlx::Postgres> {
    let mut reader = world.db.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await.expect("a transaction");
    sqlx::query("SELECT count(*) FROM tidings.schedules").fetch_one(&mut *reader).await.expect("a snapshot");
    reader
}

fn insert_rows_sql(count: u32) -> String {
    format!(
        r#"INSERT INTO tidings.schedules (kind, due_at, payload)
           SELECT 'message', now(), '{{"routing_key":"a","body":1}}' FROM generate_series(1, {count})"#
    )
}

/// The statement that writes `count` rows that fell due one by one until two minutes ago.
fn insert_old_rows_sql(kind: &str, count: u32) -> String {
    format!(
        r#"INSERT INTO tidings.schedules (kind, due_at, not_before, payload)
           SELECT '{kind}', due_at, due_at, '{{"routing_key":"old","body":1}}'
           FROM (SELECT now() - interval '2 minutes' - n * interval '1 ms' AS due_at FROM generate_series(1, {count}) AS n) AS rows"#
    )
}

/// The number of entries of the queue's index that were read so far.
async fn count_index_entries_read(world: &World) -> i64 {
    let read = "SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = 'schedules_slot_at' AND schemaname = 'tidings'";
    world.value(read).await
}

/// Uses private servers, because an open transaction that has written, in any database of the server, holds the mark
/// back.
#[tokio::test]
async fn index_entries_of_delivered_rows_are_not_read_again_during_a_long_transaction() {
    let servers = Servers::start_private_async().await;
    let world = World::on_servers(&servers, &["message"]).await;
    let _inbox = world.inbox(&["#"]).await;
    let daemon = world.launch().with("TIDINGS_SWEEP_MS", 3_600_000).start_ready().await;
    let reader = open_long_reader(&world).await;

    world.sql(&insert_rows_sql(4_000)).await;
    world.wait_until("SELECT count(*) = 4000 FROM tidings.deliveries").await;
    for _ in 0..100 {
        world.sql(&insert_rows_sql(1)).await;
        world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    }
    // A session reports its statistics when it ends at the latest.
    assert!(daemon.stop().await.success());

    let read = count_index_entries_read(&world).await;
    drop(reader);
    // The claims of the first 4,000 rows step over each other (130,000 entries on one machine). Without the mark, the
    // claims of the hundred rows would also step over those (1,500,000 entries).
    assert!(read < 400_000, "{read} entries of the index were read");
}

#[tokio::test]
async fn rows_of_long_transactions_are_found_as_soon_as_they_are_committed() {
    let world = World::with_plugins(&["message"]).await;
    let _inbox = world.inbox(&["#"]).await;
    let _daemon = world.launch().with("TIDINGS_SWEEP_MS", 3_600_000).start_ready().await;
    let reader = open_long_reader(&world).await;

    // Short transactions advance the mark. Long ones contain rows that would be below the mark if it did not wait for
    // them.
    let short = async {
        for _ in 0..120 {
            world.sql(&insert_rows_sql(3)).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let long = join_all((1..=3).map(|writer| {
        let world = &world;
        async move {
            for round in 0..3 {
                let mut transaction = world.db.begin().await.expect("a transaction");
                for step in 0..4 {
                    for sql in ["SAVEPOINT here".to_owned(), insert_rows_sql(2), "RELEASE here".into()] {
                        sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut *transaction).await.expect("written");
                    }
                    // The transactions must stay open for some time: this is what the test is about.
                    tokio::time::sleep(Duration::from_millis(90 * writer + 40 * round + 10 * step)).await;
                }
                transaction.commit().await.expect("committed");
            }
        }
    }));
    tokio::join!(short, long);

    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.deliveries").await, 120 * 3 + 3 * 3 * 4 * 2);
    drop(reader);
}

#[tokio::test]
async fn a_row_below_the_low_water_mark_is_found_by_the_next_sweep() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.launch().with("TIDINGS_SWEEP_MS", 500).start_ready().await;
    // Deliveries advance the mark.
    for _ in 0..3 {
        world.sql(&insert_rows_sql(1)).await;
        inbox.next().await;
    }

    // A row with a `slot_at` of long ago, as a restore with disabled triggers writes it.
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
async fn only_the_sweep_reads_index_entries_of_rows_that_were_deleted_before_the_start() {
    const DEAD: u32 = 100_000;
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let reader = open_long_reader(&world).await;
    world.sql(&insert_old_rows_sql("message", DEAD)).await;
    world.sql("DELETE FROM tidings.schedules").await;
    let before = count_index_entries_read(&world).await;

    let mut daemon = world.launch().with("TIDINGS_SWEEP_MS", 3_600_000).start_ready().await;
    let addr = daemon.http_addr().await;
    for number in 0..30 {
        world.sql(&insert_rows_sql(1)).await;
        inbox.next().await;
        world.sql(&format!("SELECT tidings.schedule('nobody', now(), key => '{number}')")).await;
        world
            .wait_until(&format!("SELECT held FROM tidings.schedules WHERE kind = 'nobody' AND key = '{number}'"))
            .await;
        for path in ["/readyz", "/api/overview"] {
            assert_eq!(get_json(&addr, path).await.0, 200);
        }
    }
    // A session reports its statistics when it ends at the latest.
    assert!(daemon.stop().await.success());

    let read = count_index_entries_read(&world).await - before;
    drop(reader);
    // Without the mark, each look, claim, hold and health check would step over all dead entries.
    assert!(read < 3 * i64::from(DEAD), "{read} entries of the index were read");
}

#[tokio::test]
async fn rows_that_a_sweep_finds_behind_many_dead_rows_are_delivered_held_or_expired() {
    const DEAD: u32 = 60_000;
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let reader = open_long_reader(&world).await;
    world.sql(&insert_old_rows_sql("message", DEAD)).await;
    world.sql("DELETE FROM tidings.schedules").await;
    let _daemon = world.launch().with("TIDINGS_SWEEP_MS", 500).start_ready().await;
    world.sql(&insert_rows_sql(1)).await;
    assert_eq!(inbox.next().await.delivery.routing_key.as_str(), "a");

    // Rows that the triggers did not see: a few of a served kind, some of a kind without a plugin, and a held one whose
    // deadline has passed; later a backlog.
    for sql in [
        insert_old_rows_sql("message", 3),
        insert_old_rows_sql("nobody", 2),
        "INSERT INTO tidings.schedules (kind, due_at, not_before, expires_at, held)
         SELECT 'nobody', now() - interval '1 hour', now() - interval '1 hour', now() - interval '30 minutes', true"
            .into(),
    ] {
        world.sql(&format!("DO $do$ BEGIN SET LOCAL session_replication_role = replica; {sql}; END $do$")).await;
    }
    for _ in 0..3 {
        assert_eq!(inbox.next().await.delivery.routing_key.as_str(), "old");
    }
    world.wait_until("SELECT count(*) = 2 AND bool_and(held) FROM tidings.schedules").await;
    world.wait_until("SELECT count(*) = 1 FROM tidings.deliveries WHERE outcome = 'expired'").await;
    let backlog = insert_old_rows_sql("message", 2_000);
    world.sql(&format!("DO $do$ BEGIN SET LOCAL session_replication_role = replica; {backlog}; END $do$")).await;
    world.wait_until("SELECT count(*) = 2004 FROM tidings.deliveries WHERE outcome = 'delivered'").await;
    drop(reader);
}

#[tokio::test]
async fn a_row_that_is_locked_when_the_sweep_finds_it_is_delivered_when_it_is_unlocked() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let reader = open_long_reader(&world).await;
    world.sql(&insert_old_rows_sql("message", 60_000)).await;
    world.sql("DELETE FROM tidings.schedules").await;
    world.sql(&insert_old_rows_sql("message", 2)).await;
    let mut busy = world.db.begin().await.expect("a transaction");
    sqlx::query("SELECT FROM tidings.schedules LIMIT 1 FOR UPDATE").execute(&mut *busy).await.expect("locked");
    let _daemon = world.launch().with("TIDINGS_SWEEP_MS", 3_600_000).start_ready().await;
    inbox.next().await;
    busy.rollback().await.expect("rolled back");

    inbox.next().await;
    drop(reader);
}

#[tokio::test]
async fn rows_due_long_before_the_start_or_before_a_lost_connection_are_found_at_once() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world.sql(&insert_old_rows_sql("message", 3)).await;
    let mut daemon = world.launch().with("TIDINGS_SWEEP_MS", 3_600_000).start_ready().await;
    for _ in 0..3 {
        inbox.next().await;
    }
    world.sql(&insert_rows_sql(1)).await;
    inbox.next().await;
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;

    let sql = insert_old_rows_sql("message", 3);
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
