//! A span for each dead letter that is sent back into its queue. The dead letter keeps its `traceparent`, to which the
//! span of the replay links, so that all attempts of a consumer at a message belong to one trace.

use std::collections::HashMap;
use std::time::SystemTime;

use opentelemetry::KeyValue;
use opentelemetry::trace::{Span as _, Status};
use opentelemetry_sdk::trace::Span;

use crate::model::clock::DatabaseClock;
use crate::model::dead_letter::DeadLetter;
use crate::telemetry::traces::{TRACEPARENT, TRACER, TRACESTATE, UNKNOWN, read_span_context, start_span, truncate};

/// The longest kind. A longer text is left out of the span, since any client may have written the dead letter.
const MAX_KIND_BYTES: usize = 100;

/// The spans of one window of dead letters; empty without traces. If it is dropped without [`Replays::end`], the spans
/// end with the outcome `unknown`.
#[derive(Debug)]
pub struct Replays(Option<Window>);

#[derive(Debug)]
struct Window {
    clock: DatabaseClock,
    /// By the delivery tag of the dead letter.
    spans: HashMap<u64, Span>,
    ended: bool,
}

impl Replays {
    /// Begins with the dead letters that are about to be sent back, each with its delivery tag.
    #[must_use]
    pub fn begin<'a>(letters: impl Iterator<Item = (u64, &'a DeadLetter)>, clock: DatabaseClock) -> Self {
        let Some(tracer) = TRACER.get() else { return Self(None) };
        let now = SystemTime::from(clock.now());
        let span = |letter: &DeadLetter| {
            let queue = letter.queue.as_deref().unwrap_or_default();
            let mut attributes = vec![
                KeyValue::new("messaging.system", "rabbitmq"),
                KeyValue::new("messaging.operation.name", "replay"),
                KeyValue::new("messaging.operation.type", "send"),
                KeyValue::new("messaging.destination.name", queue.to_owned()),
                KeyValue::new("tidings.replay", letter.replays.max(0).saturating_add(1)),
            ];
            attributes.extend(letter.id.clone().map(|id| KeyValue::new("messaging.message.id", id)));
            let kind = letter.kind.clone().filter(|kind| kind.len() <= MAX_KIND_BYTES);
            attributes.extend(kind.map(|kind| KeyValue::new("tidings.kind", kind)));
            let link = read_span_context(|name| match name {
                TRACEPARENT => letter.traceparent.as_deref(),
                TRACESTATE => letter.tracestate.as_deref(),
                _ => None,
            });
            start_span(tracer, format!("replay {queue}"), now, link, attributes)
        };
        let spans = letters.map(|(tag, letter)| (tag, span(letter))).collect();
        Self(Some(Window { clock, spans, ended: false }))
    }

    /// Ends the span of a dead letter that was not sent back, with its outcome and the reason.
    pub fn failed(&mut self, tag: u64, outcome: &'static str, error: &str) {
        let Some(window) = &mut self.0 else { return };
        if let Some(span) = window.spans.remove(&tag) {
            end_span(span, outcome, Some(error), window.clock);
        }
    }

    /// Ends the other spans: their dead letters were sent back.
    pub fn end(mut self) {
        if let Some(window) = &mut self.0 {
            window.ended = true;
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let (outcome, error) =
            if self.ended { ("replayed", None) } else { (UNKNOWN, Some("RabbitMQ did not say whether it arrived")) };
        for span in std::mem::take(&mut self.spans).into_values() {
            end_span(span, outcome, error, self.clock);
        }
    }
}

fn end_span(mut span: Span, outcome: &'static str, error: Option<&str>, clock: DatabaseClock) {
    span.set_attribute(KeyValue::new("tidings.outcome", outcome));
    if let Some(error) = error {
        span.set_attribute(KeyValue::new("error.type", outcome));
        span.set_status(Status::error(truncate(error)));
    }
    span.end_with_timestamp(clock.now().into());
}
