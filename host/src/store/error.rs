//! What goes wrong between the daemon and PostgreSQL, in sentences, and what it means for those who asked.

use std::time::Duration;

use sqlx::postgres::{PgDatabaseError, PgSeverity};
use thiserror::Error;

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
