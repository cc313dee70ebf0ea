//! A span for each attempt at a row, whatever came of it: from its claim until that is committed.

use std::collections::HashMap;
use std::time::SystemTime;

use opentelemetry::KeyValue;
use opentelemetry::trace::{Span as _, SpanContext, Status};
use opentelemetry_sdk::trace::{SdkTracer, Span};
use tokio::time::Instant;
use uuid::Uuid;

use crate::model::clock::DatabaseClock;
use crate::model::message::{HeaderValue, Message};
use crate::model::schedule::Schedule;
use crate::store::{Outcome, Settlement};
use crate::telemetry::metrics::kinds;
use crate::telemetry::traces::{TRACEPARENT, TRACER, TRACESTATE, UNKNOWN, cut, left_in, start, traceparent};

/// The spans of one batch; none, if nobody wants any. Dropped without [`Spans::commit`], they say that nobody knows what
/// became of the rows.
#[derive(Debug)]
pub struct Spans(Option<Box<Batch>>);

#[derive(Debug)]
struct Batch {
    claim: Claimed,
    attempts: HashMap<Uuid, Attempt>,
    committed: bool,
}

/// What the attempts have in common.
#[derive(Debug)]
struct Claimed {
    tracer: &'static SdkTracer,
    clock: DatabaseClock,
    at: SystemTime,
    exchange: String,
}

/// One row.
#[derive(Debug)]
struct Attempt {
    number: u32,
    scheduler: Option<SpanContext>,
    /// Label and generation of the plugin that was asked, and when it had answered.
    plugin: Option<(String, u64, Instant)>,
    /// Since it has a message, or it is known what is to become of it.
    span: Option<Span>,
    end: Option<End>,
}

/// What is to become of it.
#[derive(Debug)]
struct End {
    outcome: &'static str,
    /// Why it was not delivered, if it should have been.
    error: Option<String>,
    /// When the confirm came, and how late that was.
    confirmed: Option<(Instant, i64)>,
}

impl Spans {
    /// Begins with the rows of a claim; `clock` is the claim's, and `exchange` where their messages go.
    #[must_use]
    pub fn begin(rows: &[Schedule], clock: DatabaseClock, exchange: &str) -> Self {
        let Some(tracer) = TRACER.get() else { return Self(None) };
        let attempt = |row: &Schedule| {
            let header = |name: &str| row.headers.iter().find(|(other, _)| other == name).map(|(_, value)| &**value);
            Attempt { number: row.attempt(), scheduler: left_in(header), plugin: None, span: None, end: None }
        };
        let attempts = rows.iter().map(|row| (row.id, attempt(row))).collect();
        let claim = Claimed { tracer, clock, at: clock.now().into(), exchange: exchange.to_owned() };
        Self(Some(Box::new(Batch { claim, attempts, committed: false })))
    }

    /// Notes which plugin was asked for the row `id`, and when it had answered.
    pub fn built(&mut self, id: Uuid, plugin: &str, generation: u64, at: Instant) {
        if let Some(attempt) = self.0.as_mut().and_then(|batch| batch.attempts.get_mut(&id)) {
            attempt.plugin = Some((plugin.to_owned(), generation, at));
        }
    }

    /// Lets a message carry its span, in place of the one that led to it.
    pub fn carry(&mut self, message: &mut Message) {
        let Some(Batch { claim, attempts, .. }) = self.0.as_deref_mut() else { return };
        let Some(attempt) = attempts.get_mut(&message.id) else { return };
        // The plugin may know better than the row.
        attempt.scheduler = left_in(|name| {
            message.headers.iter().find_map(|(other, value)| match value {
                HeaderValue::Text(text) if other == name => Some(&**text),
                _ => None,
            })
        });
        let mut span = claim.start(message.id, &message.kind, attempt);
        span.set_attribute(KeyValue::new("messaging.rabbitmq.destination.routing_key", message.routing_key.clone()));
        message.headers.retain(|(name, _)| name != TRACEPARENT && name != TRACESTATE);
        message.headers.push((TRACEPARENT.into(), HeaderValue::Text(traceparent(span.span_context()))));
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

    /// Notes what is to become of the rows.
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
            let error = error(outcome).map(cut);
            attempt.end = Some(End { outcome: kinds::outcome(outcome), error, confirmed });
        }
    }

    /// Ends them: what was to become of the rows is committed.
    pub fn commit(mut self) {
        if let Some(batch) = &mut self.0 {
            batch.committed = true;
        }
    }
}

impl Claimed {
    /// The span of the row `id`, with what is known before it is published.
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
        let mut span = start(self.tracer, name, self.at, attempt.scheduler.clone(), attributes);
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
            // One without a span stays due, since there was no time left for it.
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

/// Why a row was not delivered that should have been.
fn error(outcome: &Outcome) -> Option<&str> {
    match outcome {
        Outcome::Delivered { .. } | Outcome::Expired(_) | Outcome::Skipped(_) => None,
        Outcome::Parked(error)
        | Outcome::Retry { error, .. }
        | Outcome::Waits { error, .. }
        | Outcome::Refused { error, .. } => Some(error),
    }
}
