//! What makes the daemon act: notifications, due times, and the sweep, which finds rows that both missed. Each test
//! excludes the other causes, most of them with a sweep that comes only every ten minutes.

use std::time::Duration;

use harness::daemon::Daemon;
use harness::proxy::{Mode, Proxy};
use harness::world::{World, database_url};
use sqlx::postgres::PgListener;

use crate::operations::metrics::scrape;

/// The statement that writes a row with this key, due at the SQL expression `due`.
fn insert_row_sql(key: &str, due: &str) -> String {
    format!(
        r#"INSERT INTO tidings.schedules (kind, key, due_at, payload)
           VALUES ('message', '{key}', {due}, '{{"routing_key":"a","body":"{key}"}}')"#
    )
}

#[tokio::test]
async fn a_notification_wakes_the_daemon() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;

    world.sql(&insert_row_sql("k", "now()")).await;

    inbox.next().await;
}

#[tokio::test]
async fn a_row_written_while_the_listener_is_disconnected_is_published_when_it_reconnects() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.start_daemon().await;

    // The listener's session holds the advisory locks that announce the served kinds.
    let listener = "SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock'
                    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    world.wait_until(&format!("SELECT EXISTS ({listener})")).await;

    // The listener's session ends before the next commit, so its notification cannot arrive.
    let killed =
        world.value::<i64>(&format!("SELECT count(pg_terminate_backend(pid)) FROM ({listener}) AS listener")).await;
    world.sql(&insert_row_sql("k", "now()")).await;

    assert_eq!(killed, 1, "the listener's connection was found");
    inbox.next().await;
    daemon.wait_for_line("lost the connection for notifications").await;
}

#[tokio::test]
async fn a_hundred_rows_in_one_transaction_notify_once_and_are_all_delivered() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    let mut listener = PgListener::connect_with(&world.db).await.expect("a listener");
    listener.listen("tidings").await.expect("listening");

    let mut transaction = world.db.begin().await.expect("a transaction");
    for key in 0..100 {
        sqlx::query(sqlx::AssertSqlSafe(insert_row_sql(&key.to_string(), "now()")))
            .execute(&mut *transaction)
            .await
            .expect("inserted");
    }
    transaction.commit().await.expect("committed");

    for _ in 0..100 {
        inbox.next().await;
    }
    // This notification arrives after those of the transaction.
    world.sql("NOTIFY tidings, 'the end'").await;
    let mut notified = 0;
    while listener.recv().await.expect("a notification").payload() != "the end" {
        notified += 1;
    }
    assert_eq!(notified, 1);
}

#[tokio::test]
async fn a_row_due_beyond_the_horizon_sends_no_notification() {
    let world = World::empty().await;
    let mut listener = PgListener::connect_with(&world.db).await.expect("a listener");
    listener.listen("tidings").await.expect("listening");

    world.sql(&insert_row_sql("far", "now() + interval '31 seconds'")).await;
    world.sql("NOTIFY tidings, 'between'").await;
    world.sql(&insert_row_sql("near", "now() + interval '29 seconds'")).await;

    assert_eq!(listener.recv().await.expect("a notification").payload(), "between");
    assert_eq!(listener.recv().await.expect("a notification").payload(), "");
}

#[tokio::test]
async fn a_trigger_in_a_long_transaction_decides_by_the_clock_and_not_by_the_transactions_start() {
    let world = World::empty().await;
    let mut listener = PgListener::connect_with(&world.db).await.expect("a listener");
    listener.listen("tidings").await.expect("listening");

    // The due time is within the horizon at the time of the INSERT, but not at the beginning of the transaction, a
    // second before.
    world
        .sql(&format!(
            "DO $$ BEGIN PERFORM pg_sleep(1); {}; END $$",
            insert_row_sql("k", "now() + interval '30.5 seconds'")
        ))
        .await;
    world.sql("NOTIFY tidings, 'the end'").await;

    assert_eq!(listener.recv().await.expect("a notification").payload(), "");
}

#[tokio::test]
async fn a_row_written_without_triggers_is_found_by_the_sweep() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.launch().with("TIDINGS_SWEEP_MS", 300).start_ready().await;

    let past_the_triggers = format!("SET LOCAL session_replication_role = replica; {}", insert_row_sql("k", "now()"));
    world.sql(&format!("DO $$ BEGIN {past_the_triggers}; END $$")).await;

    inbox.next().await;
}

#[tokio::test]
async fn an_idle_daemon_runs_one_statement_for_each_sweep() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.launch().with("TIDINGS_SWEEP_MS", 100).start_ready().await;
    let swept = async |daemon: &mut Daemon| scrape(daemon).await[r#"tidings_wakes_total{reason="sweep"}"#];
    let transactions = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()";
    let (before, asked): (f64, i64) = (swept(&mut daemon).await, world.value(transactions).await);
    world.sql(&insert_row_sql("k", "now() + interval '10 seconds'")).await;

    inbox.next().await;

    // The metrics and this test run statements too, and PostgreSQL's statistics are delayed.
    let asked = f64::from(u32::try_from(world.value::<i64>(transactions).await - asked).expect("few"));
    let swept = swept(&mut daemon).await - before;
    assert!(swept > 50.0 && asked < 1.5 * swept + 30.0, "{asked} transactions in {swept} sweeps");
}

#[tokio::test]
async fn with_notifications_off_the_sweep_finds_every_row() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let daemon = world.launch().with("TIDINGS_NOTIFY", "off").with("TIDINGS_SWEEP_MS", 100).start_ready().await;
    assert!(daemon.log().contains("notify=false"), "{}", daemon.log());

    world.sql(&insert_row_sql("k", "now()")).await;

    inbox.next().await;
}

#[tokio::test]
async fn a_row_seen_before_it_is_due_is_published_when_it_is_due_without_another_sweep() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    // Written before the daemon listens, so the first look finds the row, and afterwards only the timer can act in
    // time.
    world.sql(&insert_row_sql("k", "now() + interval '3 seconds'")).await;
    let _daemon = world.start_daemon().await;

    let received = inbox.next().await;

    assert!(received.at_ms >= received.number("tidings-due-ms"));
}

#[tokio::test]
async fn rows_that_are_moved_earlier_moved_later_or_deleted_change_when_the_daemon_wakes() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    for (key, due) in [("earlier", "1 day"), ("later", "500 ms"), ("deleted", "500 ms"), ("kept", "1 s")] {
        world.sql(&insert_row_sql(key, &format!("clock_timestamp() + interval '{due}'"))).await;
    }

    world
        .sql("UPDATE tidings.schedules SET due_at = clock_timestamp() + interval '800 ms' WHERE key = 'earlier'")
        .await;
    world.sql("UPDATE tidings.schedules SET due_at = clock_timestamp() + interval '1500 ms' WHERE key = 'later'").await;
    world.sql("DELETE FROM tidings.schedules WHERE key = 'deleted'").await;

    let mut order = Vec::new();
    for _ in 0..3 {
        order.push(inbox.next().await.text().to_owned());
    }
    assert_eq!(order, ["earlier", "kept", "later"]);
    world
        .wait_until("SELECT count(*) = 3 AND NOT EXISTS (SELECT FROM tidings.schedules) FROM tidings.deliveries")
        .await;
}

#[tokio::test]
async fn the_time_zone_and_the_search_path_of_a_session_change_nothing() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;

    for zone in ["America/Los_Angeles", "Asia/Kolkata", "Pacific/Kiritimati"] {
        let sql =
            format!("SET LOCAL TimeZone = '{zone}'; SET LOCAL search_path = ''; {}", insert_row_sql("k", "now()"));
        world.sql(&format!("DO $$ BEGIN {sql}; END $$")).await;
        inbox.next().await;
        world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    }
}

#[tokio::test]
async fn an_idle_daemon_keeps_no_transaction_open() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.launch().with("TIDINGS_SWEEP_MS", 50).start_ready().await;
    world.sql(&insert_row_sql("k", "now()")).await;
    inbox.next().await;
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;

    for _ in 0..20 {
        let open: i64 = world
            .value(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                 AND application_name = 'tidings' AND state LIKE 'idle in transaction%'",
            )
            .await;
        assert_eq!(open, 0);
    }
}

#[tokio::test]
async fn with_many_rows_pending_every_look_and_claim_uses_the_index() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world
        .sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'message', now() + interval '1 day' FROM generate_series(1, 200000)")
        .await;
    world.sql("ANALYZE tidings.schedules").await;
    let scans = "SELECT seq_scan FROM pg_stat_user_tables WHERE relid = 'tidings.schedules'::regclass";
    let before: i64 = world.value(scans).await;

    let daemon = world.launch().with("TIDINGS_SWEEP_MS", 20).start_ready().await;
    for key in 0..20 {
        world.sql(&insert_row_sql(&key.to_string(), "now()")).await;
        inbox.next().await;
    }
    world.sql("SELECT tidings.schedule('nobody', now(), key => 'k')").await;
    // Selected by kind and key, because this query must not read the whole table either.
    world.wait_until("SELECT held FROM tidings.schedules WHERE kind = 'nobody' AND key = 'k'").await;
    // A session reports its statistics when it ends at the latest.
    assert!(daemon.stop().await.success());

    world.wait_until("SELECT idx_scan > 20 FROM pg_stat_user_tables WHERE relid = 'tidings.schedules'::regclass").await;
    assert_eq!(world.value::<i64>(scans).await, before, "a statement of the daemon read the whole table");
}

#[tokio::test]
async fn a_due_row_locked_by_another_session_delays_no_other_and_is_delivered_when_unlocked() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let id: uuid::Uuid =
        world.value(r#"SELECT tidings.schedule('message', now(), '{"routing_key":"a","body":1}')"#).await;
    let mut locked = world.db.begin().await.expect("a transaction");
    sqlx::query("SELECT FROM tidings.schedules FOR UPDATE").execute(&mut *locked).await.expect("locked");
    let _daemon = world.start_daemon().await;

    world.sql(&insert_row_sql("other", "now()")).await;
    assert_eq!(inbox.next().await.text(), "other");
    locked.rollback().await.expect("let go");
    assert_eq!(inbox.next().await.id(), id);
}

/// The delay of the link in each direction.
const ONE_WAY_DELAY: Duration = Duration::from_millis(300);

#[tokio::test]
async fn a_scheduled_row_waits_for_only_one_round_trip_to_a_distant_database() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let link = Proxy::start(0, world.ports().0).await;
    let url = database_url(link.port, &world.name);
    let _daemon = world.launch().with("TIDINGS_DATABASE_URL", url).start_ready().await;
    link.set(Mode::Delay(ONE_WAY_DELAY));

    // The first rows include the cost of the start.
    for number in 1..=8 {
        world.sql(&insert_row_sql(&format!("row-{number}"), "now() + interval '2 s'")).await;
        inbox.next().await;
    }

    // The minimum, because a sweep, a new session or a busy machine may have delayed some of them.
    let lateness = "SELECT min(extract(epoch FROM finished_at - due_at) * 1000)::bigint FROM tidings.deliveries";
    world.wait_until("SELECT count(*) = 8 FROM tidings.deliveries").await;
    let lateness = Duration::from_millis(world.value::<i64>(lateness).await.try_into().expect("never early"));
    // The claim takes one round trip, and the daemon's clock may be off by the delay of one direction. A separate BEGIN
    // would add another round trip.
    assert!(lateness < 4 * ONE_WAY_DELAY, "{lateness:?}");
}
