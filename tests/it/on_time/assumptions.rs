//! What the model of the scheduler's core assumes of PostgreSQL (`tests/model/src/server.rs`), by the same numbers, each on a
//! real server and without a daemon. The eighth, that no mark outlives its server, is the daemon's doing:
//! `what_was_due_long_before_the_start_or_before_a_doubt_is_found_at_once` in `low_water.rs`.

use harness::world::World;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, Row as _};
use time::OffsetDateTime;

use crate::on_time::polling::{listener, notifications, promise};

/// A row that is due.
const ROW: &str = "INSERT INTO tidings.schedules (kind, due_at, payload) VALUES ('message', now() - interval '1 hour', '{}') RETURNING slot_at";
const COUNT: &str = "SELECT count(*) FROM tidings.schedules";
const OLDEST: &str = "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint";
const LOCK: &str = "SELECT count(*) FROM (SELECT FROM tidings.schedules FOR UPDATE SKIP LOCKED) AS locked";

async fn session(world: &World) -> PgConnection {
    PgConnection::connect_with(&world.db.connect_options()).await.expect("a session")
}

/// The one value that a statement answers with.
async fn ask<T>(session: &mut PgConnection, sql: &str) -> T
where
    T: for<'r> sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
{
    let row = sqlx::query(AssertSqlSafe(sql.to_owned())).fetch_one(session).await;
    row.unwrap_or_else(|error| panic!("{sql}: {error}")).get(0)
}

async fn run(session: &mut PgConnection, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
        .execute(session)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
}

#[tokio::test]
async fn a_snapshot_sees_what_was_committed_before_it_and_of_a_transaction_all_or_nothing() {
    let world = World::empty().await;
    let (mut writer, mut reader) = (session(&world).await, session(&world).await);
    run(&mut writer, "BEGIN").await;
    run(&mut writer, ROW).await;
    run(&mut reader, "BEGIN ISOLATION LEVEL REPEATABLE READ").await;
    assert_eq!(ask::<i64>(&mut reader, COUNT).await, 0);
    run(&mut writer, ROW).await;
    assert_eq!(world.value::<i64>(COUNT).await, 0);
    run(&mut writer, "COMMIT").await;
    assert_eq!(world.value::<i64>(COUNT).await, 2);
    assert_eq!(ask::<i64>(&mut reader, COUNT).await, 0, "its snapshot is older");
}

#[tokio::test]
async fn the_lowest_number_that_runs_waits_for_an_open_writer_and_for_no_reader() {
    let world = World::empty().await;
    let (mut writer, mut reader) = (session(&world).await, session(&world).await);
    run(&mut reader, "BEGIN ISOLATION LEVEL REPEATABLE READ").await;
    let seen: i64 = ask(&mut reader, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint").await;
    run(&mut writer, "BEGIN").await;
    let number: i64 = ask(&mut writer, "SELECT pg_current_xact_id()::text::bigint").await;
    assert!(number >= seen);
    for _ in 0..3 {
        world.sql(ROW).await;
        assert!(world.value::<i64>(OLDEST).await <= number, "it may still commit");
    }
    run(&mut writer, "COMMIT").await;
    // Other tests write to the same server.
    world.until(&format!("SELECT ({OLDEST}) > {number}")).await;
    run(&mut reader, "COMMIT").await;
}

#[tokio::test]
async fn a_slot_is_read_from_the_clock_after_its_transaction_has_its_number() {
    let world = World::empty().await;
    let mut writer = session(&world).await;
    // By its first statement, and by a later one.
    for early in [false, true] {
        run(&mut writer, "BEGIN").await;
        let numbered = "SELECT clock_timestamp() FROM pg_current_xact_id()";
        let before: OffsetDateTime = ask(&mut writer, if early { numbered } else { "SELECT clock_timestamp()" }).await;
        run(&mut writer, "SELECT pg_sleep(0.01)").await;
        let slot: OffsetDateTime = ask(&mut writer, ROW).await;
        assert!(slot > before, "{slot} {before}");
        run(&mut writer, "ROLLBACK").await;
    }
    run(&mut writer, "BEGIN").await;
    let number = "SELECT pg_current_xact_id_if_assigned() IS NOT NULL";
    assert!(!ask::<bool>(&mut writer, number).await);
    let _: OffsetDateTime = ask(&mut writer, "SELECT tidings.arrival()").await;
    assert!(ask::<bool>(&mut writer, number).await, "the number comes first");
}

#[tokio::test]
async fn what_others_have_locked_is_passed_over_and_free_when_their_session_is_gone() {
    let world = World::empty().await;
    world.sql(ROW).await;
    let (mut claim, mut other) = (session(&world).await, session(&world).await);
    let pid: i32 = ask(&mut claim, "SELECT pg_backend_pid()").await;
    run(&mut claim, "BEGIN").await;
    assert_eq!(ask::<i64>(&mut claim, LOCK).await, 1);
    assert_eq!(ask::<i64>(&mut other, LOCK).await, 0);
    world.sql(&format!("SELECT pg_terminate_backend({pid})")).await;
    world.until(&format!("SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {pid})")).await;
    assert_eq!(ask::<i64>(&mut other, LOCK).await, 1);
    assert!(sqlx::query("SELECT 1").execute(&mut claim).await.is_err());
}

#[tokio::test]
async fn a_notification_is_sent_at_the_commit_to_all_who_listen_then() {
    let world = World::empty().await;
    let mut early = listener(&world).await;
    let mut writer = session(&world).await;
    run(&mut writer, "BEGIN").await;
    run(&mut writer, ROW).await;
    assert_eq!(notifications(&world, &mut early).await, 0, "it is not committed");
    let in_time = listener(&world).await;
    run(&mut writer, "COMMIT").await;
    let mut late = listener(&world).await;
    world.sql("NOTIFY tidings, 'the end'").await;
    for (mut listener, expected) in [(early, 1), (in_time, 1)] {
        for _ in 0..expected {
            assert_eq!(listener.recv().await.expect("a notification").payload(), "");
        }
        assert_eq!(listener.recv().await.expect("a notification").payload(), "the end");
    }
    assert_eq!(late.recv().await.expect("a notification").payload(), "the end");
    run(&mut writer, &format!("BEGIN; {ROW}; ROLLBACK")).await;
    assert_eq!(notifications(&world, &mut late).await, 0, "it was rolled back");
}

#[tokio::test]
async fn a_trigger_that_finds_a_promise_is_silent_and_one_that_finds_none_is_not() {
    let world = World::empty().await;
    let mut listener = listener(&world).await;
    for (ahead, notified) in [("1 s", 0), ("-1 ms", 1), ("1 hour", 1)] {
        world.sql(&promise(ahead)).await;
        world.sql(ROW).await;
        assert_eq!(notifications(&world, &mut listener).await, notified, "{ahead}");
    }
    // Beyond the horizon nobody needs to know.
    world.sql(&ROW.replace("now() - interval '1 hour'", "now() + interval '1 hour'")).await;
    assert_eq!(notifications(&world, &mut listener).await, 0);
}

#[tokio::test]
async fn a_claim_reads_the_clock_before_it_has_a_number() {
    let world = World::empty().await;
    world.sql(ROW).await;
    let mut claim = session(&world).await;
    run(&mut claim, "BEGIN").await;
    let statement = "SELECT statement_timestamp(), pg_current_xact_id_if_assigned()::text::bigint AS before, \
                     (SELECT count(*) FROM (SELECT FROM tidings.schedules FOR UPDATE SKIP LOCKED) AS locked) AS locked";
    let row = sqlx::query(statement).fetch_one(&mut claim).await.expect("a claim");
    let (at, before): (OffsetDateTime, Option<i64>) = (row.get(0), row.get(1));
    assert_eq!((before, row.get::<i64, _>(2)), (None, 1), "statement_timestamp() is the time at which it began");
    let number: i64 = ask(&mut claim, "SELECT pg_current_xact_id_if_assigned()::text::bigint").await;
    let later: i64 = world.value("SELECT pg_current_xact_id()::text::bigint").await;
    assert!(later > number && world.now().await > at);
}
