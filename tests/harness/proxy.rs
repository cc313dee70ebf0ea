//! A TCP proxy between the daemon and a server, that can be absent, cut, or swallow everything.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What the proxy does with bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Passes them on.
    Pass,
    /// Takes them, and passes nothing on: what a half-open connection looks like.
    Swallow,
    /// Closes every connection, new ones included.
    Cut,
}

/// A proxy on a port of its own.
#[derive(Debug)]
pub struct Proxy {
    /// Where it listens.
    pub port: u16,
    mode: Arc<watch::Sender<Mode>>,
    _tasks: JoinSet<()>,
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
        let mode = Arc::new(watch::Sender::new(Mode::Pass));
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, server_port, Arc::clone(&mode)));
        Self { port, mode, _tasks: tasks }
    }

    /// Changes what happens from now on, to open connections as well.
    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

async fn accept(listener: TcpListener, server_port: u16, mode: Arc<watch::Sender<Mode>>) {
    let server = SocketAddr::from(([127, 0, 0, 1], server_port));
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let mut mode = mode.subscribe();
        connections.spawn(async move {
            if *mode.borrow() == Mode::Cut {
                return;
            }
            let Ok(upstream) = TcpStream::connect(server).await else { return };
            let _ = (client.set_nodelay(true), upstream.set_nodelay(true));
            let (client_read, client_write) = client.into_split();
            let (server_read, server_write) = upstream.into_split();
            let (there, back) = (mode.clone(), mode.clone());
            tokio::select! {
                () = pump(client_read, server_write, there) => {}
                () = pump(server_read, client_write, back) => {}
                _ = mode.wait_for(|mode| *mode == Mode::Cut) => {}
            }
        });
    }
}

async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mode: watch::Receiver<Mode>,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if *mode.borrow() == Mode::Pass && to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
