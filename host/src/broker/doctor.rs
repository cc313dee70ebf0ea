//! What `tidings doctor` asks of the broker over AMQP: whether what is ours is there, and is what we would declare. Only
//! what is there is declared, so that nothing is made.

use lapin::options::{ExchangeDeclareOptions, QueueDeclareOptions};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::FieldTable;
use lapin::{Connection, ExchangeKind};

use super::topology::{declare_exchange, declare_queue};
use super::{Broker, BrokerError, CLOSE_DEADLINE, QueueType, within};

/// One of the four things that the daemon declares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Own {
    /// `tidings`
    Exchange,
    /// `tidings.dlx`
    DeadLetterExchange,
    /// `tidings.dead`
    Dead,
    /// `tidings.parking`
    Parking,
}

/// What was found of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// It is what the daemon would declare; of a queue, with as many letters in it.
    Ours(u32),
    /// It is not there, in the broker's words.
    Absent(String),
}

/// A connection that only looks.
#[derive(Debug)]
pub struct Visit {
    connection: Connection,
    exchange: String,
    queue_type: QueueType,
}

impl Own {
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
        let what = match self {
            Self::Exchange | Self::DeadLetterExchange => "exchange",
            Self::Dead | Self::Parking => "queue",
        };
        format!("the {what} {}", self.name(exchange))
    }
}

impl Broker {
    /// Opens a connection, and declares nothing on it.
    ///
    /// # Errors
    ///
    /// When there is none to be had.
    pub async fn visit(&self) -> Result<Visit, BrokerError> {
        let connection = self.connect_only("tidings doctor").await?;
        Ok(Visit { connection, exchange: self.exchange.clone(), queue_type: self.queue_type })
    }
}

impl Visit {
    /// Looks at one of our things.
    ///
    /// # Errors
    ///
    /// [`BrokerError::Mismatch`] when it is another than the daemon would declare, or when the broker cannot be asked.
    pub async fn look(&self, own: Own) -> Result<Found, BrokerError> {
        let name = own.name(&self.exchange);
        // A refusal closes the channel.
        let channel = within("open a channel", self.connection.create_channel()).await?;
        let doing = format!("look for {}", own.describe(&self.exchange));
        let (short, nothing) = (name.as_str().into(), FieldTable::default());
        let kind = if own == Own::Exchange { ExchangeKind::Topic } else { ExchangeKind::Fanout };
        let seen = match own {
            Own::Exchange | Own::DeadLetterExchange => {
                let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
                within(&doing, channel.exchange_declare(short, kind.clone(), passive, nothing)).await.map(|()| 0)
            }
            Own::Dead | Own::Parking => {
                let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
                let declared = within(&doing, channel.queue_declare(short, passive, nothing)).await;
                declared.map(|queue| queue.message_count())
            }
        };
        let letters = match seen {
            Ok(letters) => letters,
            Err(error) => return absent(error).map(Found::Absent),
        };
        let _ = within("close a channel", channel.close(200, "seen".into())).await;
        // The passive kind compares nothing. The same again, of what is there, changes nothing.
        match own {
            Own::Exchange | Own::DeadLetterExchange => declare_exchange(&self.connection, &name, kind).await?,
            Own::Dead | Own::Parking => declare_queue(&self.connection, &name, self.queue_type).await?,
        }
        Ok(Found::Ours(letters))
    }

    /// Ends the visit.
    pub async fn close(self) {
        let _ = tokio::time::timeout(CLOSE_DEADLINE, self.connection.close(200, "good-bye".into())).await;
    }
}

/// What the broker says of a thing that is not there. It says the same of a queue whose node is down, in other words.
fn absent(error: BrokerError) -> Result<String, BrokerError> {
    if let BrokerError::Operation { source, .. } = &error
        && let lapin::ErrorKind::ProtocolError(protocol) = source.kind()
        && matches!(protocol.kind(), AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND))
    {
        return Ok(protocol.get_message().to_string());
    }
    Err(error)
}
