//! Whether the triggers and indexes that the migrations make are there and work. Without them the daemon is late or slow,
//! and nothing else says why.

use std::collections::BTreeMap;

use crate::store::schema::migrations::MIGRATOR;
use crate::store::{Store, StoreError};

/// The triggers of `tidings.schedules`, as the migrations make them.
const TRIGGERS: [&str; 3] = ["look_afresh_before_update", "notify_after_insert", "notify_after_update"];
/// The indexes of the schema, as the migrations make them.
const INDEXES: [&str; 11] = [
    "_sqlx_migrations_pkey",
    "deliveries_finished_at",
    "deliveries_id",
    "parked_pkey",
    "passes_pkey",
    "pauses_pkey",
    "schedules_held",
    "schedules_kind_key",
    "schedules_pkey",
    "schedules_slot_at",
    "schedules_subject",
];

impl Store {
    /// What is wrong with the triggers of `tidings.schedules`, each with what to do; and how many there ought to be.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn check_triggers(&self) -> Result<(Vec<String>, usize), StoreError> {
        let mut connection = self.connection().await?;
        let rows = connection
            .run("list the triggers", async |connection| {
                sqlx::query!(
                    r#"
                    SELECT tgname::text AS "name!", tgenabled IN ('O', 'A') AS "enabled!"
                    FROM pg_trigger
                    WHERE tgrelid = 'tidings.schedules'::regclass AND NOT tgisinternal
                    "#
                )
                .fetch_all(connection)
                .await
            })
            .await?;
        let found = rows.into_iter().map(|row| (row.name, row.enabled)).collect();
        Ok((trigger_flaws(&found), TRIGGERS.len()))
    }

    /// The same for the indexes of the schema.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub async fn check_indexes(&self) -> Result<(Vec<String>, usize), StoreError> {
        let mut connection = self.connection().await?;
        let rows = connection
            .run("list the indexes", async |connection| {
                sqlx::query!(
                    r#"
                    SELECT relname::text AS "name!", indisvalid AND indisready AS "valid!"
                    FROM pg_index
                    JOIN pg_class ON pg_class.oid = indexrelid
                    WHERE relnamespace = 'tidings'::regnamespace
                    "#
                )
                .fetch_all(connection)
                .await
            })
            .await?;
        let found = rows.into_iter().map(|row| (row.name, row.valid)).collect();
        Ok((index_flaws(&found), INDEXES.len()))
    }
}

/// `found` is what there is, by name, and whether it is enabled.
fn trigger_flaws(found: &BTreeMap<String, bool>) -> Vec<String> {
    let flaw = |name: &&str| match found.get(*name) {
        Some(true) => None,
        Some(false) => Some(format!("{name} is disabled (ALTER TABLE tidings.schedules ENABLE TRIGGER {name})")),
        None => Some(missing(name)),
    };
    TRIGGERS.iter().filter_map(flaw).collect()
}

/// `found` is what there is, by name, and whether it is valid. Those that somebody else has made are theirs.
fn index_flaws(found: &BTreeMap<String, bool>) -> Vec<String> {
    let flaw = |name: &&str| match found.get(*name) {
        Some(true) => None,
        Some(false) => Some(format!("{name} is not valid (REINDEX INDEX CONCURRENTLY tidings.{name})")),
        None => Some(missing(name)),
    };
    INDEXES.iter().filter_map(flaw).collect()
}

fn missing(name: &str) -> String {
    match statement(name) {
        Some(statement) => format!("{name} is missing ({statement})"),
        None => format!("{name} is missing (make the primary key of its table again)"),
    }
}

/// The statement of the migrations that makes a trigger or an index, on one line; a primary key comes with its table.
fn statement(name: &str) -> Option<String> {
    MIGRATOR.iter().find_map(|migration| {
        let sql = migration.sql.as_str();
        let begins = ["CREATE INDEX", "CREATE UNIQUE INDEX", "CREATE TRIGGER"];
        let start = begins.iter().find_map(|begin| sql.find(&format!("{begin} {name}")))?;
        let statement = sql[start..].split(';').next()?;
        Some(statement.split_whitespace().collect::<Vec<_>>().join(" "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_but_primary_keys_is_made_by_a_statement_of_the_migrations() {
        for name in TRIGGERS.into_iter().chain(INDEXES) {
            let statement = statement(name);
            if name.ends_with("_pkey") {
                assert_eq!(statement, None);
                continue;
            }
            let statement = statement.expect(name);
            assert!(statement.contains(&format!(" {name} ")) && statement.contains(" ON tidings."), "{statement}");
        }
        assert_eq!(
            statement("schedules_slot_at").as_deref(),
            Some("CREATE INDEX schedules_slot_at ON tidings.schedules (slot_at)")
        );
    }

    #[test]
    fn what_is_missing_disabled_or_not_valid_is_named_with_what_to_do() {
        let mut triggers: BTreeMap<String, bool> = TRIGGERS.map(|name| (name.to_owned(), true)).into();
        assert!(trigger_flaws(&triggers).is_empty());
        triggers.insert("notify_after_insert".into(), false);
        triggers.remove("notify_after_update");
        triggers.insert("audit".into(), false);
        let flaws = trigger_flaws(&triggers);
        assert_eq!(flaws.len(), 2, "{flaws:?}");
        assert!(flaws[0].contains("ENABLE TRIGGER notify_after_insert"), "{flaws:?}");
        assert!(flaws[1].contains("missing (CREATE TRIGGER notify_after_update AFTER UPDATE"), "{flaws:?}");

        let mut indexes: BTreeMap<String, bool> = INDEXES.map(|name| (name.to_owned(), true)).into();
        indexes.insert("schedules_slot_at".into(), false);
        indexes.remove("parked_pkey");
        let flaws = index_flaws(&indexes);
        assert!(flaws[0].contains("parked_pkey is missing (make the primary key"), "{flaws:?}");
        assert!(flaws[1].contains("REINDEX INDEX CONCURRENTLY tidings.schedules_slot_at"), "{flaws:?}");
    }
}
