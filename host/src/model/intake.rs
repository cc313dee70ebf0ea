//! Intakes: exchanges whose messages become rows. An intake takes what is published to `from`; a message without a kind of its
//! own goes to `to` when it is due. No I/O, and no types of the AMQP client library.

use uuid::Uuid;

use crate::model::properties::{Headers, Properties};

/// The longest name that RabbitMQ gives an exchange or a queue, in bytes.
const NAME_BYTES: usize = 255;

/// An exchange whose messages become rows, and the exchange to which they go when they are due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Intake {
    /// The exchange to which publishers publish.
    pub from: String,
    /// The exchange to which messages without `tidings-kind` go when they are due.
    pub to: String,
}

/// A message that was published to an intake, as it arrived.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Incoming {
    /// Its routing key.
    pub routing_key: String,
    /// Its properties.
    pub properties: Properties,
    /// Its headers.
    pub headers: Headers,
    /// `expiration`
    pub expiration: Option<String>,
    /// Its headers could not be read.
    pub is_unreadable: bool,
    /// Its body.
    pub body: Vec<u8>,
    /// RabbitMQ has delivered it before: perhaps its row was written, and its acknowledgement was lost.
    pub redelivered: bool,
    /// It lay in the intake's queue while nobody took messages from there.
    pub waited: bool,
}

/// What an intake does with a message.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Writes a row.
    Schedule(Box<NewRow>),
    /// Removes pending rows.
    Cancel(Target),
    /// Moves pending rows.
    Reschedule(Target, When),
}

/// A row that an intake writes.
#[derive(Clone, Debug, PartialEq)]
pub struct NewRow {
    /// Follows from the intake's queue, the `message_id` and what the message asks for, so that a redelivered message finds its
    /// row; `None` = without a `message_id`, its row gets an id of its own each time.
    pub id: Option<Uuid>,
    /// RabbitMQ has delivered its message before.
    pub redelivered: bool,
    /// Its kind.
    pub kind: String,
    /// Its key.
    pub key: Option<String>,
    /// Its subject.
    pub subject: Option<String>,
    /// When it is due.
    pub due: When,
    /// Its deadline, in milliseconds since the Unix epoch.
    pub expires_ms: Option<i64>,
    /// Its deadline, in milliseconds after it is due. The earlier deadline counts.
    pub expires_after_ms: Option<i64>,
    /// Which of the rows that are due goes first, from 0 to 9.
    pub priority: u8,
    /// Its payload, as JSON text.
    pub payload: String,
    /// Its headers, as a JSON object of strings.
    pub headers: String,
    /// What the intake does if another pending row of its kind has its key.
    pub on_conflict: OnConflict,
}

/// Which pending rows are meant.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// The row of this kind with this key.
    Key {
        /// The kind.
        kind: String,
        /// The key.
        key: String,
    },
    /// All rows about this subject.
    Subject(String),
}

impl Target {
    /// The kind, the key and the subject, of which a row has the first two or the third.
    #[must_use]
    pub fn columns(&self) -> (Option<&str>, Option<&str>, Option<&str>) {
        match self {
            Self::Key { kind, key } => (Some(kind), Some(key), None),
            Self::Subject(subject) => (None, None, Some(subject)),
        }
    }
}

/// An instant, by the database's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// In milliseconds since the Unix epoch.
    At(i64),
    /// So many milliseconds after the message was received.
    After(i64),
    /// So many milliseconds after the second at which the message was published, in seconds since the Unix epoch, or after it
    /// was received, if that is earlier.
    AfterSent {
        /// The delay, in milliseconds.
        delay_ms: i64,
        /// The publisher's `timestamp`.
        sent: i64,
    },
}

/// What is done if a pending row of the kind has the same key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnConflict {
    /// The new row takes its place.
    Replace,
    /// It stays, and no row is written.
    Keep,
    /// It stays, and the message is refused.
    Error,
    /// It stays, and no row is written: the key is the `message_id`, so it is the row of this message.
    Same,
}

/// Requests that touch different rows, each with its place in the batch. Each list is in the order of kinds and keys, so that two
/// daemons never wait for each other's locks.
#[derive(Debug, Default)]
pub struct Step<'a> {
    /// Rows that are written unless they are there.
    pub same: Vec<(usize, &'a NewRow)>,
    /// Rows that take the place of a row with their key.
    pub replace: Vec<(usize, &'a NewRow)>,
    /// Rows that keep a row with their key, or refuse: they wait for a row in delivery first.
    pub careful: Vec<(usize, &'a NewRow)>,
    /// Rows to remove.
    pub cancel: Vec<(usize, &'a Target)>,
    /// Rows to move.
    pub reschedule: Vec<(usize, &'a Target, When)>,
}

/// What became of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Its row was written.
    Scheduled,
    /// Nothing was written: its row was there already, or its key was, and it asked to keep that.
    Kept,
    /// It removed or moved so many rows.
    Changed(u64),
    /// It cannot be what it asks for, for this reason.
    Refused(String),
}

impl Step<'_> {
    /// Whether one statement does it: it only writes rows, in one way.
    #[must_use]
    pub fn is_one_statement(&self) -> bool {
        let Self { same, replace, careful, cancel, reschedule } = self;
        careful.is_empty() && cancel.is_empty() && reschedule.is_empty() && (same.is_empty() || replace.is_empty())
    }
}

impl Intake {
    /// The name of its queue, with a daemon of this exchange.
    #[must_use]
    pub fn queue(&self, exchange: &str) -> String {
        format!("{exchange}.intake.{}", self.from)
    }

    /// Reads the value of `TIDINGS_INTAKE`: `FROM=TO,…`, for a daemon of this exchange.
    ///
    /// # Errors
    ///
    /// A sentence for each intake that cannot be.
    pub fn parse_list(list: &str, exchange: &str) -> Result<Vec<Self>, Vec<String>> {
        let (mut intakes, mut errors) = (Vec::<Self>::new(), Vec::new());
        for part in list.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let Some((from, to)) = part.split_once('=').map(|(from, to)| (from.trim(), to.trim())) else {
                errors.push(format!("{part:?} is not FROM=TO, such as orders.delayed=orders"));
                continue;
            };
            let intake = Self { from: from.to_owned(), to: to.to_owned() };
            match intake.find_error(exchange, &intakes) {
                Some(error) => errors.push(error),
                None => intakes.push(intake),
            }
        }
        if errors.is_empty() { Ok(intakes) } else { Err(errors) }
    }

    fn find_error(&self, exchange: &str, others: &[Self]) -> Option<String> {
        let Self { from, to } = self;
        let of_daemon = |name: &str| {
            name == exchange || [".dlx", ".fleet"].iter().any(|suffix| name.strip_prefix(exchange) == Some(*suffix))
        };
        if from.is_empty() || to.is_empty() {
            Some(format!("{from}={to} lacks the name of an exchange"))
        } else if from.starts_with("amq.") || of_daemon(from) {
            Some(format!("publishers cannot use {from:?}: exchanges of that name are RabbitMQ's own or the daemon's"))
        } else if self.queue(exchange).len() > NAME_BYTES || to.len() > NAME_BYTES {
            Some(format!(
                "the names in {from}={to} are too long: that of its queue would have more than {NAME_BYTES} bytes"
            ))
        } else if from == to {
            Some(format!("{from}={to} would take in again what it has sent"))
        } else if others.iter().any(|other| other.from == *from) {
            Some(format!("{from:?} is named twice"))
        } else {
            let chained = others.iter().find(|other| other.from == *to || other.to == *from);
            chained.map(|Self { from: other_from, to: other_to }| {
                format!("{from}={to} and {other_from}={other_to} form a chain, in which a message would be due twice")
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(list: &str) -> Result<Vec<(String, String)>, String> {
        let intakes = Intake::parse_list(list, "tidings").map_err(|errors| errors.join("; "))?;
        Ok(intakes.into_iter().map(|intake| (intake.from, intake.to)).collect())
    }

    #[test]
    fn a_list_of_intakes_is_read() {
        let pair = |from: &str, to: &str| (from.to_owned(), to.to_owned());
        assert_eq!(parse(""), Ok(vec![]));
        assert_eq!(parse("orders.delayed=orders"), Ok(vec![pair("orders.delayed", "orders")]));
        assert_eq!(
            parse("a=b, c = amq.topic,d=tidings"),
            Ok(vec![pair("a", "b"), pair("c", "amq.topic"), pair("d", "tidings")])
        );
        let intake = Intake { from: "orders.delayed".into(), to: "orders".into() };
        assert_eq!(intake.queue("tidings"), "tidings.intake.orders.delayed");
    }

    #[test]
    fn an_intake_that_cannot_be_is_an_error_that_names_it() {
        let error = |list: &str| parse(list).expect_err(list);
        assert_eq!(error("orders"), r#""orders" is not FROM=TO, such as orders.delayed=orders"#);
        assert!(error("=orders").contains("lacks the name") && error("a=").contains("lacks the name"));
        assert!(error("amq.topic=a").contains("RabbitMQ's own"));
        for own in ["tidings", "tidings.dlx", "tidings.fleet"] {
            assert!(error(&format!("{own}=a")).contains("the daemon's"), "{own}");
        }
        assert!(error("a=a").contains("take in again"));
        assert!(error("a=b,a=c").contains("named twice"));
        assert!(error("a=b,b=c").contains("form a chain") && error("b=c,a=b").contains("form a chain"));
        assert!(error(&format!("{}=a", "n".repeat(250))).contains("too long"));
        assert_eq!(error("x,y").matches("is not FROM=TO").count(), 2, "all errors are reported together");
    }
}
