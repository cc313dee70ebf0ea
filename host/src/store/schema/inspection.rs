//! Reads what the schema contains, and compares it with what the migrations that ran have made: a schema may have been
//! made by other software, or restored in part.

use std::collections::BTreeSet;

use sqlx::PgConnection;

use crate::store::schema::migrations::{MIGRATOR, SchemaError};
use crate::store::schema::row_security;

/// The most names that one sentence lists.
const MAX_LISTED: usize = 5;

/// What the schema contains.
#[derive(Debug, Default)]
pub(in crate::store) struct Inspection {
    /// Whether the schema exists.
    pub(in crate::store) schema: bool,
    /// The schema's owner, if our role may create nothing in it.
    pub(in crate::store) closed_by: Option<String>,
    /// Its tables, views, sequences, functions and types.
    pub(in crate::store) objects: Vec<String>,
    /// Our tables whose rows row-level security hides from our role, or from their owner.
    pub(in crate::store) hidden: Vec<String>,
    /// The encoding of the database.
    pub(in crate::store) encoding: String,
    /// The migrations that ran, with their checksums, oldest first.
    pub(in crate::store) applied: Vec<(i64, Vec<u8>)>,
}

impl Inspection {
    /// Reads what the schema contains, in two statements.
    pub(in crate::store) async fn read(connection: &mut PgConnection) -> Result<Self, sqlx::Error> {
        let (tables, commands) = row_security::list_needed_commands();
        let found = sqlx::query!(
            r#"
            SELECT
                to_regnamespace('tidings') IS NOT NULL AS "schema!",
                (
                    SELECT pg_get_userbyid(nspowner)::text
                    FROM pg_namespace
                    WHERE nspname = 'tidings'
                        AND NOT (has_schema_privilege(oid, 'CREATE') AND has_schema_privilege(oid, 'USAGE'))
                ) AS closed_by,
                EXISTS (
                    SELECT FROM pg_class
                    WHERE relname = '_sqlx_migrations' AND relnamespace = to_regnamespace('tidings')
                ) AS "recorded!",
                ARRAY(
                    SELECT coalesce(relname::text, proname::text, typname::text)
                    FROM pg_depend
                    LEFT JOIN pg_class ON classid = 'pg_class'::regclass AND pg_class.oid = objid
                    LEFT JOIN pg_proc ON classid = 'pg_proc'::regclass AND pg_proc.oid = objid
                    LEFT JOIN pg_type ON classid = 'pg_type'::regclass AND pg_type.oid = objid
                    WHERE refclassid = 'pg_namespace'::regclass
                        AND refobjid = to_regnamespace('tidings')
                        AND classid IN ('pg_class'::regclass, 'pg_proc'::regclass, 'pg_type'::regclass)
                ) AS "objects!",
                ARRAY(
                    SELECT DISTINCT place.relname::text
                    FROM unnest($1::text[], $2::text[]) AS needs (relation, command)
                    JOIN pg_class AS place
                        ON place.relname = needs.relation
                        AND place.relnamespace = to_regnamespace('tidings')
                        AND place.relrowsecurity
                    JOIN pg_roles AS subject
                        ON subject.rolname = current_user AND row_security_active(place.oid)
                        -- The functions for producers, and the view of the pauses, read and write as their owner.
                        OR subject.oid = place.relowner
                            AND place.relforcerowsecurity
                            AND NOT subject.rolsuper
                            AND NOT subject.rolbypassrls
                    WHERE NOT EXISTS (
                        SELECT
                        FROM pg_policy
                        CROSS JOIN unnest(polroles) AS role
                        WHERE polrelid = place.oid
                            AND polpermissive
                            AND polcmd::text IN ('*', needs.command)
                            AND (role = 0 OR pg_has_role(subject.oid, role, 'USAGE'))
                    )
                    ORDER BY 1
                ) AS "hidden!",
                current_setting('server_encoding') AS "encoding!"
            "#,
            &tables,
            &commands,
        )
        .fetch_one(&mut *connection)
        .await?;
        let mut applied = Vec::new();
        if found.recorded {
            let query = "SELECT version, checksum FROM tidings._sqlx_migrations WHERE success ORDER BY version";
            applied = sqlx::query_as(query).fetch_all(connection).await?;
        }
        Ok(Self {
            schema: found.schema,
            closed_by: found.closed_by,
            objects: found.objects,
            hidden: found.hidden,
            encoding: found.encoding,
            applied,
        })
    }

    /// Checks that all migrations that ran are migrations of this binary, and that everything that they made is there.
    ///
    /// # Errors
    ///
    /// With what is wrong.
    pub(in crate::store) fn check(&self, place: &str) -> Result<(), SchemaError> {
        let place = || place.to_owned();
        // `None` = this binary has no migration of that number; else whether the checksum is that of ours.
        let compare = |(version, checksum): &(i64, Vec<u8>)| {
            let ours = MIGRATOR.iter().find(|migration| migration.version == *version)?;
            Some(*ours.checksum == **checksum)
        };
        let is_ours = self.applied.iter().any(|applied| compare(applied) == Some(true));
        if !is_ours && !self.objects.is_empty() && !self.has_only_empty_record() {
            return Err(SchemaError::Foreign { place: place(), objects: list_names(self.objects.iter()) });
        }
        for applied in &self.applied {
            let version = applied.0;
            match compare(applied) {
                None => return Err(SchemaError::Newer { place: place(), version }),
                Some(false) => return Err(SchemaError::Different { place: place(), version }),
                Some(true) => {}
            }
        }
        let missing = self.objects_of_migrations(true).filter(|name| !self.has(name)).collect::<BTreeSet<_>>();
        if !missing.is_empty() {
            return Err(SchemaError::Partial {
                place: place(),
                objects: list_names(missing),
                problem: "missing, though a migration that ran has made them",
            });
        }
        Ok(())
    }

    /// Checks the same, and that no object exists already that a migration which has not run would make.
    ///
    /// # Errors
    ///
    /// With what is wrong.
    pub(in crate::store) fn check_before_migrating(&self, place: &str) -> Result<(), SchemaError> {
        self.check(place)?;
        // A later migration may make an object anew that an earlier one has made.
        let made: BTreeSet<&str> = self.objects_of_migrations(true).collect();
        let early = self.objects_of_migrations(false).filter(|name| self.has(name) && !made.contains(name));
        let early = early.collect::<BTreeSet<_>>();
        if early.is_empty() {
            return Ok(());
        }
        Err(SchemaError::Partial {
            place: place.to_owned(),
            objects: list_names(early),
            problem: "there already, though no migration that ran has made them",
        })
    }

    /// Whether the schema contains nothing but an empty record of migrations: an earlier attempt to migrate ended right
    /// at its beginning.
    fn has_only_empty_record(&self) -> bool {
        self.applied.is_empty() && self.objects.iter().all(|name| name == "_sqlx_migrations")
    }

    fn has(&self, name: &str) -> bool {
        self.objects.iter().any(|object| object == name)
    }

    /// The names of the objects that those migrations make that ran or, with `ran` false, that did not run.
    fn objects_of_migrations(&self, ran: bool) -> impl Iterator<Item = &'static str> {
        MIGRATOR
            .iter()
            .filter(move |migration| self.applied.iter().any(|(version, _)| *version == migration.version) == ran)
            .flat_map(|migration| parse_created(migration.sql.as_str()))
    }
}

/// Finds the names of the objects that a migration makes in the schema.
fn parse_created(sql: &str) -> impl Iterator<Item = &str> {
    let statements =
        ["CREATE TABLE tidings.", "CREATE VIEW tidings.", "CREATE SEQUENCE tidings.", "CREATE FUNCTION tidings."];
    sql.lines().filter_map(move |line| {
        let name = statements.iter().find_map(|statement| line.strip_prefix(statement))?;
        name.split(|char: char| char != '_' && !char.is_ascii_alphanumeric()).next()
    })
}

/// Writes the first few names into a sentence, and how many more there are.
fn list_names<T: AsRef<str>>(names: impl IntoIterator<Item = T>) -> String {
    let names: Vec<String> = names.into_iter().map(|name| format!("tidings.{}", name.as_ref())).collect();
    let more = names.len().saturating_sub(MAX_LISTED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", names[..names.len().min(MAX_LISTED)].join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A schema that has had the first migrations, up to this one.
    fn schema_after(version: i64) -> Inspection {
        let ran = || MIGRATOR.iter().filter(|migration| migration.version <= version);
        let objects = ran().flat_map(|migration| parse_created(migration.sql.as_str())).map(str::to_owned);
        Inspection {
            schema: true,
            objects: objects.chain(["_sqlx_migrations".to_owned()]).collect(),
            applied: ran().map(|migration| (migration.version, migration.checksum.to_vec())).collect(),
            ..Inspection::default()
        }
    }

    #[test]
    fn the_schema_of_every_release_passes() {
        assert!(Inspection::default().check_before_migrating("x").is_ok());
        for version in 0..=MIGRATOR.iter().map(|migration| migration.version).max().unwrap_or(0) {
            let found = schema_after(version);
            assert!(found.check_before_migrating("x").is_ok(), "{version}: {:?}", found.check_before_migrating("x"));
        }
        assert!(schema_after(11).objects.len() > 15, "{:?}", schema_after(11).objects);
    }

    #[test]
    fn a_schema_without_a_record_of_our_migrations_is_refused_as_foreign() {
        let foreign = |applied: &[(i64, Vec<u8>)]| Inspection {
            schema: true,
            objects: ["schedules", "a", "b", "c", "d", "e", "f"].map(str::to_owned).into(),
            applied: applied.to_vec(),
            ..Inspection::default()
        };
        for found in [foreign(&[]), foreign(&[(1, vec![1])]), foreign(&[(20_260_101_000_000, vec![2])])] {
            let error = found.check("x").expect_err("the schema is foreign").to_string();
            assert!(error.contains("tidings.schedules, tidings.a") && error.contains("and 2 more"), "{error}");
        }
    }

    #[test]
    fn missing_objects_and_objects_that_exist_too_early_are_named() {
        let mut found = schema_after(11);
        found.objects.retain(|name| name != "polling_until" && name != "unpark");
        let error = found.check("x").expect_err("two objects are missing").to_string();
        assert!(error.contains("tidings.polling_until, tidings.unpark are missing"), "{error}");

        let mut found = schema_after(11);
        found.applied.retain(|(version, _)| *version < 10);
        assert!(found.check("x").is_ok());
        let error = found.check_before_migrating("x").expect_err("objects of later migrations exist").to_string();
        assert!(error.contains("tidings.paused, tidings.pauses, tidings.polling_until are there already"), "{error}");
    }

    #[test]
    fn newer_releases_and_changed_migrations_are_told_from_foreign_schemas() {
        let mut found = schema_after(11);
        found.applied.push((9999, vec![]));
        assert!(matches!(found.check("x"), Err(SchemaError::Newer { version: 9999, .. })));
        let mut found = schema_after(11);
        found.applied[4].1 = vec![];
        assert!(matches!(found.check("x"), Err(SchemaError::Different { version: 5, .. })));
    }
}
