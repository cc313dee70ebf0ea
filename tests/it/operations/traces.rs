//! Traces: which spans a collector receives, which trace context a message carries, and that deliveries do not depend
//! on a collector.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use harness::collector::{Answer, Collector, Span};
use harness::consumer::Received;
use harness::daemon::{Daemon, Launch};
use harness::eventually;
use harness::pg_proxy::{Fate, PgProxy};
use harness::world::{World, database_url};
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::TraceContextExt as _;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use uuid::Uuid;

use crate::dead_letters::replay::{
    launch_with_frequent_passes, launch_with_hourly_passes, publish_message, reject_next, schedule_message,
    suppress_pass_at_start, wait_for_message_count,
};

/// The ids of the producer's span, and the `traceparent` with them.
const SCHEDULER: &str = "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331";
const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// Makes the daemon of `launch` send its spans to `collector` within 20 ms.
pub(crate) fn launch_with_traces(launch: Launch, collector: &Collector) -> Launch {
    launch.with("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url()).with("OTEL_BSP_SCHEDULE_DELAY", 20)
}

pub(crate) async fn start_traced_daemon(world: &World, collector: &Collector) -> Daemon {
    launch_with_traces(world.launch().with("TIDINGS_SWEEP_MS", 600_000), collector).start_ready().await
}

/// Schedules a row of the kind `message` that is due now.
pub(crate) async fn schedule_with_headers(world: &World, key: &str, headers: &str) -> Uuid {
    let payload = format!(r#"{{"routing_key": "{key}", "body": 1}}"#);
    world.value(&format!("SELECT tidings.schedule('message', now(), '{payload}', headers => '{headers}')")).await
}

/// The ids in the `traceparent` that a message carries.
fn carried_ids(received: &Received) -> String {
    let headers = received.headers();
    let traceparent = headers.get("traceparent").expect("it carries one");
    assert!(traceparent.starts_with("00-") && traceparent.ends_with("-01") && traceparent.len() == 55, "{traceparent}");
    traceparent[3..52].to_owned()
}

fn is_linked_to_producer(span: &Span) -> bool {
    span.links.iter().map(|(ids, _)| ids.as_str()).eq([SCHEDULER])
}

fn event_names(span: &Span) -> Vec<&str> {
    span.events.iter().map(|(name, _)| name.as_str()).collect()
}

/// Whether the daemon has a thread that sends traces.
fn has_trace_thread(daemon: &Daemon) -> bool {
    let tasks = std::fs::read_dir(PathBuf::from(format!("/proc/{}/task", daemon.pid()))).expect("it runs");
    let names =
        tasks.map(|task| std::fs::read_to_string(task.expect("a task").path().join("comm")).unwrap_or_default());
    names.into_iter().any(|name| name.starts_with("OpenTelemetry"))
}

#[tokio::test]
async fn a_delivery_is_a_span_without_payload_linked_to_the_producers_span_and_carried_by_the_message() {
    let world = World::with_plugins(&["message"]).await;
    let collector = Collector::start(Answer::Accepts).await;
    let mut inbox = world.inbox(&["#"]).await;
    let daemon = launch_with_traces(world.launch(), &collector)
        .with("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        .with("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20abc")
        .start_ready()
        .await;
    assert!(has_trace_thread(&daemon));
    let before = world.now().await;
    let id: Uuid = world
        .value(&format!(
            r#"SELECT tidings.schedule('message', now(),
                '{{"routing_key": "a.b", "body": "SECRET", "headers": {{"own": "SECRET"}}}}', key => 'SECRET', subject => 'SECRET',
                headers => '{{"traceparent": "{TRACEPARENT}", "tracestate": "vendor=1", "row": "SECRET"}}')"#
        ))
        .await;

    let received = inbox.next().await;
    let span = collector.wait_for_span("messaging.message.id", &id.to_string()).await;

    // The delivery has a trace of its own, with a link to the producer's span.
    assert_eq!(span.links, [(SCHEDULER.to_owned(), "vendor=1".to_owned())]);
    assert!(span.parent.is_empty() && span.ids[..32] != SCHEDULER[..32], "{span:?}");
    assert_eq!((span.name.as_str(), span.kind, &span.error), ("publish tidings", "SPAN_KIND_PRODUCER", &None));
    let headers = received.headers();
    let lateness = span.attributes["tidings.lateness_ms"].clone();
    assert!(lateness.parse::<u64>().is_ok(), "{lateness}");
    let generation = span.attributes["tidings.generation"].clone();
    let expected = [
        ("messaging.system", "rabbitmq"),
        ("messaging.operation.name", "publish"),
        ("messaging.operation.type", "send"),
        ("messaging.destination.name", "tidings"),
        ("messaging.rabbitmq.destination.routing_key", "a.b"),
        ("messaging.message.id", &id.to_string()),
        ("tidings.kind", "message"),
        ("tidings.plugin", &headers["tidings-plugin"]),
        ("tidings.generation", &generation),
        ("tidings.attempt", "1"),
        ("tidings.lateness_ms", &lateness),
        ("tidings.outcome", "delivered"),
    ];
    assert_eq!(span.attributes, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    assert_eq!(event_names(&span), ["built", "published", "confirmed"]);
    let ns = |time: time::OffsetDateTime| u64::try_from(time.unix_timestamp_nanos()).expect("after 1970");
    let (from, to) = span.start_and_end_ns;
    let mut times = vec![ns(before), from];
    times.extend(span.events.iter().map(|(_, at)| *at));
    times.push(to);
    assert!(times.is_sorted(), "{times:?}");
    // The daemon's clock is ahead by the time that it took to read the database clock.
    eventually("the end of the span, by the database clock", async || (ns(world.now().await) >= to).then_some(()))
        .await;

    // A standard library reads the ids of this span from the message, which carries nothing of the producer's trace.
    assert_eq!(carried_ids(&received), span.ids);
    assert!(!headers.contains_key("tracestate") && headers["row"] == "SECRET");
    let headers: HashMap<String, String> = headers.into_iter().collect();
    let context = TraceContextPropagator::new().extract(&headers);
    let context = context.span().span_context().clone();
    assert!(context.is_sampled() && context.is_remote());
    assert_eq!(format!("{}-{}", context.trace_id(), context.span_id()), span.ids);

    assert_eq!(span.sender["service.name"], "tidings");
    assert_eq!(span.sender["deployment.environment.name"], "test");
    let head = collector.requests()[0].head.clone();
    assert!(head.starts_with("POST /v1/traces ") && head.contains("Bearer abc"), "{head}");
    assert!(collector.was_sent("tidings.outcome") && !collector.was_sent("SECRET"));
    // The row's own `traceparent` is kept in the history.
    world
        .wait_until(&format!(
            "SELECT count(*) = 1 FROM tidings.deliveries WHERE headers->>'traceparent' = '{TRACEPARENT}'"
        ))
        .await;
}

#[tokio::test]
async fn each_attempt_is_a_separate_span_with_the_same_link_and_message_id() {
    let world = World::with_plugins(&["message", "misbehave"]).await;
    let collector = Collector::start(Answer::Accepts).await;
    let launch = world.launch().with("TIDINGS_SWEEP_MS", 600_000).with("TIDINGS_MAX_ATTEMPTS", 1);
    let _daemon = launch_with_traces(launch, &collector).start_ready().await;
    let id = schedule_with_headers(&world, "later", &format!(r#"{{"traceparent": "{TRACEPARENT}"}}"#)).await;

    let refused = collector.wait_for_span("tidings.outcome", "refused").await;
    let mut inbox = world.inbox(&["later"]).await;
    let received = inbox.next().await;
    let delivered = collector.wait_for_span("tidings.outcome", "delivered").await;

    assert!(is_linked_to_producer(&refused) && is_linked_to_producer(&delivered));
    for span in [&refused, &delivered] {
        assert_eq!(span.attributes["messaging.message.id"], id.to_string());
    }
    assert_ne!(refused.ids[..32], delivered.ids[..32]);
    assert_eq!((received.id(), carried_ids(&received)), (id, delivered.ids));
    assert!(refused.error.as_ref().is_some_and(|error| error.starts_with("no queue took the message")), "{refused:?}");
    assert_eq!(
        (event_names(&refused), refused.attributes["error.type"].as_str()),
        (vec!["built", "published"], "refused")
    );

    // Rows that never become a message, because they are parked or skipped.
    for (kind, outcome) in [("invalid", "parked"), ("skip", "skipped"), ("trap", "parked")] {
        let sql =
            format!(r#"SELECT tidings.schedule('{kind}', now(), headers => '{{"traceparent": "{TRACEPARENT}"}}')"#);
        let _id: Uuid = world.value(&sql).await;
        let span = collector.wait_for_span("tidings.kind", kind).await;
        assert_eq!((event_names(&span), span.error.is_none()), (vec!["built"], outcome == "skipped"), "{span:?}");
        assert_eq!(span.attributes["tidings.outcome"], outcome);
        assert!(is_linked_to_producer(&span) && span.attributes["tidings.plugin"].starts_with("misbehave@"));
    }
}

#[tokio::test]
async fn a_delivery_that_was_not_committed_is_one_span_with_the_outcome_unknown() {
    let world = World::with_plugins(&["message"]).await;
    let collector = Collector::start(Answer::Accepts).await;
    let mut inbox = world.inbox(&["#"]).await;
    let cut = AtomicBool::new(false);
    let proxy = PgProxy::start(world.ports().0, move |statement| {
        let first = statement.contains("INSERT INTO tidings.deliveries") && !cut.swap(true, Ordering::Relaxed);
        if first { Fate::Cut } else { Fate::Pass }
    })
    .await;
    let launch = world.launch().with("TIDINGS_DATABASE_URL", database_url(proxy.port, &world.name));
    let _daemon = launch_with_traces(launch, &collector).start_ready().await;

    let id = schedule_with_headers(&world, "k", "{}").await;

    let first = inbox.next().await;
    let span = collector.wait_for_span("messaging.message.id", &id.to_string()).await;
    assert_eq!((first.id(), carried_ids(&first)), (id, span.ids.clone()));
    assert_eq!(span.attributes["tidings.outcome"], "unknown");
    assert_eq!(span.error.as_deref(), Some("what became of it could not be committed"));
    assert_eq!(event_names(&span), ["built", "published", "confirmed"]);
    assert!(span.links.is_empty(), "nobody left a span in the row");
    // The message is not published again, so there is no second span.
    world.wait_until("SELECT count(*) = 1 FROM tidings.deliveries").await;
    assert!(inbox.next_within(std::time::Duration::ZERO).await.is_none(), "it was sent a second time");
}

#[tokio::test]
async fn a_replay_is_a_span_linked_to_the_span_of_the_delivery() {
    let world = World::with_plugins(&["message"]).await;
    let collector = Collector::start(Answer::Accepts).await;
    let mut inbox = world.inbox(&["k"]).await;
    let _daemon = launch_with_traces(launch_with_frequent_passes(&world), &collector).start_ready().await;
    let id = schedule_message(&world, r#"{"routing_key": "k", "body": "SECRET"}"#).await;

    let first = reject_next(&mut inbox).await;
    let again = inbox.next().await;

    let span = collector.wait_for_span("messaging.operation.name", "replay").await;
    let delivery = collector.wait_for_span("messaging.operation.name", "publish").await;
    assert_eq!((carried_ids(&first), carried_ids(&again)), (delivery.ids.clone(), delivery.ids.clone()));
    assert_eq!(span.links, [(delivery.ids.clone(), String::new())]);
    assert!(span.parent.is_empty() && span.ids[..32] != delivery.ids[..32]);
    assert_eq!((span.name.as_str(), span.kind, &span.error), ("replay inbox.k", "SPAN_KIND_PRODUCER", &None));
    let expected = [
        ("messaging.system", "rabbitmq"),
        ("messaging.operation.name", "replay"),
        ("messaging.operation.type", "send"),
        ("messaging.destination.name", "inbox.k"),
        ("messaging.message.id", &id.to_string()),
        ("tidings.kind", "message"),
        ("tidings.replay", "1"),
        ("tidings.outcome", "replayed"),
    ];
    assert_eq!(span.attributes, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    assert!(
        span.start_and_end_ns.0 >= delivery.start_and_end_ns.0 && span.start_and_end_ns.0 <= span.start_and_end_ns.1
    );
    assert!(!collector.was_sent("SECRET"));

    // A dead letter whose queue has been deleted.
    schedule_with_headers(&world, "k", &format!(r#"{{"traceparent": "{TRACEPARENT}"}}"#)).await;
    let first = reject_next(&mut inbox).await;
    inbox.channel.queue_delete("inbox.k".into(), lapin::options::QueueDeleteOptions::default()).await.expect("deleted");
    let span = collector.wait_for_span("tidings.outcome", "parked").await;
    assert_eq!(span.links, [(carried_ids(&first), String::new())]);
    assert_eq!(span.error.as_deref(), Some("the queue \"inbox.k\" it died in is gone"));
}

#[tokio::test]
async fn a_replay_on_the_command_line_is_a_span_too() {
    let world = World::with_plugins(&["message"]).await;
    let collector = Collector::start(Answer::Accepts).await;
    let mut inbox = world.inbox(&["k"]).await;
    suppress_pass_at_start(&world).await;
    // This daemon makes no pass and sends no traces.
    let _daemon = launch_with_hourly_passes(&world).start_ready().await;
    schedule_with_headers(&world, "k", &format!(r#"{{"traceparent": "{TRACEPARENT}"}}"#)).await;
    reject_next(&mut inbox).await;
    wait_for_message_count(&world, "tidings.dead", 1).await;

    let launch = launch_with_traces(world.launch().subcommand("dead").args(["replay"]), &collector);
    let (code, output) = launch.with("OTEL_BSP_SCHEDULE_DELAY", 600_000).run_to_end().await;

    assert!(code == 0 && output.contains("1 replayed"), "{output}");
    let [span] = &*collector.spans() else { panic!("{:?}", collector.spans()) };
    assert!(is_linked_to_producer(span) && span.name == "replay inbox.k");
    assert_eq!(inbox.next().await.headers()["traceparent"], TRACEPARENT);
}

#[tokio::test]
async fn an_invalid_traceparent_is_ignored_in_a_row_and_kept_in_a_dead_letter() {
    let world = World::with_plugins(&["message"]).await;
    let collector = Collector::start(Answer::Accepts).await;
    let mut inbox = world.inbox(&["k"]).await;
    let _daemon = launch_with_traces(launch_with_frequent_passes(&world), &collector).start_ready().await;
    let long = "0-".repeat(2_000);
    for junk in ["", "junk", "00-ab-cd-01", "ÿÿ", &long, &TRACEPARENT.to_uppercase(), &format!("{TRACEPARENT}-x")] {
        let id = schedule_with_headers(&world, "k", &format!(r#"{{"traceparent": "{junk}", "tracestate": "{junk}"}}"#))
            .await;
        let received = inbox.next().await;
        let span = collector.wait_for_span("messaging.message.id", &id.to_string()).await;
        assert_eq!((received.id(), carried_ids(&received), span.links), (id, span.ids, vec![]), "{junk}");
    }

    // A dead letter keeps its header unchanged, whatever it contains.
    let junk =
        [AMQPValue::LongString("junk".into()), AMQPValue::LongInt(7), AMQPValue::LongString(vec![0xff; 9].into())];
    for (number, value) in junk.into_iter().enumerate() {
        let mut headers = FieldTable::default();
        headers.insert("traceparent".into(), value.clone());
        let id = format!("foreign {number}");
        let properties = BasicProperties::default().with_headers(headers).with_message_id(id.as_str().into());
        publish_message(&world, "", "inbox.k", b"x", properties).await;
        reject_next(&mut inbox).await;
        let again = inbox.next().await;
        let headers = again.properties().headers().clone().expect("headers");
        assert_eq!(headers.inner().get("traceparent"), Some(&value));
        assert_eq!(collector.wait_for_span("messaging.message.id", &id).await.links, []);
    }
}

#[tokio::test]
async fn a_trace_that_the_producer_did_not_sample_is_not_sampled_unless_configured() {
    let world = World::with_plugins(&["message"]).await;
    let collector = Collector::start(Answer::Accepts).await;
    let mut inbox = world.inbox(&["#"]).await;
    let unsampled = TRACEPARENT.replace("-01", "-00");
    let headers = format!(r#"{{"traceparent": "{unsampled}"}}"#);

    let one = start_traced_daemon(&world, &collector).await;
    schedule_with_headers(&world, "k", &headers).await;
    let traceparent = inbox.next().await.headers()["traceparent"].clone();
    assert!(
        traceparent.ends_with("-00") && traceparent[3..35] != SCHEDULER[..32],
        "the consumer is to know: {traceparent}"
    );
    // A stopping daemon sends all remaining spans.
    assert!(one.stop().await.success());
    assert_eq!(collector.requests().len(), 0);

    let launch = world.launch().with("OTEL_TRACES_SAMPLER", "always_on").with("OTEL_SERVICE_NAME", "reminders");
    let one = launch_with_traces(launch, &collector).with("OTEL_BSP_SCHEDULE_DELAY", 600_000).start_ready().await;
    schedule_with_headers(&world, "k", &headers).await;
    let received = inbox.next().await;
    world.wait_until("SELECT count(*) = 2 FROM tidings.deliveries").await;
    assert!(one.stop().await.success());
    let [span] = &*collector.spans() else { panic!("{:?}", collector.spans()) };
    assert!(is_linked_to_producer(span) && span.sender["service.name"] == "reminders");
    assert_eq!(carried_ids(&received), span.ids);
}

#[tokio::test]
async fn without_an_endpoint_or_when_disabled_no_span_is_sent_and_the_rows_traceparent_is_kept() {
    let world = World::with_plugins(&["message"]).await;
    let collector = Collector::start(Answer::Accepts).await;
    let mut inbox = world.inbox(&["k"]).await;
    let disabled =
        launch_with_traces(launch_with_frequent_passes(&world), &collector).with("OTEL_SDK_DISABLED", "true");
    for launch in [launch_with_frequent_passes(&world), disabled] {
        let daemon = launch.start_ready().await;
        let headers = format!(r#"{{"traceparent": "{TRACEPARENT}", "tracestate": "vendor=1"}}"#);
        schedule_with_headers(&world, "k", &headers).await;
        reject_next(&mut inbox).await;
        let headers = inbox.next().await.headers();
        assert_eq!((headers["traceparent"].as_str(), headers["tracestate"].as_str()), (TRACEPARENT, "vendor=1"));
        assert!(!has_trace_thread(&daemon));
        assert!(daemon.stop().await.success());
    }
    assert_eq!(collector.requests().len(), 0);
}

#[tokio::test]
async fn mistakes_in_trace_settings_are_reported_together_with_the_others() {
    let world = World::empty().await;
    let launch = world
        .launch()
        .with("TIDINGS_NOTIFY", "perhaps")
        .with("OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:SECRET@collector:4318")
        .with("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        .with("OTEL_TRACES_SAMPLER", "sometimes");

    let (code, output) = launch.run_to_end().await;

    assert_eq!((code, output.lines().count()), (64, 4), "{output}");
    for mistake in [
        "TIDINGS_NOTIFY is \"perhaps\"",
        "OTEL_EXPORTER_OTLP_ENDPOINT is not a URL that can be used: it has a user in it",
        "OTEL_EXPORTER_OTLP_PROTOCOL is \"grpc\"",
        "OTEL_TRACES_SAMPLER is \"sometimes\"",
    ] {
        assert!(output.contains(mistake), "{mistake}:\n{output}");
    }
    assert!(!output.contains("SECRET"), "{output}");
}
