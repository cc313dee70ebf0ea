//! The clock of PostgreSQL is set while the daemon runs: no row is early by the new clock, and nothing is stuck.

use std::sync::{Arc, Mutex};

use harness::consumer::Inbox;
use harness::daemon::Daemon;
use harness::servers::{Server, Servers};
use harness::world::World;
use nix::sys::signal::Signal;
use uuid::Uuid;

use crate::operations::health::{get_json, wait_until_ready};
use crate::operations::metrics::scrape;

const HOUR: i64 = 3600;

/// Servers with a clock that can be set, and a daemon that has delivered a row.
async fn start() -> (Arc<Mutex<Servers>>, World, Inbox, Daemon) {
    let servers = tokio::task::spawn_blocking(Servers::start_private_with_clock).await.expect("no panic");
    let servers = servers.expect("servers");
    let world = World::on_servers(&servers, &["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let daemon = world.launch().start_ready().await;
    let id = schedule(&world, "0").await;
    assert_eq!(inbox.next().await.id(), id);
    (Arc::new(Mutex::new(servers)), world, inbox, daemon)
}

/// Schedules a row that is due in the given time.
async fn schedule(world: &World, due_in: &str) -> Uuid {
    let sql = format!(
        r#"SELECT tidings.schedule('message', now() + interval '{due_in}', '{{"routing_key": "a", "body": 1}}')"#
    );
    world.value(&sql).await
}

/// Checks that the daemon tells people of the step.
async fn check_reported(world: &World, daemon: &mut Daemon, how: &str) {
    daemon.wait_for_line(&format!("the clock of PostgreSQL was set {how}")).await;
    wait_until_ready(daemon).await;
    let (_, body) = get_json(daemon, "/readyz").await;
    assert!(body["notes"].to_string().contains(&format!("was set {how}")), "{body}");
    assert!(scrape(daemon).await["tidings_clock_steps_total"] >= 1.0);
    let addr = daemon.http_addr().await;
    let (_, output) = world.launch().subcommand("doctor").with("TIDINGS_HTTP_ADDR", addr).run_to_end().await;
    assert!(output.contains(&format!("was set {how}")), "{output}");
}

/// Checks that no row was published before it was due by the database's clock.
async fn check_none_early(world: &World) {
    let early: i64 = world.value("SELECT count(*) FROM tidings.deliveries WHERE finished_at < due_at").await;
    assert_eq!(early, 0);
}

#[tokio::test]
async fn a_clock_that_is_set_back_by_an_hour_makes_no_row_early_and_leaves_none_behind() {
    if std::env::var_os(harness::image::NEWEST_VARIABLE).is_some() {
        eprintln!("libfaketime is of this machine, and the image has other libraries");
        return;
    }
    let (servers, world, mut inbox, mut daemon) = start().await;
    let waiting = schedule(&world, "3 seconds").await;
    servers.lock().expect("whole").set_clock(-HOUR).expect("set");

    let now = schedule(&world, "0").await;
    assert_eq!(inbox.next().await.id(), now);
    let soon = schedule(&world, "4 seconds").await;
    assert_eq!(inbox.next().await.id(), soon, "the other row is due in an hour");
    assert!(world.value::<bool>(&format!("SELECT due_at > now() FROM tidings.schedules WHERE id = '{waiting}'")).await);
    check_reported(&world, &mut daemon, "back").await;

    // The clock is right again.
    servers.lock().expect("whole").set_clock(0).expect("set");
    assert_eq!(inbox.next().await.id(), waiting);
    check_none_early(&world).await;
}

#[tokio::test]
async fn a_clock_that_is_set_forward_by_an_hour_makes_rows_due_and_none_early() {
    if std::env::var_os(harness::image::NEWEST_VARIABLE).is_some() {
        eprintln!("libfaketime is of this machine, and the image has other libraries");
        return;
    }
    let (servers, world, mut inbox, mut daemon) = start().await;
    let soon = schedule(&world, "30 minutes").await;
    let later = schedule(&world, "2 hours").await;
    servers.lock().expect("whole").set_clock(HOUR).expect("set");

    assert_eq!(inbox.next().await.id(), soon);
    let now = schedule(&world, "0").await;
    assert_eq!(inbox.next().await.id(), now);
    check_reported(&world, &mut daemon, "forward").await;
    assert!(world.value::<bool>(&format!("SELECT due_at > now() FROM tidings.schedules WHERE id = '{later}'")).await);
    check_none_early(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_back_with_a_clock_three_seconds_behind_delivers_what_was_due_and_nothing_early() {
    if std::env::var_os(harness::image::NEWEST_VARIABLE).is_some() {
        eprintln!("libfaketime is of this machine, and the image has other libraries");
        return;
    }
    let (servers, world, mut inbox, _daemon) = start().await;
    let waiting = schedule(&world, "12 seconds").await;
    servers.lock().expect("whole").set_clock(-3).expect("set");
    let restarting = Arc::clone(&servers);
    let restarted = tokio::task::spawn_blocking(move || {
        restarting.lock().expect("whole").restart(Server::Postgres, Signal::SIGKILL)
    });
    restarted.await.expect("no panic").expect("restarted");

    assert_eq!(inbox.next().await.id(), waiting);
    let now = schedule(&world, "0").await;
    assert_eq!(inbox.next().await.id(), now);
    check_none_early(&world).await;
}
