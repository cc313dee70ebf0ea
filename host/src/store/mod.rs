//! The only place with SQL. A [`Store`] is one PostgreSQL database: its schema, its clock, and the rows of
//! `tidings.schedules`, which a [`Claim`] locks and, when it is settled, moves on.
//!
//! - `queue/`: what the scheduler asks of the queue of due rows;
//! - `admin/`: what people ask, through commands, the page and the metrics;
//! - `connection/`: the pool of sessions, and whether the server can be used at all;
//! - `schema/`: the migrations, and whether the database has had them;
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
mod history;
mod installation;
mod intake;
mod queue;
mod recurrences;
mod schema;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use sqlx::postgres::{PgDatabaseError, PgListener, PgPoolOptions, PgSeverity};
use thiserror::Error;
use time::OffsetDateTime;
use tokio::sync::Semaphore;

use crate::model::secrets::SecretUrl;
use crate::model::tls_error;

pub use admin::backlog::{Backlog, COUNT_LIMIT, Late};
pub use admin::doctor::{HolderKind, MAX_HOLD_AGE, ServerVersion, Skew, VacuumHolder};
pub use admin::parked::ParkedRow;
pub use admin::pauses::Until;
pub use admin::produce::NewSchedule;
pub use admin::upcoming::{Upcoming, UpcomingRow};
use connection::pool::Pool;
use connection::{Backend, Connection, Doubt, Hosts, Servers};
pub use dead_letter_pass::{Begun, Pass};
pub use history::Delivered;
pub use queue::claim::{Claim, Claimed, Wanted, parse_headers};
use queue::commit_time::CommitTime;
pub use queue::look::Seen;
pub(crate) use queue::notifications::Heard;
use queue::notifications::SweepRequests;
pub use queue::settlement::{History, Outcome, Settlement, Settling};
pub use recurrences::admin::{NewRecurrence, RecurrenceFilter};
pub use recurrences::making::Making;
pub use schema::SchemaError;

/// How long a statement may take. It usually takes milliseconds; after this long the server is frozen or the link is
/// dead.
const STATEMENT_DEADLINE: Duration = Duration::from_secs(20);
/// How long opening a connection may take, the login included.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// What went wrong between the daemon and PostgreSQL. Always the infrastructure's fault, never a row's.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The server does not answer.
    #[error("could not reach PostgreSQL at {place}")]
    Connect {
        /// Host, port and database.
        place: String,
        /// Why.
        #[source]
        source: sqlx::Error,
    },
    /// Of several servers, none can be used.
    #[error("none of the servers of the database {database} can be used: {tried}")]
    NoServer {
        /// The database.
        database: String,
        /// Each server, and why not.
        tried: String,
    },
    /// The server took writes before, and takes none any more.
    #[error("PostgreSQL at {place} takes no writes any more: it has become read-only, or a standby")]
    ReadOnly {
        /// Host, port and database.
        place: String,
        /// The server's error.
        #[source]
        source: sqlx::Error,
    },
    /// The server answers, and its certificate is not trusted: it may be another host.
    #[error("the certificate of PostgreSQL at {place} is refused: {why}")]
    Certificate {
        /// Host, port and database.
        place: String,
        /// What is wrong with the certificate, and what to do.
        why: &'static str,
        /// The error of the TLS library.
        #[source]
        source: sqlx::Error,
    },
    /// The server answers, and its limit of connections is reached.
    #[error(
        "PostgreSQL at {place} accepts no further connection from us, and a daemon needs 4: raise the limit (ALTER ROLE … CONNECTION LIMIT, or max_connections)"
    )]
    Full {
        /// Host, port and database.
        place: String,
        /// The server's error.
        #[source]
        source: sqlx::Error,
    },
    /// The server answers, and refuses the login.
    #[error(
        "PostgreSQL at {place} refused the login; check the user, the password and the database in TIDINGS_DATABASE_URL"
    )]
    Login {
        /// Host, port, database and user.
        place: String,
        /// The server's error.
        #[source]
        source: sqlx::Error,
    },
    /// The server answers, and cannot be used as it is set up.
    #[error("PostgreSQL at {place} cannot be used: {why}")]
    Unfit {
        /// Host, port and database.
        place: String,
        /// What is wrong, and what to do.
        why: String,
    },
    /// Our role lacks the right to run the statement.
    #[error(
        "could not {doing}: our role lacks a right; make it a member of tidings_daemon: GRANT tidings_daemon TO our_role"
    )]
    Rights {
        /// What the statement was for.
        doing: &'static str,
        /// The server's error, which names what is forbidden.
        #[source]
        source: sqlx::Error,
    },
    /// The statement failed.
    #[error("could not {doing}")]
    Statement {
        /// What the statement was for.
        doing: &'static str,
        /// Why.
        #[source]
        source: sqlx::Error,
    },
    /// The server answers on another connection, and does not work on the statement.
    #[error("the connection to PostgreSQL at {place} on which it was to {doing} is dead: it answers on another one")]
    Lost {
        /// What was waited for.
        doing: &'static str,
        /// Host, port and database.
        place: String,
    },
    /// The session is on another server than the one that the daemon works with now.
    #[error("the connection for notifications is to PostgreSQL at {from}, and the database is at {to} now")]
    Moved {
        /// Where the session is.
        from: String,
        /// Where the database is.
        to: String,
    },
    /// The server did not answer in time.
    #[error("gave up after {} s waiting for PostgreSQL to {doing}", .after.as_secs())]
    Deadline {
        /// What was waited for.
        doing: &'static str,
        /// How long.
        after: Duration,
    },
}

impl StoreError {
    /// Whether the server understood the statement and refused it: it would refuse the same statement again.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Statement { source: sqlx::Error::Database(_), .. })
    }

    /// PostgreSQL's message, if it refused the statement and keeps the session: because of a trigger, a full disk or a
    /// revoked right, for instance.
    #[must_use]
    pub fn refusal(&self) -> Option<&str> {
        let (Self::Statement { source, .. } | Self::Rights { source, .. }) = self else { return None };
        let error = source.as_database_error()?.try_downcast_ref::<PgDatabaseError>()?;
        // A fatal error ends the session, for instance one that was idle in a transaction for too long.
        let keeps_session = !matches!(error.severity(), PgSeverity::Fatal | PgSeverity::Panic);
        keeps_session.then(|| error.message())
    }

    /// Whether the server ran out of memory, or the statement needed a value larger than PostgreSQL allows.
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        let Self::Statement { source: sqlx::Error::Database(error), .. } = self else { return false };
        // out_of_memory or program_limit_exceeded: which of them depends on PostgreSQL's version.
        error.code().is_some_and(|code| code == "53200" || code == "54000")
    }

    /// What is wrong with the given values, in a sentence, if they break a rule of the schema or cannot be stored.
    /// Nothing was changed, and the same values would be refused again. A sentence about one column begins with its
    /// name.
    #[must_use]
    pub fn broken_rule(&self) -> Option<&str> {
        let Self::Statement { source: sqlx::Error::Database(error), .. } = self else { return None };
        match error.code().as_deref() {
            // check_violation. The names of our constraints are sentences.
            Some("23514") => error.constraint(),
            // untranslatable_character.
            Some("22P05") => Some("payload must not contain \\u0000, which PostgreSQL cannot store"),
            // Other data exceptions, such as a time that is out of range.
            Some(code) if code.starts_with("22") => Some(error.message()),
            _ => None,
        }
    }

    /// Why the given values cannot be stored, in a sentence, if they and nothing else are the cause: the same statement with
    /// other values may succeed.
    #[must_use]
    pub fn fault_of_values(&self) -> Option<&str> {
        if let Some(rule) = self.broken_rule() {
            return Some(rule);
        }
        let Self::Statement { source: sqlx::Error::Database(error), .. } = self else { return None };
        // Constraints, errors that a trigger raises, and values that are too large.
        let is_of_values =
            error.code().is_some_and(|code| ["23", "P0", "54"].iter().any(|class| code.starts_with(class)));
        is_of_values.then(|| error.message())
    }

    /// PostgreSQL's message, if a key is taken already.
    #[must_use]
    pub fn conflict(&self) -> Option<&str> {
        let Self::Statement { source: sqlx::Error::Database(error), .. } = self else { return None };
        (error.code().as_deref() == Some("23505")).then(|| error.message())
    }

    /// Whether the schema `tidings` is missing, or is of an older release.
    #[must_use]
    pub fn is_unmigrated(&self) -> bool {
        let Self::Statement { source: sqlx::Error::Database(error), .. } = self else { return false };
        // No such schema, table, column or function.
        matches!(error.code().as_deref(), Some("3F000" | "42P01" | "42703" | "42883"))
    }
}

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
    async fn listener(&self, patience: Duration) -> Result<(PgListener, Backend), StoreError> {
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

    async fn try_listener(&self) -> Result<(PgListener, Backend), sqlx::Error> {
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
