//! Opens a session on a server that can be used: of the hosts in the URL, and of the addresses that a name has, the one that
//! takes writes.
//!
//! The address of the last session is tried first. Another one is tried when the one before has failed or has not answered
//! for [`NEXT_AFTER`], and the first session that can be used is taken. So a host that is gone costs a quarter of a second, and
//! a slow one is still waited for.
//!
//! **A server that was replaced.** After a failover the old primary may come back as it was, before anybody has fenced it off.
//! Where there are several addresses, each session says on which timeline its server writes, and a server on an earlier timeline
//! than the last one is not used. When a session is on another server or timeline than the last, the store doubts all older
//! sessions.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{ConnectOptions as _, PgConnection, Row as _};
use tokio::time::{sleep, timeout};
use tracing::info;

use crate::model::error_chain::error_chain;
use crate::store::connection::hosts::{Host, Hosts};
use crate::store::connection::liveness::Backend;
use crate::store::connection::{is_temporary, is_too_many_connections, session_settings};
use crate::store::{CONNECT_DEADLINE, Store, StoreError};

/// How long an address may take to answer before the next one is tried as well.
const NEXT_AFTER: Duration = Duration::from_millis(250);
/// What is wrong with a server that takes no writes.
pub(in crate::store) const STANDBY: &str = "it is a standby, which takes no writes";
/// What is wrong with a server on an earlier timeline than the last one.
const OUTDATED: &str = "it writes on an earlier timeline than the server that was used last, so it is a primary that was replaced; if the database was restored from a backup, restart the daemon";

/// The servers, and which of them was used last.
#[derive(Debug)]
pub(in crate::store) struct Servers {
    hosts: Hosts,
    last: Mutex<Last>,
}

/// What is remembered of the last session.
#[derive(Debug, Default)]
struct Last {
    /// The address that it was opened at.
    address: Option<Address>,
    /// Where its server writes; `None` = it was not asked, or does not say.
    timeline: Option<Timeline>,
    /// How often another server was used than before.
    moves: u64,
}

/// An address at which a session can be opened.
#[derive(Clone, Debug)]
struct Address {
    /// For people.
    place: String,
    options: PgConnectOptions,
}

/// Where a server writes. A promotion begins a new timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Timeline {
    /// The cluster, if the server tells it.
    system: Option<String>,
    number: u32,
}

/// A session that can be used, and where its server writes if it was asked and tells it.
struct Opened {
    session: (PgConnection, Option<Backend>),
    timeline: Option<Timeline>,
}

/// Why no session could be opened: for each address that was tried.
#[derive(Debug)]
pub(in crate::store) struct LoginFailure(Vec<(String, Refusal)>);

/// Why an address cannot be used.
#[derive(Debug)]
enum Refusal {
    Server(sqlx::Error),
    Standby,
    Outdated,
    Late(Duration),
}

impl Servers {
    pub(in crate::store) fn new(mut hosts: Hosts) -> Self {
        for Host { options, .. } in &mut hosts.hosts {
            let with_settings = options.clone().application_name("tidings").options(session_settings::AT_LOGIN);
            *options = with_settings.disable_statement_logging();
        }
        Self { hosts, last: Mutex::default() }
    }

    fn last(&self) -> MutexGuard<'_, Last> {
        self.last.lock().expect("no holder of the lock panics")
    }

    /// How to log in at the address that was used last, or else at the first.
    pub(in crate::store) fn options(&self) -> PgConnectOptions {
        let last = self.last().address.as_ref().map(|address| address.options.clone());
        last.unwrap_or_else(|| self.hosts.hosts[0].options.clone())
    }

    /// The server that was used last, or else all of them, with the database, for people.
    pub(in crate::store) fn place(&self) -> String {
        let last = self.last().address.as_ref().map(|address| address.place.clone());
        let all = || self.hosts.hosts.iter().map(|host| &*host.place).collect::<Vec<_>>().join(",");
        format!("{}/{}", last.unwrap_or_else(all), self.database())
    }

    /// How often another server was used than before: the number stays the same as long as the server does, whichever of its
    /// addresses is used.
    pub(in crate::store) fn moves(&self) -> u64 {
        self.last().moves
    }

    fn database(&self) -> &str {
        self.hosts.hosts[0].options.get_database().unwrap_or_default()
    }

    /// The user, for people.
    pub(in crate::store) fn user(&self) -> &str {
        self.hosts.hosts[0].options.get_username()
    }

    /// Whether the URL names several servers.
    pub(in crate::store) fn has_several_hosts(&self) -> bool {
        self.hosts.hosts.len() > 1
    }

    /// Whether a session of a server in recovery cannot be used.
    pub(in crate::store) fn must_write(&self) -> bool {
        self.hosts.must_write
    }

    /// Every address, in the order in which they are to be tried.
    async fn addresses(&self) -> Vec<Address> {
        let mut addresses = Vec::new();
        for host in &self.hosts.hosts {
            addresses.extend(host.addresses().await);
        }
        if let Some(last) = &self.last().address
            && let Some(at) = addresses.iter().position(|address| address.place == last.place)
        {
            addresses[..=at].rotate_right(1);
        }
        addresses
    }
}

impl Host {
    /// The addresses of the name, if they can be tried one by one; otherwise the name.
    async fn addresses(&self) -> Vec<Address> {
        let (name, port) = (self.options.get_host(), self.options.get_port());
        let by_name = || vec![Address { place: self.place.clone(), options: self.options.clone() }];
        // sqlx compares the name in the certificate with the name that it connects to.
        let needs_name = matches!(self.options.get_ssl_mode(), PgSslMode::VerifyFull);
        if needs_name || self.options.get_socket().is_some() || name.starts_with('/') || name.parse::<IpAddr>().is_ok()
        {
            return by_name();
        }
        let found = timeout(CONNECT_DEADLINE, tokio::net::lookup_host((name, port))).await;
        let mut found: Vec<IpAddr> = found.into_iter().flatten().flatten().map(|found| found.ip()).collect();
        found.dedup();
        if found.len() < 2 {
            // sqlx says what is wrong with the name.
            return by_name();
        }
        let address = |ip: IpAddr| Address {
            place: format!("{name} ({ip}):{port}"),
            options: self.options.clone().host(&ip.to_string()),
        };
        found.into_iter().map(address).collect()
    }
}

impl Store {
    /// Opens a session with the settings that our statements need, on a server that can be used.
    pub(super) async fn log_in(&self) -> Result<(PgConnection, Option<Backend>), LoginFailure> {
        let addresses = self.servers.addresses().await;
        let has_choice = addresses.len() > 1;
        let (mut untried, mut attempts) = (addresses.into_iter(), FuturesUnordered::new());
        let mut failed = Vec::new();
        loop {
            if attempts.is_empty()
                && let Some(address) = untried.next()
            {
                attempts.push(self.attempt(address, has_choice));
            }
            let (address, attempted) = tokio::select! {
                biased;
                Some(attempted) = attempts.next() => attempted,
                () = sleep(NEXT_AFTER), if untried.len() > 0 => {
                    attempts.extend(untried.next().map(|address| self.attempt(address, has_choice)));
                    continue;
                }
                else => return Err(LoginFailure(failed)),
            };
            match attempted {
                Ok(Opened { timeline, .. }) if self.is_outdated(timeline.as_ref()) => {
                    failed.push((address.place, Refusal::Outdated));
                }
                Ok(Opened { session, timeline }) => {
                    self.remember(&address, timeline.as_ref());
                    return Ok(session);
                }
                Err(refusal) => failed.push((address.place, refusal)),
            }
        }
    }

    async fn attempt(&self, address: Address, has_choice: bool) -> (Address, Result<Opened, Refusal>) {
        let Hosts { must_write, connect_timeout, .. } = self.servers.hosts;
        let patience = connect_timeout.unwrap_or(CONNECT_DEADLINE);
        let opened = timeout(patience, open(&address.options, must_write, has_choice)).await;
        (address, opened.unwrap_or(Err(Refusal::Late(patience))))
    }

    /// Whether a session that is on this timeline is on a server that was replaced since.
    fn is_outdated(&self, timeline: Option<&Timeline>) -> bool {
        let last = self.servers.last();
        let (Some(last), Some(timeline)) = (&last.timeline, timeline) else { return false };
        last.system == timeline.system && timeline.number < last.number
    }

    /// Remembers where a session was opened. If that is another server than before, older sessions are doubted.
    fn remember(&self, address: &Address, timeline: Option<&Timeline>) {
        let mut last = self.servers.last();
        let before = last.address.replace(address.clone());
        let timeline_before = last.timeline.clone();
        // A server that does not tell its timeline does not make us forget which one is the latest.
        if timeline.is_some() {
            last.timeline = timeline.cloned();
        }
        let Some(before) = before else { return };
        // A name may have several addresses that lead to one server, and only one server writes on a timeline.
        let is_other_server = match (timeline, &timeline_before) {
            (Some(now), Some(before)) if now.system.is_some() => now != before,
            _ => before.place != address.place,
        };
        if is_other_server {
            last.moves += 1;
            drop(last);
            info!("PostgreSQL is used at {} from now on, no longer at {}", address.place, before.place);
            self.doubt.raise();
        }
    }

    /// Tells why no session could be opened, with what to do.
    pub(super) fn explain_login_failure(&self, failure: LoginFailure) -> StoreError {
        let LoginFailure(mut failed) = failure;
        // The one that says what to do.
        let telling = failed.iter().position(|(_, refusal)| refusal.is_by_a_server()).unwrap_or(0);
        if failed.len() > 1 && !failed[telling].1.is_by_a_server() {
            let tried = failed.into_iter().map(|(place, refusal)| format!("{place}: {refusal}")).collect::<Vec<_>>();
            return StoreError::NoServer { database: self.servers.database().to_owned(), tried: tried.join("; ") };
        }
        let (place, refusal) = failed.swap_remove(telling);
        let place = format!("{place}/{}", self.servers.database());
        match refusal {
            Refusal::Server(source) => self.explain_connect_error(place, source),
            Refusal::Standby => StoreError::Unfit { place, why: format!("{STANDBY}; give the address of the primary") },
            Refusal::Outdated => StoreError::Unfit { place, why: OUTDATED.to_owned() },
            Refusal::Late(after) => StoreError::Deadline { doing: "accept a connection", after },
        }
    }
}

/// Opens one session.
async fn open(options: &PgConnectOptions, must_write: bool, has_choice: bool) -> Result<Opened, Refusal> {
    let mut session = options.connect().await.map_err(Refusal::Server)?;
    let (is_standby, backend) = introduce(&mut session).await.map_err(Refusal::Server)?;
    if must_write && is_standby {
        return Err(Refusal::Standby);
    }
    sqlx::raw_sql(session_settings::AFTER_LOGIN).execute(&mut session).await.map_err(Refusal::Server)?;
    let timeline = if has_choice { read_timeline(&mut session).await.map_err(Refusal::Server)? } else { None };
    Ok(Opened { session: (session, backend), timeline })
}

/// Asks a new session whether its server is in recovery, as standbys are, and which session it is. Uses the simple protocol,
/// since behind a pooler that shares sessions prepared statements may fail, and `server_check.rs` says what to do about it. If our
/// role may not see sessions, nobody can ask later what this one does.
pub(in crate::store) async fn introduce<E>(session: &mut E) -> Result<(bool, Option<Backend>), sqlx::Error>
where
    for<'a> &'a mut E: sqlx::PgExecutor<'a>,
{
    let query =
        "SELECT pg_is_in_recovery(), pid, backend_start::text FROM pg_stat_activity WHERE pid = pg_backend_pid()";
    let row = match sqlx::raw_sql(query).fetch_one(&mut *session).await {
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42501") => {
            let row = sqlx::raw_sql("SELECT pg_is_in_recovery()").fetch_one(&mut *session).await?;
            return Ok((row.try_get(0)?, None));
        }
        asked => asked?,
    };
    Ok((row.try_get(0)?, Some(Backend { pid: row.try_get(1)?, began: row.try_get(2)? })))
}

/// Asks a server where it writes. Some platforms do not tell (`None`). An error that ends the session is no such answer.
async fn read_timeline(session: &mut PgConnection) -> Result<Option<Timeline>, sqlx::Error> {
    // The control file has the timeline of the last checkpoint, which may be minutes before the promotion.
    let file = read_text(session, "SELECT pg_walfile_name(pg_current_wal_lsn())").await?;
    let number = file.as_deref().and_then(|file| u32::from_str_radix(file.get(..8)?, 16).ok());
    let Some(number) = number else { return Ok(None) };
    let system = read_text(session, "SELECT system_identifier::text FROM pg_control_system()").await?;
    Ok(Some(Timeline { system, number }))
}

/// Reads a text; `None` = the server refuses the question.
async fn read_text(session: &mut PgConnection, query: &'static str) -> Result<Option<String>, sqlx::Error> {
    match sqlx::raw_sql(query).fetch_one(session).await {
        Ok(row) => row.try_get(0).map(Some),
        // Class 57, operator intervention: the session is ended.
        Err(sqlx::Error::Database(error)) if !error.code().is_some_and(|code| code.starts_with("57")) => Ok(None),
        Err(error) => Err(error),
    }
}

impl LoginFailure {
    /// Whether the limit of connections of a server, or our role's, is reached.
    pub(super) fn is_full(&self) -> bool {
        self.0.iter().any(|(_, refusal)| matches!(refusal, Refusal::Server(error) if is_too_many_connections(error)))
    }

    /// Whether connecting may succeed in a moment: a server is starting, is full just now, or one of several is about to be
    /// promoted.
    pub(super) fn is_temporary(&self) -> bool {
        let is_one_of_several = self.0.len() > 1;
        self.0.iter().any(|(_, refusal)| match refusal {
            Refusal::Server(error) => is_temporary(error),
            Refusal::Standby => is_one_of_several,
            Refusal::Outdated | Refusal::Late(_) => false,
        })
    }
}

impl Refusal {
    /// Whether it is an answer of a server that takes writes, such as that the password is wrong.
    fn is_by_a_server(&self) -> bool {
        matches!(self, Self::Server(error) if error.as_database_error().is_some() && !is_temporary(error))
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server(error) => formatter.write_str(&error_chain(error)),
            Self::Standby => formatter.write_str(STANDBY),
            Self::Outdated => formatter.write_str(OUTDATED),
            Self::Late(after) => write!(formatter, "it did not answer within {} s", after.as_secs()),
        }
    }
}
