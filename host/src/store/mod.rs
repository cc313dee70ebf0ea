//! The only place with SQL. Everything here is about one database: its schema, its clock, and the rows of
//! `tidings.schedules`, which a [`Claim`] locks, and moves on when it is settled.
//!
//! Every wait for the server is bounded and named. A connection that a wait was given up on is closed, never given back
//! to the pool, where it would be waited for again.

mod admin;
mod connection;
mod dead_letter_pass;
mod history;
mod queue;
mod schema;

use std::str::FromStr as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sqlx::ConnectOptions as _;
use sqlx::postgres::{PgConnectOptions, PgDatabaseError, PgListener, PgPoolOptions, PgSeverity};
use thiserror::Error;
use time::OffsetDateTime;
use tokio::sync::Semaphore;

use crate::model::secret_url::SecretUrl;
use crate::model::tls_error;

pub use admin::backlog::{Backlog, ENOUGH, Late};
pub use admin::doctor::{Holder, Holding, ServerVersion, Skew, TOO_LONG};
pub use admin::parked::ParkedRow;
pub use admin::pauses::Until;
pub use admin::produce::NewSchedule;
pub use admin::upcoming::{Upcoming, UpcomingRow};
use connection::pool::Pool;
use connection::{Connection, Doubt};
pub use dead_letter_pass::{Begun, Pass};
pub use history::Delivered;
pub use queue::claim::{Claim, Claimed, Wanted};
pub(crate) use queue::kinds::{announce, withdraw};
pub(crate) use queue::polling::promise_to_poll;
pub use queue::settle::{Outcome, Settlement};
pub use schema::SchemaError;

/// A statement takes milliseconds; one that takes this long has met a frozen server or a dead link.
const STATEMENT_DEADLINE: Duration = Duration::from_secs(20);
/// For a connection, logging in included.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// What went wrong between us and PostgreSQL. Always the infrastructure's fault, never a row's.
#[derive(Debug, Error)]
pub enum StoreError {
    /// It does not answer.
    #[error("could not reach PostgreSQL at {place}")]
    Connect {
        /// Host and port.
        place: String,
        /// Why.
        #[source]
        source: sqlx::Error,
    },
    /// It answers, and its certificate says that it may be somebody else.
    #[error("the certificate of PostgreSQL at {place} is refused: {why}")]
    Certificate {
        /// Host, port and database.
        place: String,
        /// What is wrong with it, and what to do.
        why: &'static str,
        /// In the words of TLS.
        #[source]
        source: sqlx::Error,
    },
    /// It answers, and has no connection for us.
    #[error(
        "PostgreSQL at {place} gives us no further connection, and a daemon needs 4 (ALTER ROLE … CONNECTION LIMIT, max_connections)"
    )]
    Full {
        /// Host, port and database.
        place: String,
        /// What it said.
        #[source]
        source: sqlx::Error,
    },
    /// It answers, and does not let us in.
    #[error(
        "PostgreSQL at {place} refused the login; check the user, the password and the database in TIDINGS_DATABASE_URL"
    )]
    Login {
        /// User, host, port and database.
        place: String,
        /// What it said.
        #[source]
        source: sqlx::Error,
    },
    /// It answers, and cannot be used as it is.
    #[error("PostgreSQL at {place} cannot be used: {why}")]
    Unfit {
        /// Host, port and database.
        place: String,
        /// What is wrong, and what to do.
        why: String,
    },
    /// Our role may not do what we asked.
    #[error(
        "could not {doing}: our role lacks a right; make it a member of tidings_daemon: GRANT tidings_daemon TO our_role"
    )]
    Rights {
        /// What we asked.
        doing: &'static str,
        /// What is forbidden.
        #[source]
        source: sqlx::Error,
    },
    /// It could not do what we asked.
    #[error("could not {doing}")]
    Statement {
        /// What we asked.
        doing: &'static str,
        /// Why.
        #[source]
        source: sqlx::Error,
    },
    /// It does not answer any more.
    #[error("gave up after {} s waiting for PostgreSQL to {doing}", .after.as_secs())]
    Deadline {
        /// What we asked.
        doing: &'static str,
        /// How long we waited.
        after: Duration,
    },
}

impl StoreError {
    /// Whether the database understood and refused: the same again would be refused again.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Statement { source: sqlx::Error::Database(_), .. })
    }

    /// PostgreSQL's words, if it understood, refused, and serves the session on: a trigger, a full disk or a right that was
    /// withdrawn, for instance.
    #[must_use]
    pub fn refusal(&self) -> Option<&str> {
        let (Self::Statement { source, .. } | Self::Rights { source, .. }) = self else { return None };
        let error = source.as_database_error()?.try_downcast_ref::<PgDatabaseError>()?;
        // With an error that is fatal it ends the session, for one that was idle in its transaction for instance.
        let goes_on = !matches!(error.severity(), PgSeverity::Fatal | PgSeverity::Panic);
        goes_on.then(|| error.message())
    }

    /// Whether the database had no memory for it, or would have needed more than it ever takes for one value.
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        let Self::Statement { source: sqlx::Error::Database(error), .. } = self else { return false };
        // RowRef of the two depends on the version: out of memory, or a limit of the program exceeded.
        error.code().is_some_and(|code| code == "53200" || code == "54000")
    }

    /// The sentence, if what was given breaks a rule of the schema or cannot be stored: nothing was done, and the same again
    /// would be refused again. It begins with the column, where it is about one.
    #[must_use]
    pub fn broken_rule(&self) -> Option<&str> {
        let Self::Statement { source: sqlx::Error::Database(error), .. } = self else { return None };
        match error.code().as_deref() {
            // The names of our constraints are sentences.
            Some("23514") => error.constraint(),
            Some("22P05") => Some("payload must not contain \\u0000, which PostgreSQL cannot store"),
            // Other data exceptions, such as a time that is out of range.
            Some(code) if code.starts_with("22") => Some(error.message()),
            _ => None,
        }
    }

    /// The sentence, if a key is taken.
    #[must_use]
    pub fn conflict(&self) -> Option<&str> {
        let Self::Statement { source: sqlx::Error::Database(error), .. } = self else { return None };
        (error.code().as_deref() == Some("23505")).then(|| error.message())
    }

    /// Whether there is no schema, or an older one.
    #[must_use]
    pub fn is_unmigrated(&self) -> bool {
        let Self::Statement { source: sqlx::Error::Database(error), .. } = self else { return false };
        // No such schema, table, column or function.
        matches!(error.code().as_deref(), Some("3F000" | "42P01" | "42703" | "42883"))
    }
}

/// The database.
#[derive(Clone, Debug)]
pub struct Store {
    options: PgConnectOptions,
    pool: Arc<Pool>,
    /// For the one session beside the pool's and the listener's: that of a pass, or before there are passes of a check.
    beside: Arc<Semaphore>,
    doubt: Doubt,
    /// Where the queue begins, for all that read it.
    mark: Arc<Mutex<Option<OffsetDateTime>>>,
}

/// Whether `url` can be understood, without the password in the answer.
pub(crate) fn check_url(url: &SecretUrl) -> Result<(), String> {
    PgConnectOptions::from_str(url.expose()).map(drop).map_err(|error| match error {
        sqlx::Error::Configuration(source) => source.to_string(),
        error => error.to_string(),
    })
}

impl Store {
    /// The low-water mark, below which nothing waits, as far as the scheduler knows; `None` = it does not know.
    fn mark(&self) -> Option<OffsetDateTime> {
        *self.mark.lock().expect("nothing panics that holds it")
    }

    /// Notes the low-water mark, for all that read the queue beside the scheduler.
    pub fn note_mark(&self, mark: Option<OffsetDateTime>) {
        *self.mark.lock().expect("nothing panics that holds it") = mark;
    }

    /// A store that connects when it is first used. `connections` is how many it may keep for its statements, at least 1; one
    /// more is that of a pass, and another the listener's.
    ///
    /// # Panics
    ///
    /// If `url` was not checked by the configuration.
    #[must_use]
    pub fn new(url: &SecretUrl, connections: usize) -> Self {
        let options = PgConnectOptions::from_str(url.expose())
            .expect("the configuration accepts only URLs that can be understood")
            .application_name("tidings")
            .options([
                // The server must notice when our host is gone, and let go of the rows that we had locked: with its
                // own defaults that takes over two hours.
                ("tcp_keepalives_idle", "10"),
                ("tcp_keepalives_interval", "5"),
                ("tcp_keepalives_count", "3"),
                ("tcp_user_timeout", "20000"),
                ("client_connection_check_interval", "10000"),
                ("idle_in_transaction_session_timeout", "30000"),
                ("idle_session_timeout", "0"),
                ("statement_timeout", "30000"),
                ("lock_timeout", "5000"),
                // Nothing that a database or a role may have set for its other users must change what we mean.
                ("default_transaction_isolation", "read committed"),
                ("default_transaction_read_only", "off"),
                ("search_path", ""),
                ("TimeZone", "UTC"),
                ("jit", "off"),
                // What is asked for in an order is read in the order of its index. By its statistics, which lag behind or
                // cannot know what is paused, PostgreSQL would now and then rather read the whole table and sort it.
                ("enable_sort", "off"),
                // A claim was planned anew each time, which took longer than the claim: the plan for given values seems
                // cheaper by a little, and is the same.
                ("plan_cache_mode", "force_generic_plan"),
                // Our own updates need not wake us.
                ("tidings.notify", "off"),
            ])
            .disable_statement_logging();
        let beside = Arc::new(Semaphore::new(1));
        Self { options, pool: Pool::new(connections), beside, doubt: Doubt::new(), mark: Arc::default() }
    }

    /// Host, port and database, for people.
    #[must_use]
    pub fn place(&self) -> String {
        let host = self
            .options
            .get_socket()
            .map_or_else(|| self.options.get_host().to_owned(), |path| path.display().to_string());
        format!("{host}:{}/{}", self.options.get_port(), self.options.get_database().unwrap_or_default())
    }

    /// Opens one connection of its own and closes it, to find out in words whether the database can be used.
    ///
    /// # Errors
    ///
    /// When it cannot.
    pub async fn probe(&self) -> Result<(), StoreError> {
        let _alone = self.beside.acquire().await;
        let connection = self.connect().await?;
        let _ = tokio::time::timeout(CONNECT_DEADLINE, sqlx::Connection::close(connection)).await;
        Ok(())
    }

    fn connect_error(&self, source: sqlx::Error) -> StoreError {
        // 28: invalid authorization; 3D: no such database; 42501: no right to connect.
        let refused = source
            .as_database_error()
            .and_then(sqlx::error::DatabaseError::code)
            .is_some_and(|code| code.starts_with("28") || code.starts_with("3D") || code == "42501");
        let takes_no_settings =
            source.as_database_error().is_some_and(|error| error.message().contains("startup parameter"));
        if connection::is_full(&source) {
            StoreError::Full { place: self.place(), source }
        } else if takes_no_settings {
            self.unfit(connection::server_check::NO_SETTINGS)
        } else if refused {
            StoreError::Login { place: format!("{} as {}", self.place(), self.options.get_username()), source }
        } else if let sqlx::Error::Io(error) = &source
            && let Some(why) = tls_error::refusal(error)
        {
            StoreError::Certificate { place: self.place(), why, source }
        } else {
            StoreError::Connect { place: self.place(), source }
        }
    }

    /// A connection to be notified on.
    ///
    /// # Errors
    ///
    /// When it cannot be had within `patience`.
    pub(crate) async fn listener(&self, patience: Duration) -> Result<PgListener, StoreError> {
        // Of one, which the listener keeps for itself.
        let pool = PgPoolOptions::new().max_connections(1).connect_lazy_with(self.options.clone());
        match tokio::time::timeout(patience, PgListener::connect_with(&pool)).await {
            Ok(Ok(mut listener)) => {
                // What was notified while it connected again behind our back would be lost, and nothing announced.
                listener.eager_reconnect(false);
                Ok(listener)
            }
            Ok(Err(source)) => Err(self.connect_error(source)),
            // It asks again and again, and does not tell why. Another one does, and if need be makes room.
            Err(_) => {
                let connection = self.connect().await?;
                let _ = tokio::time::timeout(patience, sqlx::Connection::close(connection)).await;
                Err(StoreError::Deadline { doing: "accept a connection for notifications", after: patience })
            }
        }
    }
}
