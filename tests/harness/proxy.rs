//! A TCP proxy between the daemon and a server, that can be absent, slow, cut, or swallow everything.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What the proxy does with bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Passes them on.
    Pass,
    /// Passes them on later.
    Delay(Duration),
    /// Takes them, and passes nothing on: what a half-open connection looks like.
    Swallow,
    /// The same with what the server says: it hears us, and we do not hear it.
    SwallowAnswers,
    /// Passes on as many bytes, of all connections in both directions together, and then closes every connection.
    CutAfter(i64),
    /// Closes every connection, new ones included.
    Cut,
}

/// A proxy on a port of its own.
#[derive(Debug)]
pub struct Proxy {
    /// Where it listens.
    pub port: u16,
    state: Arc<State>,
    _tasks: JoinSet<()>,
}

#[derive(Debug)]
struct State {
    mode: watch::Sender<Mode>,
    /// Bytes until the cut.
    left: AtomicI64,
    /// How often those that were open were given up.
    given_up: AtomicU64,
}

impl Proxy {
    /// Listens on `port` (0 = any) for connections to `server_port`.
    ///
    /// # Panics
    ///
    /// When the port is taken.
    pub async fn start(port: u16, server_port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.expect("the port is free");
        let port = listener.local_addr().expect("it is bound").port();
        let state = Arc::new(State {
            mode: watch::Sender::new(Mode::Pass),
            left: AtomicI64::new(0),
            given_up: AtomicU64::new(0),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, server_port, Arc::clone(&state)));
        Self { port, state, _tasks: tasks }
    }

    /// Swallows, from now on and for ever, whatever goes through the connections that are open; new ones are as the mode says.
    pub fn swallow_those_open(&self) {
        self.state.given_up.fetch_add(1, Ordering::SeqCst);
    }

    /// Changes what happens from now on, to open connections as well.
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
            let born = state.given_up.load(Ordering::SeqCst);
            if *mode.borrow() == Mode::Cut {
                return;
            }
            let Ok(upstream) = TcpStream::connect(server).await else { return };
            let _ = (client.set_nodelay(true), upstream.set_nodelay(true));
            let (client_read, client_write) = client.into_split();
            let (server_read, server_write) = upstream.into_split();
            tokio::select! {
                () = pump(client_read, server_write, &state, born, false) => {}
                () = pump(server_read, client_write, &state, born, true) => {}
                _ = async { mode.wait_for(|mode| *mode == Mode::Cut).await.map(|mode| *mode) } => {}
            }
        });
        // Ended ones are forgotten.
        while connections.try_join_next().is_some() {}
    }
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, state: &State, born: u64, answers: bool) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let mode = *state.mode.borrow();
        let passed = match mode {
            _ if state.given_up.load(Ordering::SeqCst) != born => 0,
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
