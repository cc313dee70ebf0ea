//! Tests of intakes: messages that are published to an exchange become rows, and arrive when they are due.

pub(crate) mod clients;
pub(crate) mod crashes;
pub(crate) mod refusing;
pub(crate) mod relaying;
pub(crate) mod taking;
pub(crate) mod topology;

use harness::consumer::{Inbox, Received};
use harness::daemon::{Daemon, Launch};
use harness::world::World;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation};

/// The exchange to which publishers publish.
pub(crate) const FROM: &str = "orders.delayed";
/// The exchange to which messages go when they are due.
pub(crate) const TO: &str = "orders";
/// The intake's queue.
pub(crate) const QUEUE: &str = "tidings.intake.orders.delayed";

/// The settings of a daemon with an intake, whose sweep comes only every ten minutes.
pub(crate) fn launch(world: &World) -> Launch {
    world.launch().with("TIDINGS_SWEEP_MS", 600_000).with("TIDINGS_INTAKE", format!("{FROM}={TO}"))
}

/// Starts a daemon with an intake.
pub(crate) async fn start(world: &World) -> Daemon {
    launch(world).start_ready().await
}

/// A queue that is bound to the exchange to which messages go when they are due.
pub(crate) async fn inbox(world: &World) -> Inbox {
    world.broker.inbox(TO, "inbox", &["#"], FieldTable::default()).await
}

/// A publisher, with a channel in confirm mode.
pub(crate) struct Publisher(Channel);

impl Publisher {
    pub(crate) async fn new(world: &World) -> Self {
        let channel = world.broker.channel().await;
        channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
        Self(channel)
    }

    /// Publishes to the intake, and waits for the confirm.
    pub(crate) async fn publish(&self, key: &str, properties: BasicProperties, body: &[u8]) {
        self.publish_to(FROM, key, properties, body).await;
    }

    /// Publishes to an exchange, and waits for the confirm.
    pub(crate) async fn publish_to(&self, exchange: &str, key: &str, properties: BasicProperties, body: &[u8]) {
        let confirmed = self.try_publish(exchange, key, properties, body).await;
        assert!(matches!(confirmed, Confirmation::Ack(None)), "{confirmed:?}");
    }

    /// Publishes to an exchange, and returns what RabbitMQ answers.
    pub(crate) async fn try_publish(
        &self,
        exchange: &str,
        key: &str,
        properties: BasicProperties,
        body: &[u8],
    ) -> Confirmation {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let confirm = self.0.basic_publish(exchange.into(), key.into(), options, body, properties).await;
        confirm.expect("written").await.expect("answered")
    }
}

/// Properties with these headers.
pub(crate) fn headers<const N: usize>(headers: [(&str, AMQPValue); N]) -> BasicProperties {
    BasicProperties::default().with_headers(table(headers))
}

/// A table with these entries.
pub(crate) fn table<const N: usize>(entries: [(&str, AMQPValue); N]) -> FieldTable {
    entries.into_iter().fold(FieldTable::default(), |mut table, (name, value)| {
        table.insert(name.into(), value);
        table
    })
}

/// A text in a header.
pub(crate) fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

/// The text in a header of a received message.
pub(crate) fn text_of(received: &Received, name: &str) -> String {
    match header(received, name) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        other => panic!("{name} is {other:?}"),
    }
}

/// The number in a header of a received message.
pub(crate) fn number_of(received: &Received, name: &str) -> i64 {
    match header(received, name) {
        Some(AMQPValue::LongLongInt(number)) => number,
        other => panic!("{name} is {other:?}"),
    }
}

/// The header of a received message.
pub(crate) fn header(received: &Received, name: &str) -> Option<AMQPValue> {
    received.properties().headers().as_ref().and_then(|headers| headers.inner().get(name).cloned())
}

/// The headers of a received message, without those that the daemon adds.
pub(crate) fn own_headers(received: &Received) -> FieldTable {
    let headers = received.properties().headers().clone().unwrap_or_default();
    let own = headers.inner().iter().filter(|(name, _)| !name.as_str().starts_with("tidings-"));
    own.fold(FieldTable::default(), |mut table, (name, value)| {
        table.insert(name.clone(), value.clone());
        table
    })
}

/// These properties without headers.
pub(crate) fn without_headers(properties: &BasicProperties) -> BasicProperties {
    properties.clone().with_headers(FieldTable::default())
}
