//! The only place with AMQP, and with its client library (lapin). One connection declares, another publishes, and a third takes
//! messages from the intakes; each pass and each listing opens one more to the dead letters:
//!
//! ```text
//!   publishers ──▶ exchange of an intake ──▶ queue `tidings.intake.FROM` ──consume──▶ intake
//!
//!   scheduler ───publish──▶ exchange `tidings` (topic) ──bindings of the consumers──▶ their queues
//!                                                                              ▲       │ rejected, expired
//!   replayer ◀──pass── queue `tidings.dead` ◀── exchange `tidings.dlx` (fanout) ◀──────┘
//!      ├──replay, by the name of the queue──────────────────────────────────────┘
//!      └──▶ queue `tidings.parking`  (dead letters set aside for a person)
//! ```
//!
//! The four names follow `TIDINGS_EXCHANGE`.
//!
//! Must never take an ack for a confirm before the returned messages are matched: RabbitMQ acks an unroutable message
//! as well.
//!
//! To change this folder, know that:
//!
//! - **The client library recovers nothing.** After an error the channel or connection is dropped. What was in flight
//!   is unknown, and only the rows in the database say what to do about it.
//! - **No row is claimed while RabbitMQ is away or blocks publishing:** the scheduler asks [`Broker::is_open`] first.
//!   Each time that publishing becomes possible again, the scheduler is woken.
//!
//! When RabbitMQ restarts, the event of the broken connection makes [`Broker::is_open`] false, so the scheduler claims
//! nothing. Lanes that were publishing get errors or no confirms; they settle the messages whose fate they know, and
//! leave the other rows due. `connection.rs` connects again with backoff, declares the topology, makes
//! [`Broker::is_open`] true and wakes the scheduler. If the URL names several nodes (`nodes.rs`), it connects to the next one.

mod admin;
mod canary;
mod connection;
pub mod dead_letters;
mod fleet;
pub mod frame_guard;
mod intake;
mod nodes;
mod properties;
mod publishing;
pub mod topology;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lapin::options::QueueDeclareOptions;
use lapin::protocol::AMQPSoftError;
use lapin::types::{FieldTable, ShortString};
use lapin::uri::AMQPUri;
use lapin::{Channel, Queue};
use thiserror::Error;
use tidings_core::node_health::NodeHealth;
use tokio::sync::{Mutex, Notify};
use tokio::time::Instant;

use crate::model::health::Notices;
use crate::model::intake::Intake;
use crate::model::secrets::SecretUrl;
use crate::model::wake::Wake;
use nodes::Nodes;

pub use admin::doctor::{Found, TopologyInspection};
pub use admin::management::{Management, ManagementError, QueueInfo};
pub use canary::CanaryInbox;
pub use dead_letters::headers::Destination;
pub use dead_letters::list::{BrowseSession, ListedDeadLetter};
pub use dead_letters::{DeadLetterQueue, DeadLetterSession, FetchedDeadLetter, SendResult};
pub use fleet::FleetChannel;
use frame_guard::ByteBudget;
pub use intake::{IntakeConnection, IntakeConsumer, QueueCounts, Received, incoming, parked_copy};
use publishing::connection::PublishingConnection;
pub use publishing::{Confirmed, PublishError, Verdict, write_message};
pub use topology::DeclaredEntity;

/// How long opening a connection may take, including the login.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// How long RabbitMQ may take to answer one request, such as a declaration or a new channel.
const RPC_DEADLINE: Duration = Duration::from_secs(5);
/// The key in `Broker::refusals` under which the publisher keeps why RabbitMQ takes no messages.
const PUBLISHING: &str = "publishing";
/// How long closing a connection may take.
const CLOSE_DEADLINE: Duration = Duration::from_secs(1);

/// The type of the queues that the daemon declares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueType {
    /// A queue on one node.
    Classic,
    /// A queue with replicas on several nodes, a majority of which must have a message before it is confirmed.
    Quorum,
}

/// Where RabbitMQ is, and the names and the type of what the daemon declares there.
#[derive(Clone, Debug)]
pub struct BrokerSettings {
    /// `TIDINGS_AMQP_URL`
    pub url: SecretUrl,
    /// `TIDINGS_EXCHANGE`, 1 to 200 bytes, so that names derived from it, such as `tidings.parking`, fit into 255
    /// bytes.
    pub exchange: String,
    /// `TIDINGS_QUEUE_TYPE`
    pub queue_type: QueueType,
    /// `TIDINGS_INTAKE`
    pub intakes: Vec<Arc<Intake>>,
}

/// What went wrong between the daemon and RabbitMQ. Always a failure of the infrastructure, never of a row.
#[derive(Debug, Error)]
pub enum BrokerError {
    /// No connection could be made.
    #[error("could not reach RabbitMQ at {place}")]
    Connect {
        /// Host, port and virtual host.
        place: String,
        /// The client library's error.
        #[source]
        source: lapin::Error,
    },
    /// Of several nodes, none can be used.
    #[error("none of the nodes of RabbitMQ can be used: {tried}")]
    NoNode {
        /// Each node, and why not.
        tried: String,
    },
    /// The server's certificate was refused: it may be another server.
    #[error("the certificate of RabbitMQ at {place} is refused: {why}")]
    Certificate {
        /// Host, port and virtual host.
        place: String,
        /// What is wrong with the certificate, and what to do.
        why: &'static str,
        /// The error of the TLS library.
        #[source]
        source: lapin::Error,
    },
    /// RabbitMQ refused the login.
    #[error(
        "RabbitMQ at {place} refused the login; check the user, the password and the virtual host in TIDINGS_AMQP_URL"
    )]
    Login {
        /// User, host, port and virtual host.
        place: String,
        /// RabbitMQ's answer.
        #[source]
        source: lapin::Error,
    },
    /// An exchange or queue exists with other properties than the daemon needs.
    #[error(
        "could not declare {what}: it exists with other arguments; rename it with TIDINGS_EXCHANGE, or stop the daemons, empty it (`tidings dead replay`, `tidings parked retry --all`) and delete it: the daemon declares it again"
    )]
    Mismatch {
        /// The exchange or queue, with the properties that it must have.
        what: String,
        /// RabbitMQ's answer, which names the argument that differs.
        #[source]
        source: lapin::Error,
    },
    /// The exchange of an intake holds messages back itself.
    #[error(
        "the exchange {exchange} is of the type x-delayed-message, whose plugin holds messages back itself: let it empty while its publishers stand still, delete it, and start the daemon, which declares it as topic (moving-here.md says how); or name another exchange in TIDINGS_INTAKE"
    )]
    Delayed {
        /// Its name.
        exchange: String,
    },
    /// An exchange or queue of the daemon is missing, and its user may not declare it.
    #[error(
        "the daemon's user of RabbitMQ may not declare what is missing: {what}; import the definitions that `tidings topology` prints, or give the user the permission to configure it"
    )]
    Missing {
        /// Each missing exchange and queue, with the properties that it must have.
        what: String,
    },
    /// A request failed.
    #[error("RabbitMQ could not {doing}")]
    Operation {
        /// What RabbitMQ was asked to do, as a verb phrase.
        doing: String,
        /// The client library's error.
        #[source]
        source: lapin::Error,
    },
    /// Messages could not be published.
    #[error("RabbitMQ could not {doing}")]
    Publish {
        /// What RabbitMQ was asked to do, as a verb phrase.
        doing: String,
        /// Why.
        #[source]
        source: PublishError,
    },
    /// A message that RabbitMQ delivered did not arrive, although the connection is there.
    #[error(
        "RabbitMQ delivered message {next} of a channel after message {last}: what was between them was lost on the way"
    )]
    Gap {
        /// The number of the last message that arrived.
        last: u64,
        /// The number of the message that arrived after it.
        next: u64,
    },
    /// RabbitMQ did not answer a request in time.
    #[error("gave up after {} s waiting for RabbitMQ to {doing}", .after.as_secs())]
    Deadline {
        /// What RabbitMQ was asked to do, as a verb phrase.
        doing: String,
        /// How long the daemon waited.
        after: Duration,
    },
}

impl BrokerError {
    /// Whether our user lacks a permission, or what it asked for exists with other properties: RabbitMQ would refuse the same
    /// request again.
    #[must_use]
    pub fn is_not_permitted(&self) -> bool {
        matches!(
            topology::soft_error(self),
            Some((AMQPSoftError::ACCESSREFUSED | AMQPSoftError::PRECONDITIONFAILED, _))
        )
    }
}

/// The state of the connection that publishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// It is open.
    pub connected: bool,
    /// RabbitMQ takes no messages on it, because it is short of memory or disk.
    pub blocked: bool,
}

/// The connection to RabbitMQ, and everything that the daemon does there.
#[derive(Debug)]
pub struct Broker {
    nodes: Nodes,
    exchange: String,
    queue_type: QueueType,
    intakes: Vec<Arc<Intake>>,
    /// What the bodies of messages may take that intakes have received.
    intake_budget: Arc<ByteBudget>,
    /// The connection that declares, while there is one.
    connection: Mutex<Option<Arc<lapin::Connection>>>,
    /// The connection that publishes, while there is one.
    publishing: std::sync::Mutex<Option<PublishingConnection>>,
    /// Whether the node that publishes takes messages.
    node_health: std::sync::Mutex<NodeHealth>,
    /// The moments of `node_health` count from here.
    started: Instant,
    /// Is notified when another node is to be used.
    leaving: Notify,
    /// See [`Broker::is_open`].
    open: AtomicBool,
    /// Why RabbitMQ takes no messages although the connection is open.
    refusals: Notices,
    /// Why the last attempt to connect failed; `None` since a connection was made.
    failure: std::sync::Mutex<Option<String>>,
    topology_state: Mutex<topology::repair::TopologyState>,
    wake: Arc<Wake>,
}

/// Checks that `url` is an AMQP URL. The error does not contain the password.
pub(crate) fn check_url(url: &SecretUrl) -> Result<(), String> {
    Nodes::parse(url.expose()).map(drop)
}

impl Broker {
    /// A broker that is not connected yet. [`Broker::run`] connects it, and wakes `wake` when messages can be
    /// published.
    ///
    /// # Panics
    ///
    /// If the URL in `settings` is not an AMQP URL; the configuration checks it before.
    #[must_use]
    pub fn new(settings: &BrokerSettings, wake: Arc<Wake>) -> Self {
        let nodes = Nodes::parse(settings.url.expose());
        Self {
            nodes: nodes.expect("the configuration accepts only URLs that can be understood"),
            exchange: settings.exchange.clone(),
            queue_type: settings.queue_type,
            intakes: settings.intakes.clone(),
            intake_budget: Arc::new(ByteBudget::new(intake::HELD_BYTES)),
            connection: Mutex::new(None),
            publishing: std::sync::Mutex::default(),
            node_health: std::sync::Mutex::default(),
            started: Instant::now(),
            leaving: Notify::new(),
            open: AtomicBool::new(false),
            refusals: Notices::default(),
            failure: std::sync::Mutex::default(),
            topology_state: Mutex::new(topology::repair::TopologyState::new(&settings.exchange, &settings.intakes)),
            wake,
        }
    }

    /// The exchange that the daemon publishes to.
    #[must_use]
    pub fn exchange(&self) -> &str {
        &self.exchange
    }

    /// The daemon's own queues.
    #[must_use]
    pub fn own_queues(&self) -> Vec<DeclaredEntity> {
        let of_intakes = self.intakes.iter().map(|intake| DeclaredEntity::IntakeQueue(Arc::clone(intake)));
        [DeclaredEntity::DeadQueue, DeclaredEntity::ParkingQueue].into_iter().chain(of_intakes).collect()
    }

    /// All exchanges and queues that the daemon declares.
    #[must_use]
    pub fn declared(&self) -> Vec<DeclaredEntity> {
        DeclaredEntity::all(&self.exchange, &self.intakes)
    }

    /// Whether messages can be published now: connected, and not blocked by an alarm.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Why RabbitMQ took no message lately although the connection is open, in its words; `None` = the last batch was
    /// taken, or no row waits.
    #[must_use]
    pub fn refusal(&self) -> Option<String> {
        self.refusals.all().pop()
    }

    /// Clears [`Broker::refusal`] because no row waits: without an attempt to publish it is unknown whether RabbitMQ
    /// still takes no messages.
    pub fn clear_publish_refusal(&self) {
        self.refusals.say(PUBLISHING, None);
    }

    /// Why the last attempt to connect failed; `None` since a connection was made.
    ///
    /// # Panics
    ///
    /// Never: no code panics while it holds the lock.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().expect("no code panics while it holds the lock").clone()
    }

    /// Whether there is a connection that publishes, and whether RabbitMQ blocks it.
    ///
    /// # Panics
    ///
    /// Never: no code panics while it holds the lock.
    #[must_use]
    pub fn link(&self) -> Link {
        let connection = self.publishing.lock().expect("no code panics while it holds the lock");
        let status = connection.as_ref().map(PublishingConnection::status);
        Link {
            connected: status.as_ref().is_some_and(|status| status.ended.is_none()),
            blocked: status.is_some_and(|status| status.blocked.is_some()),
        }
    }

    /// Host, port and virtual host of the node that is used, for logs and errors.
    #[must_use]
    pub fn place(&self) -> String {
        nodes::place(self.uri())
    }

    fn uri(&self) -> &AMQPUri {
        self.nodes.current()
    }
}

/// Waits for `work`, at most [`RPC_DEADLINE`]. `doing` says what RabbitMQ is asked to do, for the error.
async fn with_deadline<T>(doing: &str, work: impl Future<Output = lapin::Result<T>>) -> Result<T, BrokerError> {
    within(RPC_DEADLINE, doing, work).await
}

/// Waits for `work`, at most so long.
async fn within<T>(
    after: Duration,
    doing: &str,
    work: impl Future<Output = lapin::Result<T>>,
) -> Result<T, BrokerError> {
    match tokio::time::timeout(after, work).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(source)) => Err(BrokerError::Operation { doing: doing.to_owned(), source }),
        Err(_) => Err(BrokerError::Deadline { doing: doing.to_owned(), after }),
    }
}

/// How many messages and consumers a queue has. If there is no such queue, RabbitMQ closes the channel.
async fn look_at_queue(channel: &Channel, queue: ShortString) -> Result<Queue, BrokerError> {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let doing = format!("count the messages in the queue {queue}");
    with_deadline(&doing, channel.queue_declare(queue, options, FieldTable::default())).await
}
