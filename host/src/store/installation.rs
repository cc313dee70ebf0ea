//! `tidings.installation`: which database this is, from where its rows were last delivered, and which daemons work on it.
//!
//! Must never write the row before the fleet's decision allows this daemon to deliver.

use sqlx::Row as _;
use uuid::Uuid;

use crate::model::installation::{Identity, Server};
use crate::store::{Store, StoreError};

impl Store {
    /// Tells which installation this is, where its rows were last delivered from, and where the database is now; `None` = no
    /// daemon has worked here, so it has no id yet.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn identity(&self) -> Result<Option<Identity>, StoreError> {
        let mut connection = self.connection().await?;
        let row = connection
            .run("say which installation it is", async |connection| {
                sqlx::query!(
                    r#"
                    SELECT
                        id,
                        servers::text AS "servers!",
                        current_database()::text AS "database!",
                        host(inet_server_addr()) || ':' || inet_server_port() AS address,
                        -- Some platforms keep them from ordinary roles.
                        has_function_privilege('pg_catalog.pg_control_system()', 'EXECUTE')
                            AND has_function_privilege('pg_catalog.pg_control_checkpoint()', 'EXECUTE') AS "may_read_control!"
                    FROM tidings.installation
                    "#
                )
                .fetch_optional(connection)
                .await
            })
            .await?;
        let Some(row) = row else { return Ok(None) };
        let (mut system, mut timeline) = (None, None);
        if row.may_read_control {
            let control =
                "SELECT system_identifier::text, timeline_id FROM pg_control_system(), pg_control_checkpoint()";
            let read = async |connection: &mut sqlx::PgConnection| sqlx::query(control).fetch_one(connection).await;
            let control = connection.run("say which server it is", read).await?;
            (system, timeline) = (control.try_get(0).ok(), control.try_get(1).ok());
        }
        // What somebody else wrote there counts as another server.
        let unknown = |database| vec![Server { system: None, timeline: None, database, address: None }];
        let recorded = serde_json::from_str(&row.servers).unwrap_or_else(|_| unknown(row.servers));
        let here = Server { system, timeline, database: row.database, address: row.address };
        Ok(Some(Identity { installation: row.id, recorded, here }))
    }

    /// Gives the installation an id, unless it has one.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn make_installation(&self) -> Result<(), StoreError> {
        let mut connection = self.connection().await?;
        connection
            .run("give the installation an id", async |connection| {
                sqlx::query!("INSERT INTO tidings.installation DEFAULT VALUES ON CONFLICT DO NOTHING")
                    .execute(connection)
                    .await
            })
            .await
            .map(drop)
    }

    /// Records that rows are delivered from these servers, which are one by several addresses.
    ///
    /// # Errors
    ///
    /// When the database cannot do it.
    pub async fn record_servers(&self, servers: &[Server]) -> Result<(), StoreError> {
        let json = serde_json::to_value(servers).expect("texts and numbers").to_string();
        let mut connection = self.connection().await?;
        connection
            .run("record from where rows are delivered", async |connection| {
                sqlx::query!("UPDATE tidings.installation SET servers = $1::text::jsonb", json)
                    .execute(connection)
                    .await
            })
            .await
            .map(drop)
    }

    /// Whether a daemon works on this database: whether its listener has announced it here.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn has_daemon(&self, daemon: Uuid) -> Result<bool, StoreError> {
        let mut connection = self.connection().await?;
        connection
            .run("say whether a daemon works on it", async |connection| {
                sqlx::query_scalar!(
                    r#"
                    SELECT EXISTS (
                        SELECT
                        FROM pg_locks
                        WHERE locktype = 'advisory' AND granted AND objsubid = 1
                            AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                            AND (classid::bigint << 32 | objid::bigint) = hashtextextended('tidings.daemon ' || $1, 0)
                    ) AS "works!"
                    "#,
                    daemon.to_string(),
                )
                .fetch_one(connection)
                .await
            })
            .await
    }
}

/// Announces a daemon for as long as `connection` lives.
///
/// # Errors
///
/// When the database does not do it.
pub(super) async fn announce_daemon(connection: impl sqlx::PgExecutor<'_>, daemon: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query!(
        r#"SELECT 1 AS "announced!" FROM pg_advisory_lock_shared(hashtextextended('tidings.daemon ' || $1, 0))"#,
        daemon.to_string(),
    )
    .fetch_one(connection)
    .await
    .map(drop)
}
