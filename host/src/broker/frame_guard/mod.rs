//! The frame guard: it stands between RabbitMQ and the client library on every connection that reads dead letters, and
//! replaces headers that the library cannot read.
//!
//! Anyone who may publish can write a dead letter's headers. The client library fails at three kinds of them:
//!
//! - tables nested a thousand deep overflow its stack, which kills the process;
//! - a name that is not UTF-8 makes it stop reading;
//! - a frame longer than the limit makes it close the connection.
//!
//! The guard replaces such headers by a single one, `tidings-unreadable`, which carries the original bytes. Everything
//! else passes unchanged, except that a connection for a listing drops all bodies, so that a listing holds none in
//! memory, however large they are. A connection for intakes passes bodies only while those before them fit into memory: the
//! other bytes stay in the socket and in RabbitMQ.
//!
//! Must never let a header frame reach the library that it cannot read, and never buffer a body.

pub mod field_table;

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_rs::Tokio;
use async_rs::traits::Reactor;
use futures_io::{AsyncRead, AsyncWrite};
use futures_util::Stream;
use futures_util::task::AtomicWaker;
use lapin::tcp::AsyncTcpStream;

/// A socket of tokio, with or without TLS, behind the guard.
pub(super) type GuardedStream = FrameGuard<AsyncTcpStream<<Tokio as Reactor>::TcpStream>>;

/// The bytes of a frame before its payload: type, channel and length. After the payload comes one end byte.
const FRAME_START: usize = 7;
/// The frame types.
const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
/// Where a header frame has the length of the body.
const BODY_LENGTH: std::ops::Range<usize> = FRAME_START + 4..FRAME_START + 12;
/// A heartbeat frame. It replaces a body frame that is dropped, so that the client library sees traffic on the
/// connection.
const HEARTBEAT: [u8; 8] = [8, 0, 0, 0, 0, 0, 0, 0xCE];
/// Class and method of `connection.tune`. Then come the maximum number of channels (2 bytes) and of bytes in a frame (4
/// bytes).
const TUNE: [u8; 4] = [0, 10, 0, 30];

/// A stream whose reading side goes through a [`FrameFilter`].
#[derive(Debug)]
pub(super) struct FrameGuard<S> {
    stream: S,
    filter: FrameFilter,
}

impl<S> FrameGuard<S> {
    pub(super) fn new(stream: S, bodies: Bodies) -> Self {
        Self { stream, filter: FrameFilter { bodies, ..FrameFilter::default() } }
    }
}

/// What the guard does with the bodies of messages.
#[derive(Clone, Debug, Default)]
pub(super) enum Bodies {
    /// Passes them on.
    #[default]
    Pass,
    /// Drops them: the client library sees messages without a body.
    Drop,
    /// Passes them on, and reads no further message while those that passed are not released and have used up the budget.
    Within(Arc<ByteBudget>),
}

impl<S: AsyncRead + Unpin> AsyncRead for FrameGuard<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        let Self { stream, filter } = &mut *self;
        let mut buffer = [0; 16 * 1024];
        while filter.output.is_empty() {
            if !filter.may_read(context) {
                return Poll::Pending;
            }
            let count = ready!(Pin::new(&mut *stream).poll_read(context, &mut buffer))?;
            if count == 0 {
                return Poll::Ready(Ok(0));
            }
            filter.add(&buffer[..count]);
        }
        let count = into.len().min(filter.output.len());
        into[..count].copy_from_slice(&filter.output[..count]);
        filter.output.drain(..count);
        Poll::Ready(Ok(count))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for FrameGuard<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(context)
    }
}

/// Filters the bytes from RabbitMQ: it holds method and header frames back until they are complete, and passes or drops
/// the bytes of all other frames as they arrive.
#[derive(Debug, Default)]
struct FrameFilter {
    /// The bytes that the client library may read.
    output: Vec<u8>,
    /// The beginning of a frame.
    held: Vec<u8>,
    /// How many bytes of the current frame are still to be passed, or to be dropped.
    remaining: usize,
    /// The current frame is dropped.
    is_dropping: bool,
    bodies: Bodies,
    /// The maximum number of bytes in a frame, from `connection.tune`; 0 = no limit.
    max_frame_bytes: usize,
    /// How many bytes of bodies are still to come, after the header frames that passed.
    body_bytes_to_come: usize,
}

impl FrameFilter {
    /// Whether further bytes may be read now. Otherwise the task is woken when they may.
    fn may_read(&self, context: &Context<'_>) -> bool {
        match &self.bodies {
            // A message that has begun is read to its end: until then, nobody can release it.
            Bodies::Within(budget) if self.body_bytes_to_come == 0 => budget.is_left(context),
            Bodies::Within(_) | Bodies::Pass | Bodies::Drop => true,
        }
    }

    fn add(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (taken, rest) = if self.remaining > 0 {
                let (taken, rest) = bytes.split_at(bytes.len().min(self.remaining));
                self.remaining -= taken.len();
                if !self.is_dropping {
                    self.output.extend_from_slice(taken);
                }
                (taken.len(), rest)
            } else {
                let wanted = self.frame_bytes().unwrap_or(FRAME_START) - self.held.len();
                let (taken, rest) = bytes.split_at(bytes.len().min(wanted));
                self.held.extend_from_slice(taken);
                (taken.len(), rest)
            };
            debug_assert!(taken > 0, "each turn takes something");
            bytes = rest;
            self.release();
        }
    }

    /// The length of the frame whose beginning is held; `None` until its length field is complete.
    fn frame_bytes(&self) -> Option<usize> {
        let length: [u8; 4] = self.held.get(3..FRAME_START)?.try_into().ok()?;
        Some(FRAME_START + u32::from_be_bytes(length) as usize + 1)
    }

    /// Moves what is held to the output, once enough of the frame has arrived to decide what to do with it.
    fn release(&mut self) {
        let Some(length) = self.frame_bytes() else { return };
        match self.held[0] {
            METHOD | HEADER if self.held.len() < length => return,
            METHOD => {
                let payload = &self.held[FRAME_START..length - 1];
                if let Some(max) = payload.strip_prefix(&TUNE).and_then(|tune| tune.get(2..6)?.try_into().ok()) {
                    self.max_frame_bytes = u32::from_be_bytes(max) as usize;
                }
            }
            HEADER => {
                if let Some(length) = self.held.get_mut(BODY_LENGTH) {
                    match &self.bodies {
                        Bodies::Pass => {}
                        Bodies::Drop => length.fill(0),
                        Bodies::Within(budget) => {
                            let length = u64::from_be_bytes((&*length).try_into().expect("eight bytes"));
                            let length = usize::try_from(length).unwrap_or(usize::MAX);
                            self.body_bytes_to_come = self.body_bytes_to_come.saturating_add(length);
                            budget.use_up(length);
                        }
                    }
                }
                let max_frame_bytes = if self.max_frame_bytes == 0 { usize::MAX } else { self.max_frame_bytes };
                if let Some(payload) = field_table::replacement(&self.held[FRAME_START..length - 1], max_frame_bytes) {
                    let length = u32::try_from(payload.len()).expect("shorter than a frame").to_be_bytes();
                    self.output.extend([&self.held[..3], &length, &payload, &[0xCE]].concat());
                    self.held.clear();
                    return;
                }
            }
            frame_type => {
                self.remaining = length - self.held.len();
                self.is_dropping = frame_type == BODY && matches!(self.bodies, Bodies::Drop);
                if frame_type == BODY {
                    self.body_bytes_to_come = self.body_bytes_to_come.saturating_sub(length - FRAME_START - 1);
                }
                if self.is_dropping {
                    self.held.clear();
                    self.output.extend(HEARTBEAT);
                }
            }
        }
        self.output.append(&mut self.held);
    }
}

/// How many bytes of bodies may be in memory.
#[derive(Debug)]
pub(super) struct ByteBudget {
    limit: usize,
    used: AtomicUsize,
    /// The task that waits for bytes to be released.
    reader: AtomicWaker,
}

impl ByteBudget {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, used: AtomicUsize::new(0), reader: AtomicWaker::new() }
    }

    /// Releases so many bytes, which are in memory no more.
    pub(super) fn release(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
        self.reader.wake();
    }

    fn use_up(&self, bytes: usize) {
        self.used.fetch_add(bytes, Ordering::AcqRel);
    }

    /// Whether it is not used up. Otherwise the task is woken when it is not.
    fn is_left(&self, context: &Context<'_>) -> bool {
        if self.used.load(Ordering::Acquire) < self.limit {
            return true;
        }
        self.reader.register(context.waker());
        // It may have been released before the task was registered.
        self.used.load(Ordering::Acquire) < self.limit
    }
}

/// Tokio's reactor, with [`GuardedStream`] as the type of its sockets, which the client library requires of a stream's
/// reactor.
#[derive(Clone, Debug)]
pub(super) struct GuardingReactor(pub(super) Tokio);

impl Reactor for GuardingReactor {
    type TcpStream = GuardedStream;
    type Sleep = <Tokio as Reactor>::Sleep;

    /// For sockets that are connected already: unsupported, because the daemon has none.
    fn register<H: io::Read + io::Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<Self::TcpStream, _>(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, time: Duration) -> Self::Sleep {
        self.0.sleep(time)
    }

    fn interval(&self, time: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(time)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(address);
        async move { Ok(FrameGuard::new(AsyncTcpStream::Plain(connecting.await?), Bodies::Pass)) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(frame_type: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
        [&[frame_type, 0, 1][..], &length, payload, &[0xCE]].concat()
    }

    fn filtered(bytes: &[u8], chunk_bytes: usize, bodies: Bodies) -> Vec<u8> {
        let mut filter = FrameFilter { bodies, ..FrameFilter::default() };
        for chunk in bytes.chunks(chunk_bytes) {
            filter.add(chunk);
        }
        filter.output
    }

    proptest! {
        #[test]
        fn readable_frames_pass_unchanged_in_chunks_of_any_size(
            frames in proptest::collection::vec((prop_oneof![Just(1_u8), Just(3), Just(8)], proptest::collection::vec(any::<u8>(), 0..300)), 0..8),
            chunk_bytes in 1..400_usize,
        ) {
            let bytes: Vec<u8> = frames.iter().flat_map(|(frame_type, payload)| frame(*frame_type, payload)).collect();
            prop_assert_eq!(filtered(&bytes, chunk_bytes, Bodies::Pass), bytes);
        }

        #[test]
        fn a_listing_gets_every_frame_except_bodies_in_chunks_of_any_size(
            bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..4),
            chunk_bytes in 1..400_usize,
        ) {
            let header = |length: usize| frame(HEADER, &[&[0, 60, 0, 0][..], &(length as u64).to_be_bytes(), &[0, 0]].concat());
            let length = bodies.iter().map(Vec::len).sum();
            let frames = [frame(METHOD, b"method"), header(length)].into_iter();
            let bytes: Vec<u8> = frames.chain(bodies.iter().map(|body| frame(BODY, body))).chain([frame(8, &[])]).flatten().collect();
            let heartbeats = HEARTBEAT.repeat(bodies.len());
            let expected = [frame(METHOD, b"method"), header(0), heartbeats, frame(8, &[])].concat();
            prop_assert_eq!(filtered(&bytes, chunk_bytes, Bodies::Drop), expected);
        }
    }

    #[test]
    fn no_message_is_read_while_those_before_it_have_used_up_the_budget_and_one_that_has_begun_is_read_to_its_end() {
        let header = |length: u64| frame(HEADER, &[&[0, 60, 0, 0][..], &length.to_be_bytes(), &[0, 0]].concat());
        let budget = Arc::new(ByteBudget::new(100));
        let mut filter = FrameFilter { bodies: Bodies::Within(Arc::clone(&budget)), ..FrameFilter::default() };
        let context = Context::from_waker(std::task::Waker::noop());
        assert!(filter.may_read(&context));
        filter.add(&[header(150), frame(BODY, &[7; 60])].concat());
        assert!(filter.may_read(&context), "90 bytes of the message are still to come");
        filter.add(&frame(BODY, &[7; 90]));
        assert!(!filter.may_read(&context), "150 bytes are in memory");
        budget.release(40);
        assert!(!filter.may_read(&context), "110 bytes are in memory");
        budget.release(110);
        assert!(filter.may_read(&context));
        filter.add(&header(0));
        assert!(filter.may_read(&context), "a message without a body uses nothing");
    }

    #[test]
    fn headers_longer_than_the_negotiated_frame_are_replaced_and_shorter_ones_pass() {
        let tune =
            |max_frame_bytes: u32| frame(1, &[&TUNE[..], &[0, 9], &max_frame_bytes.to_be_bytes(), &[0, 0]].concat());
        // The only property is a content type.
        let header = frame(2, &[&[0, 60, 0, 0][..], &[0; 8], &[0x80, 0, 200], &[b'x'; 200]].concat());
        for (max_frame_bytes, passes) in [(0, true), (4096, true), (600, false)] {
            let bytes = [tune(max_frame_bytes), header.clone()].concat();
            assert_eq!(filtered(&bytes, 10, Bodies::Pass) == bytes, passes, "{max_frame_bytes}");
        }
    }
}
