//! Signals that operators send: the daemon either finishes the rows in flight and ends, or continues. No row is
//! published twice.

use harness::authority::Authority;
use harness::servers::Servers;
use harness::world::World;
use nix::sys::signal::Signal;

use crate::on_time::delivery::start_row_in_flight;
use crate::operations::tls::{TlsWorld, write_certificate};

/// The number of rows in a drain.
const ROWS: usize = 3_000;

#[tokio::test]
async fn sigint_and_sigquit_end_the_daemon_after_it_finishes_the_rows_in_flight() {
    for signal in [Signal::SIGINT, Signal::SIGQUIT] {
        let world = World::with_plugins(&["misbehave"]).await;
        let mut inbox = world.inbox(&["#"]).await;
        let (mut daemon, _) = start_row_in_flight(&world).await;

        daemon.signal(signal);

        assert!(daemon.wait_for_end().await.success(), "{signal}:\n{}", daemon.log());
        inbox.next().await;
        assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.deliveries WHERE key = 'echo'").await, 1);
    }
}

#[tokio::test]
async fn sighup_sigusr1_and_sigusr2_during_a_drain_neither_stop_it_nor_duplicate_messages() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["a"]).await;
    world
        .sql(&format!(
            r#"INSERT INTO tidings.schedules (kind, due_at, payload)
               SELECT 'message', now(), '{{"routing_key":"a","body":1}}' FROM generate_series(1, {ROWS})"#
        ))
        .await;
    let mut daemon = world.start_daemon().await;

    let mut ids = std::collections::HashSet::new();
    for number in 0..ROWS {
        let received = inbox.next().await;
        assert!(ids.insert(received.id()), "{} came twice", received.id());
        if number % 500 == 250 {
            for signal in [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2] {
                daemon.signal(signal);
            }
        }
    }
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    daemon.wait_for_line("SIGHUP: looking again at the plugin directory and the TLS files").await;
    assert!(!daemon.has_ended());
    assert!(daemon.stop().await.success());
}

#[tokio::test]
async fn sighup_makes_the_daemon_read_the_tls_files_again_and_report_their_errors() {
    let authority = Authority::new("our own");
    let mut servers = Servers::start_private_async().await;
    let amqps_port = servers.offer_tls(&authority.identity("localhost", 1)).expect("TLS");
    let world = World::on_servers(&servers, &["message"]).await;
    let mut inbox = world.inbox(&["a"]).await;
    let trusted = write_certificate(&world, "ca.pem", &authority.certificate);
    let trusting = TlsWorld { world: &world, amqps_port };
    let mut daemon = trusting.launch_over_tls(&world.launch(), "localhost", &trusted).start_ready().await;

    daemon.signal(Signal::SIGHUP);
    daemon.wait_for_line("PostgreSQL and RabbitMQ take new connections with the TLS files as they are now").await;

    // The trusted authority is replaced by another one, which has not signed the servers' certificates yet.
    let next = Authority::new("the next");
    write_certificate(&world, "ca.pem", &next.certificate);
    daemon.signal(Signal::SIGHUP);
    daemon.wait_for_line("the certificate of PostgreSQL at localhost").await;
    let line = daemon.wait_for_line("the certificate of RabbitMQ at localhost").await;
    assert!(line.contains("no new connection could be made after SIGHUP; those that are there go on"), "{line}");
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key":"a","body":1}')"#).await;
    inbox.next().await;
    servers.replace_certificate(&next.identity("localhost", 1)).expect("shown");
    daemon.signal(Signal::SIGHUP);
    harness::eventually("the second good look", async || {
        (daemon.log().matches("take new connections with the TLS files").count() == 2).then_some(())
    })
    .await;
    assert!(daemon.stop().await.success());
}
