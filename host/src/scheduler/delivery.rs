//! Delivers one batch: claimed rows are built, published, confirmed and committed. Each value is consumed by the next step.
//!
//! **Confirms.** Only the publisher makes a `Confirmed`, and only a `Confirmed` becomes [`Outcome::Delivered`]. A row must
//! never be marked delivered without one. A row whose message may not have been confirmed stays due: a second message with
//! the same `message_id` is possible, a loss is not. A row whose message was confirmed is never sent again by this process,
//! even if its session is lost or PostgreSQL refuses to finish it: [`SentRows`] remembers it. While PostgreSQL finishes no
//! rows, one row at a time is sent to try (`careful`).
//!
//! **Time.** A row is never published early, and never after its deadline, both by the database's clock. The database itself
//! decides that a row is due. A [`DatabaseClock`](crate::model::clock::DatabaseClock) is fast by at most a round trip, so a
//! deadline is never overlooked.
//!
//! **Failures.** The cause decides what happens to the row. The row itself (a payload that the plugin cannot use, a trap):
//! attempts and backoff, then it is parked; at once, if another attempt would fail in the same way. A server (no confirm,
//! unroutable): the row waits, and no attempt is spent. No plugin for the kind, or a pause: the row is held (`hold.rs`). A
//! row is blamed only for what its plugin does in a fresh store.
//!
//! **A frozen daemon.** If the process is stopped, its sessions stand still. After 30 s PostgreSQL ends those that are in a
//! transaction, and the rows are free. Their slots have not moved, so the next look of any other daemon finds them. When the
//! process continues, a delivery whose claim is older than 5 s first checks that its transaction still lives; that fails, and
//! the delivery publishes nothing. A delivery that had published before can no longer commit.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, warn};
use uuid::Uuid;

use crate::broker::{Broker, Verdict};
use crate::model::backoff::{BUILD, jittered};
use crate::model::clock::{DatabaseClock, unix_ms};
use crate::model::event::{BuildError, LONGEST_TTL_MS};
use crate::model::message::{Expired, Message};
use crate::model::relay;
use crate::model::schedule::Schedule;
use crate::plugins::{Build, Plugin, PluginSet};
use crate::scheduler::look_notes::CatchUps;
use crate::scheduler::outcomes::{expired_row, missed_for, missed_row, refused_for, settlement_of};
use crate::scheduler::relay as relay_rows;
use crate::scheduler::sent_rows::SentRows;
use crate::store::{Claim, Outcome, Settlement, StoreError};
use crate::telemetry::{Batch, Spans, count_claim, record_confirms};

/// Before a delivery publishes the rows of a claim that is older than this, it checks that the transaction still lives.
const CHECK_CLAIM_AFTER: Duration = Duration::from_secs(5);

/// What all deliveries share.
#[expect(missing_debug_implementations, reason = "the plugins have none")]
pub struct Delivery {
    /// The broker that takes the messages.
    pub broker: Arc<Broker>,
    /// A row is parked after this many failures of its plugin.
    pub max_attempts: u32,
    /// The exchanges to which rows of the kind `relay` may go.
    pub relay_targets: Arc<BTreeSet<String>>,
    /// Rows that were confirmed and not finished. A receipt is what finishing takes: the plugin's label, and the outcome.
    pub sent_rows: SentRows<(Option<String>, Outcome)>,
}

/// How the delivery of a batch ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BatchOutcome {
    /// All rows stay as they are, for instance since the broker did not confirm.
    Unsettled,
    /// Rows were settled.
    Settled {
        /// Some of them have left the queue.
        some_left: bool,
        /// Some of them are still in the queue.
        some_stay: bool,
    },
    /// PostgreSQL refuses to finish all rows. They wait.
    Refused {
        /// PostgreSQL's error.
        error: String,
        /// Whether a message was sent in this delivery.
        sent: bool,
    },
}

/// What is needed to settle a row once its message is confirmed.
struct InFlight {
    schedule: Schedule,
    builder: Builder,
    event_digest: String,
    built_ms: i64,
}

/// Who made a message: a plugin, or the daemon itself.
struct Builder {
    label: Arc<str>,
    generation: u64,
}

impl Delivery {
    /// Delivers the rows of a claim. `plugins` is the same set from beginning to end, whatever is loaded meanwhile.
    /// Rows that were missed for longer than `catch_ups` allows are finished as expired.
    /// `careful`: PostgreSQL refuses to finish rows, so one message is sent, and only if no sent row is there to be finished.
    ///
    /// # Errors
    ///
    /// When the database does not answer, or refuses. Then either no row has changed or all have been settled.
    pub async fn deliver(
        &self,
        mut claim: Claim,
        plugins: &PluginSet,
        catch_ups: &CatchUps,
        careful: bool,
    ) -> Result<BatchOutcome, StoreError> {
        let (claimed_rows, clock) = (claim.rows.len(), claim.clock());
        count_claim(claimed_rows);
        // Until the end of this function, no other lane sends these rows.
        let mut taken = self.sent_rows.take(std::mem::take(&mut claim.rows), careful);
        let rows = std::mem::take(&mut taken.send);
        let careful = careful || !taken.finish.is_empty();
        let mut spans = Spans::begin(&rows, clock, self.broker.exchange());

        let now = clock.now();
        let (expired, due): (Vec<Schedule>, Vec<Schedule>) =
            rows.into_iter().partition(|row| row.expires_at.is_some_and(|at| at <= now));
        let (missed, due): (Vec<Schedule>, Vec<Schedule>) = due
            .into_iter()
            .partition(|row| missed_for(row, now) > catch_ups.get(&row.kind).copied().unwrap_or(Duration::MAX));
        let sent_before = taken.finish.drain(..).map(|(row, (plugin, outcome))| Settlement { row, plugin, outcome });
        let mut settlements: Vec<Settlement> =
            sent_before.chain(expired.into_iter().map(|row| expired_row(row, unix_ms(now)))).collect();
        settlements.extend(missed.into_iter().map(|row| missed_row(row, now, catch_ups)));

        let (relays, due): (Vec<Schedule>, Vec<Schedule>) = due.into_iter().partition(|row| row.kind == relay::KIND);
        let builds = plugins.build(due, clock).await;

        let mut messages = Vec::with_capacity(builds.len() + relays.len());
        let mut in_flight = Vec::with_capacity(builds.len() + relays.len());
        for Build { mut schedule, plugin, outcome, at } in builds {
            // The payload may be large, and is no longer needed.
            schedule.payload = String::new();
            // The time for building was used up before this row: it stays due.
            let Some(outcome) = outcome else { continue };
            spans.built(schedule.id, plugin.label(), plugin.generation(), at);
            let outcome = match outcome {
                Ok(built) => {
                    let (event_digest, built_ms) = (built.event.digest(), built.built_ms);
                    let builder = Builder { label: Arc::clone(&built.plugin), generation: plugin.generation() };
                    match Message::new(&schedule, built, self.broker.exchange(), clock.now_ms()) {
                        Ok(mut message) => {
                            spans.carry(&mut message);
                            messages.push(message);
                            in_flight.push(InFlight { schedule, builder, event_digest, built_ms });
                            continue;
                        }
                        Err(Expired(at)) => Outcome::Expired(format!("the event's deadline, {at} ms, had passed")),
                    }
                }
                Err(error) => self.outcome_without_event(&schedule, &plugin, error),
            };
            settlements.push(settlement_of(schedule, Some(plugin.label()), outcome));
        }
        let (relayed, not_relayed) = self.relay(relays, clock, &mut spans).await;
        settlements.extend(not_relayed);
        for (message, sent) in relayed {
            messages.push(message);
            in_flight.push(sent);
        }

        if clock.age() > CHECK_CLAIM_AFTER {
            // If the process was frozen and PostgreSQL has ended the session, another daemon may have published these rows.
            claim.confirm_held().await?;
        }
        spans.publish();
        let sent = !messages.is_empty();
        let verdicts = self.publish(messages).await;
        settlements.extend(
            in_flight.into_iter().zip(verdicts).filter_map(|(sent, verdict)| settlement_by_verdict(sent, verdict)),
        );

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
        if !refused.is_empty() {
            self.let_refused_rows_wait(&mut settlements, &refused);
            spans.settle(&settlements);
        }
        Batch::of(&settlements, clock).count();
        spans.commit();
        let left = settlements.iter().filter(|settlement| settlement.outcome.leaves_queue()).count();
        let has_settlements = !settlements.is_empty();
        let finished = settlements.into_iter().filter(|settlement| !refused.contains_key(&settlement.row.id));
        self.sent_rows.note_finished(finished.map(|Settlement { row, plugin, outcome }| {
            let is_sent = matches!(outcome, Outcome::Delivered { .. });
            (row.id, is_sent.then_some((plugin, outcome)))
        }));
        Ok(match refused.into_values().next() {
            _ if !has_settlements => BatchOutcome::Unsettled,
            Some(error) if left == 0 => BatchOutcome::Refused { error, sent },
            _ => BatchOutcome::Settled { some_left: left > 0, some_stay: left < claimed_rows },
        })
    }

    /// Changes the settlements of rows that PostgreSQL refuses to finish: the rows wait. Rows whose messages were confirmed
    /// are remembered.
    fn let_refused_rows_wait(&self, settlements: &mut [Settlement], refused: &HashMap<Uuid, String>) {
        let some_finished = refused.len() < settlements.len();
        for settlement in settlements {
            let Some(error) = refused.get(&settlement.row.id) else { continue };
            self.remember(settlement);
            let Schedule { id, kind, refusals, .. } = &settlement.row;
            // If all rows are refused, no single row is the cause. Only the first refusal of a row is logged; last_error has
            // the others.
            if *refusals == 0 && some_finished {
                warn!(schedule.id = %id, schedule.kind = kind, error, "PostgreSQL refuses to finish {id}, so the row waits");
            }
            settlement.outcome = refused_for(&settlement.row, error.clone());
        }
    }

    /// Remembers a row whose message was confirmed, so that it is not sent again.
    fn remember(&self, Settlement { row, plugin, outcome }: &Settlement) {
        if matches!(outcome, Outcome::Delivered { .. }) {
            self.sent_rows.remember(row.id, (plugin.clone(), outcome.clone()));
        }
    }

    async fn publish(&self, messages: Vec<Message>) -> Vec<Verdict> {
        if messages.is_empty() {
            return Vec::new();
        }
        let begun = Instant::now();
        let verdicts = self.broker.publish(messages).await;
        record_confirms(begun.elapsed());
        verdicts
    }

    /// The messages of rows of the kind `relay`, and the settlements of those that have none.
    async fn relay(
        &self,
        rows: Vec<Schedule>,
        clock: DatabaseClock,
        spans: &mut Spans,
    ) -> (Vec<(Message, InFlight)>, Vec<Settlement>) {
        let (mut relayed, mut settlements) = (Vec::new(), Vec::new());
        if rows.is_empty() {
            return (relayed, settlements);
        }
        let label: Arc<str> = relay::LABEL.into();
        for (schedule, read) in relay_rows::read(rows, &self.relay_targets).await {
            spans.built(schedule.id, &label, 0, Instant::now());
            let now_ms = clock.now_ms();
            let made = read.and_then(|(message, event_digest)| match Message::relayed(&schedule, message, now_ms) {
                Ok(message) => Ok((message, event_digest)),
                Err(Expired(at)) => Err(Outcome::Expired(format!("its deadline, {at} ms, had passed"))),
            });
            match made {
                Ok((mut message, event_digest)) => {
                    spans.carry(&mut message);
                    let builder = Builder { label: Arc::clone(&label), generation: 0 };
                    relayed.push((message, InFlight { schedule, builder, event_digest, built_ms: now_ms }));
                }
                Err(outcome) => settlements.push(settlement_of(schedule, Some(&label), outcome)),
            }
        }
        (relayed, settlements)
    }

    /// The outcome of a row for which the plugin built no event.
    fn outcome_without_event(&self, schedule: &Schedule, plugin: &Plugin, error: BuildError) -> Outcome {
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
                debug!(schedule.id = %id, schedule.kind = kind, plugin, generation, error, ?after, "its plugin asks for another attempt");
                Outcome::Retry { error, after, failed: false }
            }
            BuildError::Unavailable(error, after) => Outcome::Waits { error, after },
            BuildError::TooLarge(reason) => {
                // Another attempt would be as large.
                let reason = format!(
                    "{reason}; another attempt would fail in the same way: raise the limit in the plugin's NAME.toml or fix the plugin, and put the row back"
                );
                warn!(schedule.id = %id, schedule.kind = kind, plugin, generation, reason, "parked {id}: building it exceeds a limit of its plugin");
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

/// The settlement of a row, by the broker's verdict; `None` = the verdict is unknown, so the row stays due.
fn settlement_by_verdict(sent: InFlight, verdict: Verdict) -> Option<Settlement> {
    let InFlight { schedule, builder: Builder { label, generation }, event_digest, built_ms } = sent;
    let Schedule { id, kind, .. } = &schedule;
    let label = &*label;
    let outcome = match verdict {
        Verdict::Confirmed(confirmed) => Outcome::Delivered { confirmed, event_digest, built_ms },
        Verdict::Refused(error) => {
            // Only the first refusal is logged; last_error has the others.
            if schedule.refusals == 0 {
                warn!(schedule.id = %id, schedule.kind = kind, plugin = label, generation, error, "RabbitMQ did not take {id}, so the row waits");
            }
            refused_for(&schedule, error)
        }
        Verdict::Poison(reason) => {
            // Another attempt would close another channel.
            warn!(schedule.id = %id, schedule.kind = kind, plugin = label, generation, reason, "parked {id}: RabbitMQ cannot take its message");
            Outcome::Parked(reason)
        }
        Verdict::Unknown => return None,
    };
    Some(settlement_of(schedule, Some(label), outcome))
}
