//! The migrations that this binary carries, and the reasons why it refuses a database's schema.

use sqlx::migrate::{MigrateError, Migrator};
use thiserror::Error;

use crate::store::StoreError;

/// The migrations of `migrations/`.
pub(in crate::store) static MIGRATOR: Migrator = sqlx::migrate!("../migrations");

/// Why this binary cannot work with the database's schema.
#[derive(Debug, Error)]
pub enum SchemaError {
    /// The schema is missing, or is of an older release.
    #[error("the database {place} has {found} of the {known} migrations of this tidings: run `tidings migrate` first")]
    Behind {
        /// Host, port and database.
        place: String,
        /// How many migrations the database has had.
        found: usize,
        /// How many this binary carries.
        known: usize,
    },
    /// The schema is of a newer release.
    #[error(
        "the database {place} was migrated by a newer tidings (migration {version}): use that release or a later one"
    )]
    Newer {
        /// Host, port and database.
        place: String,
        /// The first migration that this binary does not know.
        version: i64,
    },
    /// A migration that ran differs from the one that this binary carries, or did not end.
    #[error("migration {version} of the database {place} is not the one that this tidings carries, or did not end")]
    Different {
        /// Host, port and database.
        place: String,
        /// The number of the migration.
        version: i64,
    },
    /// The schema contains objects, and no record of our migrations.
    #[error(
        "the schema tidings of the database {place} holds {objects} and no record of our migrations: it is somebody else's, or was restored in part; rename it (ALTER SCHEMA tidings RENAME TO another_name), restore all of it, or give Tidings a database of its own"
    )]
    Foreign {
        /// Host, port and database.
        place: String,
        /// Some of the objects.
        objects: String,
    },
    /// The objects of the schema do not match the record of our migrations.
    #[error(
        "the schema tidings of the database {place} is there only in part, as after a restore of some of its tables: {objects} are {problem}; restore all of it, tidings._sqlx_migrations included"
    )]
    Partial {
        /// Host, port and database.
        place: String,
        /// The objects that are missing, or there too early.
        objects: String,
        /// Which of the two.
        problem: &'static str,
    },
    /// The database has another encoding than UTF8, and could not store some texts.
    #[error("the database {place} has the encoding {encoding}; Tidings needs UTF8")]
    Encoding {
        /// Host, port and database.
        place: String,
        /// The encoding of the database.
        encoding: String,
    },
    /// A migration failed.
    #[error("could not migrate the database {place}")]
    Migrate {
        /// Host, port and database.
        place: String,
        /// Why.
        #[source]
        source: MigrateError,
    },
    /// The database could not be asked, or is not fit for use.
    #[error(transparent)]
    Store(#[from] StoreError),
}
