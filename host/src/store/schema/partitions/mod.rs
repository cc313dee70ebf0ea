//! Makes `tidings.schedules` a table of partitions, or a plain table again.
//!
//! Must never leave a table that is half done: all of it is one transaction. Must never drop what an administrator has added to
//! the table, such as a trigger or an index; it is named instead, and nothing is changed.
//!
//! **By kind and key.** PostgreSQL checks what is unique within each partition only, so the rows are spread by what must be
//! unique. Then every statement of producers and of the daemon works as on a plain table, `ON CONFLICT (kind, key)` included.
//! Two things differ. The rows without a key of one kind lie in one partition. And nothing keeps a producer who writes ids from
//! writing one twice.

use std::time::{Duration, Instant};

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection as _};

use crate::store::schema::objects::{find_statement, list_indexes, list_triggers};
use crate::store::schema::row_security::MAKE_POLICIES;
use crate::store::schema::{LIMITS_TO_MIGRATE, SchemaError};
use crate::store::{Store, StoreError};

/// Keeps everybody from the table. The lock is not waited for while others stand behind us for longer than half a second.
const LOCK: &str = "
DO $$
DECLARE
    tries integer := 0;
BEGIN
    SET LOCAL lock_timeout = '500ms';
    LOOP
        BEGIN
            LOCK TABLE tidings.schedules IN ACCESS EXCLUSIVE MODE;
            EXIT;
        EXCEPTION
            WHEN lock_not_available THEN
                tries := tries + 1;
                IF tries = 60 THEN
                    RAISE EXCEPTION 'tidings.schedules is in use by long transactions: end them, or try again when they have ended'
                        USING ERRCODE = 'lock_not_available';
                END IF;
                PERFORM pg_sleep(0.5);
        END;
    END LOOP;
    SET LOCAL lock_timeout = '60s';
    -- An index of ten million rows is built about twice as fast with it.
    SET LOCAL maintenance_work_mem = '256MB';
    SET LOCAL search_path = '';
END
$$";

/// What was done to the partitions.
#[derive(Debug)]
pub struct Partitioned {
    /// How many partitions there were; 1 = the table was a plain one.
    pub before: i64,
    /// How many there are now.
    pub now: u32,
    /// For how long nobody could read or write the table.
    pub took: Duration,
}

impl Store {
    /// Makes `tidings.schedules` a table of so many partitions, or a plain one if that is 1. Does nothing if it is one already.
    /// While it works, nobody can read or write the table: it copies every row, and needs the room for it.
    ///
    /// # Errors
    ///
    /// When the schema is not that of this release, the table has objects that would be lost, long transactions keep it locked
    /// for a minute, or the server cannot do it. Then nothing was changed.
    pub async fn partition(&self, partitions: u32) -> Result<Partitioned, SchemaError> {
        self.check_schema().await?;
        let mut session = self.connect().await?;
        let done = self.partition_in(&mut session, partitions).await;
        let _ = session.close().await;
        Ok(done?)
    }

    async fn partition_in(&self, session: &mut PgConnection, partitions: u32) -> Result<Partitioned, StoreError> {
        run(session, "prepare to make partitions", format!("{LIMITS_TO_MIGRATE}; BEGIN")).await?;
        run(session, "lock the table of rows", LOCK.to_owned()).await?;
        let locked_at = Instant::now();
        let before = count_partitions(session).await?;
        let done = |took| Partitioned { before, now: partitions, took };
        if before == i64::from(partitions) {
            return Ok(done(Duration::ZERO));
        }
        let others = list_other_objects(session).await?;
        if !others.is_empty() {
            return Err(self.unfit(&format!(
                "tidings.schedules has objects that Tidings did not make, and that would be lost with the table: {}; nothing was changed: drop them, run this again, and make them again afterwards",
                others.join(", ")
            )));
        }
        let set = format!("SET LOCAL tidings.partitions = {partitions}");
        run(session, "set the number of partitions", set).await?;
        run(session, "copy the rows", include_str!("copy.sql").to_owned()).await?;
        for statement in list_indexes_of_copy(partitions > 1) {
            run(session, "build an index of the rows", statement).await?;
        }
        run(session, "put the new table in the place of the old one", include_str!("swap.sql").to_owned()).await?;
        for (_, trigger) in list_triggers().filter(|(table, _)| *table == "schedules") {
            let statement = find_statement(trigger).expect("every trigger has a statement");
            run(session, "make a trigger", statement).await?;
        }
        run(session, "make policies for row-level security", MAKE_POLICIES.to_owned()).await?;
        // A daemon that waited in vain looks at once.
        let end = "ANALYZE tidings.schedules; SELECT pg_notify('tidings', ''); COMMIT";
        run(session, "commit the new table", end.to_owned()).await?;
        Ok(done(locked_at.elapsed()))
    }
}

/// The statements that make the indexes of `tidings.schedules` for `tidings.schedules_new`.
fn list_indexes_of_copy(has_partitions: bool) -> Vec<String> {
    let of_schedules = list_indexes(has_partitions).filter(|name| name.starts_with("schedules_"));
    of_schedules
        .map(|name| match (name, find_statement(name)) {
            ("schedules_id", _) => "CREATE INDEX schedules_new_id ON tidings.schedules_new (id)".to_owned(),
            (_, Some(statement)) => statement
                .replace(" ON tidings.schedules ", " ON tidings.schedules_new ")
                .replace(&format!(" {name} "), &format!(" {} ", name.replace("schedules_", "schedules_new_"))),
            (_, None) => {
                "ALTER TABLE tidings.schedules_new ADD CONSTRAINT schedules_new_pkey PRIMARY KEY (id)".to_owned()
            }
        })
        .collect()
}

async fn run(session: &mut PgConnection, doing: &'static str, sql: String) -> Result<(), StoreError> {
    let ran = sqlx::raw_sql(AssertSqlSafe(sql)).execute(session).await;
    ran.map(drop).map_err(|source| StoreError::Statement { doing, source })
}

/// How many partitions the table has; 1 = it is a plain one.
async fn count_partitions(session: &mut PgConnection) -> Result<i64, StoreError> {
    let count = sqlx::query_scalar!(
        r#"SELECT greatest(count(*), 1) AS "count!" FROM pg_inherits WHERE inhparent = 'tidings.schedules'::regclass"#
    );
    count
        .fetch_one(session)
        .await
        .map_err(|source| StoreError::Statement { doing: "count the partitions of the rows", source })
}

/// Lists what depends on the table, and that the migrations did not make.
async fn list_other_objects(session: &mut PgConnection) -> Result<Vec<String>, StoreError> {
    let triggers: Vec<String> = list_triggers().map(|(_, name)| name.to_owned()).collect();
    let indexes: Vec<String> = [false, true].into_iter().flat_map(list_indexes).map(str::to_owned).collect();
    let listed = sqlx::query_scalar!(
        r#"
        WITH places AS (
            SELECT 'tidings.schedules'::regclass::oid AS oid, true AS is_whole
            UNION ALL
            SELECT inhrelid, false FROM pg_inherits WHERE inhparent = 'tidings.schedules'::regclass
        )
        SELECT 'trigger ' || quote_ident(tgname) AS "name!"
        FROM pg_trigger
        WHERE tgrelid IN (SELECT oid FROM places) AND NOT tgisinternal AND tgparentid = 0 AND tgname <> ALL($1)
        UNION ALL
        SELECT 'index ' || indexrelid::regclass
        FROM pg_index
        JOIN pg_class ON pg_class.oid = indexrelid
        JOIN places ON places.oid = indrelid
        WHERE (is_whole AND relname <> ALL($2))
            OR (NOT is_whole AND NOT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = indexrelid))
        UNION ALL
        SELECT 'foreign key ' || quote_ident(conname) || ' of ' || conrelid::regclass
        FROM pg_constraint
        WHERE contype = 'f' AND conparentid = 0
            AND (conrelid IN (SELECT oid FROM places) OR confrelid IN (SELECT oid FROM places))
        UNION ALL
        SELECT 'policy ' || quote_ident(polname)
        FROM pg_policy
        WHERE polrelid IN (SELECT oid FROM places) AND polname NOT IN ('tidings_owner', 'tidings_daemon', 'tidings_producer')
        UNION ALL
        SELECT 'publication ' || quote_ident(pubname)
        FROM pg_publication_rel
        JOIN pg_publication ON pg_publication.oid = prpubid
        WHERE prrelid IN (SELECT oid FROM places)
        UNION ALL
        SELECT DISTINCT 'view ' || ev_class::regclass
        FROM pg_depend
        JOIN pg_rewrite ON pg_rewrite.oid = objid
        WHERE classid = 'pg_rewrite'::regclass AND refclassid = 'pg_class'::regclass AND refobjid IN (SELECT oid FROM places)
        "#,
        &triggers,
        &indexes,
    );
    listed
        .fetch_all(session)
        .await
        .map_err(|source| StoreError::Statement { doing: "list what depends on the table of rows", source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_copy_has_every_index_of_the_table_under_another_name() {
        let (plain, spread) = (list_indexes_of_copy(false), list_indexes_of_copy(true));
        assert_eq!((plain.len(), spread.len()), (7, 7));
        for statement in plain.iter().chain(&spread) {
            assert!(
                statement.contains("schedules_new_") && statement.contains(" tidings.schedules_new "),
                "{statement}"
            );
            assert!(!statement.contains("tidings.schedules "), "{statement}");
        }
        assert!(plain.iter().any(|statement| statement.ends_with("PRIMARY KEY (id)")), "{plain:?}");
        let unique =
            "CREATE UNIQUE INDEX schedules_new_kind_key ON tidings.schedules_new (kind, key) WHERE key IS NOT NULL";
        assert!(spread.iter().any(|statement| statement == unique), "{spread:?}");
    }
}
