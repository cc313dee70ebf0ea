//! Whether this server can be used at all: it takes writes, our role may do what we do, and a session is ours alone.

use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection, Row as _};

use super::{CONNECT_DEADLINE, STATEMENT_DEADLINE, Store, StoreError};

/// What the daemon does with each table, and must have the right to.
const RIGHTS: [(&str, &[&str]); 4] = [
    ("schedules", &["SELECT", "UPDATE", "DELETE"]),
    ("deliveries", &["SELECT", "INSERT", "DELETE"]),
    ("parked", &["SELECT", "INSERT", "DELETE"]),
    ("passes", &["SELECT", "INSERT", "UPDATE"]),
];

/// What is wrong behind such a pooler, and what to do.
pub(super) const SHARED: &str = "our sessions are shared, as behind PgBouncer in transaction mode, and notifications and session locks do not \
    work there; give PostgreSQL's own address, or a pooler in session mode";

impl Store {
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
        let (mut one, mut other) = (self.connect().await?, self.connect().await?);
        let asked = tokio::time::timeout(STATEMENT_DEADLINE, async {
            one.execute(AssertSqlSafe(format!("SET tidings.session = '{mark}'"))).await?;
            session_mark(&mut other).await
        });
        let doing = "say whether a session is ours alone";
        let seen = match asked.await {
            Ok(seen) => seen.map_err(|source| StoreError::Statement { doing, source })?,
            Err(_) => return Err(StoreError::Deadline { doing, after: STATEMENT_DEADLINE }),
        };
        if seen == Some(mark) {
            return Err(self.unfit(SHARED));
        }
        let _ = tokio::time::timeout(CONNECT_DEADLINE, async { tokio::join!(one.close(), other.close()) }).await;
        Ok(())
    }

    /// Checks that our role may do with each table what we do with it. The schema is known to be there.
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
                    WHERE NOT has_table_privilege(r.relation, r.may)
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

    fn unfit(&self, why: &str) -> StoreError {
        StoreError::Unfit { place: self.place(), why: why.to_owned() }
    }
}

async fn session_mark(connection: &mut PgConnection) -> Result<Option<String>, sqlx::Error> {
    connection.fetch_one("SELECT current_setting('tidings.session', true)").await?.try_get(0)
}
