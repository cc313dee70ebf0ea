//! The daemon's own topology: two exchanges, two queues and one binding, and for each intake two exchanges, a queue and a
//! binding. This file says what each must be, and declares it once; `repair.rs` decides when, and `watch.rs` calls it every few
//! seconds; `definitions.rs` writes the same as definitions for RabbitMQ to import.
//!
//! Must never touch the queues of consumers, and never delete or change anything: an exchange or queue that exists with
//! other properties is an error for a person. The exchanges of an intake belong to its publishers and consumers: those that exist
//! are used as they are, except one that holds messages back itself.
//!
//! All declarations of the daemon go through [`Broker::repair_topology`]: on a new connection, before a pass over the
//! dead letters, after a publish to an exchange that does not exist, and every 5 s. It first declares each exchange and
//! queue passively. That needs no permission, and shows what is missing, and since when at most. Then it declares what
//! is missing, and binds. Once a minute it also declares what exists, because only a declaration makes RabbitMQ compare
//! the arguments. What the daemon's user may not declare is used as it is; if it is missing as well, the error names
//! it.
//!
//! When an operator deletes `tidings.dead`, for example, the next repair declares and binds it again within seconds.
//! The messages that were in it, and the messages that consumers rejected before the repair, are lost; the log and the
//! `notes` of `/readyz` say so for an hour.
//!
//! [`Broker::repair_topology`]: crate::broker::Broker::repair_topology

mod definitions;
pub(super) mod repair;
pub mod watch;

use std::sync::Arc;
use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ExchangeKind};

use crate::broker::{BrokerError, QueueType, RPC_DEADLINE, with_deadline, within};
use crate::model::intake::Intake;

/// The type of exchange that the delayed-message plugin brings.
pub(super) const DELAYED_MESSAGE: &str = "x-delayed-message";
/// The binding of an intake's queue: all messages.
const ALL_MESSAGES: &str = "#";

/// One of the exchanges and queues that the daemon declares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeclaredEntity {
    /// `tidings`
    Exchange,
    /// `tidings.dlx`
    DeadLetterExchange,
    /// `tidings.dead`
    DeadQueue,
    /// `tidings.parking`
    ParkingQueue,
    /// The exchange to which publishers of an intake publish.
    IntakeSource(Arc<Intake>),
    /// `tidings.intake.FROM`
    IntakeQueue(Arc<Intake>),
    /// The exchange to which an intake's messages go when they are due.
    IntakeTarget(Arc<Intake>),
}

/// The value of a queue's argument.
#[derive(Clone, Debug)]
pub(super) enum Argument {
    Text(String),
    Number(i32),
}

/// A binding that the daemon makes.
#[derive(Clone, Debug)]
pub(super) struct Binding {
    pub(super) queue: DeclaredEntity,
    pub(super) source: DeclaredEntity,
    pub(super) key: &'static str,
}

/// What came of a declaration or a binding, which need permissions.
#[derive(Debug)]
pub(super) enum DeclareResult {
    /// The exchange, queue or binding exists now.
    Done,
    /// The daemon's user lacks the permission.
    NotPermitted(BrokerError),
}

/// How long RabbitMQ may take to make a binding that it had before.
const BOUND_AGAIN_WITHIN: Duration = Duration::from_secs(1);

impl QueueType {
    /// The value of `x-queue-type`.
    #[must_use]
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Classic => "classic",
            Self::Quorum => "quorum",
        }
    }

    /// The value of `x-delivery-limit`, so high that no message reaches it. Each listing, and each pass that breaks
    /// off, returns messages to their queue, and a quorum queue counts that. From RabbitMQ 4.0 on it drops a message
    /// after 20 returns by default. A limit of -1, which is meant as no limit, would make 3.10 drop a message at its
    /// first return.
    pub(super) fn delivery_limit(self) -> Option<i32> {
        match self {
            Self::Classic => None,
            Self::Quorum => Some(i32::MAX),
        }
    }
}

impl DeclaredEntity {
    /// All that a daemon with these intakes declares on this exchange, in that order.
    #[must_use]
    pub fn all(exchange: &str, intakes: &[Arc<Intake>]) -> Vec<Self> {
        let mut all = vec![Self::Exchange, Self::DeadLetterExchange, Self::DeadQueue, Self::ParkingQueue];
        let mut targets = vec![exchange];
        for intake in intakes {
            all.extend([Self::IntakeSource(Arc::clone(intake)), Self::IntakeQueue(Arc::clone(intake))]);
            if !targets.contains(&&*intake.to) {
                targets.push(&intake.to);
                all.push(Self::IntakeTarget(Arc::clone(intake)));
            }
        }
        all
    }

    /// The name. Those of the daemon's own are derived from that of the exchange that it publishes to.
    #[must_use]
    pub fn name(&self, exchange: &str) -> String {
        match self {
            Self::Exchange => exchange.to_owned(),
            Self::DeadLetterExchange => format!("{exchange}.dlx"),
            Self::DeadQueue => format!("{exchange}.dead"),
            Self::ParkingQueue => format!("{exchange}.parking"),
            Self::IntakeSource(intake) => intake.from.clone(),
            Self::IntakeQueue(intake) => intake.queue(exchange),
            Self::IntakeTarget(intake) => intake.to.clone(),
        }
    }

    /// What it is and its name, such as `the queue tidings.dead`.
    #[must_use]
    pub fn describe(&self, exchange: &str) -> String {
        let what = if self.exchange_type().is_some() { "exchange" } else { "queue" };
        format!("the {what} {}", self.name(exchange))
    }

    /// As [`DeclaredEntity::describe`], followed by every property that it must have, for an operator who declares it.
    #[must_use]
    pub fn describe_declaration(&self, exchange: &str, queue_type: QueueType) -> String {
        let arguments = match self.exchange_type() {
            Some(kind) => format!("durable, of the type {kind}"),
            None => {
                self.arguments(exchange, queue_type).into_iter().fold("durable".to_owned(), |text, (name, value)| {
                    match value {
                        Argument::Text(value) => format!("{text}, {name} = {value}"),
                        Argument::Number(value) => format!("{text}, {name} = {value}"),
                    }
                })
            }
        };
        let bound = match self {
            Self::DeadQueue => format!(", bound to {}", Self::DeadLetterExchange.name(exchange)),
            Self::IntakeQueue(intake) => format!(", bound to {} with {ALL_MESSAGES}", intake.from),
            _ => String::new(),
        };
        format!("{} ({arguments}{bound})", self.describe(exchange))
    }

    /// The type of an exchange; `None` for a queue.
    #[must_use]
    pub(super) fn exchange_type(&self) -> Option<&'static str> {
        match self {
            Self::Exchange | Self::IntakeSource(_) | Self::IntakeTarget(_) => Some("topic"),
            Self::DeadLetterExchange => Some("fanout"),
            Self::DeadQueue | Self::ParkingQueue | Self::IntakeQueue(_) => None,
        }
    }

    /// Whether it may have other properties than the daemon declares, because it belongs to others.
    pub(super) fn is_used_as_it_is(&self) -> bool {
        matches!(self, Self::IntakeSource(_) | Self::IntakeTarget(_))
    }

    /// The arguments of a queue.
    pub(super) fn arguments(&self, exchange: &str, queue_type: QueueType) -> Vec<(&'static str, Argument)> {
        // Always with a type: the virtual host may have another default.
        let mut arguments = vec![("x-queue-type", Argument::Text(queue_type.name().to_owned()))];
        arguments.extend(queue_type.delivery_limit().map(|limit| ("x-delivery-limit", Argument::Number(limit))));
        if let Self::IntakeQueue(_) = self {
            // What expires there before a daemon takes it comes to the daemon, which counts it.
            arguments.push(("x-dead-letter-exchange", Argument::Text(Self::DeadLetterExchange.name(exchange))));
        }
        arguments
    }
}

impl Binding {
    /// All that a daemon with these intakes makes.
    pub(super) fn all(intakes: &[Arc<Intake>]) -> Vec<Self> {
        let (queue, source) = (DeclaredEntity::DeadQueue, DeclaredEntity::DeadLetterExchange);
        let of_intake = |intake: &Arc<Intake>| Self {
            queue: DeclaredEntity::IntakeQueue(Arc::clone(intake)),
            source: DeclaredEntity::IntakeSource(Arc::clone(intake)),
            key: ALL_MESSAGES,
        };
        std::iter::once(Self { queue, source, key: "" }).chain(intakes.iter().map(of_intake)).collect()
    }

    /// What it is, such as `the binding of the queue tidings.dead to the exchange tidings.dlx`.
    pub(super) fn describe(&self, exchange: &str) -> String {
        format!("the binding of {} to {}", self.queue.describe(exchange), self.source.describe(exchange))
    }
}

/// Declares `entity` passively, which shows whether it exists, needs no permission and compares nothing. Returns the
/// number of messages in a queue, 0 for an exchange, or RabbitMQ's words if it does not exist. RabbitMQ also answers
/// that a queue does not exist when the node of that queue is down.
pub(super) async fn declare_passively(
    connection: &Connection,
    entity: &DeclaredEntity,
    exchange: &str,
) -> Result<Result<u32, String>, BrokerError> {
    let doing = format!("find {}", entity.describe(exchange));
    // A channel of its own, because RabbitMQ closes it if the entity does not exist.
    let channel = with_deadline("open a channel", connection.create_channel()).await?;
    let (name, no_arguments) = (entity.name(exchange).into(), FieldTable::default());
    let declared = if let Some(kind) = entity.exchange_type() {
        let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
        with_deadline(&doing, channel.exchange_declare(name, exchange_kind(kind), passive, no_arguments))
            .await
            .map(|()| 0)
    } else {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        with_deadline(&doing, channel.queue_declare(name, passive, no_arguments))
            .await
            .map(|queue| queue.message_count())
    };
    match declared {
        Ok(messages) => {
            let _ = with_deadline("close a channel", channel.close(200, "found".into())).await;
            Ok(Ok(messages))
        }
        Err(error) => match soft_error(&error) {
            Some((AMQPSoftError::NOTFOUND, answer)) => Ok(Err(answer)),
            _ => Err(error),
        },
    }
}

/// Declares `entity`. If it exists, RabbitMQ compares its arguments, and changes nothing.
pub(super) async fn declare(
    connection: &Connection,
    entity: &DeclaredEntity,
    exchange: &str,
    queue_type: QueueType,
) -> Result<DeclareResult, BrokerError> {
    let channel = with_deadline("open a channel", connection.create_channel()).await?;
    let (doing, name) = (format!("declare {}", entity.describe(exchange)), entity.name(exchange).into());
    let declared = if let Some(kind) = entity.exchange_type() {
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        with_deadline(&doing, channel.exchange_declare(name, exchange_kind(kind), options, FieldTable::default())).await
    } else {
        let mut arguments = FieldTable::default();
        for (name, value) in entity.arguments(exchange, queue_type) {
            let value = match value {
                Argument::Text(text) => AMQPValue::LongString(text.into()),
                Argument::Number(number) => AMQPValue::LongInt(number),
            };
            arguments.insert(name.into(), value);
        }
        with_deadline(&doing, channel.queue_declare(name, QueueDeclareOptions::durable(), arguments)).await.map(drop)
    };
    match declared {
        Ok(()) => {
            let _ = with_deadline("close a channel", channel.close(200, "declared".into())).await;
            Ok(DeclareResult::Done)
        }
        Err(error) => {
            not_permitted(error).map_err(|error| mismatch(error, entity.describe_declaration(exchange, queue_type)))
        }
    }
}

/// Makes sure that messages that are fetched from this queue and not acknowledged come back, however often. From a
/// queue with other arguments than the daemon declares, for classic or for quorum queues, RabbitMQ may drop them after
/// some returns; such a queue is an error. The queue must exist.
pub(super) async fn ensure_messages_return(
    connection: &Connection,
    entity: &DeclaredEntity,
    exchange: &str,
    queue_type: QueueType,
) -> Result<(), BrokerError> {
    // A user who may not declare cannot compare the arguments; the queue is trusted then.
    let Err(error) = declare(connection, entity, exchange, queue_type).await else { return Ok(()) };
    let other_type = match queue_type {
        QueueType::Classic => QueueType::Quorum,
        QueueType::Quorum => QueueType::Classic,
    };
    let has_other_type = matches!(error, BrokerError::Mismatch { .. })
        && declare(connection, entity, exchange, other_type).await.is_ok();
    if has_other_type { Ok(()) } else { Err(error) }
}

/// Makes a binding. If it exists already, this changes nothing. `was_bound`: it existed before, and is not waited for long.
pub(super) async fn bind(
    connection: &Connection,
    exchange: &str,
    binding: &Binding,
    was_bound: bool,
) -> Result<DeclareResult, BrokerError> {
    let channel = with_deadline("open a channel", connection.create_channel()).await?;
    let (queue, source) = (binding.queue.name(exchange), binding.source.name(exchange));
    let (options, no_arguments) = (QueueBindOptions::default(), FieldTable::default());
    let bound =
        channel.queue_bind(queue.as_str().into(), source.as_str().into(), binding.key.into(), options, no_arguments);
    let doing = format!("bind the queue {queue} to the exchange {source}");
    let patience = if was_bound { BOUND_AGAIN_WITHIN } else { RPC_DEADLINE };
    match within(patience, &doing, bound).await {
        Ok(()) => {
            let _ = with_deadline("close a channel", channel.close(200, "bound".into())).await;
            Ok(DeclareResult::Done)
        }
        Err(error) => not_permitted(error),
    }
}

/// The type of the exchange of an intake, if it differs from the type that the daemon would declare, by RabbitMQ's answer to the
/// declaration: `inequivalent arg 'type' for exchange 'a' in vhost '/': received 'topic' but current is 'fanout'`,
/// or `current is ''x-delayed-message''`.
pub(super) fn current_type(error: &BrokerError) -> Option<String> {
    let BrokerError::Mismatch { source, .. } = error else { return None };
    let text = source.to_string();
    let (_, rest) = text.split_once("inequivalent arg 'type'")?;
    let (_, rest) = rest.split_once("current is ")?;
    // A name with a hyphen has two quotes on each side.
    let quoted = rest.split_whitespace().next()?;
    Some(quoted.trim_matches('\'').to_owned()).filter(|current| !current.is_empty())
}

fn exchange_kind(name: &str) -> ExchangeKind {
    if name == "topic" { ExchangeKind::Topic } else { ExchangeKind::Fanout }
}

/// The channel error with which RabbitMQ answered, and its text; `None` for any other error.
pub(super) fn soft_error(error: &BrokerError) -> Option<(AMQPSoftError, String)> {
    let BrokerError::Operation { source, .. } = error else { return None };
    let lapin::ErrorKind::ProtocolError(protocol) = source.kind() else { return None };
    match protocol.kind() {
        AMQPErrorKind::Soft(soft) => Some((soft.clone(), protocol.get_message().to_string())),
        AMQPErrorKind::Hard(_) => None,
    }
}

/// Turns an error into [`DeclareResult::NotPermitted`] if it says that the daemon's user lacks a permission.
fn not_permitted(error: BrokerError) -> Result<DeclareResult, BrokerError> {
    match soft_error(&error) {
        Some((AMQPSoftError::ACCESSREFUSED, _)) => Ok(DeclareResult::NotPermitted(error)),
        _ => Err(error),
    }
}

/// Turns an error into [`BrokerError::Mismatch`] if it says that the arguments differ, which a person must resolve.
fn mismatch(error: BrokerError, what: String) -> BrokerError {
    match (soft_error(&error), error) {
        (Some((AMQPSoftError::PRECONDITIONFAILED, _)), BrokerError::Operation { source, .. }) => {
            BrokerError::Mismatch { what, source }
        }
        (_, error) => error,
    }
}
