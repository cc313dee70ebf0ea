//! A proxy that knows AMQP 0-9-1 well enough to see each method on its way, and to lose one, or the connection, at the
//! very moment that matters.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// A method on its way: who sent it, its class and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The client asks for a message.
    Get,
    /// The client publishes.
    Publish,
    /// The client is done with a message.
    Ack,
    /// The broker confirms messages.
    Confirm,
    /// Anything else.
    Other,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Pass,
    /// It is lost. Only for methods without content.
    Lose,
    /// It never arrives, nor does anything after it from the same side.
    Hang,
    /// The connection breaks.
    Cut,
}

/// The proxy, on a port of its own.
#[derive(Debug)]
pub struct AmqpProxy {
    /// Where it listens.
    pub port: u16,
    _tasks: JoinSet<()>,
}

impl AmqpProxy {
    /// Listens for connections to the broker, and has `judge` judge each method.
    ///
    /// # Panics
    ///
    /// When there is no port.
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
                        _ = pump(from_client, to_broker, true, &*judge) => {}
                        _ = pump(from_broker, to_client, false, &*judge) => {}
                    }
                });
            }
        });
        Self { port, _tasks: tasks }
    }
}

/// Passes frames on until the connection breaks or is cut.
async fn pump(
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
