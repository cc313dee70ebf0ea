//! What lies in the schema, and whether it is what the migrations that ran have made: a schema may be somebody else's, or
//! restored in part.

use std::collections::BTreeSet;

use sqlx::PgConnection;

use crate::store::schema::migrations::{MIGRATOR, SchemaError};
use crate::store::schema::row_security;

/// Names that are listed in one sentence.
const NAMED: usize = 5;

/// What a look at the schema found.
#[derive(Debug, Default)]
pub(in crate::store) struct Found {
    /// Whether there is the schema.
    pub(in crate::store) schema: bool,
    /// Whose it is, if our role may not make anything in it.
    pub(in crate::store) closed_by: Option<String>,
    /// Its tables, views, sequences, functions and types.
    pub(in crate::store) objects: Vec<String>,
    /// Tables of ours whose rows are hidden from our role, or from their owner.
    pub(in crate::store) hidden: Vec<String>,
    /// Of the database.
    pub(in crate::store) encoding: String,
    /// The migrations that ran, with their checksums, oldest first.
    pub(in crate::store) applied: Vec<(i64, Vec<u8>)>,
}

impl Found {
    /// Looks, in two statements.
    pub(in crate::store) async fn look(connection: &mut PgConnection) -> Result<Self, sqlx::Error> {
        let (tables, commands) = row_security::needs();
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
            let asked = "SELECT version, checksum FROM tidings._sqlx_migrations WHERE success ORDER BY version";
            applied = sqlx::query_as(asked).fetch_all(connection).await?;
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

    /// Checks that what ran are migrations of this binary, and that all that they have made is there.
    ///
    /// # Errors
    ///
    /// With what is wrong.
    pub(in crate::store) fn check(&self, place: &str) -> Result<(), SchemaError> {
        let place = || place.to_owned();
        let known = |(version, checksum): &(i64, Vec<u8>)| {
            let ours = MIGRATOR.iter().find(|migration| migration.version == *version)?;
            Some(*ours.checksum == **checksum)
        };
        let ours = self.applied.iter().any(|applied| known(applied) == Some(true));
        if !ours && !self.objects.is_empty() && !self.is_only_begun() {
            return Err(SchemaError::Foreign { place: place(), objects: listed(self.objects.iter()) });
        }
        for applied in &self.applied {
            let version = applied.0;
            match known(applied) {
                None => return Err(SchemaError::Newer { place: place(), version }),
                Some(false) => return Err(SchemaError::Different { place: place(), version }),
                Some(true) => {}
            }
        }
        let missing = self.made(true).filter(|name| !self.has(name)).collect::<BTreeSet<_>>();
        if !missing.is_empty() {
            return Err(SchemaError::Part {
                place: place(),
                objects: listed(missing),
                how: "missing, though a migration that ran has made them",
            });
        }
        Ok(())
    }

    /// Checks, beside that, that what is to be made is not there yet.
    ///
    /// # Errors
    ///
    /// With what is.
    pub(in crate::store) fn check_before_migrating(&self, place: &str) -> Result<(), SchemaError> {
        self.check(place)?;
        let early = self.made(false).filter(|name| self.has(name)).collect::<BTreeSet<_>>();
        if early.is_empty() {
            return Ok(());
        }
        Err(SchemaError::Part {
            place: place.to_owned(),
            objects: listed(early),
            how: "there already, though no migration that ran has made them",
        })
    }

    /// Whether there is nothing but the record of migrations, and nothing in it: one was broken off at its very beginning.
    fn is_only_begun(&self) -> bool {
        self.applied.is_empty() && self.objects.iter().all(|name| name == "_sqlx_migrations")
    }

    fn has(&self, name: &str) -> bool {
        self.objects.iter().any(|object| object == name)
    }

    /// What the migrations make that ran, or that did not.
    fn made(&self, ran: bool) -> impl Iterator<Item = &'static str> {
        MIGRATOR
            .iter()
            .filter(move |migration| self.applied.iter().any(|(version, _)| *version == migration.version) == ran)
            .flat_map(|migration| made(migration.sql.as_str()))
    }
}

/// The names of what a migration makes in the schema.
fn made(sql: &str) -> impl Iterator<Item = &str> {
    let kinds =
        ["CREATE TABLE tidings.", "CREATE VIEW tidings.", "CREATE SEQUENCE tidings.", "CREATE FUNCTION tidings."];
    sql.lines().filter_map(move |line| {
        let named = kinds.iter().find_map(|kind| line.strip_prefix(kind))?;
        named.split(|char: char| char != '_' && !char.is_ascii_alphanumeric()).next()
    })
}

fn listed<T: AsRef<str>>(names: impl IntoIterator<Item = T>) -> String {
    let names: Vec<String> = names.into_iter().map(|name| format!("tidings.{}", name.as_ref())).collect();
    let more = names.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", names[..names.len().min(NAMED)].join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A schema that had the first migrations, up to this one.
    fn after(version: i64) -> Found {
        let ran = || MIGRATOR.iter().filter(|migration| migration.version <= version);
        let objects = ran().flat_map(|migration| made(migration.sql.as_str())).map(str::to_owned);
        Found {
            schema: true,
            objects: objects.chain(["_sqlx_migrations".to_owned()]).collect(),
            applied: ran().map(|migration| (migration.version, migration.checksum.to_vec())).collect(),
            ..Found::default()
        }
    }

    #[test]
    fn a_schema_of_any_release_is_whole() {
        assert!(Found::default().check_before_migrating("x").is_ok());
        for version in 0..=MIGRATOR.iter().map(|migration| migration.version).max().unwrap_or(0) {
            let found = after(version);
            assert!(found.check_before_migrating("x").is_ok(), "{version}: {:?}", found.check_before_migrating("x"));
        }
        assert!(after(11).objects.len() > 15, "{:?}", after(11).objects);
    }

    #[test]
    fn a_schema_without_a_record_of_ours_is_somebody_elses() {
        let theirs = |applied: &[(i64, Vec<u8>)]| Found {
            schema: true,
            objects: ["schedules", "a", "b", "c", "d", "e", "f"].map(str::to_owned).into(),
            applied: applied.to_vec(),
            ..Found::default()
        };
        for found in [theirs(&[]), theirs(&[(1, vec![1])]), theirs(&[(20_260_101_000_000, vec![2])])] {
            let error = found.check("x").expect_err("it is not ours").to_string();
            assert!(error.contains("tidings.schedules, tidings.a") && error.contains("and 2 more"), "{error}");
        }
    }

    #[test]
    fn what_is_missing_or_there_too_early_is_named() {
        let mut found = after(11);
        found.objects.retain(|name| name != "polling_until" && name != "unpark");
        let error = found.check("x").expect_err("two are missing").to_string();
        assert!(error.contains("tidings.polling_until, tidings.unpark are missing"), "{error}");

        let mut found = after(11);
        found.applied.retain(|(version, _)| *version < 10);
        assert!(found.check("x").is_ok());
        let error = found.check_before_migrating("x").expect_err("they are there").to_string();
        assert!(error.contains("tidings.paused, tidings.pauses, tidings.polling_until are there already"), "{error}");
    }

    #[test]
    fn later_releases_and_other_files_are_told_from_somebody_elses() {
        let mut found = after(11);
        found.applied.push((9999, vec![]));
        assert!(matches!(found.check("x"), Err(SchemaError::Newer { version: 9999, .. })));
        let mut found = after(11);
        found.applied[4].1 = vec![];
        assert!(matches!(found.check("x"), Err(SchemaError::Different { version: 5, .. })));
    }
}
