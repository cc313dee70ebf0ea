//! Whether this server can be used at all: it takes writes, our role may do what we do, and a session is ours alone.

use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection, Row as _};

use crate::store::dead_letter_pass::ask;
use crate::store::{CONNECT_DEADLINE, SchemaError, Store, StoreError};

/// What the daemon does with each table, and must have the right to.
pub(in crate::store) const RIGHTS: [(&str, &[&str]); 6] = [
    ("_sqlx_migrations", &["SELECT"]),
    ("schedules", &["SELECT", "INSERT", "UPDATE", "DELETE"]),
    ("deliveries", &["SELECT", "INSERT", "DELETE"]),
    ("parked", &["SELECT", "INSERT", "DELETE"]),
    ("passes", &["SELECT", "INSERT", "UPDATE"]),
    ("paused", &["SELECT"]),
];

/// What is wrong behind a pooler that lends sessions out, and what to do.
const SHARED: &str = "our sessions are shared, as behind PgBouncer in transaction mode, and notifications and session locks do not \
    work there; give PostgreSQL's own address: Tidings keeps about ten connections";
/// What is wrong in front of a pooler that does not know the settings of a session, and what to do.
pub(in crate::store) const NO_SETTINGS: &str = "what stands in front of it, a pooler for instance, does not pass our settings on, and without them a frozen \
    daemon would keep its rows for ever; give PostgreSQL's own address: Tidings keeps about ten connections";

impl Store {
    /// Everything that a daemon needs of its database.
    ///
    /// # Errors
    ///
    /// What is wrong and what to do.
    pub async fn check(&self) -> Result<(), SchemaError> {
        // In words, if it cannot be reached or lets nobody in.
        self.probe().await?;
        self.check_server().await?;
        self.check_rights().await?;
        self.check_schema().await
    }

    /// Checks that the server is the primary, and that nobody shares our sessions.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unfit`] with what is wrong and what to do, or when it cannot be asked.
    pub async fn check_server(&self) -> Result<(), StoreError> {
        self.check_session().await?;
        let mut connection = self.connection().await?;
        let standby = connection
            .run("ask whether it is a standby", async |connection| {
                sqlx::query_scalar!(r#"SELECT pg_is_in_recovery() AS "standby!""#).fetch_one(connection).await
            })
            .await?;
        if standby {
            return Err(self.unfit("it is a standby, which takes no writes; give the address of the primary"));
        }
        Ok(())
    }

    /// Behind a pooler that lends each transaction another session, nothing that belongs to a session works: neither
    /// LISTEN nor the locks that announce our kinds. What one of our sessions sets, another must not see.
    ///
    /// In the simple protocol, since prepared statements may fail there as well.
    async fn check_session(&self) -> Result<(), StoreError> {
        let mark = format!("{:016x}", fastrand::u64(..));
        let doing = "say whether a session is ours alone";
        let _alone = self.beside.acquire().await;
        let mut one = self.connect().await?;
        let set = format!("SET tidings.session = '{mark}'");
        ask(doing, async { one.execute(AssertSqlSafe(set)).await }).await?;
        let mut other = self.connection().await?;
        let (seen, settings_stand) = other.run(doing, async |other| session(other).await).await?;
        if seen == Some(mark) {
            return Err(self.unfit(SHARED));
        }
        if !settings_stand {
            return Err(self.unfit(NO_SETTINGS));
        }
        let _ = tokio::time::timeout(CONNECT_DEADLINE, one.close()).await;
        Ok(())
    }

    /// Checks that our role may do with each table what we do with it. Tables that are missing are another matter.
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
            .run("ask for our rights", async |connection| {
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

/// What `tidings.session` is, and whether a setting that we asked for when we connected stands.
async fn session(connection: &mut PgConnection) -> Result<(Option<String>, bool), sqlx::Error> {
    let asked = "SELECT current_setting('tidings.session', true),
                        current_setting('idle_in_transaction_session_timeout') = '30s'";
    let row = connection.fetch_one(asked).await?;
    Ok((row.try_get(0)?, row.try_get(1)?))
}
