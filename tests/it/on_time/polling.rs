//! Many who write due rows at once are not told to stand in line for a notification: the daemon looks by itself meanwhile.
//! The sweep, which would find whatever it missed, comes once an hour here.

use std::time::Duration;

use futures_util::future::join_all;
use harness::guests::well_behaved;
use harness::servers::Servers;
use harness::world::World;
use nix::sys::signal::Signal;
use sqlx::postgres::PgListener;

/// A row that is due.
const ROW: &str = r#"INSERT INTO tidings.schedules (kind, due_at, payload) VALUES ('message', now(), '{"routing_key": "a", "body": 1}')"#;
/// Whether somebody promised to look by himself.
const PROMISED: &str = "SELECT to_timestamp(last_value / 1e6::float8) > clock_timestamp() FROM tidings.polling_until";
const ALL_DELIVERED: &str = "SELECT NOT EXISTS (SELECT FROM tidings.schedules)";

/// Counts notifications until `the end`, which comes after all others.
pub(crate) async fn notifications(world: &World, listener: &mut PgListener) -> usize {
    world.sql("NOTIFY tidings, 'the end'").await;
    let mut notified = 0;
    while listener.recv().await.expect("a notification").payload() != "the end" {
        notified += 1;
    }
    notified
}

pub(crate) async fn listener(world: &World) -> PgListener {
    let mut listener = PgListener::connect_with(&world.db).await.expect("a listener");
    listener.listen("tidings").await.expect("listening");
    listener
}

/// Promises to look by ourselves.
pub(crate) fn promise(ahead: &str) -> String {
    format!(
        "SELECT setval('tidings.polling_until', (extract(epoch FROM clock_timestamp() + interval '{ahead}') * 1e6)::bigint)"
    )
}

#[tokio::test]
async fn many_who_write_due_rows_hardly_notify_and_each_row_is_delivered() {
    let world = World::with(&["message"]).await;
    let mut listener = listener(&world).await;
    let _inbox = world.inbox(&["#"]).await;
    let _daemon = world.launch().with("TIDINGS_SWEEP_MS", 3_600_000).ready().await;

    join_all((0..8).map(|_| async {
        for _ in 0..250 {
            world.sql(ROW).await;
        }
    }))
    .await;

    world.until(ALL_DELIVERED).await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.deliveries").await, 2_000);
    let notified = notifications(&world, &mut listener).await;
    assert!(notified < 1_000, "{notified} of 2000 transactions notified");

    // Afterwards one row notifies as ever.
    world.until(&PROMISED.replace('>', "<")).await;
    world.sql(ROW).await;
    assert_eq!(notifications(&world, &mut listener).await, 1);
    world.until(ALL_DELIVERED).await;
}

/// On servers of its own: what others write there tells the daemon which numbers have been given to transactions, and it must
/// know without.
#[tokio::test]
async fn a_row_of_a_transaction_that_was_silent_and_stayed_open_is_found_when_it_is_committed() {
    let servers = Servers::alone().await;
    let world = World::on(&servers, &["message"]).await;
    let _inbox = world.inbox(&["#"]).await;
    let _daemon = world.launch().with("TIDINGS_SWEEP_MS", 3_600_000).ready().await;
    let mut listener = listener(&world).await;

    world.sql(&promise("1.9 s")).await;
    // The daemon sees it.
    notifications(&world, &mut listener).await;
    let mut transaction = world.db.begin().await.expect("a transaction");
    sqlx::query(ROW).execute(&mut *transaction).await.expect("written");
    world.until(&PROMISED.replace('>', "<")).await;
    // It goes on looking for as long as the transaction is open, which is what the test is about.
    tokio::time::sleep(Duration::from_millis(200)).await;
    transaction.commit().await.expect("committed");

    world.until(ALL_DELIVERED).await;
    assert_eq!(notifications(&world, &mut listener).await, 0, "it was silent");
}

/// A daemon that was frozen finds all notifications of that time at once, and takes them for a flood.
#[tokio::test]
async fn a_promise_binds_the_other_daemons_too_and_they_deliver_what_only_they_serve() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _left = world.launch().with("TIDINGS_SWEEP_MS", 3_600_000).ready().await;
    let dir = world.plugin_dir.join("right");
    std::fs::create_dir(&dir).expect("made");
    std::fs::write(dir.join("right.wasm"), well_behaved("right", &["right"], "right")).expect("written");
    let right = world
        .launch()
        .with("TIDINGS_SWEEP_MS", 3_600_000)
        .with("TIDINGS_PLUGIN_DIR", dir.display())
        .with("TIDINGS_STATE_DIR", world.state_dir().with_extension("right").display())
        .ready()
        .await;

    right.signal(Signal::SIGSTOP);
    for _ in 0..20 {
        world.sql("NOTIFY tidings").await;
        // Too few at a time for the left one to make a promise of its own.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(!world.value::<bool>(PROMISED).await);
    right.signal(Signal::SIGCONT);
    world.until(PROMISED).await;
    // The triggers are silent.
    world.sql(ROW).await;

    inbox.next().await;
}

#[tokio::test]
async fn a_promise_that_nobody_keeps_ends_by_itself() {
    let world = World::empty().await;
    let mut listener = listener(&world).await;
    world.sql(&promise("1.9 s")).await;
    world.sql(ROW).await;
    assert_eq!(notifications(&world, &mut listener).await, 0);
    world.until(&PROMISED.replace('>', "<")).await;
    world.sql(ROW).await;
    assert_eq!(notifications(&world, &mut listener).await, 1);
    // Left over from before the clock was set back.
    world.sql(&promise("1 hour")).await;
    world.sql(ROW).await;
    assert_eq!(notifications(&world, &mut listener).await, 1);
}
