//! Checks whether the server can be used at all: it must take writes, our role must have the rights that the daemon
//! needs, and no pooler may share our sessions with others.

use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection, Row as _};

use crate::store::connection::{STANDBY, run_bounded};
use crate::store::{CONNECT_DEADLINE, SchemaError, Store, StoreError};

/// The rights that the daemon needs on each table.
pub(in crate::store) const RIGHTS: [(&str, &[&str]); 12] = [
    ("_sqlx_migrations", &["SELECT"]),
    ("schedules", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
    ("deliveries", &["SELECT", "INSERT", "DELETE"]),
    ("parked", &["SELECT", "INSERT", "DELETE"]),
    ("passes", &["SELECT", "INSERT", "UPDATE"]),
    ("paused", &["SELECT"]),
    ("installation", &["SELECT", "INSERT", "UPDATE"]),
    ("recurrences", &["SELECT", "UPDATE"]),
    ("catch_ups", &["SELECT"]),
    // UPDATE, because rows that are moved into lines lock their limit.
    ("limits", &["SELECT", "UPDATE"]),
    ("lines", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
    ("lifted", &["SELECT", "DELETE"]),
];

/// A pooler gives each transaction another session.
const SESSIONS_SHARED: &str = "our sessions are shared, as behind PgBouncer in transaction mode, and notifications and session locks do not \
    work there; give PostgreSQL's own address: Tidings keeps about ten connections";
/// A pooler drops or refuses the settings that a session asks for.
pub(in crate::store) const SETTINGS_NOT_PASSED_ON: &str = "a pooler or proxy in front of it does not pass our settings on, and without them a frozen \
    daemon would keep its rows locked for ever; give PostgreSQL's own address: Tidings keeps about ten connections";

impl Store {
    /// Checks everything that a daemon needs of its database.
    ///
    /// # Errors
    ///
    /// What is wrong and what to do.
    pub async fn check(&self) -> Result<(), SchemaError> {
        // First, since its error says why the server cannot be reached or refuses the login.
        self.probe().await?;
        self.check_server().await?;
        self.check_rights().await?;
        self.check_schema().await
    }

    /// Checks that the server is the primary, and that no pooler shares our sessions.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unfit`] with what is wrong and what to do, or when it cannot be asked.
    pub async fn check_server(&self) -> Result<(), StoreError> {
        self.check_session().await?;
        let mut connection = self.connection().await?;
        let standby = connection
            .run("tell whether it is a standby", async |connection| {
                sqlx::query_scalar!(r#"SELECT pg_is_in_recovery() AS "standby!""#).fetch_one(connection).await
            })
            .await?;
        if standby {
            return Err(self.unfit(&format!("{STANDBY}; give the address of the primary")));
        }
        Ok(())
    }

    /// Checks that what one of our sessions sets cannot be seen in another. Behind a pooler that gives each transaction
    /// another session, nothing that belongs to a session works: neither LISTEN nor the locks that announce our kinds.
    ///
    /// Uses the simple protocol, since behind such a pooler prepared statements may fail as well.
    async fn check_session(&self) -> Result<(), StoreError> {
        let token = format!("{:016x}", fastrand::u64(..));
        let doing = "check that no session is shared";
        let _permit = self.extra_session.acquire().await;
        let mut first = self.connect().await?;
        let set = format!("SET tidings.session = '{token}'");
        run_bounded(doing, async { first.execute(AssertSqlSafe(set)).await }).await?;
        let mut second = self.connection().await?;
        let (seen, has_settings) = second.run(doing, async |second| read_settings(second).await).await?;
        if seen == Some(token) {
            return Err(self.unfit(SESSIONS_SHARED));
        }
        if !has_settings {
            return Err(self.unfit(SETTINGS_NOT_PASSED_ON));
        }
        let _ = tokio::time::timeout(CONNECT_DEADLINE, first.close()).await;
        Ok(())
    }

    /// Checks that our role has the rights that the daemon needs on each table. Missing tables are left to
    /// [`Store::check_schema`].
    ///
    /// # Errors
    ///
    /// As [`Store::check_server`].
    pub async fn check_rights(&self) -> Result<(), StoreError> {
        let pairs = RIGHTS
            .iter()
            .flat_map(|(table, rights)| rights.iter().map(move |right| (format!("tidings.{table}"), *right)));
        let (tables, rights): (Vec<String>, Vec<String>) =
            pairs.map(|(table, right)| (table, right.to_owned())).unzip();
        let mut connection = self.connection().await?;
        let missing = connection
            .run("check the rights of our role", async |connection| {
                sqlx::query_scalar!(
                    r#"
                    SELECT r.may || ' ' || r.relation AS "missing!"
                    FROM unnest($1::text[], $2::text[]) AS r (relation, may)
                    WHERE NOT has_table_privilege(to_regclass(r.relation), r.may)
                    "#,
                    &tables,
                    &rights,
                )
                .fetch_all(connection)
                .await
            })
            .await?;
        if missing.is_empty() {
            return Ok(());
        }
        Err(self.unfit(&format!(
            "our role may not {}; make it a member of tidings_daemon: GRANT tidings_daemon TO our_role",
            missing.join(", ")
        )))
    }

    pub(in crate::store) fn unfit(&self, why: &str) -> StoreError {
        StoreError::Unfit { place: self.place(), why: why.to_owned() }
    }
}

/// Reads `tidings.session`, and whether the session has a setting that we asked for when we connected.
async fn read_settings(connection: &mut PgConnection) -> Result<(Option<String>, bool), sqlx::Error> {
    let query = "SELECT current_setting('tidings.session', true),
                        current_setting('idle_in_transaction_session_timeout') = '30s'";
    let row = connection.fetch_one(query).await?;
    Ok((row.try_get(0)?, row.try_get(1)?))
}
