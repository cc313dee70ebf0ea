//! One batch on its way: claimed, built, published, confirmed, committed. Each value is consumed by the next step, and
//! only a confirm marks a row delivered.
//!
//! Whose fault a failure is decides what becomes of the row. The row's (a payload the plugin cannot use, a trap): its own
//! attempts and backoff, then parked; at once, if another attempt would end the same. The infrastructure's (no confirm, unroutable): no attempt is spent, it waits.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, warn};
use uuid::Uuid;

use crate::broker::{Broker, Verdict};
use crate::model::backoff::{BUILD, REFUSED, jittered};
use crate::model::clock::unix_ms;
use crate::model::event::{BuildError, LONGEST_TTL_MS};
use crate::model::message::{Expired, Message};
use crate::model::schedule::Schedule;
use crate::plugins::{Build, Plugin, PluginSet};
use crate::scheduler::sent_rows::SentRows;
use crate::store::{Claim, Outcome, Settlement, StoreError};
use crate::telemetry::{Batch, Spans, count_claim, record_confirms};

/// A claim that is older is asked for before anything is published.
const DOUBTFUL: Duration = Duration::from_secs(5);

/// What a batch needs.
#[expect(missing_debug_implementations, reason = "the plugins have none")]
pub struct Delivery {
    /// Where the messages go.
    pub broker: Arc<Broker>,
    /// Failures of a plugin after which a row is parked.
    pub max_attempts: u32,
    /// What was confirmed and could not be finished, and what it takes to finish it: the plugin, and the outcome.
    pub sent_rows: SentRows<(Option<String>, Outcome)>,
}

/// How a batch went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// All rows stay as they are: the broker did not confirm, for instance.
    Unsettled,
    /// Rows were settled.
    Settled {
        /// Some of them have left the queue.
        some_left: bool,
        /// Some of them are still in the queue.
        some_stay: bool,
    },
    /// PostgreSQL refuses to settle each of them, and lets them wait.
    Refused {
        /// Its words.
        why: String,
        /// A message was sent to find that out.
        sent: bool,
    },
}

/// A message that is on its way, and what to write when it has arrived.
struct InFlight {
    schedule: Schedule,
    plugin: Arc<Plugin>,
    event_digest: String,
    built_ms: i64,
}

impl Delivery {
    /// Delivers the rows of a claim. `plugins` is one set from beginning to end, whatever is loaded meanwhile. `careful` while
    /// PostgreSQL refuses to finish rows: one is sent, and only if there is none to finish.
    ///
    /// # Errors
    ///
    /// When the database does not answer, or refuses. Then the rows are as they were, or as they were to become.
    pub async fn deliver(&self, mut claim: Claim, plugins: &PluginSet, careful: bool) -> Result<Delivered, StoreError> {
        let (claimed, clock) = (claim.rows.len(), claim.clock());
        count_claim(claimed);
        // Until the end of this function, no other lane sends what is sent here.
        let mut taken = self.sent_rows.take(std::mem::take(&mut claim.rows), careful);
        let rows = std::mem::take(&mut taken.send);
        let careful = careful || !taken.finish.is_empty();
        let mut spans = Spans::begin(&rows, clock, self.broker.exchange());

        let now = clock.now();
        let (expired, due): (Vec<Schedule>, Vec<Schedule>) =
            rows.into_iter().partition(|row| row.expires_at.is_some_and(|at| at <= now));
        let known = taken.finish.drain(..).map(|(row, (plugin, outcome))| Settlement { row, plugin, outcome });
        let mut settlements: Vec<Settlement> =
            known.chain(expired.into_iter().map(|row| expired_row(row, unix_ms(now)))).collect();

        let builds = plugins.build(due, clock).await;

        let mut messages = Vec::with_capacity(builds.len());
        let mut in_flight = HashMap::with_capacity(builds.len());
        for Build { mut schedule, plugin, outcome, at } in builds {
            // It may be large, and is in the body now.
            schedule.payload = String::new();
            // No time was left for it: it stays due.
            let Some(outcome) = outcome else { continue };
            spans.built(schedule.id, plugin.label(), plugin.generation(), at);
            let settlement = match outcome {
                Ok(built) => {
                    let (event_digest, built_ms) = (built.event.digest(), built.built_ms);
                    match Message::new(&schedule, built, self.broker.exchange(), clock.now_ms()) {
                        Ok(mut message) => {
                            spans.carry(&mut message);
                            messages.push(message);
                            let id = schedule.id;
                            in_flight.insert(id, InFlight { schedule, plugin, event_digest, built_ms });
                            continue;
                        }
                        Err(Expired(at)) => Outcome::Expired(format!("its event's deadline, {at} ms, had come")),
                    }
                }
                Err(error) => self.unbuilt(&schedule, &plugin, error),
            };
            settlements.push(settlement_of(schedule, Some(&plugin), settlement));
        }

        if clock.age() > DOUBTFUL {
            // Frozen for longer than PostgreSQL waits for us, we would publish what another daemon has published.
            claim.confirm_held().await?;
        }
        spans.publish();
        let sent = !messages.is_empty();
        for (id, verdict) in self.publish(messages).await {
            let Some(sent) = in_flight.remove(&id) else { continue };
            settlements.extend(Self::arrived(sent, verdict));
        }

        spans.settle(&settlements);
        let refused = if careful {
            claim.settle_each(&settlements).await
        } else {
            claim.settle(&settlements).await.map(|()| HashMap::new())
        };
        let refused = match refused {
            Ok(refused) => refused,
            Err(error) => {
                for settlement in &settlements {
                    self.remember(settlement);
                }
                return Err(error);
            }
        };
        let settled = settlements.iter().map(|settlement| settlement.row.id);
        self.sent_rows.forget(settled.filter(|id| !refused.contains_key(id)));
        if !refused.is_empty() {
            self.wait(&mut settlements, &refused);
            spans.settle(&settlements);
        }
        Batch::of(&settlements, clock).count();
        spans.commit();
        let left = settlements.iter().filter(|settlement| settlement.outcome.is_the_end()).count();
        Ok(match refused.into_values().next() {
            _ if settlements.is_empty() => Delivered::Unsettled,
            Some(why) if left == 0 => Delivered::Refused { why, sent },
            _ => Delivered::Settled { some_left: left > 0, some_stay: left < claimed },
        })
    }

    /// Rows that PostgreSQL refuses to settle: they wait, and what was confirmed of them is remembered.
    fn wait(&self, settlements: &mut [Settlement], refused: &HashMap<Uuid, String>) {
        let some_finished = refused.len() < settlements.len();
        for settlement in settlements {
            let Some(error) = refused.get(&settlement.row.id) else { continue };
            self.remember(settlement);
            let Schedule { id, kind, refusals, .. } = &settlement.row;
            // If all are refused, it is not about this one. The first is worth a line; the rest can be read in last_error.
            if *refusals == 0 && some_finished {
                warn!(schedule.id = %id, schedule.kind = kind, error, "PostgreSQL refuses to finish {id}, it waits");
            }
            settlement.outcome = refused_for(&settlement.row, error.clone());
        }
    }

    /// Remembers a row whose message was confirmed: it must not be sent again.
    fn remember(&self, Settlement { row, plugin, outcome }: &Settlement) {
        if matches!(outcome, Outcome::Delivered { .. }) {
            self.sent_rows.remember(row.id, (plugin.clone(), outcome.clone()));
        }
    }

    async fn publish(&self, messages: Vec<Message>) -> HashMap<Uuid, Verdict> {
        if messages.is_empty() {
            return HashMap::new();
        }
        let begun = Instant::now();
        let verdicts = self.broker.publish(&messages).await;
        record_confirms(begun.elapsed());
        verdicts
    }

    /// What the broker's verdict makes of a row; nothing if we do not know, since then it stays due.
    fn arrived(sent: InFlight, verdict: Verdict) -> Option<Settlement> {
        let InFlight { schedule, plugin, event_digest, built_ms } = sent;
        let Schedule { id, kind, .. } = &schedule;
        let (by, generation) = (plugin.label(), plugin.generation());
        let outcome = match verdict {
            Verdict::Confirmed(confirmed) => Outcome::Delivered { confirmed, event_digest, built_ms },
            Verdict::Refused(error) => {
                // The first is worth a line; the rest can be read in last_error.
                if schedule.refusals == 0 {
                    warn!(schedule.id = %id, schedule.kind = kind, plugin = by, generation, error, "RabbitMQ did not take {id}, it waits");
                }
                refused_for(&schedule, error)
            }
            Verdict::Poison(reason) => {
                // Tried again, it would only close more channels.
                warn!(schedule.id = %id, schedule.kind = kind, plugin = by, generation, reason, "parked {id}: RabbitMQ cannot take its message");
                Outcome::Parked(reason)
            }
            Verdict::Unknown => return None,
        };
        Some(settlement_of(schedule, Some(&plugin), outcome))
    }

    /// What becomes of a row without an event.
    fn unbuilt(&self, schedule: &Schedule, plugin: &Plugin, error: BuildError) -> Outcome {
        let Schedule { id, kind, .. } = schedule;
        let (plugin, generation) = (plugin.label(), plugin.generation());
        match error {
            BuildError::Skip(reason) => {
                debug!(schedule.id = %id, schedule.kind = kind, plugin, generation, reason, "skipped");
                Outcome::Skipped(reason)
            }
            BuildError::Invalid(reason) => {
                warn!(schedule.id = %id, schedule.kind = kind, plugin, generation, reason, "parked {id}: its plugin cannot use it");
                Outcome::Parked(reason)
            }
            BuildError::Retry(error, after_ms) => {
                let after = after_ms.map_or_else(
                    || jittered(&BUILD, schedule.attempts),
                    |ms| Duration::from_millis(ms.min(LONGEST_TTL_MS)),
                );
                debug!(schedule.id = %id, schedule.kind = kind, plugin, generation, error, ?after, "its plugin wants to be asked again");
                Outcome::Retry { error, after, failed: false }
            }
            BuildError::Unavailable(error, after) => Outcome::Waits { error, after },
            BuildError::TooLarge(reason) => {
                // Tried again, it would only be as large again.
                let reason = format!(
                    "{reason}; another attempt would end the same: raise the limit in the plugin's NAME.toml or mend the plugin, and put the row back"
                );
                warn!(schedule.id = %id, schedule.kind = kind, plugin, generation, reason, "parked {id}: it is beyond a limit of its plugin");
                Outcome::Parked(reason)
            }
            BuildError::Failed(reason) if schedule.failures.saturating_add(1) >= self.max_attempts => {
                let reason = format!("failed {} times, at last: {reason}", self.max_attempts);
                warn!(schedule.id = %id, schedule.kind = kind, plugin, generation, reason, "parked {id}");
                Outcome::Parked(reason)
            }
            BuildError::Failed(error) => {
                let after = jittered(&BUILD, schedule.attempts);
                warn!(schedule.id = %id, schedule.kind = kind, plugin, generation, attempt = schedule.attempt(), error, "could not build {id}");
                Outcome::Retry { error, after, failed: true }
            }
        }
    }
}

/// What becomes of a row; `plugin` is the one that was asked, if one was.
fn settlement_of(row: Schedule, plugin: Option<&Plugin>, outcome: Outcome) -> Settlement {
    let plugin = plugin.map(|plugin| plugin.label().to_owned());
    Settlement { row, plugin, outcome }
}

/// A row whose deadline came before anybody asked its plugin.
fn expired_row(row: Schedule, now_ms: i64) -> Settlement {
    let late_ms = row.expires_ms().map_or(0, |deadline| now_ms - deadline);
    let detail = format!("its deadline had come {late_ms} ms before it could be built");
    settlement_of(row, None, Outcome::Expired(detail))
}

/// A row whose message the broker did not take, or which PostgreSQL does not finish: it waits.
fn refused_for(schedule: &Schedule, error: String) -> Outcome {
    Outcome::Refused { error, after: jittered(&REFUSED, schedule.refusals) }
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;

    use super::*;

    #[test]
    fn a_refusal_waits_longer_each_time_and_spends_no_attempt() {
        let after = |refusals| {
            let schedule = Schedule {
                id: Uuid::nil(),
                kind: "k".into(),
                key: None,
                subject: None,
                due_at: OffsetDateTime::UNIX_EPOCH,
                expires_at: None,
                payload: "{}".into(),
                headers: Vec::new(),
                attempts: 0,
                failures: 0,
                refusals,
            };
            match refused_for(&schedule, "no queue".into()) {
                Outcome::Refused { after, .. } => after,
                other => panic!("{other:?}"),
            }
        };
        assert!(after(0) < after(2) && after(2) < after(5));
        assert!(after(9) <= Duration::from_secs(36));
    }
}
