//! What stands between the broker and the client library on a connection for dead letters. Anybody who may publish can
//! write headers that the library cannot read: nested so deeply that it runs out of stack and takes the process with it,
//! with names that are not UTF-8, at which it stops, or in a frame beyond the limit, at which it hangs up. Such headers are
//! replaced by one that carries them as they came; everything else passes untouched, or for who only looks at letters all but
//! the bodies, so that a look holds none, however large they are.

pub mod field_table;

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_rs::Tokio;
use async_rs::traits::Reactor;
use futures_io::{AsyncRead, AsyncWrite};
use futures_util::Stream;
use lapin::tcp::AsyncTcpStream;

/// The sockets of tokio, with or without TLS, behind the sieve.
pub(super) type GuardedStream = FrameGuard<AsyncTcpStream<<Tokio as Reactor>::TcpStream>>;

/// Of a frame: its type, channel and length before the payload, and the end byte after it.
const START: usize = 7;
const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
/// Where the frame of a header has the length of the body.
const BODY_LENGTH: std::ops::Range<usize> = START + 4..START + 12;
/// Stands for the frame of a body, so that the client library sees that the connection lives.
const HEARTBEAT: [u8; 8] = [8, 0, 0, 0, 0, 0, 0, 0xCE];
/// `connection.tune`, after which come the channels and then the longest frame.
const TUNE: [u8; 4] = [0, 10, 0, 30];

/// A stream whose reading end is sieved.
#[derive(Debug)]
pub(super) struct FrameGuard<S> {
    stream: S,
    frames: Frames,
}

impl<S> FrameGuard<S> {
    pub(super) fn new(stream: S, bodies: Bodies) -> Self {
        Self { stream, frames: Frames { bodies, ..Frames::default() } }
    }
}

/// What becomes of the bodies of messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Bodies {
    /// They pass.
    #[default]
    Pass,
    /// Every message has none.
    Drop,
}

impl<S: AsyncRead + Unpin> AsyncRead for FrameGuard<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        let Self { stream, frames } = &mut *self;
        let mut buffer = [0; 16 * 1024];
        while frames.done.is_empty() {
            let count = ready!(Pin::new(&mut *stream).poll_read(context, &mut buffer))?;
            if count == 0 {
                return Poll::Ready(Ok(0));
            }
            frames.add(&buffer[..count]);
        }
        let count = into.len().min(frames.done.len());
        into[..count].copy_from_slice(&frames.done[..count]);
        frames.done.drain(..count);
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

/// Bytes on their way: frames of methods and headers are held until they are whole, bodies pass.
#[derive(Debug, Default)]
struct Frames {
    /// What may be read.
    done: Vec<u8>,
    /// The beginning of a frame.
    held: Vec<u8>,
    /// Bytes of a frame that passes as it is, or does not.
    passing: usize,
    /// Those do not.
    dropping: bool,
    bodies: Bodies,
    /// The longest frame that was agreed upon; 0 = any.
    longest: usize,
}

impl Frames {
    fn add(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (taken, rest) = if self.passing > 0 {
                let (taken, rest) = bytes.split_at(bytes.len().min(self.passing));
                self.passing -= taken.len();
                if !self.dropping {
                    self.done.extend_from_slice(taken);
                }
                (taken.len(), rest)
            } else {
                let wanted = self.length().unwrap_or(START) - self.held.len();
                let (taken, rest) = bytes.split_at(bytes.len().min(wanted));
                self.held.extend_from_slice(taken);
                (taken.len(), rest)
            };
            debug_assert!(taken > 0, "each turn takes something");
            bytes = rest;
            self.release();
        }
    }

    /// How long the frame is whose beginning is held, as far as that is known.
    fn length(&self) -> Option<usize> {
        let length: [u8; 4] = self.held.get(3..START)?.try_into().ok()?;
        Some(START + u32::from_be_bytes(length) as usize + 1)
    }

    /// Lets go of what is held, if enough of it is here to know what it is.
    fn release(&mut self) {
        let Some(length) = self.length() else { return };
        match self.held[0] {
            METHOD | HEADER if self.held.len() < length => return,
            METHOD => {
                let payload = &self.held[START..length - 1];
                if let Some(longest) = payload.strip_prefix(&TUNE).and_then(|tune| tune.get(2..6)?.try_into().ok()) {
                    self.longest = u32::from_be_bytes(longest) as usize;
                }
            }
            HEADER => {
                if self.bodies == Bodies::Drop
                    && let Some(length) = self.held.get_mut(BODY_LENGTH)
                {
                    length.fill(0);
                }
                let longest = if self.longest == 0 { usize::MAX } else { self.longest };
                if let Some(other) = field_table::instead(&self.held[START..length - 1], longest) {
                    let length = u32::try_from(other.len()).expect("shorter than a frame").to_be_bytes();
                    self.done.extend([&self.held[..3], &length, &other, &[0xCE]].concat());
                    self.held.clear();
                    return;
                }
            }
            kind => {
                self.passing = length - self.held.len();
                self.dropping = kind == BODY && self.bodies == Bodies::Drop;
                if self.dropping {
                    self.held.clear();
                    self.done.extend(HEARTBEAT);
                }
            }
        }
        self.done.append(&mut self.held);
    }
}

/// Tokio's reactor, for a client library that believes that its sockets are sieved ones.
#[derive(Clone, Debug)]
pub(super) struct GuardingReactor(pub(super) Tokio);

impl Reactor for GuardingReactor {
    type TcpStream = GuardedStream;
    type Sleep = <Tokio as Reactor>::Sleep;

    /// For sockets that are connected already, of which there are none.
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

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
        [&[kind, 0, 1][..], &length, payload, &[0xCE]].concat()
    }

    fn sieved(bytes: &[u8], at_once: usize, bodies: Bodies) -> Vec<u8> {
        let mut frames = Frames { bodies, ..Frames::default() };
        for bytes in bytes.chunks(at_once) {
            frames.add(bytes);
        }
        frames.done
    }

    proptest! {
        #[test]
        fn what_can_be_read_passes_untouched_however_it_is_cut(
            frames in proptest::collection::vec((prop_oneof![Just(1_u8), Just(3), Just(8)], proptest::collection::vec(any::<u8>(), 0..300)), 0..8),
            at_once in 1..400_usize,
        ) {
            let bytes: Vec<u8> = frames.iter().flat_map(|(kind, payload)| frame(*kind, payload)).collect();
            prop_assert_eq!(sieved(&bytes, at_once, Bodies::Pass), bytes);
        }

        #[test]
        fn a_look_gets_every_frame_but_those_of_bodies_however_they_are_cut(
            bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..4),
            at_once in 1..400_usize,
        ) {
            let header = |length: usize| frame(HEADER, &[&[0, 60, 0, 0][..], &(length as u64).to_be_bytes(), &[0, 0]].concat());
            let length = bodies.iter().map(Vec::len).sum();
            let frames = [frame(METHOD, b"method"), header(length)].into_iter();
            let bytes: Vec<u8> = frames.chain(bodies.iter().map(|body| frame(BODY, body))).chain([frame(8, &[])]).flatten().collect();
            let rest = HEARTBEAT.repeat(bodies.len());
            let expected = [frame(METHOD, b"method"), header(0), rest, frame(8, &[])].concat();
            prop_assert_eq!(sieved(&bytes, at_once, Bodies::Drop), expected);
        }
    }

    #[test]
    fn headers_beyond_the_agreed_length_are_replaced_and_those_within_it_are_not() {
        let tune = |longest: u32| frame(1, &[&TUNE[..], &[0, 9], &longest.to_be_bytes(), &[0, 0]].concat());
        // Without any property but a content type.
        let header = frame(2, &[&[0, 60, 0, 0][..], &[0; 8], &[0x80, 0, 200], &[b'x'; 200]].concat());
        for (longest, passes) in [(0, true), (4096, true), (600, false)] {
            let bytes = [tune(longest), header.clone()].concat();
            assert_eq!(sieved(&bytes, 10, Bodies::Pass) == bytes, passes, "{longest}");
        }
    }
}
