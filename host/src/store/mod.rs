//! The only place with SQL. A [`Store`] is one PostgreSQL database: its schema, its clock, and the rows of
//! `tidings.schedules`, which a [`Claim`] locks and, when it is settled, moves on.
//!
//! - `queue/`: what the scheduler asks of the queue of due rows;
//! - `admin/`: what people ask, through commands, the page and the metrics;
//! - `connection/`: the servers that may be used, the pool of sessions, and whether a server can be used at all;
//! - `error.rs`: what goes wrong;
//! - `schema/`: the migrations, whether the database has had them, and the partitions of the table of rows;
//! - `dead_letter_pass.rs`: the lock under which one daemon at a time works on dead letters;
//! - `history.rs`: `tidings.deliveries`, and its retention.
//! - `recurrences/`: rules that make rows: what makes occurrences, and what people ask;
//! - `intake.rs`: rows of messages that were published to an intake;
//! - `installation.rs`: which database this is, and which daemons work on it.
//!
//! Must never:
//!
//! - wait for the server without a deadline and without a name for the wait, which the error then gives. After a
//!   deadline the connection is closed. In the pool its next user would wait for the same statement again;
//! - fail because of one row's data once the row's message may have been confirmed;
//! - let PostgreSQL sort. Every session sets `enable_sort = off`, so what is read in an order is read by an index in
//!   that order, and statements about several kinds ask kind by kind. The planner's statistics lag behind, and a
//!   prepared statement keeps its generic plan (by default from its sixth execution on). If that plan reads the whole
//!   table, every look becomes slower as the table grows;
//! - rely on settings that an administrator may have changed for the database or the role: [`Store::new`] sets all that
//!   matter.
//!
//! After a change to a statement, write the files in `.sqlx/` anew, as `migrations/README.md` says.

mod admin;
mod connection;
mod dead_letter_pass;
mod error;
mod history;
mod installation;
mod intake;
mod queue;
mod recurrences;
mod schema;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use sqlx::postgres::{PgListener, PgPoolOptions};
use time::OffsetDateTime;
use tokio::sync::Semaphore;

use crate::model::secrets::SecretUrl;
use crate::model::tls_error;

pub use admin::backlog::{Backlog, COUNT_LIMIT, Late};
pub use admin::doctor::{HolderKind, MAX_HOLD_AGE, Replication, ServerVersion, Skew, VacuumHolder};
pub use admin::limits::{LimitStatus, MAX_COUNTED};
pub use admin::parked::ParkedRow;
pub use admin::pauses::Until;
pub use admin::produce::NewSchedule;
pub use admin::upcoming::{Upcoming, UpcomingRow};
use connection::pool::Pool;
use connection::{Backend, Connection, Doubt, Hosts, Servers};
pub use dead_letter_pass::{Begun, Pass};
pub use error::StoreError;
pub use history::Delivered;
pub use queue::claim::{Claim, Claimed, Order, Rows, Wanted, parse_headers};
use queue::commit_time::CommitTime;
pub use queue::kinds::BATCH;
pub use queue::look::Seen;
pub(crate) use queue::notifications::Heard;
use queue::notifications::SweepRequests;
pub use queue::settlement::{History, Outcome, Settlement, Settling};
pub use recurrences::admin::{NewRecurrence, RecurrenceFilter};
pub use recurrences::making::Making;
pub use schema::{Partitioned, SchemaError};

/// How long a statement may take. It usually takes milliseconds; after this long the server is frozen or the link is
/// dead.
const STATEMENT_DEADLINE: Duration = Duration::from_secs(20);
/// How long opening a connection may take, the login included.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// One PostgreSQL database. Clones share the pool.
#[derive(Clone, Debug)]
pub struct Store {
    servers: Arc<Servers>,
    pool: Arc<Pool>,
    /// Permits one session besides those of the pool and the listener: for a pass over the dead letters or, before
    /// passes begin, for a check.
    extra_session: Arc<Semaphore>,
    doubt: Doubt,
    commit_time: CommitTime,
    settling: Settling,
    /// The low-water mark, for what reads the queue beside the scheduler.
    low_water_mark: Arc<Mutex<Option<OffsetDateTime>>>,
    /// Sweeps run on the session for notifications.
    sweep_requests: Arc<SweepRequests>,
}

/// Checks that `url` can be parsed. The error does not contain the password.
pub(crate) fn check_url(url: &SecretUrl) -> Result<(), String> {
    parse(url).map(drop)
}

fn parse(url: &SecretUrl) -> Result<Hosts, String> {
    Hosts::parse(url.expose(), &|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
}

impl Store {
    /// The low-water mark, below which no row waits; `None` = the scheduler has none.
    fn low_water_mark(&self) -> Option<OffsetDateTime> {
        *self.low_water_mark.lock().expect("no holder of the lock panics")
    }

    /// Notes the scheduler's low-water mark, for what reads the queue beside the scheduler.
    pub fn set_low_water_mark(&self, mark: Option<OffsetDateTime>) {
        *self.low_water_mark.lock().expect("no holder of the lock panics") = mark;
    }

    /// A store that connects when it is first used. `connections` is the size of its pool, at least 1. A pass over the
    /// dead letters uses one more connection, and the listener another.
    ///
    /// # Panics
    ///
    /// If `url` was not checked by the configuration.
    #[must_use]
    pub fn new(url: &SecretUrl, connections: usize) -> Self {
        let hosts = parse(url).expect("the configuration accepts only URLs that can be understood");
        let servers = Arc::new(Servers::new(hosts));
        let (pool, extra_session) = (Pool::new(connections), Arc::new(Semaphore::new(1)));
        let (doubt, commit_time) = (Doubt::new(), CommitTime::default());
        let settling = Settling::default();
        Self {
            servers,
            pool,
            extra_session,
            doubt,
            commit_time,
            settling,
            low_water_mark: Arc::default(),
            sweep_requests: Arc::default(),
        }
    }

    /// The same store, which settles claims in another way than by default.
    #[must_use]
    pub fn with_settling(self, settling: Settling) -> Self {
        Self { settling, ..self }
    }

    /// How long a commit takes, by the last row that came alone; zero = unknown.
    #[must_use]
    pub fn commit_time(&self) -> Duration {
        self.commit_time.get()
    }

    /// Host, port and database of the server that was used last, or of all that may be used, for people.
    #[must_use]
    pub fn place(&self) -> String {
        self.servers.place()
    }

    /// Opens a connection outside the pool and closes it, to find out whether the database can be reached.
    ///
    /// # Errors
    ///
    /// When it cannot, with the reason.
    pub async fn probe(&self) -> Result<(), StoreError> {
        let _permit = self.extra_session.acquire().await;
        let connection = self.connect().await?;
        let _ = tokio::time::timeout(CONNECT_DEADLINE, sqlx::Connection::close(connection)).await;
        Ok(())
    }

    /// Tells why a connection to the server at `place` could not be opened, with what to do.
    fn explain_connect_error(&self, place: String, source: sqlx::Error) -> StoreError {
        // 28: invalid authorization; 3D: no such database; 42501: no right to connect.
        let is_login_refused = source
            .as_database_error()
            .and_then(sqlx::error::DatabaseError::code)
            .is_some_and(|code| code.starts_with("28") || code.starts_with("3D") || code == "42501");
        // A pooler that does not know the settings of a session.
        let is_setting_refused =
            source.as_database_error().is_some_and(|error| error.message().contains("startup parameter"));
        if connection::is_too_many_connections(&source) {
            StoreError::Full { place, source }
        } else if is_setting_refused {
            StoreError::Unfit { place, why: connection::server_check::SETTINGS_NOT_PASSED_ON.to_owned() }
        } else if is_login_refused {
            StoreError::Login { place: format!("{place} as {}", self.servers.user()), source }
        } else if let sqlx::Error::Io(error) = &source
            && let Some(why) = tls_error::refusal(error)
        {
            StoreError::Certificate { place, why, source }
        } else {
            StoreError::Connect { place, source }
        }
    }

    /// Opens a connection for LISTEN, on the server that takes writes.
    ///
    /// # Errors
    ///
    /// When none can be opened within `patience`.
    async fn listener(&self, patience: Duration) -> Result<(PgListener, Option<Backend>), StoreError> {
        if let Ok(Ok(listener)) = tokio::time::timeout(patience, self.try_listener()).await {
            return Ok(listener);
        }
        // sqlx retries until our timeout and does not tell why, and the server may be a standby by now. `connect` finds the
        // server that can be used or fails with the reason and, if the server has too many connections, closes an idle one of
        // the pool.
        let connection = self.connect().await?;
        let _ = tokio::time::timeout(patience, sqlx::Connection::close(connection)).await;
        let late = || StoreError::Deadline { doing: "accept a connection for notifications", after: patience };
        let opened = tokio::time::timeout(patience, self.try_listener()).await.map_err(|_| late())?;
        opened.map_err(|source| self.explain_connect_error(self.place(), source))
    }

    async fn try_listener(&self) -> Result<(PgListener, Option<Backend>), sqlx::Error> {
        // A pool of one connection, which the listener keeps.
        let pool = PgPoolOptions::new().max_connections(1).connect_lazy_with(self.servers.options());
        let mut listener = PgListener::connect_with(&pool).await?;
        // If it reconnected by itself, notifications of the meantime would be lost, and the locks that announce our kinds as
        // well.
        listener.eager_reconnect(false);
        let (is_standby, backend) = connection::introduce(&mut listener).await?;
        if self.servers.must_write() && is_standby {
            return Err(sqlx::Error::Configuration(connection::STANDBY.into()));
        }
        Ok((listener, backend))
    }
}
