//! A span for each attempt at a row, whatever its outcome: from the claim until the claim's transaction ends.

use std::collections::HashMap;
use std::time::SystemTime;

use opentelemetry::KeyValue;
use opentelemetry::trace::{Span as _, SpanContext, Status};
use opentelemetry_sdk::trace::{SdkTracer, Span};
use tokio::time::Instant;
use uuid::Uuid;

use crate::model::clock::DatabaseClock;
use crate::model::message::Message;
use crate::model::properties::HeaderValue;
use crate::model::schedule::Schedule;
use crate::store::{Outcome, Settlement};
use crate::telemetry::metrics::kinds;
use crate::telemetry::traces::{
    TRACEPARENT, TRACER, TRACESTATE, UNKNOWN, format_traceparent, read_span_context, start_span, truncate,
};

/// The spans of one batch; empty without traces. If it is dropped without [`Spans::commit`], the spans end with the
/// outcome `unknown`.
#[derive(Debug)]
pub struct Spans(Option<Box<Batch>>);

#[derive(Debug)]
struct Batch {
    claim: Claim,
    attempts: HashMap<Uuid, Attempt>,
    committed: bool,
}

/// What all attempts of a batch have in common.
#[derive(Debug)]
struct Claim {
    tracer: &'static SdkTracer,
    clock: DatabaseClock,
    claimed_at: SystemTime,
    exchange: String,
}

/// An attempt at one row.
#[derive(Debug)]
struct Attempt {
    number: u32,
    /// The span of the producer, or of the plugin, that led to this attempt.
    producer: Option<SpanContext>,
    /// Label and generation of the plugin that was called, and when it answered.
    plugin: Option<(String, u64, Instant)>,
    /// Started when the row has a message or an outcome.
    span: Option<Span>,
    end: Option<End>,
}

/// The outcome of an attempt.
#[derive(Debug)]
struct End {
    outcome: &'static str,
    /// Why the row was not delivered, if it should have been.
    error: Option<String>,
    /// When the confirm came, and how late that was, in milliseconds.
    confirmed: Option<(Instant, i64)>,
}

impl Spans {
    /// Begins with the rows of a claim. `clock` is the claim's; messages are published to `exchange`.
    #[must_use]
    pub fn begin(rows: &[Schedule], clock: DatabaseClock, exchange: &str) -> Self {
        let Some(tracer) = TRACER.get() else { return Self(None) };
        let attempt = |row: &Schedule| {
            let header = |name: &str| row.headers.iter().find(|(other, _)| other == name).map(|(_, value)| &**value);
            Attempt { number: row.attempt(), producer: read_span_context(header), plugin: None, span: None, end: None }
        };
        let attempts = rows.iter().map(|row| (row.id, attempt(row))).collect();
        let claim = Claim { tracer, clock, claimed_at: clock.now().into(), exchange: exchange.to_owned() };
        Self(Some(Box::new(Batch { claim, attempts, committed: false })))
    }

    /// Notes which plugin was called for the row `id`, and when it answered.
    pub fn built(&mut self, id: Uuid, plugin: &str, generation: u64, at: Instant) {
        if let Some(attempt) = self.0.as_mut().and_then(|batch| batch.attempts.get_mut(&id)) {
            attempt.plugin = Some((plugin.to_owned(), generation, at));
        }
    }

    /// Starts the span of a message, and puts it into the message's `traceparent` in place of the producer's.
    pub fn carry(&mut self, message: &mut Message) {
        let Some(Batch { claim, attempts, .. }) = self.0.as_deref_mut() else { return };
        let Some(attempt) = attempts.get_mut(&message.id) else { return };
        // The plugin may have set another `traceparent` than the row had.
        attempt.producer = read_span_context(|name| {
            message.headers.iter().find_map(|(other, value)| match value {
                HeaderValue::Text(text) if other == name => Some(&**text),
                _ => None,
            })
        });
        let mut span = claim.start(message.id, &message.kind, attempt);
        span.set_attribute(KeyValue::new("messaging.rabbitmq.destination.routing_key", message.routing_key.clone()));
        message.headers.retain(|(name, _)| name != TRACEPARENT && name != TRACESTATE);
        message.headers.push((TRACEPARENT.into(), HeaderValue::Text(format_traceparent(span.span_context()))));
        attempt.span = Some(span);
    }

    /// Notes that the messages are about to be published.
    pub fn publish(&mut self) {
        let Some(batch) = &mut self.0 else { return };
        let now = SystemTime::from(batch.claim.clock.now());
        for span in batch.attempts.values_mut().filter_map(|attempt| attempt.span.as_mut()) {
            span.add_event_with_timestamp("published", now, Vec::new());
        }
    }

    /// Notes the outcomes of the rows, which are not committed yet.
    pub fn settle(&mut self, settlements: &[Settlement]) {
        let Some(Batch { claim, attempts, .. }) = self.0.as_deref_mut() else { return };
        for Settlement { row: Schedule { id, kind, due_at, .. }, outcome, .. } in settlements {
            let Some(attempt) = attempts.get_mut(id) else { continue };
            if attempt.span.is_none() {
                attempt.span = Some(claim.start(*id, kind, attempt));
            }
            let confirmed = match outcome {
                Outcome::Delivered { confirmed, .. } => {
                    let late_ms = (claim.clock.at(confirmed.at()) - *due_at).whole_milliseconds().max(0);
                    Some((confirmed.at(), i64::try_from(late_ms).unwrap_or(i64::MAX)))
                }
                _ => None,
            };
            let error = failure(outcome).map(truncate);
            attempt.end = Some(End { outcome: kinds::outcome_label(outcome), error, confirmed });
        }
    }

    /// Ends the spans with the outcomes that were noted: the transaction is committed.
    pub fn commit(mut self) {
        if let Some(batch) = &mut self.0 {
            batch.committed = true;
        }
    }
}

impl Claim {
    /// Starts the span of the row `id`, with the attributes that are known before it is published.
    fn start(&self, id: Uuid, kind: &str, attempt: &Attempt) -> Span {
        let attributes = vec![
            KeyValue::new("messaging.system", "rabbitmq"),
            KeyValue::new("messaging.operation.name", "publish"),
            KeyValue::new("messaging.operation.type", "send"),
            KeyValue::new("messaging.destination.name", self.exchange.clone()),
            KeyValue::new("messaging.message.id", id.to_string()),
            KeyValue::new("tidings.kind", kind.to_owned()),
            KeyValue::new("tidings.attempt", i64::from(attempt.number)),
        ];
        let name = format!("publish {}", self.exchange);
        let mut span = start_span(self.tracer, name, self.claimed_at, attempt.producer.clone(), attributes);
        if let Some((plugin, generation, answered)) = &attempt.plugin {
            span.set_attribute(KeyValue::new("tidings.plugin", plugin.clone()));
            span.set_attribute(KeyValue::new("tidings.generation", i64::try_from(*generation).unwrap_or(i64::MAX)));
            span.add_event_with_timestamp("built", self.clock.at(*answered).into(), Vec::new());
        }
        span
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        let clock = self.claim.clock;
        let ended = SystemTime::from(clock.now());
        for Attempt { span, end, .. } in std::mem::take(&mut self.attempts).into_values() {
            // A row without a span has no outcome: its batch had no time left for it, and it stays due.
            let Some(mut span) = span else { continue };
            let unknown = |error: &str| End { outcome: UNKNOWN, error: Some(error.to_owned()), confirmed: None };
            let end = match end {
                Some(end) if self.committed => end,
                Some(End { confirmed, .. }) => End { confirmed, ..unknown("what became of it could not be committed") },
                None => unknown("RabbitMQ did not confirm it, so it stays due"),
            };
            span.set_attribute(KeyValue::new("tidings.outcome", end.outcome));
            if let Some((at, late_ms)) = end.confirmed {
                span.add_event_with_timestamp("confirmed", clock.at(at).into(), Vec::new());
                span.set_attribute(KeyValue::new("tidings.lateness_ms", late_ms));
            }
            if let Some(error) = end.error {
                span.set_attribute(KeyValue::new("error.type", end.outcome));
                span.set_status(Status::error(error));
            }
            span.end_with_timestamp(ended);
        }
    }
}

/// Why a row was not delivered, if it should have been.
fn failure(outcome: &Outcome) -> Option<&str> {
    match outcome {
        Outcome::Delivered { .. } | Outcome::Expired(_) | Outcome::Skipped(_) => None,
        Outcome::Parked(error)
        | Outcome::Retry { error, .. }
        | Outcome::Waits { error, .. }
        | Outcome::Refused { error, .. } => Some(error),
    }
}
