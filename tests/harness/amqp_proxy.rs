//! A proxy between the daemon and RabbitMQ that parses AMQP 0-9-1 frames. It can lose a chosen method, stop forwarding,
//! or cut the connection at exactly that method.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// A method that passes through the proxy, told apart by its sender, class and number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The client fetches a message (`basic.get`).
    Get,
    /// The client publishes (`basic.publish`).
    Publish,
    /// The client acknowledges a message (`basic.ack`).
    Ack,
    /// The broker confirms messages (`basic.ack` to the client).
    Confirm,
    /// Any other frame.
    Other,
}

/// What the proxy does with a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Forwards the method.
    Pass,
    /// Drops the method. Only for methods without content.
    Lose,
    /// Forwards neither the method nor anything that the same side sends after it.
    Hang,
    /// Closes the connection.
    Cut,
}

/// A running proxy. Dropping this value closes its connections.
#[derive(Debug)]
pub struct AmqpProxy {
    /// The port on which it listens.
    pub port: u16,
    _tasks: JoinSet<()>,
}

impl AmqpProxy {
    /// Listens on a free port, forwards to the broker, and calls `judge` for each method.
    ///
    /// # Panics
    ///
    /// When no port is free.
    pub async fn start(broker_port: u16, judge: impl Fn(Method) -> Verdict + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let broker = SocketAddr::from(([127, 0, 0, 1], broker_port));
        let judge = Arc::new(judge);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let judge = Arc::clone(&judge);
                connections.spawn(async move {
                    let Ok(upstream) = TcpStream::connect(broker).await else { return };
                    let _ = (client.set_nodelay(true), upstream.set_nodelay(true));
                    let (from_client, to_client) = client.into_split();
                    let (from_broker, to_broker) = upstream.into_split();
                    tokio::select! {
                        _ = forward(from_client, to_broker, true, &*judge) => {}
                        _ = forward(from_broker, to_client, false, &*judge) => {}
                    }
                });
            }
        });
        Self { port, _tasks: tasks }
    }
}

/// Forwards frames in one direction until the connection breaks or `judge` says [`Verdict::Cut`].
async fn forward(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    by_client: bool,
    judge: &(impl Fn(Method) -> Verdict + ?Sized),
) -> std::io::Result<()> {
    if by_client {
        let mut greeting = [0; 8];
        from.read_exact(&mut greeting).await?;
        to.write_all(&greeting).await?;
    }
    loop {
        let mut frame = vec![0; 7];
        from.read_exact(&mut frame).await?;
        let length = u32::from_be_bytes([frame[3], frame[4], frame[5], frame[6]]) as usize;
        frame.resize(7 + length + 1, 0);
        from.read_exact(&mut frame[7..]).await?;
        let method = match (frame[0], by_client, &frame[7..]) {
            (1, true, [0, 60, 0, 70, ..]) => Method::Get,
            (1, true, [0, 60, 0, 40, ..]) => Method::Publish,
            (1, true, [0, 60, 0, 80, ..]) => Method::Ack,
            (1, false, [0, 60, 0, 80, ..]) => Method::Confirm,
            _ => Method::Other,
        };
        match judge(method) {
            Verdict::Pass => to.write_all(&frame).await?,
            Verdict::Lose => {}
            Verdict::Hang => return std::future::pending().await,
            Verdict::Cut => return Ok(()),
        }
    }
}
