//! Checks on a real server, without a daemon, what the model of the scheduler's core assumes of PostgreSQL
//! (`tests/model/src/server.rs` numbers the assumptions, and the tests follow that order). The eighth assumption, that
//! no low-water mark outlives its server, depends on the daemon and is checked by
//! `rows_due_long_before_the_start_or_before_a_lost_connection_are_found_at_once` in `low_water.rs`.

use harness::world::World;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, Row as _};
use time::OffsetDateTime;

use crate::on_time::polling::{connect_listener, count_notifications, promise_sql};

/// The statement that writes a row that is due.
const INSERT_ROW: &str = "INSERT INTO tidings.schedules (kind, due_at, payload) VALUES ('message', now() - interval '1 hour', '{}') RETURNING slot_at";
const COUNT_ROWS: &str = "SELECT count(*) FROM tidings.schedules";
const OLDEST_RUNNING: &str = "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint";
const LOCK_FREE_ROWS: &str = "SELECT count(*) FROM (SELECT FROM tidings.schedules FOR UPDATE SKIP LOCKED) AS locked";

async fn connect(world: &World) -> PgConnection {
    PgConnection::connect_with(&world.db.connect_options()).await.expect("a session")
}

/// Runs a query in `session`, and returns the first column of its first row.
async fn fetch_value<T>(session: &mut PgConnection, sql: &str) -> T
where
    T: for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
{
    let row = sqlx::query(AssertSqlSafe(sql.to_owned())).fetch_one(session).await;
    row.unwrap_or_else(|error| panic!("{sql}: {error}")).get(0)
}

async fn execute(session: &mut PgConnection, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
        .execute(session)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
}

#[tokio::test]
async fn a_snapshot_sees_all_of_each_transaction_committed_before_it_and_nothing_of_later_ones() {
    let world = World::empty().await;
    let (mut writer, mut reader) = (connect(&world).await, connect(&world).await);
    execute(&mut writer, "BEGIN").await;
    execute(&mut writer, INSERT_ROW).await;
    execute(&mut reader, "BEGIN ISOLATION LEVEL REPEATABLE READ").await;
    assert_eq!(fetch_value::<i64>(&mut reader, COUNT_ROWS).await, 0);
    execute(&mut writer, INSERT_ROW).await;
    assert_eq!(world.value::<i64>(COUNT_ROWS).await, 0);
    execute(&mut writer, "COMMIT").await;
    assert_eq!(world.value::<i64>(COUNT_ROWS).await, 2);
    assert_eq!(fetch_value::<i64>(&mut reader, COUNT_ROWS).await, 0, "its snapshot is older");
}

#[tokio::test]
async fn the_oldest_running_transaction_number_waits_for_an_open_writer_but_not_for_a_reader() {
    let world = World::empty().await;
    let (mut writer, mut reader) = (connect(&world).await, connect(&world).await);
    execute(&mut reader, "BEGIN ISOLATION LEVEL REPEATABLE READ").await;
    let seen: i64 = fetch_value(&mut reader, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint").await;
    execute(&mut writer, "BEGIN").await;
    let number: i64 = fetch_value(&mut writer, "SELECT pg_current_xact_id()::text::bigint").await;
    assert!(number >= seen);
    for _ in 0..3 {
        world.sql(INSERT_ROW).await;
        assert!(world.value::<i64>(OLDEST_RUNNING).await <= number, "it may still commit");
    }
    execute(&mut writer, "COMMIT").await;
    // Other tests write to the same server, so later transaction numbers may still be running.
    world.wait_until(&format!("SELECT ({OLDEST_RUNNING}) > {number}")).await;
    execute(&mut reader, "COMMIT").await;
}

#[tokio::test]
async fn slot_at_is_read_from_the_clock_after_its_transaction_has_its_number() {
    let world = World::empty().await;
    let mut writer = connect(&world).await;
    // The transaction gets its number from the INSERT, or from an earlier statement.
    for early in [false, true] {
        execute(&mut writer, "BEGIN").await;
        let numbered = "SELECT clock_timestamp() FROM pg_current_xact_id()";
        let before: OffsetDateTime =
            fetch_value(&mut writer, if early { numbered } else { "SELECT clock_timestamp()" }).await;
        execute(&mut writer, "SELECT pg_sleep(0.01)").await;
        let slot: OffsetDateTime = fetch_value(&mut writer, INSERT_ROW).await;
        assert!(slot > before, "{slot} {before}");
        execute(&mut writer, "ROLLBACK").await;
    }
    execute(&mut writer, "BEGIN").await;
    let number = "SELECT pg_current_xact_id_if_assigned() IS NOT NULL";
    assert!(!fetch_value::<bool>(&mut writer, number).await);
    let _: OffsetDateTime = fetch_value(&mut writer, "SELECT tidings.arrival()").await;
    assert!(fetch_value::<bool>(&mut writer, number).await, "the number comes first");
}

#[tokio::test]
async fn rows_locked_by_another_session_are_skipped_until_that_session_ends() {
    let world = World::empty().await;
    world.sql(INSERT_ROW).await;
    let (mut claim, mut other) = (connect(&world).await, connect(&world).await);
    let pid: i32 = fetch_value(&mut claim, "SELECT pg_backend_pid()").await;
    execute(&mut claim, "BEGIN").await;
    assert_eq!(fetch_value::<i64>(&mut claim, LOCK_FREE_ROWS).await, 1);
    assert_eq!(fetch_value::<i64>(&mut other, LOCK_FREE_ROWS).await, 0);
    world.sql(&format!("SELECT pg_terminate_backend({pid})")).await;
    world.wait_until(&format!("SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {pid})")).await;
    assert_eq!(fetch_value::<i64>(&mut other, LOCK_FREE_ROWS).await, 1);
    assert!(sqlx::query("SELECT 1").execute(&mut claim).await.is_err());
}

#[tokio::test]
async fn a_notification_is_sent_at_the_commit_to_all_sessions_that_listen_then() {
    let world = World::empty().await;
    let mut early = connect_listener(&world).await;
    let mut writer = connect(&world).await;
    execute(&mut writer, "BEGIN").await;
    execute(&mut writer, INSERT_ROW).await;
    assert_eq!(count_notifications(&world, &mut early).await, 0, "it is not committed");
    let in_time = connect_listener(&world).await;
    execute(&mut writer, "COMMIT").await;
    let mut late = connect_listener(&world).await;
    world.sql("NOTIFY tidings, 'the end'").await;
    for (mut listener, expected) in [(early, 1), (in_time, 1)] {
        for _ in 0..expected {
            assert_eq!(listener.recv().await.expect("a notification").payload(), "");
        }
        assert_eq!(listener.recv().await.expect("a notification").payload(), "the end");
    }
    assert_eq!(late.recv().await.expect("a notification").payload(), "the end");
    execute(&mut writer, &format!("BEGIN; {INSERT_ROW}; ROLLBACK")).await;
    assert_eq!(count_notifications(&world, &mut late).await, 0, "it was rolled back");
}

#[tokio::test]
async fn a_trigger_notifies_unless_a_daemon_has_promised_to_poll() {
    let world = World::empty().await;
    let mut listener = connect_listener(&world).await;
    for (ahead, notified) in [("1 s", 0), ("-1 ms", 1), ("1 hour", 1)] {
        world.sql(&promise_sql(ahead)).await;
        world.sql(INSERT_ROW).await;
        assert_eq!(count_notifications(&world, &mut listener).await, notified, "{ahead}");
    }
    // A row that is due beyond the horizon notifies nobody.
    world.sql(&INSERT_ROW.replace("now() - interval '1 hour'", "now() + interval '1 hour'")).await;
    assert_eq!(count_notifications(&world, &mut listener).await, 0);
}

#[tokio::test]
async fn a_claim_reads_the_clock_before_its_transaction_has_a_number() {
    let world = World::empty().await;
    world.sql(INSERT_ROW).await;
    let mut claim = connect(&world).await;
    execute(&mut claim, "BEGIN").await;
    let statement = "SELECT statement_timestamp(), pg_current_xact_id_if_assigned()::text::bigint AS before, \
                     (SELECT count(*) FROM (SELECT FROM tidings.schedules FOR UPDATE SKIP LOCKED) AS locked) AS locked";
    let row = sqlx::query(statement).fetch_one(&mut claim).await.expect("a claim");
    let (at, before): (OffsetDateTime, Option<i64>) = (row.get(0), row.get(1));
    assert_eq!((before, row.get::<i64, _>(2)), (None, 1), "statement_timestamp() is the time at which it began");
    let number: i64 = fetch_value(&mut claim, "SELECT pg_current_xact_id_if_assigned()::text::bigint").await;
    let later: i64 = world.value("SELECT pg_current_xact_id()::text::bigint").await;
    assert!(later > number && world.now().await > at);
}
