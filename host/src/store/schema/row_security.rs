//! Row-level security, which platforms switch on for every new table: without a policy for our role each table looks empty,
//! and nothing says why.

use crate::store::connection::server_check::RIGHTS;

/// Tables of ours, and what the daemon does with the rows of each, in the letters of `pg_policy.polcmd`.
pub(in crate::store) fn needs() -> (Vec<String>, Vec<String>) {
    RIGHTS
        .iter()
        // A view has no rows of its own.
        .map(|(table, rights)| (if *table == "paused" { "pauses" } else { table }, rights))
        .flat_map(|(table, rights)| rights.iter().map(move |right| (table.to_owned(), letter(right).to_owned())))
        .unzip()
}

fn letter(right: &str) -> &'static str {
    match right {
        "SELECT" => "r",
        "INSERT" => "a",
        "UPDATE" => "w",
        _ => "d",
    }
}

/// Makes a policy for each role that has none, on our tables where row-level security is on and which our role owns. What
/// they may do is for the grants to say, as without it. A table with policies that others made gets none for producers,
/// since those may be there to keep them apart.
pub(in crate::store) const MAKE_POLICIES: &str = r"
DO $$
DECLARE
    place record;
BEGIN
    FOR place IN
        SELECT c.oid, c.oid::regclass AS name, c.relname, c.relforcerowsecurity, pg_get_userbyid(c.relowner) AS owner
        FROM pg_class AS c
        WHERE c.relnamespace = to_regnamespace('tidings')
            AND c.relname IN ('_sqlx_migrations', 'schedules', 'deliveries', 'parked', 'passes', 'pauses')
            AND c.relrowsecurity
            AND pg_has_role(c.relowner, 'USAGE')
    LOOP
        -- The functions for producers run as the owner.
        IF place.relforcerowsecurity
            AND NOT EXISTS (SELECT FROM pg_policy WHERE polrelid = place.oid AND polname = 'tidings_owner')
        THEN
            EXECUTE format('CREATE POLICY tidings_owner ON %s TO %I USING (true) WITH CHECK (true)', place.name, place.owner);
        END IF;
        -- Before the first migration there are no roles.
        IF to_regrole('tidings_daemon') IS NOT NULL
            AND NOT EXISTS (SELECT FROM pg_policy WHERE polrelid = place.oid AND polname = 'tidings_daemon')
        THEN
            EXECUTE format('CREATE POLICY tidings_daemon ON %s TO tidings_daemon USING (true) WITH CHECK (true)', place.name);
        END IF;
        IF to_regrole('tidings_producer') IS NOT NULL
            AND place.relname IN ('schedules', 'deliveries', 'parked', 'pauses')
            AND NOT EXISTS (
                SELECT FROM pg_policy
                WHERE polrelid = place.oid AND polname NOT IN ('tidings_owner', 'tidings_daemon')
            )
        THEN
            EXECUTE format('CREATE POLICY tidings_producer ON %s TO tidings_producer USING (true) WITH CHECK (true)', place.name);
        END IF;
    END LOOP;
END
$$";

/// What is wrong with tables whose rows are hidden, and what to do.
pub(in crate::store) fn flaw(hidden: &[String]) -> String {
    let tables: Vec<String> = hidden.iter().map(|table| format!("tidings.{table}")).collect();
    let off: Vec<String> =
        tables.iter().map(|table| format!("ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")).collect();
    format!(
        "row-level security is on and hides the rows of {} from us; `tidings migrate`, run as their owner, makes policies (CREATE POLICY tidings_daemon ON {} TO tidings_daemon USING (true)), if our role is a member of tidings_daemon; or switch it off: {}",
        tables.join(", "),
        tables.first().map_or("tidings.schedules", String::as_str),
        off.join("; ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_mends_it_is_said_for_each_table() {
        let flaw = flaw(&["parked".to_owned(), "schedules".to_owned()]);
        assert!(flaw.contains("hides the rows of tidings.parked, tidings.schedules from us"), "{flaw}");
        assert!(
            flaw.contains("CREATE POLICY tidings_daemon ON tidings.parked TO tidings_daemon USING (true)"),
            "{flaw}"
        );
        assert!(flaw.contains("ALTER TABLE tidings.schedules DISABLE ROW LEVEL SECURITY"), "{flaw}");
    }

    #[test]
    fn every_table_and_each_of_its_uses_is_asked_for() {
        let (tables, commands) = needs();
        let of = |table: &str| -> String {
            tables
                .iter()
                .zip(&commands)
                .filter(|(name, _)| *name == table)
                .map(|(_, command)| command.as_str())
                .collect()
        };
        assert_eq!(
            [of("schedules"), of("deliveries"), of("pauses"), of("_sqlx_migrations")],
            ["rawd", "rad", "r", "r"]
        );
    }
}
