//! The schema: the migrations that the binary carries, and whether a database has had them.
//!
//! Their bookkeeping is `tidings._sqlx_migrations`, so that a database with migrations of its own is not disturbed.

use std::collections::HashMap;

use sqlx::migrate::Migrator;
use thiserror::Error;

use super::{Store, StoreError};

pub(super) static MIGRATOR: Migrator = sqlx::migrate!("../migrations");

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
        /// Which migration.
        version: i64,
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
        source: sqlx::migrate::MigrateError,
    },
    /// The database could not be asked.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Store {
    /// Runs the migrations that have not run yet. Several processes may try at once: one does it, the others wait.
    ///
    /// # Errors
    ///
    /// When one fails, or the database belongs to another release.
    pub async fn migrate(&self) -> Result<usize, SchemaError> {
        let place = self.place();
        let mut connection = self.connect().await?;
        let before = match self.applied().await {
            Ok(applied) => applied.len(),
            Err(error) => return Err(error),
        };
        let mut migrator = Migrator::with_migrations(MIGRATOR.migrations.to_vec());
        migrator.dangerous_set_table_name("tidings._sqlx_migrations");
        migrator.create_schema("tidings");
        // The daemon's own limits are too tight for an index over a large table.
        for setting in
            ["SET statement_timeout = 0", "SET lock_timeout = '60s'", "SET idle_in_transaction_session_timeout = 0"]
        {
            sqlx::query(setting)
                .execute(&mut connection)
                .await
                .map_err(|source| StoreError::Statement { doing: "prepare to migrate", source })?;
        }
        match migrator.run_direct(None, &mut connection, false).await {
            Ok(()) => Ok(MIGRATOR.migrations.len() - before.min(MIGRATOR.migrations.len())),
            Err(sqlx::migrate::MigrateError::VersionMissing(version)) => Err(SchemaError::Newer { place, version }),
            Err(
                sqlx::migrate::MigrateError::VersionMismatch(version) | sqlx::migrate::MigrateError::Dirty(version),
            ) => Err(SchemaError::Different { place, version }),
            Err(source) => Err(SchemaError::Migrate { place, source }),
        }
    }

    /// Whether the database has exactly the migrations that this binary carries, and an encoding we can write.
    ///
    /// # Errors
    ///
    /// When it has not.
    pub async fn check_schema(&self) -> Result<(), SchemaError> {
        let place = self.place();
        let applied = self.applied().await?;
        let known: HashMap<i64, &[u8]> =
            MIGRATOR.iter().map(|migration| (migration.version, &*migration.checksum)).collect();
        for (version, checksum) in &applied {
            match known.get(version) {
                None => return Err(SchemaError::Newer { place, version: *version }),
                Some(expected) if expected != checksum => {
                    return Err(SchemaError::Different { place, version: *version });
                }
                Some(_) => {}
            }
        }
        if applied.len() < known.len() {
            return Err(SchemaError::Behind { place, found: applied.len(), known: known.len() });
        }
        let encoding = self
            .connection()
            .await?
            .run("read the encoding of the database", async |connection| {
                sqlx::query_scalar!(r#"SELECT current_setting('server_encoding') AS "encoding!""#)
                    .fetch_one(connection)
                    .await
            })
            .await?;
        if encoding == "UTF8" { Ok(()) } else { Err(SchemaError::Encoding { place, encoding }) }
    }

    /// The migrations that ended, oldest first; none if there is no schema yet.
    async fn applied(&self) -> Result<Vec<(i64, Vec<u8>)>, SchemaError> {
        let mut connection = self.connection().await?;
        let exists = connection
            .run("look for the schema", async |connection| {
                sqlx::query_scalar!(r#"SELECT to_regclass('tidings._sqlx_migrations') IS NOT NULL AS "exists!""#)
                    .fetch_one(connection)
                    .await
            })
            .await?;
        if !exists {
            return Ok(Vec::new());
        }
        let rows = connection
            .run("read which migrations ran", async |connection| {
                sqlx::query!("SELECT version, checksum FROM tidings._sqlx_migrations WHERE success ORDER BY version")
                    .fetch_all(connection)
                    .await
            })
            .await?;
        Ok(rows.into_iter().map(|row| (row.version, row.checksum)).collect())
    }
}
