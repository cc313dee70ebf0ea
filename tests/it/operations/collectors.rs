//! Collectors of traces that hang, are away, talk nonsense or are strangers: nobody waits for them.

use harness::authority::Authority;
use harness::collector::{Answer, Collector};
use harness::eventually;
use harness::world::World;

use crate::operations::metrics::until_is;
use crate::operations::traces::{daemon, schedule, traced};

/// Spans that no collector took.
const DROPPED: &str = "tidings_spans_dropped_total";

#[tokio::test]
async fn a_collector_that_hangs_delays_nothing_and_the_daemon_stops_all_the_same() {
    let world = World::with(&["message"]).await;
    let collector = Collector::start(Answer::Never).await;
    let mut inbox = world.inbox(&["#"]).await;
    // Far beyond the patience of this test.
    let mut daemon = traced(world.launch(), &collector)
        .with("OTEL_EXPORTER_OTLP_TIMEOUT", 600_000)
        .with("OTEL_BSP_MAX_QUEUE_SIZE", 3)
        .ready()
        .await;
    schedule(&world, "k", "{}").await;
    inbox.next().await;
    eventually("an export that hangs", async || (collector.requests().len() == 1).then_some(())).await;

    for _ in 0..10 {
        schedule(&world, "k", "{}").await;
        inbox.next().await;
    }

    // Three wait, and the other seven found no place.
    until_is(&mut daemon, DROPPED, 7.0).await;
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(daemon.ended().await.success());
    let log = daemon.log();
    assert!(log.contains("stopped") && log.contains("the collector did not take the last spans within 2 s"), "{log}");
}

#[tokio::test]
async fn a_collector_that_is_away_or_talks_nonsense_is_a_line_in_the_log_and_so_is_its_return() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let answers = [
        Answer::Says("220 mail.example ESMTP\r\n"),
        Answer::Says(""),
        Answer::Says("HTTP/1.1 401 Unauthorized\r\nContent-Length: 6\r\n\r\nSECRET"),
        Answer::Says("HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n"),
        Answer::Says("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"),
    ];
    for answer in answers {
        let collector = Collector::start(answer).await;
        let addr = collector.addr();
        let mut daemon = daemon(&world, &collector).await;
        for _ in 0..2 {
            schedule(&world, "k", "{}").await;
            inbox.next().await;
        }
        let line = daemon.wait_for_line(&format!("the collector at {addr} does not take spans")).await;
        until_is(&mut daemon, DROPPED, 2.0).await;

        drop(collector);
        schedule(&world, "k", "{}").await;
        inbox.next().await;
        until_is(&mut daemon, DROPPED, 3.0).await;
        let collector = Collector::at(addr, Answer::Takes).await;
        let id = schedule(&world, "k", "{}").await;
        inbox.next().await;
        collector.one("messaging.message.id", &id.to_string()).await;
        daemon.wait_for_line(&format!("the collector at {addr} takes spans again")).await;

        let log = daemon.log();
        assert_eq!(log.matches("does not take spans").count(), 1, "told once: {log}");
        assert!(!log.contains("SECRET") && !line.contains("SECRET"), "{log}");
        assert!(daemon.stop().await.success());
    }
}

#[tokio::test]
async fn a_collector_over_tls_is_trusted_as_the_servers_are_and_a_stranger_gets_nothing() {
    let world = World::with(&["message"]).await;
    let collector = Collector::start(Answer::Takes).await;
    let mut inbox = world.inbox(&["#"]).await;
    let authority = Authority::new("our own");
    let url = format!("https://localhost:{}", collector.offer_tls(&authority.identity("localhost", 1)));
    let launch = traced(world.launch(), &collector).with("OTEL_EXPORTER_OTLP_ENDPOINT", &url);
    let trusting = |authority: &Authority, name: &str| {
        let file = world.plugin_dir.join(name);
        std::fs::write(&file, &authority.certificate).expect("written");
        launch.clone().with("SSL_CERT_FILE", file.display()).with("SSL_CERT_DIR", "")
    };

    let mut daemon = trusting(&Authority::new("a stranger"), "strange.pem").ready().await;
    schedule(&world, "k", "{}").await;
    inbox.next().await;
    let line = daemon.wait_for_line("does not take spans").await;
    assert!(line.contains("UnknownIssuer"), "{line}");
    assert!(daemon.stop().await.success());
    assert_eq!(collector.requests().len(), 0);

    let _daemon = trusting(&authority, "ca.pem").ready().await;
    let id = schedule(&world, "k", "{}").await;
    inbox.next().await;
    collector.one("messaging.message.id", &id.to_string()).await;
}
