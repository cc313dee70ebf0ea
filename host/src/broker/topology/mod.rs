//! The four things that are ours, two exchanges and two queues: what each must be, and one declaration of each. What exists
//! already must be the same; consumers' queues are theirs, and never touched.

mod definitions;
pub(super) mod repair;
pub mod watch;

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ExchangeKind};

use crate::broker::{BrokerError, QueueType, within};

/// One of the four things that the daemon declares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnEntity {
    /// `tidings`
    Exchange,
    /// `tidings.dlx`
    DeadLetterExchange,
    /// `tidings.dead`
    Dead,
    /// `tidings.parking`
    Parking,
}

/// Whether RabbitMQ lets us do something that needs a permission.
#[derive(Debug)]
pub(super) enum Permitted {
    /// It was done.
    Done,
    /// Our user may not, in the broker's words.
    Refused(BrokerError),
}

impl QueueType {
    /// Its name in `x-queue-type`.
    #[must_use]
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Classic => "classic",
            Self::Quorum => "quorum",
        }
    }

    /// What is looked at, or is given up in the middle of a pass, comes back, and that is counted. From 4.0 on, a quorum queue
    /// throws away what came back 20 times, unless it is told otherwise; -1, which ought to mean never, would be at once on
    /// 3.10.
    pub(super) fn delivery_limit(self) -> Option<i32> {
        match self {
            Self::Classic => None,
            Self::Quorum => Some(i32::MAX),
        }
    }
}

impl OwnEntity {
    /// All of them, in the order in which they are declared.
    pub const ALL: [Self; 4] = [Self::Exchange, Self::DeadLetterExchange, Self::Dead, Self::Parking];

    /// Its name.
    #[must_use]
    pub fn name(self, exchange: &str) -> String {
        match self {
            Self::Exchange => exchange.to_owned(),
            Self::DeadLetterExchange => format!("{exchange}.dlx"),
            Self::Dead => format!("{exchange}.dead"),
            Self::Parking => format!("{exchange}.parking"),
        }
    }

    /// Its name, and what it is.
    #[must_use]
    pub fn describe(self, exchange: &str) -> String {
        let what = if self.kind().is_some() { "exchange" } else { "queue" };
        format!("the {what} {}", self.name(exchange))
    }

    /// All that it must be, for who declares it by other means.
    #[must_use]
    pub fn wanted(self, exchange: &str, queue_type: QueueType) -> String {
        let arguments = match (self.kind(), queue_type.delivery_limit()) {
            (Some(kind), _) => format!("durable, of the type {kind}"),
            (None, None) => format!("durable, x-queue-type = {}", queue_type.name()),
            (None, Some(limit)) => format!("durable, x-queue-type = {}, x-delivery-limit = {limit}", queue_type.name()),
        };
        let bound = match self {
            Self::Dead => format!(", bound to {}", Self::DeadLetterExchange.name(exchange)),
            _ => String::new(),
        };
        format!("{} ({arguments}{bound})", self.describe(exchange))
    }

    /// Of an exchange, how it routes; a queue has none.
    #[must_use]
    pub(super) fn kind(self) -> Option<&'static str> {
        match self {
            Self::Exchange => Some("topic"),
            Self::DeadLetterExchange => Some("fanout"),
            Self::Dead | Self::Parking => None,
        }
    }
}

/// Looks whether one of ours is there, for which no permission is needed, and compares nothing: how many letters lie in it
/// (of an exchange, none), or what the broker says of its absence. It says the same of a queue whose node is down.
pub(super) async fn look(
    connection: &Connection,
    own: OwnEntity,
    exchange: &str,
) -> Result<Result<u32, String>, BrokerError> {
    let doing = format!("look for {}", own.describe(exchange));
    // A refusal closes the channel.
    let channel = within("open a channel", connection.create_channel()).await?;
    let (name, nothing) = (own.name(exchange).into(), FieldTable::default());
    let seen = if let Some(kind) = own.kind() {
        let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
        within(&doing, channel.exchange_declare(name, exchange_kind(kind), passive, nothing)).await.map(|()| 0)
    } else {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        within(&doing, channel.queue_declare(name, passive, nothing)).await.map(|queue| queue.message_count())
    };
    match seen {
        Ok(letters) => {
            let _ = within("close a channel", channel.close(200, "seen".into())).await;
            Ok(Ok(letters))
        }
        Err(error) => match refusal(&error) {
            Some((AMQPSoftError::NOTFOUND, said)) => Ok(Err(said)),
            _ => Err(error),
        },
    }
}

/// Declares one of ours. What is there already is compared by that, and not changed.
pub(super) async fn declare(
    connection: &Connection,
    own: OwnEntity,
    exchange: &str,
    queue_type: QueueType,
) -> Result<Permitted, BrokerError> {
    let channel = within("open a channel", connection.create_channel()).await?;
    let what = own.describe(exchange);
    let (doing, name) = (format!("declare {what}"), own.name(exchange).into());
    let declared = if let Some(kind) = own.kind() {
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        within(&doing, channel.exchange_declare(name, exchange_kind(kind), options, FieldTable::default())).await
    } else {
        // Never without a type: a virtual host may have another default.
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(queue_type.name().into()));
        if let Some(limit) = queue_type.delivery_limit() {
            arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(limit));
        }
        within(&doing, channel.queue_declare(name, QueueDeclareOptions::durable(), arguments)).await.map(drop)
    };
    match declared {
        Ok(()) => {
            let _ = within("close a channel", channel.close(200, "declared".into())).await;
            Ok(Permitted::Done)
        }
        Err(error) => permitted(error).map_err(|error| mismatch(error, own.wanted(exchange, queue_type))),
    }
}

/// Makes sure that letters of a queue of ours come back if they are only looked at, however often: from a queue that is neither
/// of those that we declare, RabbitMQ may throw them away after some times. The queue must be there.
pub(super) async fn come_back(
    connection: &Connection,
    own: OwnEntity,
    exchange: &str,
    queue_type: QueueType,
) -> Result<(), BrokerError> {
    // A user who may not declare cannot compare, and looks all the same.
    let Err(error) = declare(connection, own, exchange, queue_type).await else { return Ok(()) };
    let other = match queue_type {
        QueueType::Classic => QueueType::Quorum,
        QueueType::Quorum => QueueType::Classic,
    };
    let is_other =
        matches!(error, BrokerError::Mismatch { .. }) && declare(connection, own, exchange, other).await.is_ok();
    if is_other { Ok(()) } else { Err(error) }
}

/// Binds `tidings.dead` to `tidings.dlx`, which changes nothing if it is bound.
pub(super) async fn bind(connection: &Connection, exchange: &str) -> Result<Permitted, BrokerError> {
    let channel = within("open a channel", connection.create_channel()).await?;
    let (queue, source) = (OwnEntity::Dead.name(exchange), OwnEntity::DeadLetterExchange.name(exchange));
    let (options, nothing) = (QueueBindOptions::default(), FieldTable::default());
    let bound = channel.queue_bind(queue.as_str().into(), source.as_str().into(), "".into(), options, nothing);
    match within(&format!("bind the queue {queue} to the exchange {source}"), bound).await {
        Ok(()) => {
            let _ = within("close a channel", channel.close(200, "bound".into())).await;
            Ok(Permitted::Done)
        }
        Err(error) => permitted(error),
    }
}

fn exchange_kind(name: &str) -> ExchangeKind {
    if name == "topic" { ExchangeKind::Topic } else { ExchangeKind::Fanout }
}

/// What the broker refused, if that is what went wrong, and in which words.
fn refusal(error: &BrokerError) -> Option<(AMQPSoftError, String)> {
    let BrokerError::Operation { source, .. } = error else { return None };
    let lapin::ErrorKind::ProtocolError(protocol) = source.kind() else { return None };
    match protocol.kind() {
        AMQPErrorKind::Soft(soft) => Some((soft.clone(), protocol.get_message().to_string())),
        AMQPErrorKind::Hard(_) => None,
    }
}

/// Tells what our user may not from everything else.
fn permitted(error: BrokerError) -> Result<Permitted, BrokerError> {
    match refusal(&error) {
        Some((AMQPSoftError::ACCESSREFUSED, _)) => Ok(Permitted::Refused(error)),
        _ => Err(error),
    }
}

/// Tells a difference, which a person must resolve, from everything else.
fn mismatch(error: BrokerError, what: String) -> BrokerError {
    match (refusal(&error), error) {
        (Some((AMQPSoftError::PRECONDITIONFAILED, _)), BrokerError::Operation { source, .. }) => {
            BrokerError::Mismatch { what, source }
        }
        (_, error) => error,
    }
}
