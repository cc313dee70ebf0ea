//! Keeps one connection to RabbitMQ, for ever: connects, declares what is ours, watches, and begins again.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio};
use futures_util::StreamExt as _;
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::tcp::{AMQPUriTcpExt as _, AsyncTcpStream};
use lapin::uri::AMQPUri;
use lapin::{Connection, ConnectionProperties, Event};
use tidings_core::backoff::RECONNECT;
use tidings_core::reason::Reason;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::broker::frame_guard::{Bodies, FrameGuard, GuardingReactor};
use crate::broker::{Broker, BrokerError, CLOSE_DEADLINE, CONNECT_DEADLINE, PUBLISHING};
use crate::model::backoff::jittered;
use crate::model::tls_error;

impl Broker {
    /// Connects as often as it takes, and keeps the connection until `shutdown`. `ready` is called at the first.
    ///
    /// # Errors
    ///
    /// When, at the first connection, what exists is not what we need: a person must see to that.
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
                Ok(connection) => {
                    failures = 0;
                    self.failed(None);
                    info!(broker = self.place(), exchange = self.exchange, "connected to RabbitMQ");
                    if let Some(ready) = ready.take() {
                        ready();
                    }
                    if self.watch(connection, &shutdown).await {
                        return Ok(());
                    }
                }
                Err(error @ BrokerError::Mismatch { .. }) if ready.is_some() => return Err(error),
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "RabbitMQ cannot be used, trying again");
                    self.failed(Some(format!("{:#}", anyhow::Error::from(error))));
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

    async fn connect(&self) -> Result<Connection, BrokerError> {
        let connection = self.connect_only("tidings").await?;
        self.keep_on(&connection, true).await?;
        Ok(connection)
    }

    fn failed(&self, why: Option<String>) {
        *self.failure.lock().expect("nobody panics with it") = why;
    }

    /// A connection on which nothing has been declared.
    pub(super) async fn connect_only(&self, name: &str) -> Result<Connection, BrokerError> {
        let properties = ConnectionProperties::default().with_connection_name(name.into());
        self.connected(Connection::connect_uri(self.uri.clone(), properties)).await
    }

    /// A connection that may read what anybody has written.
    pub(super) async fn connect_for_letters(&self, bodies: Bodies) -> Result<Connection, BrokerError> {
        let properties = ConnectionProperties::default().with_connection_name("tidings dead letters".into());
        let runtime = Runtime::new(RuntimeParts::new(Tokio::current(), GuardingReactor(Tokio::current())));
        let connect = async move |uri: AMQPUri, _| {
            let connected = uri.connect_async(&Runtime::tokio_current()).await;
            let stream = connected.map_err(lapin::Error::from)?;
            Ok(AsyncTcpStream::Plain(FrameGuard::new(stream, bodies)))
        };
        self.connected(Connection::connector(self.uri.clone(), runtime, connect, properties)).await
    }

    pub(super) async fn connected(
        &self,
        connecting: impl Future<Output = lapin::Result<Connection>>,
    ) -> Result<Connection, BrokerError> {
        match tokio::time::timeout(CONNECT_DEADLINE, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(source)) => Err(self.connect_error(source)),
            Err(_) => Err(BrokerError::Deadline {
                doing: format!("accept a connection at {}", self.place()),
                after: CONNECT_DEADLINE,
            }),
        }
    }

    fn connect_error(&self, source: lapin::Error) -> BrokerError {
        let refused = matches!(source.kind(), lapin::ErrorKind::ProtocolError(error) if matches!(
            error.kind(),
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) | AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED)
        ));
        if refused {
            let user = &self.uri.authority.userinfo.username;
            BrokerError::Login { place: format!("{} as {user}", self.place()), source }
        } else if let lapin::ErrorKind::IOError(error) = source.kind()
            && let Some(why) = tls_error::refusal(error)
        {
            BrokerError::Certificate { place: self.place(), why, source }
        } else {
            BrokerError::Connect { place: self.place(), source }
        }
    }

    /// Lets the connection be used until it breaks, or until `shutdown`, for which it returns `true`.
    async fn watch(&self, connection: Connection, shutdown: &CancellationToken) -> bool {
        let mut events = connection.events_listener();
        self.refusals.say(PUBLISHING, None);
        let connection = Arc::new(connection);
        *self.connection.lock().await = Some(Arc::clone(&connection));
        // The event of a break before we listened is lost; the status is not.
        let mut usable = connection.status().connected();
        let stopping = loop {
            self.open.store(usable, Ordering::Release);
            if usable {
                self.wake.wake(Reason::Broker);
            }
            if !connection.status().connected() {
                break false;
            }
            let event = tokio::select! {
                biased;
                () = shutdown.cancelled() => break true,
                event = events.next() => event,
            };
            usable = match event {
                Some(Event::ConnectionBlocked(reason)) => {
                    warn!(reason, "RabbitMQ blocks publishing; rows wait until it is over");
                    false
                }
                Some(Event::ConnectionUnblocked) => {
                    info!("RabbitMQ takes messages again");
                    true
                }
                // A channel's error is an event as well; it concerns those who publish on it.
                Some(Event::Error(error)) if !connection.status().connected() => {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "lost the connection to RabbitMQ, connecting again"
                    );
                    false
                }
                Some(_) => usable,
                None => false,
            };
        };
        self.open.store(false, Ordering::Release);
        self.connection.lock().await.take();
        self.idle_channels.lock().await.clear();
        let _ = tokio::time::timeout(CLOSE_DEADLINE, connection.close(200, "good-bye".into())).await;
        stopping
    }
}
