//! A span for each dead letter that is sent back into its queue. The letter carries on what it carried, this span's place in
//! its history is a link: a consumer's second look at a message belongs where its first one does.

use std::collections::HashMap;
use std::time::SystemTime;

use opentelemetry::KeyValue;
use opentelemetry::trace::{Span as _, Status};
use opentelemetry_sdk::trace::Span;

use crate::model::clock::DatabaseClock;
use crate::model::dead_letter::DeadLetter;
use crate::telemetry::traces::{TRACEPARENT, TRACER, TRACESTATE, UNKNOWN, cut, left_in, start};

/// A kind is no longer; what is may be anything, since anybody may have written the letter.
const KIND_BYTES: usize = 100;

/// The spans of one window; none, if nobody wants any. Dropped without [`Replays::end`], they say that nobody knows which of
/// the letters arrived.
#[derive(Debug)]
pub struct Replays(Option<Window>);

#[derive(Debug)]
struct Window {
    clock: DatabaseClock,
    /// By the letter's tag.
    spans: HashMap<u64, Span>,
    ended: bool,
}

impl Replays {
    /// Begins with letters that are about to go back, and what tells them apart.
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
            let kind = letter.kind.clone().filter(|kind| kind.len() <= KIND_BYTES);
            attributes.extend(kind.map(|kind| KeyValue::new("tidings.kind", kind)));
            let link = left_in(|name| match name {
                TRACEPARENT => letter.traceparent.as_deref(),
                TRACESTATE => letter.tracestate.as_deref(),
                _ => None,
            });
            start(tracer, format!("replay {queue}"), now, link, attributes)
        };
        let spans = letters.map(|(tag, letter)| (tag, span(letter))).collect();
        Self(Some(Window { clock, spans, ended: false }))
    }

    /// Notes that a letter did not go back, what becomes of it instead, and why.
    pub fn failed(&mut self, tag: u64, outcome: &'static str, error: &str) {
        let Some(window) = &mut self.0 else { return };
        if let Some(span) = window.spans.remove(&tag) {
            finish(span, outcome, Some(error), window.clock);
        }
    }

    /// Ends them: all letters but those that failed went back.
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
            finish(span, outcome, error, self.clock);
        }
    }
}

fn finish(mut span: Span, outcome: &'static str, error: Option<&str>, clock: DatabaseClock) {
    span.set_attribute(KeyValue::new("tidings.outcome", outcome));
    if let Some(error) = error {
        span.set_attribute(KeyValue::new("error.type", outcome));
        span.set_status(Status::error(cut(error)));
    }
    span.end_with_timestamp(clock.now().into());
}
