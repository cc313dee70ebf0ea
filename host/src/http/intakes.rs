//! The intakes in the overview: what waits in their queues, by RabbitMQ, and what this daemon takes.

use serde::Serialize;

use crate::broker::QueueCounts;
use crate::http::Sources;
use crate::intake::status::Snapshot;
use crate::model::intake::Intake;

/// One intake.
#[derive(Debug, Serialize)]
pub(super) struct IntakeOverview {
    from: String,
    to: String,
    queue: String,
    /// How many messages wait in its queue; `None` = RabbitMQ does not say.
    waiting: Option<u32>,
    /// How many daemons take from it.
    daemons: Option<u32>,
    /// Messages a second that this daemon took over the last minute.
    rate: f64,
    /// How many messages this daemon has carried out since it started, and how many it has refused.
    taken: u64,
    refused: u64,
    /// Why the last refused message was refused.
    last_refusal: Option<String>,
    /// Why this daemon takes no messages.
    problem: Option<String>,
}

/// The intakes, with what waits in their queues by `counts`.
pub(super) fn show(sources: &Sources, counts: &[(std::sync::Arc<Intake>, Option<QueueCounts>)]) -> Vec<IntakeOverview> {
    let show = |snapshot: Snapshot| {
        let Snapshot { intake, taken, refused, rate, last_refusal, problem } = snapshot;
        let counted = counts.iter().find(|(other, _)| *other == intake).and_then(|(_, counted)| *counted);
        IntakeOverview {
            queue: intake.queue(sources.broker.exchange()),
            from: intake.from.clone(),
            to: intake.to.clone(),
            waiting: counted.map(|counted| counted.messages),
            daemons: counted.map(|counted| counted.consumers),
            rate,
            taken,
            refused,
            last_refusal,
            problem,
        }
    };
    sources.intakes.iter().map(|status| show(status.snapshot())).collect()
}
