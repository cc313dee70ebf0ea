//! Keeps two connections to RabbitMQ until the shutdown, one that declares and one that publishes: connects, repairs the
//! topology, waits until one of them breaks, and connects both again with backoff. Also opens the other connections: for dead
//! letters, the canary and `tidings doctor`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::tcp::{AMQPUriTcpExt as _, AsyncTcpStream};
use lapin::uri::AMQPUri;
use lapin::{Connection, ConnectionProperties, Event};
use tidings_core::backoff::RECONNECT;
use tidings_core::reason::Reason;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::broker::frame_guard::{Bodies, FrameGuard, GuardingReactor};
use crate::broker::nodes::place;
use crate::broker::publishing::connection::PublishingConnection;
use crate::broker::publishing::handshake;
use crate::broker::{Broker, BrokerError, CLOSE_DEADLINE, CONNECT_DEADLINE, PUBLISHING};
use crate::model::backoff::jittered;
use crate::model::error_chain::error_chain;
use crate::model::tls_error;

/// How long a node may take to be connected before the next one is tried as well.
const HEAD_START: Duration = Duration::from_secs(2);

impl Broker {
    /// Connects, and connects again whenever the connection breaks, until `shutdown`. Calls `ready` after the first
    /// connect.
    ///
    /// # Errors
    ///
    /// When, before the first connect succeeded, an exchange or queue exists with other properties than the daemon
    /// needs. A person must resolve that.
    pub async fn run(&self, shutdown: CancellationToken, ready: impl FnOnce() + Send) -> Result<(), BrokerError> {
        let mut ready = Some(ready);
        let mut failures = 0;
        loop {
            let connected = tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                connected = self.connect() => connected,
            };
            match connected {
                Ok((connection, publishing)) => {
                    failures = 0;
                    self.set_failure(None);
                    info!(broker = self.place(), exchange = self.exchange, "connected to RabbitMQ");
                    if let Some(ready) = ready.take() {
                        ready();
                    }
                    if self.use_until_closed(connection, publishing, &shutdown).await {
                        return Ok(());
                    }
                }
                Err(error @ (BrokerError::Mismatch { .. } | BrokerError::Delayed { .. })) if ready.is_some() => {
                    return Err(error);
                }
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "RabbitMQ cannot be used, trying again");
                    self.set_failure(Some(format!("{:#}", anyhow::Error::from(error))));
                }
            }
            let delay = jittered(&RECONNECT, failures);
            failures = failures.saturating_add(1);
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                () = tokio::time::sleep(delay) => {}
            }
        }
    }

    /// Connects to the first node that can be used, and uses it from now on.
    async fn connect(&self) -> Result<(Connection, PublishingConnection), BrokerError> {
        let connect = |uri: AMQPUri| async move {
            let connection = self.connect_guarded_to(&uri, "tidings", Bodies::Pass).await?;
            self.repair_topology_on(&connection, true).await?;
            Ok((connection, self.connect_for_publishing(&uri).await?))
        };
        let (number, connections) = self.on_a_node(connect).await?;
        self.nodes.use_node(number);
        Ok(connections)
    }

    /// Tries `connect` with each node in turn, beginning with the one that is used, until one can be used. Returns its number
    /// as well. One that does not answer (it is frozen, or packets vanish) holds up the next one for [`HEAD_START`] only.
    async fn on_a_node<T, F: Future<Output = Result<T, BrokerError>>>(
        &self,
        connect: impl Fn(AMQPUri) -> F,
    ) -> Result<(usize, T), BrokerError> {
        let mut left = self.nodes.in_turn().map(|(number, uri)| {
            let connecting = connect(uri.clone());
            async move { (number, place(uri), connecting.await) }
        });
        let (mut attempts, mut failed) = (FuturesUnordered::new(), Vec::new());
        attempts.extend(left.next());
        loop {
            let ended = tokio::select! {
                biased;
                ended = attempts.next() => ended,
                () = tokio::time::sleep(HEAD_START) => {
                    attempts.extend(left.next());
                    continue;
                }
            };
            match ended {
                None => break,
                Some((number, _, Ok(connected))) => return Ok((number, connected)),
                // Every node would say the same.
                Some((
                    ..,
                    Err(
                        error @ (BrokerError::Login { .. }
                        | BrokerError::Mismatch { .. }
                        | BrokerError::Delayed { .. }
                        | BrokerError::Missing { .. }),
                    ),
                )) => return Err(error),
                Some((_, place, Err(error))) => failed.push((place, error)),
            }
            attempts.extend(left.next());
        }
        if failed.len() == 1
            && let Some((_, error)) = failed.pop()
        {
            return Err(error);
        }
        let tried = failed.into_iter().map(|(place, error)| format!("{place}: {}", error_chain(&error)));
        Err(BrokerError::NoNode { tried: tried.collect::<Vec<_>>().join("; ") })
    }

    async fn connect_for_publishing(&self, uri: &AMQPUri) -> Result<PublishingConnection, BrokerError> {
        let doing = || format!("accept a connection at {} to publish", place(uri));
        let opening = async {
            let connected = handshake::connect(uri).await;
            let stream = connected.map_err(|error| connect_error(uri, lapin::Error::from(error)))?;
            let opened = PublishingConnection::open(stream, uri, "tidings publishing").await;
            opened.map_err(|source| BrokerError::Publish { doing: doing(), source })
        };
        match tokio::time::timeout(CONNECT_DEADLINE, opening).await {
            Ok(opened) => opened,
            Err(_) => Err(BrokerError::Deadline { doing: doing(), after: CONNECT_DEADLINE }),
        }
    }

    fn set_failure(&self, why: Option<String>) {
        *self.failure.lock().expect("no code panics while it holds the lock") = why;
    }

    /// Opens a connection, and declares nothing on it.
    pub(super) async fn connect_without_declaring(&self, name: &str) -> Result<Connection, BrokerError> {
        let connect = |uri: AMQPUri| async move {
            let properties = ConnectionProperties::default().with_connection_name(name.into());
            await_connection(&uri, Connection::connect_uri(uri.clone(), properties)).await
        };
        self.on_a_node(connect).await.map(|(_, connection)| connection)
    }

    /// Opens a connection for dead letters.
    pub(super) async fn connect_for_dead_letters(&self, bodies: Bodies) -> Result<Connection, BrokerError> {
        self.connect_guarded("tidings dead letters", bodies).await
    }

    /// Opens a connection behind the frame guard, because anyone who may publish can have written the headers of a dead
    /// letter, or of what is taken for an announcement.
    pub(super) async fn connect_guarded(&self, name: &str, bodies: Bodies) -> Result<Connection, BrokerError> {
        let connect = |uri: AMQPUri| {
            let bodies = bodies.clone();
            async move { self.connect_guarded_to(&uri, name, bodies).await }
        };
        self.on_a_node(connect).await.map(|(_, connection)| connection)
    }

    async fn connect_guarded_to(&self, uri: &AMQPUri, name: &str, bodies: Bodies) -> Result<Connection, BrokerError> {
        let properties = ConnectionProperties::default().with_connection_name(name.into());
        let runtime = Runtime::new(RuntimeParts::new(Tokio::current(), GuardingReactor(Tokio::current())));
        let connect = async move |uri: AMQPUri, _| {
            let connected = uri.connect_async(&Runtime::tokio_current()).await;
            let stream = connected.map_err(lapin::Error::from)?;
            Ok(AsyncTcpStream::Plain(FrameGuard::new(stream, bodies.clone())))
        };
        await_connection(uri, Connection::connector(uri.clone(), runtime, connect, properties)).await
    }

    /// Lets the daemon use the connections until one of them breaks or `shutdown` is cancelled, and returns whether it was
    /// the shutdown.
    async fn use_until_closed(
        &self,
        connection: Connection,
        mut publishing: PublishingConnection,
        shutdown: &CancellationToken,
    ) -> bool {
        let mut events = connection.events_listener();
        self.refusals.say(PUBLISHING, None);
        // Batches that were given to another node and get no answer say nothing about this one.
        let connected = self.started.elapsed();
        self.node_health.lock().expect("no code panics while it holds the lock").connected(connected);
        let connection = Arc::new(connection);
        *self.connection.lock().await = Some(Arc::clone(&connection));
        self.set_publishing(Some(publishing.clone()));
        let mut was_blocked = false;
        let stopping = loop {
            let status = publishing.status();
            if let Some(error) = &status.ended {
                warn!(error = error as &dyn std::error::Error, "lost the connection to RabbitMQ, connecting again");
                break false;
            }
            // Its error was logged when it came. A break before `events_listener` was called makes no event.
            if !connection.status().connected() {
                break false;
            }
            match &status.blocked {
                Some(reason) if !was_blocked => {
                    warn!(reason, "RabbitMQ blocks publishing; rows wait until it is over");
                }
                None if was_blocked => info!("RabbitMQ takes messages again"),
                _ => {}
            }
            was_blocked = status.blocked.is_some();
            let was_open = self.open.swap(!was_blocked, Ordering::AcqRel);
            if !was_blocked && !was_open {
                self.wake.wake(Reason::Broker);
            }
            let event = tokio::select! {
                biased;
                () = shutdown.cancelled() => break true,
                () = publishing.changed() => continue,
                () = self.leaving.notified() => {
                    warn!(broker = self.place(), "RabbitMQ takes no message at this node, going on with another one");
                    break false;
                }
                event = events.next() => event,
            };
            match event {
                // The error of a single channel is an event as well, and is handled where the channel is used.
                Some(Event::Error(error)) if !connection.status().connected() => {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "lost the connection to RabbitMQ, connecting again"
                    );
                }
                Some(_) => {}
                None => break false,
            }
        };
        self.open.store(false, Ordering::Release);
        self.nodes.leave();
        self.connection.lock().await.take();
        self.set_publishing(None);
        let closing = async { tokio::join!(publishing.close(), connection.close(200, "good-bye".into())) };
        let _ = tokio::time::timeout(CLOSE_DEADLINE, closing).await;
        stopping
    }

    fn set_publishing(&self, connection: Option<PublishingConnection>) {
        *self.publishing.lock().expect("no code panics while it holds the lock") = connection;
    }
}

/// Waits for `connecting`, at most [`CONNECT_DEADLINE`], and tells what went wrong.
async fn await_connection(
    uri: &AMQPUri,
    connecting: impl Future<Output = lapin::Result<Connection>>,
) -> Result<Connection, BrokerError> {
    match tokio::time::timeout(CONNECT_DEADLINE, connecting).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(source)) => Err(connect_error(uri, source)),
        Err(_) => Err(BrokerError::Deadline {
            doing: format!("accept a connection at {}", place(uri)),
            after: CONNECT_DEADLINE,
        }),
    }
}

fn connect_error(uri: &AMQPUri, source: lapin::Error) -> BrokerError {
    let refused = matches!(source.kind(), lapin::ErrorKind::ProtocolError(error) if matches!(
        error.kind(),
        AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) | AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED)
    ));
    let place = place(uri);
    if refused {
        BrokerError::Login { place: format!("{place} as {}", uri.authority.userinfo.username), source }
    } else if let lapin::ErrorKind::IOError(error) = source.kind()
        && let Some(why) = tls_error::refusal(error)
    {
        BrokerError::Certificate { place, why, source }
    } else {
        BrokerError::Connect { place, source }
    }
}
