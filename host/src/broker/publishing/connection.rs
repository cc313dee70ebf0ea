//! The connection that publishes: a task that writes and reads, and a handle with which the lanes publish through it.
//!
//! Must never decide what a frame means; `session.rs` does.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::Duration;

use amq_protocol::protocol::{AMQPClass, connection};
use futures_util::task::AtomicWaker;
use futures_util::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use lapin::uri::AMQPUri;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use crate::broker::publishing::error::PublishError;
use crate::broker::publishing::handshake::{Agreement, Stream, shake_hands};
use crate::broker::publishing::incoming::Incoming;
use crate::broker::publishing::session::{BatchEnd, Session, Status, write};
use crate::model::message::Message;

/// How large a frame may be before the handshake, and if RabbitMQ sets no limit (its default).
const DEFAULT_FRAME_BYTES: u32 = 128 * 1024;

/// The connection, shared by the lanes. It is closed when the last handle is dropped.
#[derive(Clone, Debug)]
pub(in crate::broker) struct PublishingConnection {
    shared: Arc<Shared>,
    status: watch::Receiver<Status>,
    _task: Arc<AbortOnDropHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    session: Mutex<Session>,
    /// Wakes the task when there is something to write.
    task: AtomicWaker,
}

/// How long bytes may take to be read that arrived while this process stood still.
const LAST_CHANCE: Duration = Duration::from_millis(250);

/// The task's side.
struct Driver {
    shared: Arc<Shared>,
    stream: Stream,
    incoming: Incoming,
    /// What is being written, from this position on.
    writing: (Vec<u8>, usize),
    is_flushed: bool,
    /// When bytes last arrived, and were last written.
    read_at: Instant,
    wrote_at: Instant,
    status: watch::Sender<Status>,
}

impl PublishingConnection {
    /// Logs in on `stream` and starts the task. `name` is the connection's name in RabbitMQ.
    pub(in crate::broker) async fn open(mut stream: Stream, uri: &AMQPUri, name: &str) -> Result<Self, PublishError> {
        let mut incoming = Incoming::new(DEFAULT_FRAME_BYTES as usize);
        let agreed = shake_hands(&mut stream, &mut incoming, uri, name).await?;
        let Agreement { max_channels, max_frame_bytes, heartbeat } = agreed;
        incoming.limit(max_frame_bytes as usize);
        let max_frame_bytes = if max_frame_bytes == 0 { DEFAULT_FRAME_BYTES } else { max_frame_bytes };
        let max_channels = if max_channels == 0 { u16::MAX } else { max_channels };
        let session = Mutex::new(Session::new(max_frame_bytes as usize, max_channels));
        let shared = Arc::new(Shared { session, task: AtomicWaker::new() });
        let (sender, status) = watch::channel(Status::default());
        let driver = Driver {
            shared: Arc::clone(&shared),
            stream,
            incoming,
            writing: (Vec::new(), 0),
            is_flushed: true,
            read_at: Instant::now(),
            wrote_at: Instant::now(),
            status: sender,
        };
        let task = Arc::new(AbortOnDropHandle::new(tokio::spawn(driver.run(Duration::from_secs(heartbeat.into())))));
        Ok(Self { shared, status, _task: task })
    }

    /// Publishes a batch, and waits until each message has an answer, at most until `deadline`. Returns the confirms, and
    /// why some are missing. Not cancel-safe: if the caller stops waiting, the batch goes on, and nobody learns its end.
    ///
    /// # Errors
    ///
    /// When the connection has ended already.
    pub(in crate::broker) async fn publish(
        &self,
        exchange: &str,
        messages: &[Message],
        deadline: Instant,
    ) -> Result<BatchEnd, PublishError> {
        let (channel, end) = self.shared.session().publish(exchange, messages)?;
        self.shared.task.wake();
        match timeout_at(deadline, end).await {
            Ok(Ok(end)) => Ok(end),
            // The session sends the end of each batch before it drops it.
            Ok(Err(_)) => Err(PublishError::Closed),
            Err(_) => {
                let known = self.shared.session().abandon(channel);
                self.shared.task.wake();
                known.map(|confirms| (confirms, None)).ok_or(PublishError::Closed)
            }
        }
    }

    /// Waits until RabbitMQ blocks or unblocks the connection, or it ends. Cancel-safe.
    pub(in crate::broker) async fn changed(&mut self) {
        // If the task is gone, the status says that the connection has ended.
        let _ = self.status.changed().await;
    }

    /// What RabbitMQ says about the connection.
    pub(in crate::broker) fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Asks RabbitMQ to close the connection, and waits until it has.
    pub(in crate::broker) async fn close(mut self) {
        self.shared.session().close();
        self.shared.task.wake();
        while self.status.borrow().ended.is_none() && self.status.changed().await.is_ok() {}
    }
}

impl Shared {
    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().expect("no thread panics while it holds the lock")
    }
}

impl Driver {
    /// Writes and reads until the connection ends.
    async fn run(mut self, heartbeat: Duration) {
        let error = if heartbeat.is_zero() {
            std::future::poll_fn(|context| self.poll(context)).await
        } else {
            // RabbitMQ sends a heartbeat twice in the time that was agreed on. The protocol would wait for four of them; a
            // row would then be late by more than ten seconds when packets vanish.
            let silence = heartbeat * 3 / 2;
            let (mut silent_at, mut is_last_chance) = (self.read_at + silence, false);
            let mut tick = tokio::time::interval(heartbeat / 2);
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    biased;
                    error = std::future::poll_fn(|context| self.poll(context)) => break error,
                    () = tokio::time::sleep_until(silent_at) => {
                        let (now, limit) = (Instant::now(), self.read_at + silence);
                        if now >= limit && is_last_chance {
                            break PublishError::Silent(silence);
                        }
                        // If this process stood still, bytes wait to be read.
                        is_last_chance = now >= limit;
                        silent_at = if is_last_chance { now + LAST_CHANCE } else { limit };
                    }
                    now = tick.tick() => {
                        if now.saturating_duration_since(self.wrote_at) >= heartbeat / 2 {
                            self.shared.session().send_heartbeat();
                        }
                    }
                }
            }
        };
        let status = {
            let mut session = self.shared.session();
            session.end(&error);
            session.status.clone()
        };
        self.status.send_replace(status);
        if matches!(error, PublishError::ConnectionClosed { .. }) {
            let mut bytes = Vec::new();
            write(&mut bytes, 0, AMQPClass::Connection(connection::AMQPMethod::CloseOk(connection::CloseOk {})));
            let _ = self.stream.write_all(&bytes).await;
        }
        let _ = self.stream.close().await;
    }

    /// Writes and reads what it can without waiting. Ready when the connection has ended.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<PublishError> {
        self.shared.task.register(context.waker());
        loop {
            if let Err(error) = self.write(context) {
                return Poll::Ready(error.into());
            }
            match Pin::new(&mut self.stream).poll_read(context, self.incoming.space()) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(read) => {
                    let read = read.and_then(|bytes| self.incoming.filled(bytes)).map_err(PublishError::from);
                    if let Err(error) = read.and_then(|()| self.handle_frames()) {
                        return Poll::Ready(error);
                    }
                }
            }
        }
    }

    fn write(&mut self, context: &mut Context<'_>) -> std::io::Result<()> {
        loop {
            let (bytes, written) = &mut self.writing;
            if *written == bytes.len() {
                let next = self.shared.session().next_outgoing();
                let is_done = next.is_none();
                self.writing = (next.unwrap_or_default(), 0);
                if is_done {
                    break;
                }
                continue;
            }
            match Pin::new(&mut self.stream).poll_write(context, &bytes[*written..]) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Ok(0)) => return Err(std::io::ErrorKind::WriteZero.into()),
                Poll::Ready(count) => *written += count?,
            }
            self.is_flushed = false;
            self.wrote_at = Instant::now();
        }
        if !self.is_flushed
            && let Poll::Ready(flushed) = Pin::new(&mut self.stream).poll_flush(context)
        {
            flushed?;
            self.is_flushed = true;
        }
        Ok(())
    }

    fn handle_frames(&mut self) -> Result<(), PublishError> {
        let now = Instant::now();
        self.read_at = now;
        let mut session = self.shared.session();
        let was_blocked = session.status.blocked.is_some();
        while let Some(frame) = self.incoming.next_frame()? {
            session.handle(frame, now)?;
        }
        if session.status.blocked.is_some() != was_blocked {
            self.status.send_replace(session.status.clone());
        }
        Ok(())
    }
}
