//! The addresses of PostgreSQL and of RabbitMQ, of which there are several in a cluster. The rig's own processes find the server
//! that takes writes and a node that answers, as the daemon does, but with code of their own.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use lapin::ConnectionProperties;
use sqlx::Connection as _;
use sqlx::postgres::{PgConnection, PgPool, PgPoolOptions};

/// How long a server may take to answer before the next one is asked. A frozen one never does.
const PATIENCE: Duration = Duration::from_secs(2);

/// The URL with all these ports of this machine in the place of its one.
pub(crate) fn with_ports(url: &str, ports: &[u16]) -> String {
    let (before, rest) = url.split_once("127.0.0.1:").expect("a URL of this machine");
    let tail = rest.trim_start_matches(|digit: char| digit.is_ascii_digit());
    let hosts: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
    format!("{before}{}{tail}", hosts.join(","))
}

/// A URL for each of the servers that a URL names.
fn split(url: &str) -> Vec<String> {
    let Some((before, rest)) = url.split_once('@') else { return vec![url.to_owned()] };
    let (hosts, tail) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    hosts.split(',').map(|host| format!("{before}@{host}{tail}")).collect()
}

/// The nodes of RabbitMQ.
#[derive(Debug)]
pub(crate) struct Nodes {
    urls: Vec<String>,
    next: AtomicUsize,
}

impl Nodes {
    /// The nodes that a URL names. The one with this number is tried first.
    pub(crate) fn of(url: &str, first: u64) -> Self {
        Self { urls: split(url), next: AtomicUsize::new(usize::try_from(first).unwrap_or_default()) }
    }

    /// Whether RabbitMQ is a cluster.
    pub(crate) fn are_several(&self) -> bool {
        self.urls.len() > 1
    }

    /// Connects to a node, another one than before if there are several.
    pub(crate) async fn connect(&self) -> anyhow::Result<lapin::Connection> {
        let mut error = None;
        for _ in 0..self.urls.len() {
            let url = &self.urls[self.next.fetch_add(1, Ordering::Relaxed) % self.urls.len()];
            // Where there is no other node, the caller says how long it waits.
            let patience = if self.are_several() { PATIENCE } else { Duration::from_mins(5) };
            let connecting = lapin::Connection::connect(url, ConnectionProperties::default());
            match tokio::time::timeout(patience, connecting).await {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(refusal)) => error = Some(refusal.into()),
                Err(late) => error = Some(late.into()),
            }
        }
        Err(error.unwrap_or_else(|| anyhow::anyhow!("there is no node"))).context("connecting to RabbitMQ")
    }
}

/// A pool of connections to the PostgreSQL that takes writes.
#[derive(Debug)]
pub(crate) struct Database {
    urls: Vec<String>,
    pool: Mutex<PgPool>,
    is_doubted: AtomicBool,
}

impl Database {
    /// The servers that a URL names.
    pub(crate) fn of(url: &str) -> anyhow::Result<Self> {
        let urls = split(url);
        let pool = Mutex::new(open(&urls[0])?);
        let is_doubted = AtomicBool::new(urls.len() > 1);
        Ok(Self { urls, pool, is_doubted })
    }

    /// The pool. Its connections may be broken.
    pub(crate) fn pool(&self) -> PgPool {
        self.pool.lock().expect("no holder of the lock panics").clone()
    }

    /// How long a transaction may take besides what its writer waits for. With one server it takes as long as a fault does.
    pub(crate) fn patience(&self) -> Duration {
        if self.urls.len() > 1 { 3 * PATIENCE } else { Duration::from_hours(1) }
    }

    /// Notes that a statement failed, so that the server may be another one by now.
    pub(crate) fn doubt(&self) {
        self.is_doubted.store(self.urls.len() > 1, Ordering::Relaxed);
    }

    /// Looks for the server again, if there was a doubt about it. Like a client library it takes the first that accepts writes,
    /// which after a failover may be the old primary for a while.
    pub(crate) async fn find_if_doubted(&self) -> anyhow::Result<()> {
        if !self.is_doubted.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        for url in &self.urls {
            if let Ok(Ok(true)) = tokio::time::timeout(PATIENCE, takes_writes(url)).await {
                *self.pool.lock().expect("no holder of the lock panics") = open(url)?;
                return Ok(());
            }
        }
        self.doubt();
        anyhow::bail!("no server takes writes")
    }
}

fn open(url: &str) -> anyhow::Result<PgPool> {
    Ok(PgPoolOptions::new().max_connections(8).acquire_timeout(Duration::from_secs(5)).connect_lazy(url)?)
}

async fn takes_writes(url: &str) -> Result<bool, sqlx::Error> {
    let mut connection = PgConnection::connect(url).await?;
    sqlx::query_scalar("SELECT NOT pg_is_in_recovery()").fetch_one(&mut connection).await
}
