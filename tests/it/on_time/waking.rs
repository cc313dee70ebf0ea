//! When the daemon acts: notifications, due times, and the sweep for whatever got past both. Each test switches the other
//! ways off, most of them by a sweep of ten minutes.

use std::time::Duration;

use harness::daemon::Daemon;
use harness::proxy::{Mode, Proxy};
use harness::world::{World, database_url};
use sqlx::postgres::PgListener;

use crate::operations::metrics::scrape;

/// A message row of a key of its own; `{due}` is an SQL expression.
fn row(key: &str, due: &str) -> String {
    format!(
        r#"INSERT INTO tidings.schedules (kind, key, due_at, payload)
           VALUES ('message', '{key}', {due}, '{{"routing_key":"a","body":"{key}"}}')"#
    )
}

#[tokio::test]
async fn a_notification_wakes_the_daemon() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.daemon().await;

    world.sql(&row("k", "now()")).await;

    inbox.next().await;
}

#[tokio::test]
async fn a_row_written_while_the_listener_was_cut_off_is_published_when_it_is_back() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.daemon().await;

    // The listener's session announces the kinds.
    let listener = "SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock'
                    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    world.until(&format!("SELECT EXISTS ({listener})")).await;

    // In one statement: the notification of this commit cannot reach a listener that is gone.
    let killed =
        world.value::<i64>(&format!("SELECT count(pg_terminate_backend(pid)) FROM ({listener}) AS listener")).await;
    world.sql(&row("k", "now()")).await;

    assert_eq!(killed, 1, "the listener's connection was found");
    inbox.next().await;
    daemon.wait_for_line("lost the connection for notifications").await;
}

#[tokio::test]
async fn a_burst_in_one_transaction_is_one_notification_and_all_of_it_is_handled() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.daemon().await;
    let mut listener = PgListener::connect_with(&world.db).await.expect("a listener");
    listener.listen("tidings").await.expect("listening");

    let mut transaction = world.db.begin().await.expect("a transaction");
    for key in 0..100 {
        sqlx::query(sqlx::AssertSqlSafe(row(&key.to_string(), "now()")))
            .execute(&mut *transaction)
            .await
            .expect("inserted");
    }
    transaction.commit().await.expect("committed");

    for _ in 0..100 {
        inbox.next().await;
    }
    // A notification of our own comes after all of the transaction's.
    world.sql("NOTIFY tidings, 'the end'").await;
    let mut notified = 0;
    while listener.recv().await.expect("a notification").payload() != "the end" {
        notified += 1;
    }
    assert_eq!(notified, 1);
}

#[tokio::test]
async fn a_row_due_beyond_the_horizon_notifies_nobody() {
    let world = World::empty().await;
    let mut listener = PgListener::connect_with(&world.db).await.expect("a listener");
    listener.listen("tidings").await.expect("listening");

    world.sql(&row("far", "now() + interval '31 seconds'")).await;
    world.sql("NOTIFY tidings, 'between'").await;
    world.sql(&row("near", "now() + interval '29 seconds'")).await;

    assert_eq!(listener.recv().await.expect("a notification").payload(), "between");
    assert_eq!(listener.recv().await.expect("a notification").payload(), "");
}

#[tokio::test]
async fn a_long_transaction_decides_by_the_clock_and_not_by_its_beginning() {
    let world = World::empty().await;
    let mut listener = PgListener::connect_with(&world.db).await.expect("a listener");
    listener.listen("tidings").await.expect("listening");

    // Within the horizon of the insert, though not of the transaction's beginning, which lies a second before.
    world
        .sql(&format!("DO $$ BEGIN PERFORM pg_sleep(1); {}; END $$", row("k", "now() + interval '30.5 seconds'")))
        .await;
    world.sql("NOTIFY tidings, 'the end'").await;

    assert_eq!(listener.recv().await.expect("a notification").payload(), "");
}

#[tokio::test]
async fn a_row_that_no_trigger_saw_is_found_by_the_sweep() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.launch().with("TIDINGS_SWEEP_MS", 300).ready().await;

    let past_the_triggers = format!("SET LOCAL session_replication_role = replica; {}", row("k", "now()"));
    world.sql(&format!("DO $$ BEGIN {past_the_triggers}; END $$")).await;

    inbox.next().await;
}

#[tokio::test]
async fn an_idle_daemon_asks_one_statement_for_each_sweep() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.launch().with("TIDINGS_SWEEP_MS", 100).ready().await;
    let swept = async |daemon: &mut Daemon| scrape(daemon).await[r#"tidings_wakes_total{reason="sweep"}"#];
    let transactions = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()";
    let (before, asked): (f64, i64) = (swept(&mut daemon).await, world.value(transactions).await);
    world.sql(&row("k", "now() + interval '10 seconds'")).await;

    inbox.next().await;

    // The metrics and this test ask as well, and the statistics come late.
    let asked = f64::from(u32::try_from(world.value::<i64>(transactions).await - asked).expect("few"));
    let swept = swept(&mut daemon).await - before;
    assert!(swept > 50.0 && asked < 1.5 * swept + 30.0, "{asked} transactions in {swept} sweeps");
}

#[tokio::test]
async fn with_notify_off_the_sweep_alone_is_enough() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let daemon = world.launch().with("TIDINGS_NOTIFY", "off").with("TIDINGS_SWEEP_MS", 100).ready().await;
    assert!(daemon.log().contains("notify=false"), "{}", daemon.log());

    world.sql(&row("k", "now()")).await;

    inbox.next().await;
}

#[tokio::test]
async fn a_row_found_by_an_early_sweep_is_published_when_it_is_due_and_not_a_sweep_later() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    // Written before the daemon listens: seen by its first look, after which only the timer can be what acts in time.
    world.sql(&row("k", "now() + interval '3 seconds'")).await;
    let _daemon = world.daemon().await;

    let received = inbox.next().await;

    assert!(received.at_ms >= received.number("tidings-due-ms"));
}

#[tokio::test]
async fn the_next_wake_follows_a_row_that_is_moved_earlier_later_or_deleted() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.daemon().await;
    for (key, due) in [("earlier", "1 day"), ("later", "500 ms"), ("deleted", "500 ms"), ("kept", "1 s")] {
        world.sql(&row(key, &format!("clock_timestamp() + interval '{due}'"))).await;
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
    world.until("SELECT count(*) = 3 AND NOT EXISTS (SELECT FROM tidings.schedules) FROM tidings.deliveries").await;
}

#[tokio::test]
async fn the_time_zone_and_the_search_path_of_a_session_change_nothing() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.daemon().await;

    for zone in ["America/Los_Angeles", "Asia/Kolkata", "Pacific/Kiritimati"] {
        let sql = format!("SET LOCAL TimeZone = '{zone}'; SET LOCAL search_path = ''; {}", row("k", "now()"));
        world.sql(&format!("DO $$ BEGIN {sql}; END $$")).await;
        inbox.next().await;
        world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    }
}

#[tokio::test]
async fn an_idle_daemon_is_in_no_transaction() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.launch().with("TIDINGS_SWEEP_MS", 50).ready().await;
    world.sql(&row("k", "now()")).await;
    inbox.next().await;
    world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;

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
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world
        .sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'message', now() + interval '1 day' FROM generate_series(1, 200000)")
        .await;
    world.sql("ANALYZE tidings.schedules").await;
    let scans = "SELECT seq_scan FROM pg_stat_user_tables WHERE relid = 'tidings.schedules'::regclass";
    let before: i64 = world.value(scans).await;

    let daemon = world.launch().with("TIDINGS_SWEEP_MS", 20).ready().await;
    for key in 0..20 {
        world.sql(&row(&key.to_string(), "now()")).await;
        inbox.next().await;
    }
    world.sql("SELECT tidings.schedule('nobody', now(), key => 'k')").await;
    // By its key: this question must not read the whole table either.
    world.until("SELECT held FROM tidings.schedules WHERE kind = 'nobody' AND key = 'k'").await;
    // A session hands in its statistics at its end at the latest.
    assert!(daemon.stop().await.success());

    world.until("SELECT idx_scan > 20 FROM pg_stat_user_tables WHERE relid = 'tidings.schedules'::regclass").await;
    assert_eq!(world.value::<i64>(scans).await, before, "a statement of the daemon read the whole table");
}

#[tokio::test]
async fn a_due_row_that_somebody_else_has_locked_delays_no_other_and_is_delivered_when_it_is_let_go() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let id: uuid::Uuid =
        world.value(r#"SELECT tidings.schedule('message', now(), '{"routing_key":"a","body":1}')"#).await;
    let mut locked = world.db.begin().await.expect("a transaction");
    sqlx::query("SELECT FROM tidings.schedules FOR UPDATE").execute(&mut *locked).await.expect("locked");
    let _daemon = world.daemon().await;

    world.sql(&row("other", "now()")).await;
    assert_eq!(inbox.next().await.text(), "other");
    locked.rollback().await.expect("let go");
    assert_eq!(inbox.next().await.id(), id);
}

/// What a link takes in each direction.
const FAR: Duration = Duration::from_millis(300);

#[tokio::test]
async fn a_planned_row_waits_for_one_round_trip_to_a_database_that_is_far_away() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let link = Proxy::start(0, world.ports().0).await;
    let url = database_url(link.port, &world.name);
    let _daemon = world.launch().with("TIDINGS_DATABASE_URL", url).ready().await;
    link.set(Mode::Delay(FAR));

    // The first of them show what it takes to begin.
    for key in ["first", "second", "third", "fourth"] {
        world.sql(&row(key, "now() + interval '4 s'")).await;
        inbox.next().await;
    }

    // The least of them: a sweep, or a machine that is busy, may have been in the way of one.
    let lateness = "SELECT min(extract(epoch FROM finished_at - due_at) * 1000)::bigint FROM tidings.deliveries";
    world.until("SELECT count(*) = 4 FROM tidings.deliveries").await;
    let lateness = Duration::from_millis(world.value::<i64>(lateness).await.try_into().expect("never early"));
    // The claim goes there and back, and the clock may be ahead by one way; a BEGIN before it would be two more.
    assert!(lateness < 4 * FAR, "{lateness:?}");
}
