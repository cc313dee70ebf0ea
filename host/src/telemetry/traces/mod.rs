//! Traces, over OTLP, off unless somebody names a collector: a span for each attempt at a row and for each replay of a dead
//! letter. The only place with OpenTelemetry. Nothing that delivers waits for it: spans leave by a thread of their own,
//! through a queue that is bounded, and what does not fit is dropped and counted.
//!
//! ```text
//!   scheduler's span ◀─link─ publish (a trace of its own: weeks may lie between) ─traceparent─▶ consumer's span, its child
//!                                              ▲
//!                                              └─link─ replay; the letter goes back as it was, and so does its traceparent
//! ```
//!
//! What a span never has in it: payload, body, key, subject, and headers other than `traceparent` and `tracestate`.

mod deliveries;
mod export;
mod replays;

use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{
    Link, SpanBuilder, SpanContext, SpanId, SpanKind, TraceContextExt as _, TraceFlags, TraceId, TraceState,
    Tracer as _, TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::ExporterBuildError;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Config, SamplingResult, SdkTracer, SdkTracerProvider, ShouldSample, Span};
use tracing::{info, warn};

use crate::model::secret_url::SecretUrl;

pub use deliveries::Spans;
pub use export::check_endpoint;
pub use replays::Replays;

/// How long what is left may take at the end.
const FLUSH_DEADLINE: Duration = Duration::from_secs(2);
/// A sentence is cut to this many bytes.
const SENTENCE_BYTES: usize = 500;

/// W3C Trace Context.
const TRACEPARENT: &str = "traceparent";
/// What vendors add to it.
const TRACESTATE: &str = "tracestate";

const SERVICE_NAME: &str = "service.name";

/// What became of something of which nobody knows whether it arrived.
const UNKNOWN: &str = "unknown";

/// What makes spans, if somebody wants them.
static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Where the traces go. Headers, sampler, resource and batches are read by the library, from the variables that have the
/// same names everywhere.
#[derive(Clone, Debug)]
pub struct TraceSettings {
    /// `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, or `OTEL_EXPORTER_OTLP_ENDPOINT` and the path.
    pub endpoint: SecretUrl,
    /// `OTEL_EXPORTER_OTLP_TRACES_TIMEOUT` or `OTEL_EXPORTER_OTLP_TIMEOUT`; default 10 s. What the collector has not taken
    /// then is dropped.
    pub timeout: Duration,
    /// `OTEL_BSP_MAX_QUEUE_SIZE`; default 2,048. Spans that may wait; further ones are dropped.
    pub queue: usize,
}

/// The traces of this process, until they are stopped.
#[derive(Debug)]
#[must_use]
pub struct Traces(Option<SdkTracerProvider>);

impl Traces {
    /// Starts them, if there are settings. Before this, and in a process that never calls it, there are no spans.
    ///
    /// # Errors
    ///
    /// When they cannot be started.
    pub fn start(settings: Option<&TraceSettings>) -> Result<Self, ExporterBuildError> {
        let Some(settings) = settings else { return Ok(Self(None)) };
        let (queue, place) = export::start(settings)?;
        let provider = SdkTracerProvider::builder()
            .with_sampler(AsScheduled(Config::default().sampler))
            .with_resource(resource())
            .with_span_processor(queue)
            .build();
        let tracer = provider.tracer("tidings");
        TRACER.set(tracer).expect("they are started once");
        info!(place, "traces go to the collector at {place}");
        Ok(Self(Some(provider)))
    }

    /// Hands over what is left, within 2 s.
    pub async fn stop(self) {
        let Some(provider) = self.0 else { return };
        // It blocks.
        let stopped = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(FLUSH_DEADLINE)).await;
        if !matches!(stopped, Ok(Ok(()))) {
            warn!("the collector did not take the last spans within {} s", FLUSH_DEADLINE.as_secs());
        }
    }
}

/// Who we are: what `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` say, or our name.
fn resource() -> Resource {
    let told = Resource::builder().build();
    let name = told.get(&SERVICE_NAME.into()).map(|name| name.to_string()).unwrap_or_default();
    let ours = [
        KeyValue::new(SERVICE_NAME, if name.starts_with("unknown_service") { "tidings".to_owned() } else { name }),
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
    ];
    Resource::builder().with_attributes(ours).build()
}

/// Samples as the SDK is told to by `OTEL_TRACES_SAMPLER`. Where that asks what the parent decided, the scheduler is asked: a
/// link and no parent, but what it left out should be left out to the end.
#[derive(Clone, Debug)]
struct AsScheduled(Box<dyn ShouldSample>);

impl ShouldSample for AsScheduled {
    fn should_sample(
        &self,
        _parent: Option<&Context>,
        trace_id: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        let scheduler = links.first().map(|link| Context::new().with_remote_span_context(link.span_context.clone()));
        let result = self.0.should_sample(scheduler.as_ref(), trace_id, name, kind, attributes, links);
        // That of the scheduler's trace says nothing of this one.
        SamplingResult { trace_state: TraceState::default(), ..result }
    }
}

/// A span of its own trace, linked to what led to it.
fn start(
    tracer: &SdkTracer,
    name: String,
    since: SystemTime,
    link: Option<SpanContext>,
    attributes: Vec<KeyValue>,
) -> Span {
    let builder = SpanBuilder::from_name(name)
        .with_kind(SpanKind::Producer)
        .with_start_time(since)
        .with_links(link.into_iter().map(Link::with_context).collect())
        .with_attributes(attributes);
    tracer.build_with_context(builder, &Context::new())
}

/// The span that somebody else left in `headers`; `None` if nobody did, or what they left cannot be used. Not the library's,
/// which takes ids that are too short.
fn left_in<'a>(header: impl Fn(&str) -> Option<&'a str>) -> Option<SpanContext> {
    let mut parts = header(TRACEPARENT)?.split('-');
    let mut hex = |digits| {
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        parts.next().filter(|part| part.len() == digits && part.bytes().all(is_digit))
    };
    let (version, trace_id, span_id, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
    // Later versions may say more behind these.
    if version == "ff" || (version == "00" && parts.next().is_some()) {
        return None;
    }
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED;
    let state = header(TRACESTATE).and_then(|state| state.parse().ok()).unwrap_or_default();
    let ids = (TraceId::from_hex(trace_id).ok()?, SpanId::from_hex(span_id).ok()?);
    Some(SpanContext::new(ids.0, ids.1, flags, true, state)).filter(SpanContext::is_valid)
}

/// What others find a span by.
fn traceparent(span: &SpanContext) -> String {
    format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags() & TraceFlags::SAMPLED)
}

/// A sentence that is no burden: some are a plugin's.
fn cut(sentence: &str) -> String {
    sentence[..sentence.floor_char_boundary(SENTENCE_BYTES)].to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SCHEDULER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn left(traceparent: &str, tracestate: Option<&str>) -> Option<SpanContext> {
        left_in(|name| if name == TRACEPARENT { Some(traceparent) } else { tracestate })
    }

    #[test]
    fn a_traceparent_is_read_as_it_is_written_and_junk_is_none() {
        let span = left(SCHEDULER, Some("vendor=1")).expect("a span");
        assert!(span.is_sampled() && span.is_remote());
        assert_eq!(span.trace_state().header(), "vendor=1");
        assert_eq!(traceparent(&span), SCHEDULER);
        assert!(left(&SCHEDULER.replace("-01", "-00"), Some("=, junk")).is_some_and(|span| !span.is_sampled()));
        assert!(left(&SCHEDULER.replacen("00", "cc", 1), None).is_some(), "a later version");
        assert!(left(&format!("{}-more", SCHEDULER.replacen("00", "cc", 1)), None).is_some());

        for junk in [
            "",
            "-",
            "00-ab-cd-01",
            "junk",
            &SCHEDULER.to_uppercase(),
            &SCHEDULER.replacen("00", "ff", 1),
            &format!("{SCHEDULER}-more"),
            &format!(" {SCHEDULER}"),
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319é-b7ad6b7169203331-01",
        ] {
            assert_eq!(left(junk, Some("vendor=1")), None, "{junk}");
        }
    }

    #[test]
    fn what_the_scheduler_left_out_is_left_out_and_a_row_without_a_scheduler_is_not() {
        let sampler = AsScheduled(Config::default().sampler);
        let sampled = |links: &[Link]| {
            let result = sampler.should_sample(None, TraceId::from(7), "", &SpanKind::Producer, &[], links);
            assert_eq!(result.trace_state, TraceState::default());
            result.decision == opentelemetry_sdk::trace::SamplingDecision::RecordAndSample
        };
        let link = |traceparent| Link::with_context(left(traceparent, Some("vendor=1")).expect("a span"));
        assert!(sampled(&[]) && sampled(&[link(SCHEDULER)]));
        assert!(!sampled(&[link(&SCHEDULER.replace("-01", "-00"))]));
    }

    proptest! {
        #[test]
        fn whatever_is_in_the_headers_is_a_span_that_is_written_alike_or_none(
            text in "(.|\n){0,60}|[0-9a-f]{2}-[0-9a-f]{31,33}-[0-9a-f]{15,17}-[0-9a-f]{2}(-.{0,3})?",
            state in proptest::option::of("(.|\n){0,60}"),
        ) {
            if let Some(span) = left(&text, state.as_deref()) {
                prop_assert_eq!(&traceparent(&span)[3..52], &text[3..52]);
            }
        }
    }
}
