//! Declares the four things that are ours: two exchanges and two queues. What exists already must be the same; consumers'
//! queues are theirs, and never touched.

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ExchangeKind};

use super::{BrokerError, QueueType, within};

/// Declares everything, each on a channel of its own, since a refusal closes the channel.
pub(super) async fn declare(connection: &Connection, exchange: &str, queue_type: QueueType) -> Result<(), BrokerError> {
    let dead_letter_exchange = format!("{exchange}.dlx");
    let dead = format!("{exchange}.dead");
    let parking = format!("{exchange}.parking");

    declare_exchange(connection, exchange, ExchangeKind::Topic).await?;
    declare_exchange(connection, &dead_letter_exchange, ExchangeKind::Fanout).await?;
    for queue in [&dead, &parking] {
        declare_queue(connection, queue, queue_type).await?;
    }

    let channel = within("open a channel", connection.create_channel()).await?;
    let bound = channel.queue_bind(
        dead.as_str().into(),
        dead_letter_exchange.as_str().into(),
        "".into(),
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    within(&format!("bind the queue {dead} to the exchange {dead_letter_exchange}"), bound).await?;
    let _ = within("close a channel", channel.close(200, "declared".into())).await;
    Ok(())
}

/// Declares an exchange of ours.
pub(super) async fn declare_exchange(
    connection: &Connection,
    name: &str,
    kind: ExchangeKind,
) -> Result<(), BrokerError> {
    let channel = within("open a channel", connection.create_channel()).await?;
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let declared = channel.exchange_declare(name.into(), kind, options, FieldTable::default());
    let what = format!("the exchange {name}");
    within(&format!("declare {what}"), declared).await.map_err(|error| mismatch(error, what))?;
    let _ = within("close a channel", channel.close(200, "declared".into())).await;
    Ok(())
}

/// Declares a queue of ours.
pub(super) async fn declare_queue(
    connection: &Connection,
    name: &str,
    queue_type: QueueType,
) -> Result<(), BrokerError> {
    let channel = within("open a channel", connection.create_channel()).await?;
    let mut arguments = FieldTable::default();
    if queue_type == QueueType::Quorum {
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        // What is only looked at, or is given up in the middle of a pass, comes back, and that is counted. From 4.0 on,
        // a quorum queue throws away what came back 20 times, unless it is told otherwise; -1, which ought to mean
        // never, would be at once on 3.10.
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(i32::MAX));
    }
    let declared = channel.queue_declare(name.into(), QueueDeclareOptions::durable(), arguments);
    let what = format!("the queue {name}");
    within(&format!("declare {what}"), declared).await.map_err(|error| mismatch(error, what))?;
    let _ = within("close a channel", channel.close(200, "declared".into())).await;
    Ok(())
}

/// Tells a difference, which a person must resolve, from everything else.
fn mismatch(error: BrokerError, what: String) -> BrokerError {
    match error {
        BrokerError::Operation { source, .. }
            if matches!(source.kind(), lapin::ErrorKind::ProtocolError(error)
                if matches!(error.kind(), AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED))) =>
        {
            BrokerError::Mismatch { what, source }
        }
        error => error,
    }
}
