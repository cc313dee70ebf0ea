//! Collectors of traces that hang, are away, answer nonsense or have an untrusted certificate: the daemon does not wait
//! for them.

use harness::authority::Authority;
use harness::collector::{Answer, Collector};
use harness::eventually;
use harness::world::World;

use crate::operations::metrics::wait_for_value;
use crate::operations::traces::{launch_with_traces, schedule_with_headers, start_traced_daemon};

/// The metric of spans that could not be sent to a collector.
const DROPPED: &str = "tidings_spans_dropped_total";

#[tokio::test]
async fn a_collector_that_hangs_delays_neither_deliveries_nor_the_stop() {
    let world = World::with_plugins(&["message"]).await;
    let collector = Collector::start(Answer::Hangs).await;
    let mut inbox = world.inbox(&["#"]).await;
    // The export timeout is much longer than this test.
    let mut daemon = launch_with_traces(world.launch(), &collector)
        .with("OTEL_EXPORTER_OTLP_TIMEOUT", 600_000)
        .with("OTEL_BSP_MAX_QUEUE_SIZE", 3)
        .start_ready()
        .await;
    schedule_with_headers(&world, "k", "{}").await;
    inbox.next().await;
    eventually("an export that hangs", async || (collector.requests().len() == 1).then_some(())).await;

    for _ in 0..10 {
        schedule_with_headers(&world, "k", "{}").await;
        inbox.next().await;
    }

    // The queue holds three of the ten spans; the other seven are dropped.
    wait_for_value(&mut daemon, DROPPED, 7.0).await;
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(daemon.wait_for_end().await.success());
    let log = daemon.log();
    assert!(log.contains("stopped") && log.contains("the collector did not take the last spans within 2 s"), "{log}");
}

#[tokio::test]
async fn a_failing_collector_and_its_recovery_are_each_logged_once() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let answers = [
        Answer::SendsAndCloses("220 mail.example ESMTP\r\n"),
        Answer::SendsAndCloses(""),
        Answer::SendsAndCloses("HTTP/1.1 401 Unauthorized\r\nContent-Length: 6\r\n\r\nSECRET"),
        Answer::SendsAndCloses("HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n"),
        Answer::SendsAndCloses("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"),
    ];
    for answer in answers {
        let collector = Collector::start(answer).await;
        let addr = collector.addr();
        let mut daemon = start_traced_daemon(&world, &collector).await;
        for _ in 0..2 {
            schedule_with_headers(&world, "k", "{}").await;
            inbox.next().await;
        }
        let line = daemon.wait_for_line(&format!("the collector at {addr} does not take spans")).await;
        wait_for_value(&mut daemon, DROPPED, 2.0).await;

        drop(collector);
        schedule_with_headers(&world, "k", "{}").await;
        inbox.next().await;
        wait_for_value(&mut daemon, DROPPED, 3.0).await;
        let collector = Collector::start_at(addr, Answer::Accepts).await;
        let id = schedule_with_headers(&world, "k", "{}").await;
        inbox.next().await;
        collector.wait_for_span("messaging.message.id", &id.to_string()).await;
        daemon.wait_for_line(&format!("the collector at {addr} takes spans again")).await;

        let log = daemon.log();
        assert_eq!(log.matches("does not take spans").count(), 1, "told once: {log}");
        assert!(!log.contains("SECRET") && !line.contains("SECRET"), "{log}");
        assert!(daemon.stop().await.success());
    }
}

#[tokio::test]
async fn spans_are_sent_over_tls_only_to_a_collector_with_a_trusted_certificate() {
    let world = World::with_plugins(&["message"]).await;
    let collector = Collector::start(Answer::Accepts).await;
    let mut inbox = world.inbox(&["#"]).await;
    let authority = Authority::new("our own");
    let url = format!("https://localhost:{}", collector.offer_tls(&authority.identity("localhost", 1)));
    let launch = launch_with_traces(world.launch(), &collector).with("OTEL_EXPORTER_OTLP_ENDPOINT", &url);
    let trusting = |authority: &Authority, name: &str| {
        let file = world.plugin_dir.join(name);
        std::fs::write(&file, &authority.certificate).expect("written");
        launch.clone().with("SSL_CERT_FILE", file.display()).with("SSL_CERT_DIR", "")
    };

    let mut daemon = trusting(&Authority::new("a stranger"), "strange.pem").start_ready().await;
    schedule_with_headers(&world, "k", "{}").await;
    inbox.next().await;
    let line = daemon.wait_for_line("does not take spans").await;
    assert!(line.contains("UnknownIssuer"), "{line}");
    assert!(daemon.stop().await.success());
    assert_eq!(collector.requests().len(), 0);

    let _daemon = trusting(&authority, "ca.pem").start_ready().await;
    let id = schedule_with_headers(&world, "k", "{}").await;
    inbox.next().await;
    collector.wait_for_span("messaging.message.id", &id.to_string()).await;
}
