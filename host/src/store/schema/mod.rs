//! The schema `tidings`: runs the migrations that the binary carries, and checks whether a database has had them.
//!
//! Must never change a schema that other software made, that a newer release migrated, or that was restored in part.
//! Which migrations ran is recorded in `tidings._sqlx_migrations`, so that an application's own migrations in the same
//! database are not disturbed.

pub(super) mod inspection;
mod migrations;
pub(super) mod objects;
mod partitions;
pub(super) mod row_security;

use sqlx::Connection as _;
use sqlx::PgConnection;
use sqlx::migrate::{Migrate as _, MigrateError, Migrator};

use crate::store::connection::run_bounded;
use crate::store::{Store, StoreError};
use inspection::Inspection;
use migrations::MIGRATOR;
pub use migrations::SchemaError;
pub use partitions::Partitioned;
use row_security::MAKE_POLICIES;

/// The limits of the daemon's sessions are too tight for creating an index on a large table.
const LIMITS_TO_MIGRATE: &str =
    "SET statement_timeout = 0; SET lock_timeout = '60s'; SET idle_in_transaction_session_timeout = 0";
/// The table that records which migrations ran.
const MIGRATIONS_TABLE: &str = "tidings._sqlx_migrations";

impl Store {
    /// Runs the migrations that have not run yet, and makes policies where row-level security is on. Several processes
    /// may try at once: one does it, the others wait. Returns how many migrations ran.
    ///
    /// # Errors
    ///
    /// When a migration fails, or the schema is of a newer release or was made by other software; then nothing was
    /// changed.
    pub async fn migrate(&self) -> Result<usize, SchemaError> {
        let mut connection = self.connect().await?;
        let prepared = sqlx::raw_sql(LIMITS_TO_MIGRATE).execute(&mut connection).await;
        prepared.map_err(|source| StoreError::Statement { doing: "prepare to migrate", source })?;
        // The lock that sqlx itself takes, so that no two releases migrate at once. It is released with the session.
        connection.lock().await.map_err(|source| self.migrate_error(source))?;
        let ran = self.migrate_locked(&mut connection).await?;
        let _ = connection.close().await;
        Ok(ran)
    }

    /// Migrates while the session holds the lock for it. Returns how many migrations ran.
    async fn migrate_locked(&self, connection: &mut PgConnection) -> Result<usize, SchemaError> {
        self.make_policies(connection).await?;
        let found = self.refuse_hidden(run_bounded("inspect the schema", Inspection::read(connection)).await?)?;
        found.check_before_migrating(&self.place())?;
        let left = MIGRATOR.iter().count() - found.applied.len();
        if left > 0 {
            if let Some(owner) = &found.closed_by {
                let why = format!(
                    "our role may create nothing in the schema tidings; as {owner}: GRANT USAGE, CREATE ON SCHEMA tidings TO our_role"
                );
                return Err(self.unfit(&why).into());
            }
            self.run_migrations(connection, found.schema).await.map_err(|source| self.migrate_error(source))?;
            self.make_policies(connection).await?;
        }
        self.check_usage(connection).await?;
        Ok(left)
    }

    async fn run_migrations(&self, connection: &mut PgConnection, has_schema: bool) -> Result<(), MigrateError> {
        let mut migrator = Migrator::with_migrations(MIGRATOR.migrations.to_vec());
        migrator.set_locking(false);
        migrator.dangerous_set_table_name(MIGRATIONS_TABLE);
        // Only if it is missing: without the right to create a schema, IF NOT EXISTS fails even if the schema exists.
        if !has_schema {
            connection.create_schema_if_not_exists("tidings").await?;
        }
        connection.ensure_migrations_table(MIGRATIONS_TABLE).await?;
        sqlx::raw_sql(MAKE_POLICIES).execute(&mut *connection).await?;
        migrator.run_direct(None, connection, false).await
    }

    fn migrate_error(&self, source: MigrateError) -> SchemaError {
        let place = self.place();
        match source {
            MigrateError::VersionMissing(version) => SchemaError::Newer { place, version },
            MigrateError::VersionMismatch(version) | MigrateError::Dirty(version) => {
                SchemaError::Different { place, version }
            }
            source => SchemaError::Migrate { place, source },
        }
    }

    async fn make_policies(&self, connection: &mut PgConnection) -> Result<(), StoreError> {
        let doing = "make policies for row-level security";
        run_bounded(doing, async { sqlx::raw_sql(MAKE_POLICIES).execute(connection).await }).await.map(drop)
    }

    /// Checks that our roles may use the schema. If another role owns it, the grants of the migrations may have had no
    /// effect, with only a warning.
    async fn check_usage(&self, connection: &mut PgConnection) -> Result<(), StoreError> {
        let closed_by = run_bounded("check who may use the schema", async {
            sqlx::query_scalar!(
                r#"
                SELECT pg_get_userbyid(nspowner)::text AS "owner!"
                FROM pg_namespace
                WHERE nspname = 'tidings'
                    AND NOT (
                        has_schema_privilege('tidings_daemon', oid, 'USAGE')
                        AND has_schema_privilege('tidings_producer', oid, 'USAGE')
                    )
                "#
            )
            .fetch_optional(connection)
            .await
        })
        .await?;
        let Some(owner) = closed_by else { return Ok(()) };
        Err(self.unfit(&format!(
            "its schema tidings is migrated, and our roles may not use it; as {owner}: GRANT USAGE ON SCHEMA tidings TO tidings_daemon, tidings_producer"
        )))
    }

    /// Refuses a schema with tables whose rows are hidden from us; passes any other on.
    fn refuse_hidden(&self, found: Inspection) -> Result<Inspection, StoreError> {
        if found.hidden.is_empty() { Ok(found) } else { Err(self.unfit(&row_security::explain_hidden(&found.hidden))) }
    }

    /// Checks that the database has exactly the migrations that this binary carries and everything that they made,
    /// shows us the rows of its tables, and has the encoding UTF8.
    ///
    /// # Errors
    ///
    /// What is wrong, and what to do.
    pub async fn check_schema(&self) -> Result<(), SchemaError> {
        let place = self.place();
        let mut connection = self.connection().await?;
        let found = connection.run("inspect the schema", async |connection| Inspection::read(connection).await).await?;
        let found = self.refuse_hidden(found)?;
        found.check(&place)?;
        let (ran, known) = (found.applied.len(), MIGRATOR.iter().count());
        if ran < known {
            return Err(SchemaError::Behind { place, found: ran, known });
        }
        let encoding = found.encoding;
        if encoding == "UTF8" { Ok(()) } else { Err(SchemaError::Encoding { place, encoding }) }
    }
}
