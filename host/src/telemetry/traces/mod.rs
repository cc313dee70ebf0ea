//! Traces, sent over OTLP if a collector is set: a span for each attempt at a row, and one for each replay of a dead
//! letter. The only place with OpenTelemetry.
//!
//! Must never delay a delivery: spans wait in a bounded queue for a thread of their own; those that do not fit are
//! dropped and counted. Must never put into a span: payload, body, key, subject, or headers other than `traceparent`
//! and `tracestate`.
//!
//! To change it, know: a delivery starts a new trace and links to the producer's span, since weeks may lie between
//! scheduling and delivery. The message carries the span of its delivery in `traceparent`. A replayed dead letter keeps
//! the `traceparent` that it carried; the span of the replay only links to it.
//!
//! ```text
//!   producer's span ◀─link─ publish ─traceparent─▶ consumer's span, its child
//!                              ▲
//!                              └─link─ replay
//! ```

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

use crate::model::secrets::SecretUrl;

pub use deliveries::Spans;
pub use export::check_endpoint;
pub use replays::Replays;

/// How long sending the last spans may take at the end of the process.
const FLUSH_DEADLINE: Duration = Duration::from_secs(2);
/// An error in a span is truncated to this many bytes.
const MAX_ERROR_BYTES: usize = 500;

/// The header of W3C Trace Context.
const TRACEPARENT: &str = "traceparent";
/// The header of W3C Trace Context with the data of vendors.
const TRACESTATE: &str = "tracestate";

const SERVICE_NAME: &str = "service.name";

/// The outcome of a message when it is not known whether RabbitMQ took it.
const UNKNOWN: &str = "unknown";

/// Makes the spans; not set = no traces.
static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Where the traces go. The library itself reads headers, sampler, resource and batches from OpenTelemetry's variables.
#[derive(Clone, Debug)]
pub struct TraceSettings {
    /// `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, or `OTEL_EXPORTER_OTLP_ENDPOINT` and the path.
    pub endpoint: SecretUrl,
    /// `OTEL_EXPORTER_OTLP_TRACES_TIMEOUT` or `OTEL_EXPORTER_OTLP_TIMEOUT`; default 10 s. Spans that the
    /// collector has not taken by then are dropped.
    pub timeout: Duration,
    /// `OTEL_BSP_MAX_QUEUE_SIZE`; default 2,048. How many spans may wait; further ones are dropped.
    pub queue: usize,
}

/// The traces of this process, until they are stopped.
#[derive(Debug)]
#[must_use]
pub struct Traces(Option<SdkTracerProvider>);

impl Traces {
    /// Starts the traces, if there are settings. Without this call there are no spans.
    ///
    /// # Errors
    ///
    /// When the exporter cannot be built.
    pub fn start(settings: Option<&TraceSettings>) -> Result<Self, ExporterBuildError> {
        let Some(settings) = settings else { return Ok(Self(None)) };
        let (queue, place) = export::start(settings)?;
        let provider = SdkTracerProvider::builder()
            .with_sampler(ProducerSampler(Config::default().sampler))
            .with_resource(build_resource())
            .with_span_processor(queue)
            .build();
        let tracer = provider.tracer("tidings");
        TRACER.set(tracer).expect("they are started once");
        info!(place, "traces go to the collector at {place}");
        Ok(Self(Some(provider)))
    }

    /// Sends the remaining spans, within 2 s.
    pub async fn stop(self) {
        let Some(provider) = self.0 else { return };
        // The shutdown blocks its thread.
        let stopped = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(FLUSH_DEADLINE)).await;
        if !matches!(stopped, Ok(Ok(()))) {
            warn!("the collector did not take the last spans within {} s", FLUSH_DEADLINE.as_secs());
        }
    }
}

/// The resource that `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` describe; by default the service is named
/// `tidings`.
fn build_resource() -> Resource {
    let configured = Resource::builder().build();
    let name = configured.get(&SERVICE_NAME.into()).map(|name| name.to_string()).unwrap_or_default();
    let attributes = [
        KeyValue::new(SERVICE_NAME, if name.starts_with("unknown_service") { "tidings".to_owned() } else { name }),
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
    ];
    Resource::builder().with_attributes(attributes).build()
}

/// The sampler of `OTEL_TRACES_SAMPLER`. One that follows the parent's decision follows that of the producer's span
/// here: it is only linked, but a trace that the producer did not sample should not be sampled later either.
#[derive(Clone, Debug)]
struct ProducerSampler(Box<dyn ShouldSample>);

impl ShouldSample for ProducerSampler {
    fn should_sample(
        &self,
        _parent: Option<&Context>,
        trace_id: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        let producer = links.first().map(|link| Context::new().with_remote_span_context(link.span_context.clone()));
        let result = self.0.should_sample(producer.as_ref(), trace_id, name, kind, attributes, links);
        // The producer's trace state belongs to its own trace, not to this one.
        SamplingResult { trace_state: TraceState::default(), ..result }
    }
}

/// Starts a span in a trace of its own, with a link to the span that led to it.
fn start_span(
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

/// Reads the span in `traceparent` and `tracestate`; `None` if there is none, or it is malformed. The library's parser
/// is not used because it accepts ids that are too short.
fn read_span_context<'a>(header: impl Fn(&str) -> Option<&'a str>) -> Option<SpanContext> {
    let mut parts = header(TRACEPARENT)?.split('-');
    let mut hex = |digits| {
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        parts.next().filter(|part| part.len() == digits && part.bytes().all(is_digit))
    };
    let (version, trace_id, span_id, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
    // Later versions may have further parts.
    if version == "ff" || (version == "00" && parts.next().is_some()) {
        return None;
    }
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED;
    let state = header(TRACESTATE).and_then(|state| state.parse().ok()).unwrap_or_default();
    let ids = (TraceId::from_hex(trace_id).ok()?, SpanId::from_hex(span_id).ok()?);
    Some(SpanContext::new(ids.0, ids.1, flags, true, state)).filter(SpanContext::is_valid)
}

/// Writes the header that refers to a span.
fn format_traceparent(span: &SpanContext) -> String {
    format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags() & TraceFlags::SAMPLED)
}

/// Truncates an error for a span: its text may come from a plugin.
fn truncate(error: &str) -> String {
    error[..error.floor_char_boundary(MAX_ERROR_BYTES)].to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PRODUCER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn read(traceparent: &str, tracestate: Option<&str>) -> Option<SpanContext> {
        read_span_context(|name| if name == TRACEPARENT { Some(traceparent) } else { tracestate })
    }

    #[test]
    fn a_valid_traceparent_is_read_and_a_malformed_one_is_not() {
        let span = read(PRODUCER, Some("vendor=1")).expect("a span");
        assert!(span.is_sampled() && span.is_remote());
        assert_eq!(span.trace_state().header(), "vendor=1");
        assert_eq!(format_traceparent(&span), PRODUCER);
        assert!(read(&PRODUCER.replace("-01", "-00"), Some("=, junk")).is_some_and(|span| !span.is_sampled()));
        assert!(read(&PRODUCER.replacen("00", "cc", 1), None).is_some(), "a later version");
        assert!(read(&format!("{}-more", PRODUCER.replacen("00", "cc", 1)), None).is_some());

        for junk in [
            "",
            "-",
            "00-ab-cd-01",
            "junk",
            &PRODUCER.to_uppercase(),
            &PRODUCER.replacen("00", "ff", 1),
            &format!("{PRODUCER}-more"),
            &format!(" {PRODUCER}"),
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319é-b7ad6b7169203331-01",
        ] {
            assert_eq!(read(junk, Some("vendor=1")), None, "{junk}");
        }
    }

    #[test]
    fn a_row_whose_producer_did_not_sample_is_not_sampled_and_one_without_a_producer_is() {
        let sampler = ProducerSampler(Config::default().sampler);
        let sampled = |links: &[Link]| {
            let result = sampler.should_sample(None, TraceId::from(7), "", &SpanKind::Producer, &[], links);
            assert_eq!(result.trace_state, TraceState::default());
            result.decision == opentelemetry_sdk::trace::SamplingDecision::RecordAndSample
        };
        let link = |traceparent| Link::with_context(read(traceparent, Some("vendor=1")).expect("a span"));
        assert!(sampled(&[]) && sampled(&[link(PRODUCER)]));
        assert!(!sampled(&[link(&PRODUCER.replace("-01", "-00"))]));
    }

    proptest! {
        #[test]
        fn any_header_is_a_span_that_is_written_back_unchanged_or_is_none(
            text in "(.|\n){0,60}|[0-9a-f]{2}-[0-9a-f]{31,33}-[0-9a-f]{15,17}-[0-9a-f]{2}(-.{0,3})?",
            state in proptest::option::of("(.|\n){0,60}"),
        ) {
            if let Some(span) = read(&text, state.as_deref()) {
                prop_assert_eq!(&format_traceparent(&span)[3..52], &text[3..52]);
            }
        }
    }
}
