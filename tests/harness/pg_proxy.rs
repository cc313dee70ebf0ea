//! A proxy that knows PostgreSQL's protocol well enough to see each statement on its way, and to stop everything at the
//! very moment that matters.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What becomes of a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Pass,
    /// It never arrives, and nothing after it.
    Hang,
    /// It arrives, and nobody hears what came of it.
    LoseReply,
    /// It never arrives, and the connection is closed.
    Cut,
}

/// The proxy, on a port of its own.
#[derive(Debug)]
pub struct PgProxy {
    /// Where it listens.
    pub port: u16,
    _tasks: JoinSet<()>,
}

/// The answer to a request for TLS is one byte, and the login begins anew.
const SSL_REQUEST: [u8; 4] = 80_877_103_u32.to_be_bytes();

impl PgProxy {
    /// Listens for connections to the server, and has `judge` judge each statement that is executed.
    ///
    /// # Panics
    ///
    /// When there is no port.
    pub async fn start(server_port: u16, judge: impl Fn(&str) -> Fate + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let server = SocketAddr::from(([127, 0, 0, 1], server_port));
        let judge = Arc::new(judge);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let judge = Arc::clone(&judge);
                connections.spawn(async move {
                    let Ok(upstream) = TcpStream::connect(server).await else { return };
                    let _ = (client.set_nodelay(true), upstream.set_nodelay(true));
                    let (from_client, to_client) = client.into_split();
                    let (from_server, to_server) = upstream.into_split();
                    let (lost, losing) = watch::channel(false);
                    tokio::select! {
                        _ = statements(from_client, to_server, &*judge, &lost) => {}
                        _ = replies(from_server, to_client, losing) => {}
                    }
                });
            }
        });
        Self { port, _tasks: tasks }
    }
}

async fn read(from: &mut OwnedReadHalf, count: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; count];
    from.read_exact(&mut bytes).await?;
    Ok(bytes)
}

/// A length that counts itself, and what it is the length of.
async fn rest(from: &mut OwnedReadHalf) -> std::io::Result<Vec<u8>> {
    let mut message = read(from, 4).await?;
    let length = u32::from_be_bytes([message[0], message[1], message[2], message[3]]) as usize;
    message.extend(read(from, length.saturating_sub(4)).await?);
    Ok(message)
}

async fn statements(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    judge: &(impl Fn(&str) -> Fate + ?Sized),
    lost: &watch::Sender<bool>,
) -> std::io::Result<()> {
    loop {
        let login = rest(&mut from).await?;
        to.write_all(&login).await?;
        if login[4..] != SSL_REQUEST {
            break;
        }
    }
    let mut prepared: HashMap<Vec<u8>, String> = HashMap::new();
    loop {
        let kind = read(&mut from, 1).await?;
        let message = rest(&mut from).await?;
        let mut texts = message[4..].split(|byte| *byte == 0);
        let mut next = || texts.next().unwrap_or_default().to_vec();
        let executed = match kind[0] {
            b'Q' => Some(String::from_utf8_lossy(&next()).into_owned()),
            b'P' => {
                let name = next();
                prepared.insert(name, String::from_utf8_lossy(&next()).into_owned());
                None
            }
            b'B' => {
                let _portal = next();
                prepared.get(&next()).cloned()
            }
            _ => None,
        };
        match executed.map_or(Fate::Pass, |statement| judge(&statement)) {
            Fate::Pass => {}
            Fate::Hang => return std::future::pending().await,
            Fate::Cut => return Ok(()),
            Fate::LoseReply => {
                lost.send_replace(true);
            }
        }
        to.write_all(&kind).await?;
        to.write_all(&message).await?;
    }
}

async fn replies(
    mut from: impl AsyncRead + Unpin,
    mut to: OwnedWriteHalf,
    losing: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        if !*losing.borrow() {
            to.write_all(&buffer[..count]).await?;
        }
    }
}
