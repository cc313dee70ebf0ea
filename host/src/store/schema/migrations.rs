//! The migrations that this binary carries, and why it does not work with a database's schema.

use sqlx::migrate::{MigrateError, Migrator};
use thiserror::Error;

use crate::store::StoreError;

pub(in crate::store) static MIGRATOR: Migrator = sqlx::migrate!("../migrations");

/// The database's schema is not the one that this binary works with.
#[derive(Debug, Error)]
pub enum SchemaError {
    /// There is none, or an older one.
    #[error("the database {place} has {found} of the {known} migrations of this tidings: run `tidings migrate` first")]
    Behind {
        /// Host, port and database.
        place: String,
        /// How many migrations it has had.
        found: usize,
        /// How many there are.
        known: usize,
    },
    /// It belongs to a newer release.
    #[error(
        "the database {place} was migrated by a newer tidings (migration {version}): use that release or a later one"
    )]
    Newer {
        /// Host, port and database.
        place: String,
        /// The first migration that this binary does not know.
        version: i64,
    },
    /// A migration was changed after it had run, or did not end.
    #[error("migration {version} of the database {place} is not the one that this tidings carries, or did not end")]
    Different {
        /// Host, port and database.
        place: String,
        /// RowRef migration.
        version: i64,
    },
    /// Objects lie in it that no migration of ours has made.
    #[error(
        "the schema tidings of the database {place} holds {objects} and no record of our migrations: it is somebody else's, or was restored in part; rename it (ALTER SCHEMA tidings RENAME TO another_name), restore all of it, or give Tidings a database of its own"
    )]
    Foreign {
        /// Host, port and database.
        place: String,
        /// Some of what lies in it.
        objects: String,
    },
    /// What the record of our migrations says and what there is are not the same.
    #[error(
        "the schema tidings of the database {place} is there in part, as after a restore of some of its tables: {objects} are {how}; restore all of it, tidings._sqlx_migrations included"
    )]
    Part {
        /// Host, port and database.
        place: String,
        /// What is missing, or there too early.
        objects: String,
        /// RowRef of the two.
        how: &'static str,
    },
    /// Texts of other encodings could not be stored.
    #[error("the database {place} has the encoding {encoding}; Tidings needs UTF8")]
    Encoding {
        /// Host, port and database.
        place: String,
        /// What it is.
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
    /// The database could not be asked.
    #[error(transparent)]
    Store(#[from] StoreError),
}
