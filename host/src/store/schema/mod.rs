//! The schema: the migrations that the binary carries, and whether a database has had them.
//!
//! Their bookkeeping is `tidings._sqlx_migrations`, so that a database with migrations of its own is not disturbed.

pub(super) mod inspection;
mod migrations;
pub(super) mod objects;
pub(super) mod row_security;

use sqlx::Connection as _;
use sqlx::PgConnection;
use sqlx::migrate::{Migrate as _, MigrateError, Migrator};

use crate::store::dead_letter_pass::ask;
use crate::store::{Store, StoreError};
use inspection::Found;
use migrations::MIGRATOR;
pub use migrations::SchemaError;
use row_security::MAKE_POLICIES;

/// Where it is written which of them ran.
const RECORD: &str = "tidings._sqlx_migrations";

impl Store {
    /// Runs the migrations that have not run yet, and makes policies where row-level security is on. Several processes may try
    /// at once: one does it, the others wait. Returns how many ran.
    ///
    /// # Errors
    ///
    /// When one fails, or the schema belongs to another release or to somebody else; then nothing was changed.
    pub async fn migrate(&self) -> Result<usize, SchemaError> {
        let mut connection = self.connect().await?;
        // The daemon's own limits are too tight for an index over a large table.
        let limits = "SET statement_timeout = 0; SET lock_timeout = '60s'; SET idle_in_transaction_session_timeout = 0";
        let prepared = sqlx::raw_sql(limits).execute(&mut connection).await;
        prepared.map_err(|source| StoreError::Statement { doing: "prepare to migrate", source })?;
        // As sqlx does, so that no two of any release migrate at once. It ends with the session.
        connection.lock().await.map_err(|source| self.migrate_error(source))?;
        let ran = self.migrate_alone(&mut connection).await?;
        let _ = connection.close().await;
        Ok(ran)
    }

    async fn migrate_alone(&self, connection: &mut PgConnection) -> Result<usize, SchemaError> {
        self.make_policies(connection).await?;
        let found = self.seen(ask("look at the schema", Found::look(connection)).await?)?;
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
        migrator.dangerous_set_table_name(RECORD);
        // That it exists does not count for who may not make one.
        if !has_schema {
            connection.create_schema_if_not_exists("tidings").await?;
        }
        connection.ensure_migrations_table(RECORD).await?;
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
        ask(doing, async { sqlx::raw_sql(MAKE_POLICIES).execute(connection).await }).await.map(drop)
    }

    /// A schema that somebody else made and owns: our grants may have been without effect, with a warning that nobody saw.
    async fn check_usage(&self, connection: &mut PgConnection) -> Result<(), StoreError> {
        let closed = ask("ask who may use the schema", async {
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
        let Some(owner) = closed else { return Ok(()) };
        Err(self.unfit(&format!(
            "its schema tidings is migrated, and our roles may not use it; as {owner}: GRANT USAGE ON SCHEMA tidings TO tidings_daemon, tidings_producer"
        )))
    }

    /// What was found, if none of it is hidden.
    fn seen(&self, found: Found) -> Result<Found, StoreError> {
        if found.hidden.is_empty() { Ok(found) } else { Err(self.unfit(&row_security::flaw(&found.hidden))) }
    }

    /// Whether the database has exactly the migrations that this binary carries and all that they made, shows us the rows of
    /// its tables, and has an encoding we can write.
    ///
    /// # Errors
    ///
    /// When it has not.
    pub async fn check_schema(&self) -> Result<(), SchemaError> {
        let place = self.place();
        let mut connection = self.connection().await?;
        let found = connection.run("look at the schema", async |connection| Found::look(connection).await).await?;
        let found = self.seen(found)?;
        found.check(&place)?;
        let (ran, known) = (found.applied.len(), MIGRATOR.iter().count());
        if ran < known {
            return Err(SchemaError::Behind { place, found: ran, known });
        }
        let encoding = found.encoding;
        if encoding == "UTF8" { Ok(()) } else { Err(SchemaError::Encoding { place, encoding }) }
    }
}
