//! A TCP proxy between the daemon and a server. It can delay bytes, swallow them, or cut connections.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What the proxy does with the bytes that it receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Forwards them.
    Pass,
    /// Forwards them after this delay.
    Delay(Duration),
    /// Reads them and forwards nothing, like a half-open connection.
    Swallow,
    /// Forwards only to the server, and drops the server's answers.
    SwallowAnswers,
    /// Forwards this many bytes, counted over all connections and both directions, and then closes every connection.
    CutAfter(i64),
    /// Closes every connection, including new ones.
    Cut,
}

/// A running proxy. Dropping this value closes its connections.
#[derive(Debug)]
pub struct Proxy {
    /// The port on which it listens.
    pub port: u16,
    state: Arc<State>,
    _tasks: JoinSet<()>,
}

#[derive(Debug)]
struct State {
    mode: watch::Sender<Mode>,
    /// How many bytes may still be forwarded in [`Mode::CutAfter`].
    left: AtomicI64,
    /// How often [`Proxy::swallow_open_connections`] was called. A connection that was opened at a smaller count is
    /// swallowed.
    swallow_count: AtomicU64,
}

impl Proxy {
    /// Listens on `port` (0 = any free port) and forwards to `server_port`.
    ///
    /// # Panics
    ///
    /// When the port is in use.
    pub async fn start(port: u16, server_port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.expect("the port is free");
        let port = listener.local_addr().expect("it is bound").port();
        let state = Arc::new(State {
            mode: watch::Sender::new(Mode::Pass),
            left: AtomicI64::new(0),
            swallow_count: AtomicU64::new(0),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, server_port, Arc::clone(&state)));
        Self { port, state, _tasks: tasks }
    }

    /// From now on, swallows everything on the connections that are open now. New connections follow the mode.
    pub fn swallow_open_connections(&self) {
        self.state.swallow_count.fetch_add(1, Ordering::SeqCst);
    }

    /// Changes the mode for open and new connections.
    pub fn set(&self, mode: Mode) {
        if let Mode::CutAfter(bytes) = mode {
            self.state.left.store(bytes, Ordering::SeqCst);
        }
        self.state.mode.send_replace(mode);
    }
}

async fn accept(listener: TcpListener, server_port: u16, state: Arc<State>) {
    let server = SocketAddr::from(([127, 0, 0, 1], server_port));
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let state = Arc::clone(&state);
        connections.spawn(async move {
            let mut mode = state.mode.subscribe();
            let opened_at = state.swallow_count.load(Ordering::SeqCst);
            if *mode.borrow() == Mode::Cut {
                return;
            }
            let Ok(upstream) = TcpStream::connect(server).await else { return };
            let _ = (client.set_nodelay(true), upstream.set_nodelay(true));
            let (client_read, client_write) = client.into_split();
            let (server_read, server_write) = upstream.into_split();
            tokio::select! {
                () = forward(client_read, server_write, &state, opened_at, false) => {}
                () = forward(server_read, client_write, &state, opened_at, true) => {}
                _ = async { mode.wait_for(|mode| *mode == Mode::Cut).await.map(|mode| *mode) } => {}
            }
        });
        // Connections that have ended are removed from the set.
        while connections.try_join_next().is_some() {}
    }
}

async fn forward(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, state: &State, opened_at: u64, answers: bool) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let mode = *state.mode.borrow();
        let passed = match mode {
            _ if state.swallow_count.load(Ordering::SeqCst) != opened_at => 0,
            Mode::Swallow => 0,
            Mode::SwallowAnswers if answers => 0,
            Mode::Pass | Mode::Cut | Mode::SwallowAnswers => length,
            Mode::Delay(delay) => {
                tokio::time::sleep(delay).await;
                length
            }
            Mode::CutAfter(_) => {
                let bytes = i64::try_from(length).expect("a buffer");
                let left = state.left.fetch_sub(bytes, Ordering::SeqCst);
                usize::try_from(left.clamp(0, bytes)).expect("a part of the buffer")
            }
        };
        if to.write_all(&buffer[..passed]).await.is_err() {
            return;
        }
        if matches!(mode, Mode::CutAfter(_)) && passed < length {
            return;
        }
    }
}
