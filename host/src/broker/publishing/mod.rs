//! Publishes batches of messages, and returns RabbitMQ's verdict on each. Only this folder makes a [`Confirmed`].
//!
//! The connection that publishes is our own, not the client library's. The library has a thread for each connection, to which
//! every message and every confirm is handed over one by one: at one row at a time, waking threads took most of the daemon's
//! processor time, and in a backlog the library took as much for a message as everything else together
//! (`tests/bench/README.md`). Here a batch is written at once, and its lane wakes once, when all confirms are there.
//!
//! ```text
//!   lane ──publish──▶ connection.rs: one task that writes and reads ◀──▶ RabbitMQ
//!                          │ session.rs: channels and batches, without I/O
//!                          │    frames.rs: a batch as bytes      confirms.rs: which messages are confirmed
//!                          └ incoming.rs: bytes as frames        handshake.rs: logging in
//! ```
//!
//! Must never count a message as confirmed without an ack on a channel in confirm mode, or after RabbitMQ has returned
//! it: RabbitMQ acks an unroutable message as well.
//!
//! To change it, know that:
//!
//! - **A channel serves one batch at a time.** That keeps the messages in order, and each return with its batch.
//! - **A message that makes RabbitMQ close the channel** (a body larger than `max_message_size`, for instance) **takes
//!   its batch along only once.** The rest of the batch is then published one by one, and the message that closes a
//!   channel again gets [`Verdict::Poison`]; its row is parked.

mod confirms;
pub(super) mod connection;
mod error;
mod frames;
pub(super) mod handshake;
mod incoming;
mod session;

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use tidings_core::node_health::Answers;
use tokio::time::Instant;
use tracing::warn;

use crate::broker::{Broker, BrokerError, PUBLISHING};
use crate::model::message::Message;
use confirms::NACKED;
use connection::PublishingConnection;

pub use error::PublishError;
pub use frames::write_message;

/// How long the confirms of a batch may take. A message that is not confirmed by then is [`Verdict::Unknown`].
const CONFIRM_DEADLINE: Duration = Duration::from_secs(10);

/// RabbitMQ has confirmed a message. Only the publisher makes this.
#[derive(Clone, Copy, Debug)]
pub struct Confirmed {
    at: Instant,
}

impl Confirmed {
    /// When the confirm arrived.
    #[must_use]
    pub fn at(&self) -> Instant {
        self.at
    }
}

/// RabbitMQ's verdict on one message.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// RabbitMQ has it.
    Confirmed(Confirmed),
    /// RabbitMQ did not take it, with the reason: no queue is bound to the routing key, or a queue refused it.
    Refused(String),
    /// RabbitMQ closed the channel because of it, with the reason: it is larger than `max_message_size`, for instance.
    /// To publish it again would not help.
    Poison(String),
    /// Neither confirmed nor refused. The message may be in a queue.
    Unknown,
}

impl Broker {
    /// Publishes `messages`, waits for the confirms, and returns a verdict for each message, in their order. Those to other
    /// exchanges than the daemon's go on channels of their own: what goes wrong there concerns no other message.
    pub async fn publish(&self, messages: Vec<Message>) -> Vec<Verdict> {
        if messages.iter().all(|message| message.exchange.is_none()) {
            return self.publish_to_own(&messages).await;
        }
        let mut groups: BTreeMap<Option<String>, (Vec<usize>, Vec<Message>)> = BTreeMap::new();
        let mut verdicts = vec![Verdict::Unknown; messages.len()];
        for (at, message) in messages.into_iter().enumerate() {
            let (places, group) = groups.entry(message.exchange.clone()).or_default();
            places.push(at);
            group.push(message);
        }
        let published = groups.iter().map(async |(exchange, (places, group))| {
            let verdicts = match exchange {
                Some(exchange) => self.publish_to(exchange, group).await,
                None => self.publish_to_own(group).await,
            };
            (places, verdicts)
        });
        for (places, of_group) in join_all(published).await {
            for (at, verdict) in places.iter().zip(of_group) {
                verdicts[*at] = verdict;
            }
        }
        verdicts
    }

    /// Publishes to the daemon's exchange.
    async fn publish_to_own(&self, messages: &[Message]) -> Vec<Verdict> {
        let deadline = Instant::now() + CONFIRM_DEADLINE;
        let (mut verdicts, failure) = self.publish_batch(&self.exchange, messages, deadline).await;
        let Some(error) = failure else {
            self.refusals.say(PUBLISHING, None);
            return verdicts;
        };
        let unknown = verdicts.iter().filter(|verdict| is_unknown(verdict)).count();
        let refusal = format!("RabbitMQ takes no message for the exchange {}: {}", self.exchange, with_causes(&error));
        if !affects_every_message(&error) || self.refusals.say(PUBLISHING, Some(refusal)) {
            warn!(
                error = &error as &dyn std::error::Error,
                unknown, "could not publish; rows whose messages are not confirmed stay due"
            );
        }
        let BrokerError::Publish { source, .. } = &error else { return verdicts };
        if source.is_missing_exchange() {
            // The exchange has been deleted.
            self.declare_exchange_again().await;
        }
        if source.is_caused_by_a_message() {
            self.publish_one_by_one(&self.exchange, messages, &mut verdicts, deadline).await;
        }
        verdicts
    }

    /// Publishes to another exchange. If RabbitMQ refuses that exchange as a whole, each message is refused: its row waits, as
    /// it would for a queue.
    async fn publish_to(&self, exchange: &str, messages: &[Message]) -> Vec<Verdict> {
        let deadline = Instant::now() + CONFIRM_DEADLINE;
        let (mut verdicts, failure) = self.publish_batch(exchange, messages, deadline).await;
        let Some(BrokerError::Publish { source: source @ PublishError::ChannelClosed { .. }, .. }) = &failure else {
            if let Some(error) = &failure {
                warn!(error = error as &dyn std::error::Error, exchange, "could not publish to an exchange");
            }
            return verdicts;
        };
        if source.is_missing_exchange() {
            self.declare_exchange_again().await;
        }
        if source.is_caused_by_a_message() {
            self.publish_one_by_one(exchange, messages, &mut verdicts, deadline).await;
        } else {
            for verdict in verdicts.iter_mut().filter(|verdict| is_unknown(verdict)) {
                *verdict = Verdict::Refused(format!("RabbitMQ takes no message for the exchange {exchange}: {source}"));
            }
        }
        verdicts
    }

    /// Publishes the messages whose fate is unknown one by one: one of them closed the channel, and would close the next one as
    /// well. So it takes no other message along.
    async fn publish_one_by_one(
        &self,
        exchange: &str,
        messages: &[Message],
        verdicts: &mut [Verdict],
        deadline: Instant,
    ) {
        for (message, verdict) in messages.iter().zip(verdicts).filter(|(_, verdict)| is_unknown(verdict)) {
            let (mut single, failure) = self.publish_batch(exchange, std::slice::from_ref(message), deadline).await;
            match failure {
                None => *verdict = single.remove(0),
                Some(BrokerError::Publish { source, .. }) if source.is_caused_by_a_message() => {
                    *verdict = Verdict::Poison(format!("RabbitMQ closed the channel over its message: {source}"));
                }
                Some(_) => break,
            }
        }
    }

    /// Publishes `messages` on a channel that no other batch uses. Returns their verdicts, and why some are unknown.
    async fn publish_batch(
        &self,
        exchange: &str,
        messages: &[Message],
        deadline: Instant,
    ) -> (Vec<Verdict>, Option<BrokerError>) {
        let doing = || format!("take {} messages", messages.len());
        let failed = |source| Some(BrokerError::Publish { doing: doing(), source });
        let unknown = || vec![Verdict::Unknown; messages.len()];
        let Some(connection) = self.publishing_connection() else {
            return (unknown(), failed(PublishError::Closed));
        };
        let (confirms, error) = match connection.publish(exchange, messages, deadline).await {
            Ok(ended) => ended,
            Err(error) => return (unknown(), failed(error)),
        };
        let failure = match error {
            Some(error) => failed(error),
            None if confirms.is_complete() => None,
            None => Some(BrokerError::Deadline { doing: doing(), after: CONFIRM_DEADLINE }),
        };
        let verdicts = confirms.into_verdicts();
        self.note_answers(&verdicts, failure.as_ref());
        (verdicts, failure)
    }

    /// Leaves the node if it takes no message and there is another one.
    fn note_answers(&self, verdicts: &[Verdict], failure: Option<&BrokerError>) {
        let is_nacked = |verdict: &Verdict| matches!(verdict, Verdict::Refused(why) if why == NACKED);
        let answers = if !verdicts.iter().all(|verdict| is_unknown(verdict) || is_nacked(verdict)) {
            Answers::Taken
        } else if matches!(failure, Some(BrokerError::Deadline { .. })) {
            Answers::Missing
        } else if verdicts.iter().any(is_nacked) {
            Answers::Refused
        } else {
            return;
        };
        let mut health = self.node_health.lock().expect("no code panics while it holds the lock");
        let leaves = health.answered(self.started.elapsed(), answers);
        if leaves && self.nodes.has_others() {
            self.leaving.notify_waiters();
        }
    }

    fn publishing_connection(&self) -> Option<PublishingConnection> {
        self.publishing.lock().expect("no code panics while it holds the lock").clone()
    }

    async fn declare_exchange_again(&self) {
        if let Err(error) = self.repair_topology().await {
            warn!(
                error = &error as &dyn std::error::Error,
                "could not declare the daemon's exchanges and queues again"
            );
        }
    }
}

fn is_unknown(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Unknown)
}

/// Whether RabbitMQ would refuse every other message as well, although it is reachable: a permission was withdrawn, for
/// instance, or it confirms nothing.
fn affects_every_message(error: &BrokerError) -> bool {
    match error {
        BrokerError::Publish { source, .. } => {
            matches!(source, PublishError::ChannelClosed { .. }) && !source.is_caused_by_a_message()
        }
        error => matches!(error, BrokerError::Deadline { .. }),
    }
}

/// An error and its causes, on one line.
fn with_causes(error: &BrokerError) -> String {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
