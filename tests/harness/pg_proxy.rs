//! A proxy between the daemon and PostgreSQL that parses the protocol. It can lose the reply to a chosen statement,
//! stop forwarding, or cut the connection at exactly that statement.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What the proxy does with a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Forwards the statement.
    Pass,
    /// Forwards neither the statement nor anything after it.
    Hang,
    /// Forwards the statement, and drops its reply and all later ones.
    LoseReply,
    /// Closes the connection without forwarding the statement.
    Cut,
}

/// A running proxy. Dropping this value closes its connections.
#[derive(Debug)]
pub struct PgProxy {
    /// The port on which it listens.
    pub port: u16,
    _tasks: JoinSet<()>,
}

/// The code of a request for TLS. The server replies with one byte, and the client then sends its login.
const SSL_REQUEST: [u8; 4] = 80_877_103_u32.to_be_bytes();

impl PgProxy {
    /// Listens on a free port, forwards to the server, and calls `judge` for each statement that is executed.
    ///
    /// # Panics
    ///
    /// When no port is free.
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
                        _ = forward_statements(from_client, to_server, &*judge, &lost) => {}
                        _ = forward_replies(from_server, to_client, losing) => {}
                    }
                });
            }
        });
        Self { port, _tasks: tasks }
    }
}

async fn read_bytes(from: &mut OwnedReadHalf, count: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; count];
    from.read_exact(&mut bytes).await?;
    Ok(bytes)
}

/// Reads a length, which includes its own four bytes, and the message of that length.
async fn read_message(from: &mut OwnedReadHalf) -> std::io::Result<Vec<u8>> {
    let mut message = read_bytes(from, 4).await?;
    let length = u32::from_be_bytes([message[0], message[1], message[2], message[3]]) as usize;
    message.extend(read_bytes(from, length.saturating_sub(4)).await?);
    Ok(message)
}

async fn forward_statements(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    judge: &(impl Fn(&str) -> Fate + ?Sized),
    lost: &watch::Sender<bool>,
) -> std::io::Result<()> {
    loop {
        let login = read_message(&mut from).await?;
        to.write_all(&login).await?;
        if login[4..] != SSL_REQUEST {
            break;
        }
    }
    let mut prepared: HashMap<Vec<u8>, String> = HashMap::new();
    let mut named = HashMap::new();
    loop {
        let kind = read_bytes(&mut from, 1).await?;
        let message = read_message(&mut from).await?;
        let mut texts = message[4..].split(|byte| *byte == 0);
        let mut next = || texts.next().unwrap_or_default().to_vec();
        let executed = match kind[0] {
            b'Q' => expand(&String::from_utf8_lossy(&next()), &mut named),
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

/// The text of a query, in which each EXECUTE is followed by the statement that was prepared under its name; `None` = the query
/// only prepares statements.
fn expand(query: &str, named: &mut HashMap<String, String>) -> Option<String> {
    if query.starts_with("PREPARE ") {
        for statement in query.split("PREPARE ").filter(|statement| !statement.is_empty()) {
            let (name, text) = statement.split_once(' ').expect("a name");
            named.insert(name.to_owned(), text.to_owned());
        }
        return None;
    }
    let executed = named.iter().filter(|(name, _)| query.contains(&format!("EXECUTE {name}(")));
    Some(executed.fold(query.to_owned(), |query, (_, text)| format!("{query}\n{text}")))
}

async fn forward_replies(
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
