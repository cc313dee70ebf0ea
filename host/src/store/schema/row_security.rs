//! Row-level security, which some platforms switch on for every new table. Without a policy for our role each table
//! then looks empty, and no error says why.

use crate::store::connection::server_check::RIGHTS;

/// Lists the pairs of our tables and the commands that the daemon runs on their rows, as `pg_policy.polcmd` abbreviates
/// them.
pub(in crate::store) fn list_needed_commands() -> (Vec<String>, Vec<String>) {
    RIGHTS
        .iter()
        // A view has no rows of its own.
        .map(|(table, rights)| (if *table == "paused" { "pauses" } else { table }, rights))
        .flat_map(|(table, rights)| rights.iter().map(move |right| (table.to_owned(), to_polcmd(right).to_owned())))
        .unzip()
}

fn to_polcmd(right: &str) -> &'static str {
    match right {
        "SELECT" => "r",
        "INSERT" => "a",
        "UPDATE" => "w",
        _ => "d",
    }
}

/// Makes a policy for each of our roles that has none, on our tables where row-level security is on and which our role
/// owns. The policies allow everything, so that the grants alone decide, as without row-level security. A table with
/// policies that an administrator made gets none for producers, since those policies may be there to keep producers
/// apart.
pub(in crate::store) const MAKE_POLICIES: &str = r"
DO $$
DECLARE
    place record;
BEGIN
    FOR place IN
        SELECT c.oid, c.oid::regclass AS name, c.relname, c.relforcerowsecurity, pg_get_userbyid(c.relowner) AS owner
        FROM pg_class AS c
        WHERE c.relnamespace = to_regnamespace('tidings')
            AND c.relname IN ('_sqlx_migrations', 'schedules', 'deliveries', 'parked', 'passes', 'pauses', 'installation',
                'recurrences', 'catch_ups', 'limits', 'lines', 'lifted')
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
            AND place.relname IN ('schedules', 'deliveries', 'parked', 'pauses', 'recurrences', 'catch_ups', 'limits', 'lines')
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

/// Says which tables hide their rows from us, and what to do.
pub(in crate::store) fn explain_hidden(hidden: &[String]) -> String {
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
    fn the_remedy_names_each_table() {
        let flaw = explain_hidden(&["parked".to_owned(), "schedules".to_owned()]);
        assert!(flaw.contains("hides the rows of tidings.parked, tidings.schedules from us"), "{flaw}");
        assert!(
            flaw.contains("CREATE POLICY tidings_daemon ON tidings.parked TO tidings_daemon USING (true)"),
            "{flaw}"
        );
        assert!(flaw.contains("ALTER TABLE tidings.schedules DISABLE ROW LEVEL SECURITY"), "{flaw}");
    }

    #[test]
    fn every_table_is_listed_with_all_needed_commands() {
        let (tables, commands) = list_needed_commands();
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
