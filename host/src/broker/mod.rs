//! The only place with AMQP's client library. One connection publishes, another takes back dead letters while a pass lasts:
//!
//! ```text
//!   scheduler ───publish──▶ exchange `tidings` (topic) ──bindings of the consumers──▶ their queues
//!                                                                              ▲       │ rejected, expired
//!   replayer ◀──pass── queue `tidings.dead` ◀── exchange `tidings.dlx` (fanout) ◀──────┘
//!      ├──replay, by the name of the queue──────────────────────────────────────┘
//!      └──▶ queue `tidings.parking`  (dead letters set aside for a person)
//! ```
//!
//! The four names follow `TIDINGS_EXCHANGE`. The client library's own recovery is not used: what was in flight when a
//! connection broke is unknown, and only the rows in the database say what to do about it.

mod admin;
mod canary;
mod connection;
pub mod dead_letters;
pub mod frame_guard;
mod publisher;
pub mod topology;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lapin::uri::AMQPUri;
use thiserror::Error;
use tokio::sync::Mutex;

use crate::model::health::Notices;
use crate::model::secret_url::SecretUrl;
use crate::model::wake::Wake;

pub use admin::doctor::{Found, Visit};
pub use admin::management::{Management, ManagementError, Seen};
pub use canary::CanaryInbox;
pub use dead_letters::headers::SendTo;
pub use dead_letters::list::{Look, Looked};
pub use dead_letters::{DeadLetterQueue, DeadLetters, FetchedLetter, SendResult};
pub use publisher::{Confirmed, Verdict};
pub use topology::OwnEntity;

/// For a connection, logging in included.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// For each declaration and each new channel.
const RPC_DEADLINE: Duration = Duration::from_secs(5);
/// What the broker's refusals are about.
const PUBLISHING: &str = "publishing";
/// How long we say good-bye.
const CLOSE_DEADLINE: Duration = Duration::from_secs(1);

/// The type of the queues that the daemon declares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueType {
    /// One node keeps it.
    Classic,
    /// A majority of the cluster keeps it.
    Quorum,
}

/// Where RabbitMQ is, and what is ours there.
#[derive(Clone, Debug)]
pub struct BrokerSettings {
    /// `TIDINGS_AMQP_URL`
    pub url: SecretUrl,
    /// `TIDINGS_EXCHANGE`, 1 to 200 bytes, so that the names after it fit as well.
    pub exchange: String,
    /// `TIDINGS_QUEUE_TYPE`
    pub queue_type: QueueType,
}

/// What went wrong between us and RabbitMQ. Always the infrastructure's fault, never a row's.
#[derive(Debug, Error)]
pub enum BrokerError {
    /// It does not answer.
    #[error("could not reach RabbitMQ at {place}")]
    Connect {
        /// Host, port and virtual host.
        place: String,
        /// Why.
        #[source]
        source: lapin::Error,
    },
    /// It answers, and its certificate says that it may be somebody else.
    #[error("the certificate of RabbitMQ at {place} is refused: {why}")]
    Certificate {
        /// Host, port and virtual host.
        place: String,
        /// What is wrong with it, and what to do.
        why: &'static str,
        /// In the words of TLS.
        #[source]
        source: lapin::Error,
    },
    /// It answers, and does not let us in.
    #[error(
        "RabbitMQ at {place} refused the login; check the user, the password and the virtual host in TIDINGS_AMQP_URL"
    )]
    Login {
        /// User, host, port and virtual host.
        place: String,
        /// What it said.
        #[source]
        source: lapin::Error,
    },
    /// What exists is not what we need.
    #[error(
        "could not declare {what}: it exists with other arguments; rename it with TIDINGS_EXCHANGE, or stop the daemons, empty it (`tidings dead replay`, `tidings parked retry --all`) and delete it: the daemon declares it again"
    )]
    Mismatch {
        /// The exchange or queue, and what it ought to be.
        what: String,
        /// What it said, which names the argument.
        #[source]
        source: lapin::Error,
    },
    /// Something of ours is not there, and we may not make it.
    #[error(
        "our user may not declare what is missing: {what}; declare it (`tidings topology` prints all of it as definitions for RabbitMQ), or let the user configure it"
    )]
    Missing {
        /// What is missing, and what each must be.
        what: String,
    },
    /// It could not do what we asked.
    #[error("could not {doing}")]
    Operation {
        /// What we asked.
        doing: String,
        /// Why.
        #[source]
        source: lapin::Error,
    },
    /// It does not answer any more.
    #[error("gave up after {} s waiting for RabbitMQ to {doing}", .after.as_secs())]
    Deadline {
        /// What we asked.
        doing: String,
        /// How long we waited.
        after: Duration,
    },
}

/// How the connection that publishes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// It is there.
    pub connected: bool,
    /// RabbitMQ takes nothing on it, for want of memory or disk.
    pub blocked: bool,
}

/// RabbitMQ.
#[derive(Debug)]
pub struct Broker {
    uri: AMQPUri,
    exchange: String,
    queue_type: QueueType,
    /// The connection of the moment, while it can be used.
    connection: Mutex<Option<Arc<lapin::Connection>>>,
    /// Open channels that nobody is using. All belong to `connection`, or are closed.
    idle_channels: Mutex<Vec<lapin::Channel>>,
    open: AtomicBool,
    /// Why it takes no message although it is open.
    refusals: Notices,
    /// Why the last attempt to connect failed, while there is no connection.
    failure: std::sync::Mutex<Option<String>>,
    /// What is known of what is ours.
    ledger: Mutex<topology::repair::Ledger>,
    wake: Arc<Wake>,
}

/// Whether `url` can be understood, without the password in the answer.
pub(crate) fn check_url(url: &SecretUrl) -> Result<(), String> {
    parse(url).map(drop)
}

fn parse(url: &SecretUrl) -> Result<AMQPUri, String> {
    url.expose().parse()
}

impl Broker {
    /// A broker that is not connected yet; `wake` is woken when it can be used.
    ///
    /// # Panics
    ///
    /// If `url` was not checked by the configuration.
    #[must_use]
    pub fn new(settings: &BrokerSettings, wake: Arc<Wake>) -> Self {
        let mut uri = parse(&settings.url).expect("the configuration accepts only URLs that can be understood");
        // RabbitMQ's own 60 s would let a dead link look alive for two minutes.
        uri.query.heartbeat.get_or_insert(10);
        uri.query.connection_timeout.get_or_insert(5_000);
        Self {
            uri,
            exchange: settings.exchange.clone(),
            queue_type: settings.queue_type,
            connection: Mutex::new(None),
            idle_channels: Mutex::new(Vec::new()),
            open: AtomicBool::new(false),
            refusals: Notices::default(),
            failure: std::sync::Mutex::default(),
            ledger: Mutex::default(),
            wake,
        }
    }

    /// The exchange that is published to.
    #[must_use]
    pub fn exchange(&self) -> &str {
        &self.exchange
    }

    /// Whether messages can be published now: connected, and not blocked by an alarm.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Why no message was taken lately, in the broker's words, although it is open; `None` = the last was, or nothing waits.
    #[must_use]
    pub fn refusal(&self) -> Option<String> {
        self.refusals.all().pop()
    }

    /// No row waits for a message of its own: whether one would be taken is not known any more.
    pub fn nothing_waits(&self) {
        self.refusals.say(PUBLISHING, None);
    }

    /// Why there is no connection, in the words of the last attempt to make one.
    ///
    /// # Panics
    ///
    /// Never: nobody panics with it.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().expect("nobody panics with it").clone()
    }

    /// Whether there is a connection, and whether RabbitMQ blocks it.
    pub async fn link(&self) -> Link {
        let connection = self.connection.lock().await.clone();
        let status = connection.map(|connection| connection.status().clone());
        Link {
            connected: status.as_ref().is_some_and(lapin::ConnectionStatus::connected),
            blocked: status.as_ref().is_some_and(lapin::ConnectionStatus::blocked),
        }
    }

    /// Host, port and virtual host, for people.
    #[must_use]
    pub fn place(&self) -> String {
        let authority = &self.uri.authority;
        format!("{}:{}/{}", authority.host, authority.port, self.uri.vhost.trim_start_matches('/'))
    }
}

/// Waits for the broker, at most [`RPC_DEADLINE`].
async fn within<T>(doing: &str, work: impl Future<Output = lapin::Result<T>>) -> Result<T, BrokerError> {
    match tokio::time::timeout(RPC_DEADLINE, work).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(source)) => Err(BrokerError::Operation { doing: doing.to_owned(), source }),
        Err(_) => Err(BrokerError::Deadline { doing: doing.to_owned(), after: RPC_DEADLINE }),
    }
}
