//! Checks that the triggers and indexes that the migrations make exist and work. Without them the daemon is late or
//! slow, and no error says why.

use std::collections::BTreeMap;

use crate::store::schema::migrations::MIGRATOR;
use crate::store::{Store, StoreError};

/// The triggers, as the migrations make them, each with its table.
const TRIGGERS: [(&str, &str); 6] = [
    ("schedules", "look_afresh_before_update"),
    ("schedules", "notify_after_insert"),
    ("schedules", "notify_after_update"),
    ("recurrences", "recurrences_notify_after_insert"),
    ("recurrences", "recurrences_notify_after_update"),
    ("recurrences", "set_make_at"),
];
/// The indexes of the schema, as the migrations make them.
const INDEXES: [&str; 22] = [
    "_sqlx_migrations_pkey",
    "catch_ups_pkey",
    "deliveries_finished_at",
    "deliveries_id",
    "installation_pkey",
    "lifted_pkey",
    "limits_pkey",
    "lines_free_at",
    "lines_pkey",
    "parked_pkey",
    "passes_pkey",
    "pauses_pkey",
    "recurrences_make_at",
    "recurrences_pkey",
    "recurrences_problem",
    "schedules_kind_key",
    "schedules_line",
    "schedules_pkey",
    "schedules_recurrence",
    "schedules_slot_at",
    "schedules_subject",
    "schedules_turn",
];

/// Where `tidings.schedules` has partitions, this index is in the place of the primary key, which would have to contain what the
/// partitions are made by.
const INSTEAD_OF_PRIMARY_KEY: &str = "schedules_id";

/// The triggers that the migrations make, each after its table.
pub(super) fn list_triggers() -> impl Iterator<Item = (&'static str, &'static str)> {
    TRIGGERS.into_iter()
}

/// The indexes of the schema, where `tidings.schedules` has partitions or not.
pub(super) fn list_indexes(has_partitions: bool) -> impl Iterator<Item = &'static str> {
    let name = move |name| if has_partitions && name == "schedules_pkey" { INSTEAD_OF_PRIMARY_KEY } else { name };
    INDEXES.into_iter().map(name)
}

impl Store {
    /// Tells what is wrong with the triggers of the schema, each with what to do, and how many triggers there
    /// should be.
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
                    WHERE tgrelid IN ('tidings.schedules'::regclass, 'tidings.recurrences'::regclass) AND NOT tgisinternal
                    "#
                )
                .fetch_all(connection)
                .await
            })
            .await?;
        let found = rows.into_iter().map(|row| (row.name, row.enabled)).collect();
        Ok((find_trigger_flaws(&found), TRIGGERS.len()))
    }

    /// Tells the same for the indexes of the schema.
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
                    SELECT
                        relname::text AS "name!",
                        indisvalid AND indisready AS "valid!",
                        indrelid = 'tidings.schedules'::regclass AND relkind = 'I' AS "of_partitions!"
                    FROM pg_index
                    JOIN pg_class ON pg_class.oid = indexrelid
                    WHERE relnamespace = 'tidings'::regnamespace
                    "#
                )
                .fetch_all(connection)
                .await
            })
            .await?;
        let has_partitions = rows.iter().any(|row| row.of_partitions);
        let found = rows.into_iter().map(|row| (row.name, row.valid)).collect();
        Ok((find_index_flaws(&found, has_partitions), INDEXES.len()))
    }
}

/// `found` has the existing triggers by name, and whether each is enabled.
fn find_trigger_flaws(found: &BTreeMap<String, bool>) -> Vec<String> {
    let flaw = |(table, name): &(&str, &str)| match found.get(*name) {
        Some(true) => None,
        Some(false) => Some(format!("{name} is disabled (ALTER TABLE tidings.{table} ENABLE TRIGGER {name})")),
        None => Some(describe_missing(name)),
    };
    TRIGGERS.iter().filter_map(flaw).collect()
}

/// `found` has the existing indexes by name, and whether each is valid. Indexes that an administrator added are not
/// checked.
fn find_index_flaws(found: &BTreeMap<String, bool>, has_partitions: bool) -> Vec<String> {
    let flaw = |name: &&str| match found.get(*name) {
        Some(true) => None,
        Some(false) => Some(format!("{name} is not valid (REINDEX INDEX CONCURRENTLY tidings.{name})")),
        None => Some(describe_missing(name)),
    };
    list_indexes(has_partitions).filter_map(|name| flaw(&name)).collect()
}

fn describe_missing(name: &str) -> String {
    match find_statement(name) {
        None if name == INSTEAD_OF_PRIMARY_KEY => {
            format!("{name} is missing (CREATE INDEX {name} ON tidings.schedules (id))")
        }
        Some(statement) => format!("{name} is missing ({statement})"),
        None => format!("{name} is missing (make the primary key of its table again)"),
    }
}

/// Finds the last statement of the migrations that makes a trigger or an index, on one line; `None` = it is a primary key,
/// which comes with its table.
pub(super) fn find_statement(name: &str) -> Option<String> {
    MIGRATOR.migrations.iter().rev().find_map(|migration| {
        let sql = migration.sql.as_str();
        let begins = ["CREATE INDEX", "CREATE UNIQUE INDEX", "CREATE TRIGGER", "CREATE OR REPLACE TRIGGER"];
        let start = begins.iter().find_map(|begin| sql.find(&format!("{begin} {name}")))?;
        let statement = sql[start..].split(';').next()?;
        Some(statement.split_whitespace().collect::<Vec<_>>().join(" "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_trigger_and_index_but_the_primary_keys_has_a_statement_in_the_migrations() {
        for name in TRIGGERS.map(|(_, name)| name).into_iter().chain(INDEXES) {
            let statement = find_statement(name);
            if name.ends_with("_pkey") {
                assert_eq!(statement, None);
                continue;
            }
            let statement = statement.expect(name);
            assert!(statement.contains(&format!(" {name} ")) && statement.contains(" ON tidings."), "{statement}");
        }
        assert_eq!(
            find_statement("schedules_slot_at").as_deref(),
            Some("CREATE INDEX schedules_slot_at ON tidings.schedules (slot_at)")
        );
        let changed = find_statement("look_afresh_before_update").expect("a later migration makes it again");
        assert!(changed.starts_with("CREATE OR REPLACE TRIGGER") && changed.contains(" subject, "), "{changed}");
    }

    #[test]
    fn missing_disabled_and_invalid_objects_are_named_with_what_to_do() {
        let mut triggers: BTreeMap<String, bool> = TRIGGERS.map(|(_, name)| (name.to_owned(), true)).into();
        assert!(find_trigger_flaws(&triggers).is_empty());
        triggers.insert("notify_after_insert".into(), false);
        triggers.remove("notify_after_update");
        triggers.insert("audit".into(), false);
        let flaws = find_trigger_flaws(&triggers);
        assert_eq!(flaws.len(), 2, "{flaws:?}");
        assert!(flaws[0].contains("ENABLE TRIGGER notify_after_insert"), "{flaws:?}");
        assert!(flaws[1].contains("missing (CREATE TRIGGER notify_after_update AFTER UPDATE"), "{flaws:?}");

        let mut indexes: BTreeMap<String, bool> = INDEXES.map(|name| (name.to_owned(), true)).into();
        indexes.insert("schedules_slot_at".into(), false);
        indexes.remove("parked_pkey");
        let flaws = find_index_flaws(&indexes, false);
        assert!(flaws[0].contains("parked_pkey is missing (make the primary key"), "{flaws:?}");
        assert!(flaws[1].contains("REINDEX INDEX CONCURRENTLY tidings.schedules_slot_at"), "{flaws:?}");
    }
}
