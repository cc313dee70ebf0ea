//! When many transactions write due rows at once, triggers do not notify (NOTIFY serialises commits), and the daemon
//! looks at the queue by itself until `tidings.polling_until`. In these tests the sweep, which would find missed rows,
//! comes only once an hour.

use std::time::Duration;

use futures_util::future::join_all;
use harness::guests::well_behaved;
use harness::servers::Servers;
use harness::world::World;
use nix::sys::signal::Signal;
use sqlx::postgres::PgListener;

/// The statement that writes a row that is due.
const INSERT_ROW: &str = r#"INSERT INTO tidings.schedules (kind, due_at, payload) VALUES ('message', now(), '{"routing_key": "a", "body": 1}')"#;
/// Whether a daemon has promised to look by itself until a later time.
const IS_PROMISED: &str =
    "SELECT to_timestamp(last_value / 1e6::float8) > clock_timestamp() FROM tidings.polling_until";
const ALL_DELIVERED: &str = "SELECT NOT EXISTS (SELECT FROM tidings.schedules)";

/// Notifies `the end`, which arrives after all earlier notifications, and counts the notifications before it.
pub(crate) async fn count_notifications(world: &World, listener: &mut PgListener) -> usize {
    world.sql("NOTIFY tidings, 'the end'").await;
    let mut notified = 0;
    while listener.recv().await.expect("a notification").payload() != "the end" {
        notified += 1;
    }
    notified
}

pub(crate) async fn connect_listener(world: &World) -> PgListener {
    let mut listener = PgListener::connect_with(&world.db).await.expect("a listener");
    listener.listen("tidings").await.expect("listening");
    listener
}

/// The statement that promises, as a daemon would, to look by itself for the interval `ahead`.
pub(crate) fn promise_sql(ahead: &str) -> String {
    format!(
        "SELECT setval('tidings.polling_until', (extract(epoch FROM clock_timestamp() + interval '{ahead}') * 1e6)::bigint)"
    )
}

#[tokio::test]
async fn concurrent_writers_of_due_rows_notify_rarely_and_every_row_is_delivered() {
    let world = World::with_plugins(&["message"]).await;
    let mut listener = connect_listener(&world).await;
    let _inbox = world.inbox(&["#"]).await;
    let _daemon = world.launch().with("TIDINGS_SWEEP_MS", 3_600_000).start_ready().await;

    join_all((0..8).map(|_| async {
        for _ in 0..250 {
            world.sql(INSERT_ROW).await;
        }
    }))
    .await;

    world.wait_until(ALL_DELIVERED).await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.deliveries").await, 2_000);
    let notified = count_notifications(&world, &mut listener).await;
    assert!(notified < 1_000, "{notified} of 2000 transactions notified");

    // After the promise has ended, a row notifies again.
    world.wait_until(&IS_PROMISED.replace('>', "<")).await;
    world.sql(INSERT_ROW).await;
    assert_eq!(count_notifications(&world, &mut listener).await, 1);
    world.wait_until(ALL_DELIVERED).await;
}

/// Uses private servers, because transactions of other tests would show the daemon which transaction numbers are in
/// use, and it must not depend on that.
#[tokio::test]
async fn a_row_of_a_long_transaction_that_did_not_notify_is_found_at_its_commit() {
    let servers = Servers::start_private_async().await;
    let world = World::on_servers(&servers, &["message"]).await;
    let _inbox = world.inbox(&["#"]).await;
    let _daemon = world.launch().with("TIDINGS_SWEEP_MS", 3_600_000).start_ready().await;
    let mut listener = connect_listener(&world).await;

    world.sql(&promise_sql("1.9 s")).await;
    // The daemon is notified and sees the promise.
    count_notifications(&world, &mut listener).await;
    let mut transaction = world.db.begin().await.expect("a transaction");
    sqlx::query(INSERT_ROW).execute(&mut *transaction).await.expect("written");
    world.wait_until(&IS_PROMISED.replace('>', "<")).await;
    // The daemon must keep looking for as long as the transaction is open: this is what the test is about.
    tokio::time::sleep(Duration::from_millis(200)).await;
    transaction.commit().await.expect("committed");

    world.wait_until(ALL_DELIVERED).await;
    assert_eq!(count_notifications(&world, &mut listener).await, 0, "it was silent");
}

/// A daemon that was frozen receives all notifications of that time at once, takes them for a flood, and makes a
/// promise.
#[tokio::test]
async fn a_promise_to_poll_makes_all_daemons_poll_for_the_kinds_that_they_serve() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _left = world.launch().with("TIDINGS_SWEEP_MS", 3_600_000).start_ready().await;
    let dir = world.plugin_dir.join("right");
    std::fs::create_dir(&dir).expect("made");
    std::fs::write(dir.join("right.wasm"), well_behaved("right", &["right"], "right")).expect("written");
    let right = world
        .launch()
        .with("TIDINGS_SWEEP_MS", 3_600_000)
        .with("TIDINGS_PLUGIN_DIR", dir.display())
        .with("TIDINGS_STATE_DIR", world.state_dir().with_extension("right").display())
        .start_ready()
        .await;

    right.signal(Signal::SIGSTOP);
    for _ in 0..20 {
        world.sql("NOTIFY tidings").await;
        // Too few at a time for the left daemon to make a promise.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(!world.value::<bool>(IS_PROMISED).await);
    right.signal(Signal::SIGCONT);
    world.wait_until(IS_PROMISED).await;
    // The triggers do not notify.
    world.sql(INSERT_ROW).await;

    inbox.next().await;
}

#[tokio::test]
async fn a_promise_to_poll_that_no_daemon_keeps_ends_by_itself() {
    let world = World::empty().await;
    let mut listener = connect_listener(&world).await;
    world.sql(&promise_sql("1.9 s")).await;
    world.sql(INSERT_ROW).await;
    assert_eq!(count_notifications(&world, &mut listener).await, 0);
    world.wait_until(&IS_PROMISED.replace('>', "<")).await;
    world.sql(INSERT_ROW).await;
    assert_eq!(count_notifications(&world, &mut listener).await, 1);
    // A promise too far in the future, as it remains after the clock was set back, does not count.
    world.sql(&promise_sql("1 hour")).await;
    world.sql(INSERT_ROW).await;
    assert_eq!(count_notifications(&world, &mut listener).await, 1);
}
