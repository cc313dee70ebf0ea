//! Traces: what a collector gets to see, what a message carries, and that nobody waits for a collector or is in its debt.

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

use crate::dead_letters::replay::{no_pass_at_start, often, once, publish, reject, send, until_waiting};

/// The span of whoever scheduled, and what `traceparent` says of it.
const SCHEDULER: &str = "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331";
const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// `launch` with traces, which do not wait for company.
pub(crate) fn traced(launch: Launch, collector: &Collector) -> Launch {
    launch.with("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url()).with("OTEL_BSP_SCHEDULE_DELAY", 20)
}

pub(crate) async fn daemon(world: &World, collector: &Collector) -> Daemon {
    traced(world.launch().with("TIDINGS_SWEEP_MS", 600_000), collector).ready().await
}

/// Schedules a message that is due now.
pub(crate) async fn schedule(world: &World, key: &str, headers: &str) -> Uuid {
    let payload = format!(r#"{{"routing_key": "{key}", "body": 1}}"#);
    world.value(&format!("SELECT tidings.schedule('message', now(), '{payload}', headers => '{headers}')")).await
}

/// The ids in the `traceparent` that a message carries.
fn carried(received: &Received) -> String {
    let headers = received.headers();
    let traceparent = headers.get("traceparent").expect("it carries one");
    assert!(traceparent.starts_with("00-") && traceparent.ends_with("-01") && traceparent.len() == 55, "{traceparent}");
    traceparent[3..52].to_owned()
}

fn linked_to_the_scheduler(span: &Span) -> bool {
    span.links.iter().map(|(ids, _)| ids.as_str()).eq([SCHEDULER])
}

fn events(span: &Span) -> Vec<&str> {
    span.events.iter().map(|(name, _)| name.as_str()).collect()
}

/// Whether the daemon has a thread that sends traces.
fn sends_traces(daemon: &Daemon) -> bool {
    let tasks = std::fs::read_dir(PathBuf::from(format!("/proc/{}/task", daemon.pid()))).expect("it runs");
    let names =
        tasks.map(|task| std::fs::read_to_string(task.expect("a task").path().join("comm")).unwrap_or_default());
    names.into_iter().any(|name| name.starts_with("OpenTelemetry"))
}

#[tokio::test]
async fn a_delivery_is_a_span_linked_to_the_schedulers_that_the_message_carries_and_no_secret_is_in_it() {
    let world = World::with(&["message"]).await;
    let collector = Collector::start(Answer::Takes).await;
    let mut inbox = world.inbox(&["#"]).await;
    let daemon = traced(world.launch(), &collector)
        .with("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        .with("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20abc")
        .ready()
        .await;
    assert!(sends_traces(&daemon));
    let before = world.now().await;
    let id: Uuid = world
        .value(&format!(
            r#"SELECT tidings.schedule('message', now(),
                '{{"routing_key": "a.b", "body": "SECRET", "headers": {{"own": "SECRET"}}}}', key => 'SECRET', subject => 'SECRET',
                headers => '{{"traceparent": "{TRACEPARENT}", "tracestate": "vendor=1", "row": "SECRET"}}')"#
        ))
        .await;

    let received = inbox.next().await;
    let span = collector.one("messaging.message.id", &id.to_string()).await;

    // A trace of its own, which says where it comes from.
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
    assert_eq!(events(&span), ["built", "published", "confirmed"]);
    let ns = |time: time::OffsetDateTime| u64::try_from(time.unix_timestamp_nanos()).expect("after 1970");
    let (from, to) = span.lasted;
    let mut times = vec![ns(before), from];
    times.extend(span.events.iter().map(|(_, at)| *at));
    times.push(to);
    assert!(times.is_sorted(), "{times:?}");
    // The daemon's clock is fast by as long as it took to read it.
    eventually("the end of the span, by the database clock", async || (ns(world.now().await) >= to).then_some(()))
        .await;

    // What the message carries is this span, as anybody's library reads it, and nothing of the old trace.
    assert_eq!(carried(&received), span.ids);
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
    // The row's own is not lost: the history has it.
    world
        .until(&format!("SELECT count(*) = 1 FROM tidings.deliveries WHERE headers->>'traceparent' = '{TRACEPARENT}'"))
        .await;
}

#[tokio::test]
async fn each_attempt_is_a_span_of_its_own_with_the_same_link_and_the_same_message_id() {
    let world = World::with(&["message", "misbehave"]).await;
    let collector = Collector::start(Answer::Takes).await;
    let launch = world.launch().with("TIDINGS_SWEEP_MS", 600_000).with("TIDINGS_MAX_ATTEMPTS", 1);
    let _daemon = traced(launch, &collector).ready().await;
    let id = schedule(&world, "later", &format!(r#"{{"traceparent": "{TRACEPARENT}"}}"#)).await;

    let refused = collector.one("tidings.outcome", "refused").await;
    let mut inbox = world.inbox(&["later"]).await;
    let received = inbox.next().await;
    let delivered = collector.one("tidings.outcome", "delivered").await;

    assert!(linked_to_the_scheduler(&refused) && linked_to_the_scheduler(&delivered));
    for span in [&refused, &delivered] {
        assert_eq!(span.attributes["messaging.message.id"], id.to_string());
    }
    assert_ne!(refused.ids[..32], delivered.ids[..32]);
    assert_eq!((received.id(), carried(&received)), (id, delivered.ids));
    assert!(refused.error.as_ref().is_some_and(|error| error.starts_with("no queue took the message")), "{refused:?}");
    assert_eq!((events(&refused), refused.attributes["error.type"].as_str()), (vec!["built", "published"], "refused"));

    // One that never gets as far as a message, and one about which there is nothing to send.
    for (kind, outcome) in [("invalid", "parked"), ("skip", "skipped"), ("trap", "parked")] {
        let sql =
            format!(r#"SELECT tidings.schedule('{kind}', now(), headers => '{{"traceparent": "{TRACEPARENT}"}}')"#);
        let _id: Uuid = world.value(&sql).await;
        let span = collector.one("tidings.kind", kind).await;
        assert_eq!((events(&span), span.error.is_none()), (vec!["built"], outcome == "skipped"), "{span:?}");
        assert_eq!(span.attributes["tidings.outcome"], outcome);
        assert!(linked_to_the_scheduler(&span) && span.attributes["tidings.plugin"].starts_with("misbehave@"));
    }
}

#[tokio::test]
async fn a_message_whose_delivery_was_not_committed_is_in_a_span_that_says_so_and_in_no_other() {
    let world = World::with(&["message"]).await;
    let collector = Collector::start(Answer::Takes).await;
    let mut inbox = world.inbox(&["#"]).await;
    let cut = AtomicBool::new(false);
    let proxy = PgProxy::start(world.ports().0, move |statement| {
        let first = statement.contains("INSERT INTO tidings.deliveries") && !cut.swap(true, Ordering::Relaxed);
        if first { Fate::Cut } else { Fate::Pass }
    })
    .await;
    let launch = world.launch().with("TIDINGS_DATABASE_URL", database_url(proxy.port, &world.name));
    let _daemon = traced(launch, &collector).ready().await;

    let id = schedule(&world, "k", "{}").await;

    let first = inbox.next().await;
    let span = collector.one("messaging.message.id", &id.to_string()).await;
    assert_eq!((first.id(), carried(&first)), (id, span.ids.clone()));
    assert_eq!(span.attributes["tidings.outcome"], "unknown");
    assert_eq!(span.error.as_deref(), Some("what became of it could not be committed"));
    assert_eq!(events(&span), ["built", "published", "confirmed"]);
    assert!(span.links.is_empty(), "nobody left a span in the row");
    // Its message is not sent again, so there is nothing more to tell.
    world.until("SELECT count(*) = 1 FROM tidings.deliveries").await;
    assert!(inbox.within(std::time::Duration::ZERO).await.is_none(), "it was sent a second time");
}

#[tokio::test]
async fn a_replay_is_a_span_linked_to_the_one_that_the_letter_carries_on() {
    let world = World::with(&["message"]).await;
    let collector = Collector::start(Answer::Takes).await;
    let mut inbox = world.inbox(&["k"]).await;
    let _daemon = traced(often(&world), &collector).ready().await;
    let id = send(&world, r#"{"routing_key": "k", "body": "SECRET"}"#).await;

    let first = reject(&mut inbox).await;
    let again = inbox.next().await;

    let span = collector.one("messaging.operation.name", "replay").await;
    let delivery = collector.one("messaging.operation.name", "publish").await;
    assert_eq!((carried(&first), carried(&again)), (delivery.ids.clone(), delivery.ids.clone()));
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
    assert!(span.lasted.0 >= delivery.lasted.0 && span.lasted.0 <= span.lasted.1);
    assert!(!collector.was_sent("SECRET"));

    // One whose queue is gone.
    schedule(&world, "k", &format!(r#"{{"traceparent": "{TRACEPARENT}"}}"#)).await;
    let first = reject(&mut inbox).await;
    inbox.channel.queue_delete("inbox.k".into(), lapin::options::QueueDeleteOptions::default()).await.expect("deleted");
    let span = collector.one("tidings.outcome", "parked").await;
    assert_eq!(span.links, [(carried(&first), String::new())]);
    assert_eq!(span.error.as_deref(), Some("the queue \"inbox.k\" it died in is gone"));
}

#[tokio::test]
async fn a_replay_by_hand_is_a_span_as_well() {
    let world = World::with(&["message"]).await;
    let collector = Collector::start(Answer::Takes).await;
    let mut inbox = world.inbox(&["k"]).await;
    no_pass_at_start(&world).await;
    // It makes no pass, and no traces.
    let _daemon = once(&world).ready().await;
    schedule(&world, "k", &format!(r#"{{"traceparent": "{TRACEPARENT}"}}"#)).await;
    reject(&mut inbox).await;
    until_waiting(&world, "tidings.dead", 1).await;

    let launch = traced(world.launch().subcommand("dead").args(["replay"]), &collector);
    let (code, output) = launch.with("OTEL_BSP_SCHEDULE_DELAY", 600_000).finished().await;

    assert!(code == 0 && output.contains("1 replayed"), "{output}");
    let [span] = &*collector.spans() else { panic!("{:?}", collector.spans()) };
    assert!(linked_to_the_scheduler(span) && span.name == "replay inbox.k");
    assert_eq!(inbox.next().await.headers()["traceparent"], TRACEPARENT);
}

#[tokio::test]
async fn junk_in_traceparent_hurts_nobody() {
    let world = World::with(&["message"]).await;
    let collector = Collector::start(Answer::Takes).await;
    let mut inbox = world.inbox(&["k"]).await;
    let _daemon = traced(often(&world), &collector).ready().await;
    let long = "0-".repeat(2_000);
    for junk in ["", "junk", "00-ab-cd-01", "ÿÿ", &long, &TRACEPARENT.to_uppercase(), &format!("{TRACEPARENT}-x")] {
        let id = schedule(&world, "k", &format!(r#"{{"traceparent": "{junk}", "tracestate": "{junk}"}}"#)).await;
        let received = inbox.next().await;
        let span = collector.one("messaging.message.id", &id.to_string()).await;
        assert_eq!((received.id(), carried(&received), span.links), (id, span.ids, vec![]), "{junk}");
    }

    // In a letter it stays what it is, whatever that is.
    let junk =
        [AMQPValue::LongString("junk".into()), AMQPValue::LongInt(7), AMQPValue::LongString(vec![0xff; 9].into())];
    for (number, value) in junk.into_iter().enumerate() {
        let mut headers = FieldTable::default();
        headers.insert("traceparent".into(), value.clone());
        let id = format!("foreign {number}");
        let properties = BasicProperties::default().with_headers(headers).with_message_id(id.as_str().into());
        publish(&world, "", "inbox.k", b"x", properties).await;
        reject(&mut inbox).await;
        let again = inbox.next().await;
        let headers = again.properties().headers().clone().expect("headers");
        assert_eq!(headers.inner().get("traceparent"), Some(&value));
        assert_eq!(collector.one("messaging.message.id", &id).await.links, []);
    }
}

#[tokio::test]
async fn what_the_scheduler_did_not_sample_is_not_sampled_either_unless_somebody_says_so() {
    let world = World::with(&["message"]).await;
    let collector = Collector::start(Answer::Takes).await;
    let mut inbox = world.inbox(&["#"]).await;
    let unsampled = TRACEPARENT.replace("-01", "-00");
    let headers = format!(r#"{{"traceparent": "{unsampled}"}}"#);

    let one = daemon(&world, &collector).await;
    schedule(&world, "k", &headers).await;
    let traceparent = inbox.next().await.headers()["traceparent"].clone();
    assert!(
        traceparent.ends_with("-00") && traceparent[3..35] != SCHEDULER[..32],
        "the consumer is to know: {traceparent}"
    );
    // It hands over what there is.
    assert!(one.stop().await.success());
    assert_eq!(collector.requests().len(), 0);

    let launch = world.launch().with("OTEL_TRACES_SAMPLER", "always_on").with("OTEL_SERVICE_NAME", "reminders");
    let one = traced(launch, &collector).with("OTEL_BSP_SCHEDULE_DELAY", 600_000).ready().await;
    schedule(&world, "k", &headers).await;
    let received = inbox.next().await;
    world.until("SELECT count(*) = 2 FROM tidings.deliveries").await;
    assert!(one.stop().await.success());
    let [span] = &*collector.spans() else { panic!("{:?}", collector.spans()) };
    assert!(linked_to_the_scheduler(span) && span.sender["service.name"] == "reminders");
    assert_eq!(carried(&received), span.ids);
}

#[tokio::test]
async fn without_an_endpoint_or_disabled_nothing_is_sent_and_the_header_is_the_rows() {
    let world = World::with(&["message"]).await;
    let collector = Collector::start(Answer::Takes).await;
    let mut inbox = world.inbox(&["k"]).await;
    let disabled = traced(often(&world), &collector).with("OTEL_SDK_DISABLED", "true");
    for launch in [often(&world), disabled] {
        let daemon = launch.ready().await;
        let headers = format!(r#"{{"traceparent": "{TRACEPARENT}", "tracestate": "vendor=1"}}"#);
        schedule(&world, "k", &headers).await;
        reject(&mut inbox).await;
        let headers = inbox.next().await.headers();
        assert_eq!((headers["traceparent"].as_str(), headers["tracestate"].as_str()), (TRACEPARENT, "vendor=1"));
        assert!(!sends_traces(&daemon));
        assert!(daemon.stop().await.success());
    }
    assert_eq!(collector.requests().len(), 0);
}

#[tokio::test]
async fn a_mistake_in_the_settings_of_traces_is_one_among_the_others() {
    let world = World::empty().await;
    let launch = world
        .launch()
        .with("TIDINGS_NOTIFY", "perhaps")
        .with("OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:SECRET@collector:4318")
        .with("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        .with("OTEL_TRACES_SAMPLER", "sometimes");

    let (code, output) = launch.finished().await;

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
