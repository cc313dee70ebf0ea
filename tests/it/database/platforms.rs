//! Databases that hosting platforms or other users have changed: a foreign schema named `tidings`, a partial restore,
//! row-level security on every table, a publication of all tables.

use harness::daemon::Launch;
use harness::world::{World, database_url};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};

use crate::dead_letters::replay::{force_pass_at_start, reject_next, wait_for_message_count};
use crate::operations::health::{wait_until_ready, wait_until_unready};

/// How to run `tidings migrate` as `user`.
pub(crate) fn launch_migrate(world: &World, user: &str) -> Launch {
    let url = database_url(world.ports().0, &world.name).replace("postgres@", &format!("{user}@"));
    let launch = world.launch().subcommand("migrate").without("TIDINGS_AMQP_URL").without("TIDINGS_PLUGIN_DIR");
    launch.with("TIDINGS_DATABASE_URL", url)
}

/// The query for the names of all objects in the schema, sorted.
const CONTENTS: &str = "SELECT coalesce(string_agg(identity, ' ' ORDER BY identity), '') FROM (
    SELECT (pg_identify_object(classid, objid, objsubid)).identity FROM pg_depend
    WHERE refclassid = 'pg_namespace'::regclass AND refobjid = to_regnamespace('tidings')) AS contents";

/// Creates a login role for this world, and returns its name.
pub(crate) async fn create_role(world: &World, name: &str, options: &str) -> String {
    let role = format!("{name}_{}", world.name);
    world.sql(&format!("CREATE ROLE {role} LOGIN {options}")).await;
    role
}

pub(crate) fn database_url_of(world: &World, role: &str) -> String {
    database_url(world.ports().0, &world.name).replace("postgres@", &format!("{role}@"))
}

#[tokio::test]
async fn migrate_refuses_a_foreign_schema_named_tidings_with_one_line_and_changes_nothing() {
    let world = World::empty().await;
    for foreign_objects in [
        "CREATE TABLE tidings.schedules (id int)",
        "CREATE TABLE tidings.news (id int); CREATE FUNCTION tidings.schedule() RETURNS int LANGUAGE sql RETURN 1",
        "CREATE TYPE tidings.mood AS ENUM ('good')",
        "CREATE TABLE tidings._sqlx_migrations (version bigint PRIMARY KEY, description text NOT NULL, installed_on timestamptz NOT NULL DEFAULT now(), success boolean NOT NULL, checksum bytea NOT NULL, execution_time bigint NOT NULL);
         INSERT INTO tidings._sqlx_migrations VALUES (1, 'theirs', now(), true, '', 0)",
    ] {
        world.db.execute(AssertSqlSafe(format!("DROP SCHEMA tidings CASCADE; CREATE SCHEMA tidings; {foreign_objects}"))).await.expect(foreign_objects);
        let before: String = world.value(CONTENTS).await;

        let (code, output) = launch_migrate(&world, "postgres").run_to_end().await;

        assert_eq!(code, 65, "{output}");
        assert_eq!(output.matches("somebody else's").count(), 1, "{output}");
        assert!(output.contains("ALTER SCHEMA tidings RENAME TO") && output.lines().count() == 1, "{output}");
        assert_eq!(world.value::<String>(CONTENTS).await, before, "{foreign_objects}");
        let (code, output) = world.launch().run_to_end().await;
        assert!(code == 65 && output.contains("somebody else's"), "{code} {output}");
    }
}

#[tokio::test]
async fn migrate_refuses_a_partly_restored_schema_names_the_missing_objects_and_changes_nothing() {
    let world = World::empty().await;
    for (fault, named) in [
        ("DROP SEQUENCE tidings.polling_until", "tidings.polling_until are missing"),
        (
            "DROP VIEW tidings.paused; DROP TABLE tidings.pauses, tidings.passes",
            "tidings.passes, tidings.paused, tidings.pauses",
        ),
        ("DROP FUNCTION tidings.unpark(uuid)", "tidings.unpark are missing"),
        ("DELETE FROM tidings._sqlx_migrations WHERE version > 8", "tidings.catch_up, tidings.catch_ups"),
        ("DELETE FROM tidings._sqlx_migrations", "no record of our migrations"),
        ("DROP TABLE tidings._sqlx_migrations", "no record of our migrations"),
    ] {
        world.db.execute("DROP SCHEMA tidings CASCADE").await.expect("gone");
        let (code, output) = launch_migrate(&world, "postgres").run_to_end().await;
        assert_eq!(code, 0, "{output}");
        world.db.execute(AssertSqlSafe(fault.to_owned())).await.expect(fault);
        let before: String = world.value(CONTENTS).await;

        let (code, output) = launch_migrate(&world, "postgres").run_to_end().await;

        assert!(code == 65 && output.contains(named) && output.contains("in part"), "{fault}: {code} {output}");
        assert_eq!(output.lines().count(), 1, "{output}");
        assert_eq!(world.value::<String>(CONTENTS).await, before, "{fault}");
        let (code, output) = world.launch().run_to_end().await;
        assert_eq!(code, 65, "{output}");
    }
}

#[tokio::test]
async fn an_empty_schema_of_another_owner_is_migrated_by_a_role_that_may_create_in_it() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let (owner, migrator) = (create_role(&world, "owner", "").await, create_role(&world, "migrator", "").await);
    let prepare = format!(
        "DROP SCHEMA tidings CASCADE; CREATE SCHEMA tidings AUTHORIZATION {owner};
         ALTER DEFAULT PRIVILEGES IN SCHEMA tidings GRANT SELECT ON TABLES TO {owner}"
    );
    world.db.execute(AssertSqlSafe(prepare)).await.expect("prepared");

    let (code, output) = launch_migrate(&world, &migrator).run_to_end().await;
    let grant = format!("as {owner}: GRANT USAGE, CREATE ON SCHEMA tidings TO");
    assert!(code == 1 && output.contains(&grant), "{code} {output}");

    world.sql(&format!("GRANT USAGE, CREATE ON SCHEMA tidings TO {migrator}")).await;
    let (code, output) = launch_migrate(&world, &migrator).run_to_end().await;
    let grant = "GRANT USAGE ON SCHEMA tidings TO tidings_daemon, tidings_producer";
    assert!(code == 1 && output.contains(grant), "{code} {output}");

    world.sql(grant).await;
    let (code, output) = launch_migrate(&world, &migrator).run_to_end().await;
    assert!(code == 0 && output.contains("is up to date"), "{code} {output}");
    let daemon = create_role(&world, "daemon", "IN ROLE tidings_daemon").await;
    let _daemon = world.launch().with("TIDINGS_DATABASE_URL", database_url_of(&world, &daemon)).start_ready().await;
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key": "a", "body": 1}')"#).await;
    inbox.next().await;
}

#[tokio::test]
async fn several_migrations_at_once_succeed_and_only_one_does_the_work() {
    let world = World::empty().await;
    for _ in 0..3 {
        world.sql("DROP SCHEMA tidings CASCADE").await;
        let migrate = launch_migrate(&world, "postgres");
        let ended = futures_util::future::join_all((0..4).map(|_| migrate.run_to_end())).await;
        for (code, output) in &ended {
            assert_eq!(*code, 0, "{output}");
        }
        let ran = ended.iter().filter(|(_, output)| output.contains("ran ")).count();
        assert_eq!(ran, 1, "{ended:?}");
    }
}

#[tokio::test]
async fn migrate_prints_the_cause_of_an_error_only_once() {
    let world = World::empty().await;
    let nobody = create_role(&world, "nobody", "").await;
    world.sql("DROP SCHEMA tidings CASCADE").await;

    let (code, output) = launch_migrate(&world, &nobody).run_to_end().await;

    assert_eq!(code, 1, "{output}");
    assert_eq!(output.matches("permission denied for database").count(), 1, "{output}");
}

/// All tables of Tidings.
pub(crate) const TABLES: [&str; 12] = [
    "_sqlx_migrations",
    "schedules",
    "deliveries",
    "parked",
    "passes",
    "pauses",
    "installation",
    "recurrences",
    "catch_ups",
    "limits",
    "lines",
    "lifted",
];

#[tokio::test]
async fn row_level_security_is_reported_at_the_start_by_readyz_and_by_the_doctor_with_the_solution() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let role = create_role(&world, "daemon", "IN ROLE tidings_daemon").await;
    let launch = world.launch().with("TIDINGS_DATABASE_URL", database_url_of(&world, &role));
    for table in TABLES {
        let hides = format!("hides the rows of tidings.{table} from us");
        let off = format!("ALTER TABLE tidings.{table} DISABLE ROW LEVEL SECURITY");
        world.sql(&format!("ALTER TABLE tidings.{table} ENABLE ROW LEVEL SECURITY")).await;

        let mut daemon = launch.start();
        let line = daemon.wait_for_line(&hides).await;
        assert!(line.contains(&off) && line.contains("CREATE POLICY tidings_daemon ON"), "{line}");
        wait_until_unready(&mut daemon, &hides).await;
        let (code, output) =
            launch.clone().subcommand("doctor").with("TIDINGS_HTTP_ADDR", daemon.http_addr().await).run_to_end().await;
        let is_reported =
            output.lines().any(|line| line.starts_with("FAIL") && line.contains(&hides) && line.contains(&off));
        assert!(code == 1 && is_reported, "{output}");
        world.sql(&off).await;
        daemon.wait_for_line(" ready ").await;
        wait_until_ready(&mut daemon).await;

        // Row-level security is enabled while the daemon runs.
        world.sql(&format!("ALTER TABLE tidings.{table} ENABLE ROW LEVEL SECURITY")).await;
        wait_until_unready(&mut daemon, &hides).await;
        world.sql(&off).await;
        wait_until_ready(&mut daemon).await;
        world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key": "a", "body": 1}')"#).await;
        inbox.next().await;
    }
}

/// Checks that members of the two roles can do everything that producers and the daemon do.
pub(crate) async fn check_everything(world: &World) {
    check_everything_with(world, "").await;
}

/// Checks the same while something is set for the daemon's role, such as `TimeZone = 'UTC'`.
pub(crate) async fn check_everything_with(world: &World, imposed: &str) {
    let mut inbox = world.inbox(&["#"]).await;
    let daemon = create_role(world, "daemon", "IN ROLE tidings_daemon").await;
    let producer = create_role(world, "producer", "IN ROLE tidings_producer").await;
    if !imposed.is_empty() {
        world.sql(&format!("ALTER ROLE {daemon} SET {imposed}")).await;
    }
    let launch = world.launch().with("TIDINGS_DATABASE_URL", database_url_of(world, &daemon));
    force_pass_at_start(world).await;
    let mut running = launch.clone().with("TIDINGS_REPLAY_INTERVAL_MS", 1_000).start_ready().await;
    wait_until_ready(&mut running).await;

    let mut app = PgConnection::connect(&database_url_of(world, &producer)).await.expect("the application logs in");
    let later = "now() + interval '1 hour'";
    for (sql, rows) in [
        (
            format!(
                "SELECT FROM tidings.schedule('message', {later}, '{{\"routing_key\": \"a\", \"body\": 1}}', key => 'k')"
            ),
            1,
        ),
        ("SELECT FROM tidings.schedules".to_owned(), 1),
        ("UPDATE tidings.schedules SET subject = 's'".to_owned(), 1),
        ("SELECT FROM tidings.reschedule('message', 'k', now()) AS moved WHERE moved".to_owned(), 1),
        (format!("INSERT INTO tidings.schedules (kind, due_at) VALUES ('message', {later})"), 1),
        ("DELETE FROM tidings.schedules WHERE due_at > now()".to_owned(), 1),
        ("INSERT INTO tidings.schedules (kind, due_at) VALUES ('message', now())".to_owned(), 1),
    ] {
        let done = app.execute(AssertSqlSafe(sql.clone())).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
        assert_eq!(done.rows_affected(), rows, "{sql}");
    }
    reject_next(&mut inbox).await;
    assert_eq!(inbox.next().await.number("tidings-replay"), 1);
    wait_for_message_count(world, "tidings.dead", 0).await;
    world.wait_until("SELECT count(*) = 1 FROM tidings.parked").await;
    world.wait_until("SELECT count(*) = 1 FROM tidings.deliveries").await;
    let seen = app.execute("SELECT FROM tidings.deliveries, tidings.parked").await.expect("seen").rows_affected();
    assert_eq!(seen, 1);
    for command in [&["pause", "message"][..], &["resume", "message"]] {
        let (code, output) = launch.clone().subcommand(command[0]).args(&command[1..]).run_to_end().await;
        assert_eq!(code, 0, "{output}");
    }
    let (code, output) = launch.clone().subcommand("parked").args(["drop", "--all"]).run_to_end().await;
    assert_eq!(code, 0, "{output}");
    let repeat =
        "SELECT FROM tidings.repeat('r', 'message', '* * * * * *', time_zone => 'Europe/Berlin', spread => '1 s',
        expires_after => '1 hour', max_count => 2, payload => '{\"routing_key\": \"a\", \"body\": 1}')";
    app.execute(repeat).await.expect("repeated");
    app.execute("SELECT FROM tidings.catch_up('other', 'none', within => '1 day')").await.expect("noted");
    for _ in 0..2 {
        assert_eq!(inbox.next().await.headers()["tidings-recurrence"], "r");
    }
    world.wait_until("SELECT ended AND count = 2 FROM tidings.recurrences").await;
    assert_eq!(
        app.execute("SELECT FROM tidings.recurrences, tidings.catch_ups").await.expect("seen").rows_affected(),
        1
    );
    let stopped =
        app.execute("SELECT FROM tidings.stop_repeating('r') AS stopped WHERE stopped").await.expect("stopped");
    assert_eq!(stopped.rows_affected(), 1);
    wait_until_ready(&mut running).await;
    world.sql("UPDATE tidings.deliveries SET finished_at = now() - interval '30 days'").await;
    let _other = launch.start_ready().await;
    world.wait_until("SELECT count(*) = 0 FROM tidings.deliveries").await;
}

#[tokio::test]
async fn migrate_creates_policies_for_both_roles_where_row_level_security_is_on() {
    for (how, owner) in [("ENABLE", "postgres"), ("FORCE", "owner")] {
        let world = World::with_plugins(&["message"]).await;
        let owner = if owner == "owner" { create_role(&world, "owner", "").await } else { owner.to_owned() };
        world.sql(&format!("ALTER SCHEMA tidings OWNER TO {owner}")).await;
        for table in TABLES {
            world.sql(&format!("ALTER TABLE tidings.{table} OWNER TO {owner}")).await;
            world.sql(&format!("ALTER TABLE tidings.{table} ENABLE ROW LEVEL SECURITY")).await;
            world.sql(&format!("ALTER TABLE tidings.{table} {how} ROW LEVEL SECURITY")).await;
        }
        let functions = "DO $$ DECLARE f record; BEGIN
            FOR f IN SELECT oid::regprocedure AS name FROM pg_proc WHERE pronamespace = 'tidings'::regnamespace LOOP
                EXECUTE format('ALTER FUNCTION %s OWNER TO OWNER_OF_IT', f.name);
            END LOOP; END $$; ALTER VIEW tidings.paused OWNER TO OWNER_OF_IT";
        world.db.execute(AssertSqlSafe(functions.replace("OWNER_OF_IT", &owner))).await.expect("owned");

        let (code, output) = launch_migrate(&world, &owner).run_to_end().await;
        assert!(code == 0 && output.contains("is up to date"), "{how}: {output}");

        check_everything(&world).await;
        let (code, output) = launch_migrate(&world, &owner).run_to_end().await;
        assert_eq!(code, 0, "{output}");
        let on: i64 = world
            .value("SELECT count(*) FROM pg_class WHERE relnamespace = 'tidings'::regnamespace AND relrowsecurity")
            .await;
        assert_eq!(usize::try_from(on).expect("few"), TABLES.len());
    }
}

#[tokio::test]
async fn migrate_keeps_existing_policies_for_producers() {
    let world = World::empty().await;
    world.sql("ALTER TABLE tidings.schedules ENABLE ROW LEVEL SECURITY").await;
    world.sql("CREATE POLICY shop ON tidings.schedules TO tidings_producer USING (kind = 'shop')").await;

    let (code, output) = launch_migrate(&world, "postgres").run_to_end().await;

    assert_eq!(code, 0, "{output}");
    let policies: String =
        world.value("SELECT string_agg(policyname::text, ' ' ORDER BY policyname) FROM pg_policies WHERE schemaname = 'tidings'").await;
    assert_eq!(policies, "shop tidings_daemon");
}

#[tokio::test]
async fn one_migration_is_enough_where_every_new_table_gets_row_level_security() {
    for how in ["ENABLE", "FORCE"] {
        let world = World::with_plugins(&["message"]).await;
        let owner = create_role(&world, "owner", "").await;
        let trigger = format!(
            "DROP SCHEMA tidings CASCADE; GRANT CREATE ON DATABASE {} TO {owner};
            CREATE FUNCTION public.secure() RETURNS event_trigger LANGUAGE plpgsql AS $$
            DECLARE made record; BEGIN
                FOR made IN SELECT * FROM pg_event_trigger_ddl_commands() WHERE object_type = 'table' LOOP
                    EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', made.object_identity);
                    EXECUTE format('ALTER TABLE %s {how} ROW LEVEL SECURITY', made.object_identity);
                END LOOP;
            END $$;
            CREATE EVENT TRIGGER secure ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION public.secure()",
            world.name
        );
        world.db.execute(AssertSqlSafe(trigger)).await.expect("a trigger");

        let (code, output) = launch_migrate(&world, &owner).run_to_end().await;
        assert!(code == 0 && output.contains("ran "), "{how}: {code} {output}");

        check_everything(&world).await;
    }
}

#[tokio::test]
async fn everything_works_with_a_publication_of_all_tables() {
    let world = World::with_plugins(&["message"]).await;
    world.sql("CREATE PUBLICATION everything FOR ALL TABLES").await;
    let without: i64 = world
        .value(
            "SELECT count(*) FROM pg_class WHERE relnamespace = 'tidings'::regnamespace AND relkind = 'r'
                AND NOT (relreplident = 'f' OR relreplident = 'd' AND EXISTS (
                    SELECT FROM pg_index WHERE indrelid = pg_class.oid AND indisprimary))",
        )
        .await;
    assert_eq!(without, 0, "tables that cannot be deleted from");

    // This delivers, parks, retries, pauses, makes a pass and removes history.
    check_everything(&world).await;

    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.start_daemon().await;
    world.sql("SELECT tidings.schedule('message', now(), '{}', key => 'parked')").await;
    world.wait_until("SELECT count(*) = 1 FROM tidings.parked").await;
    world.sql(r#"UPDATE tidings.parked SET payload = '{"routing_key": "a", "body": 1}'"#).await;
    world.sql("SELECT tidings.unpark(id) FROM tidings.parked").await;
    inbox.next().await;
    world.sql("SELECT tidings.schedule('nobody', now())").await;
    world.wait_until("SELECT count(*) = 1 FROM tidings.schedules WHERE held").await;
    world.sql("UPDATE tidings.schedules SET payload = '1'").await;
    world.sql("SELECT tidings.cancel_subject('s'), tidings.cancel('nobody', 'k')").await;
    for command in ["pause", "resume"] {
        let (code, output) = world.tidings([command, "message"]).await;
        assert_eq!(code, 0, "{output}");
    }
    wait_until_ready(&mut daemon).await;
}

#[tokio::test]
async fn a_daemon_whose_role_may_not_see_sessions_delivers() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let role = format!("r{}", world.name);
    world.sql(&format!("CREATE ROLE {role} LOGIN IN ROLE tidings_daemon")).await;
    world.sql("REVOKE SELECT ON pg_catalog.pg_stat_activity FROM PUBLIC").await;
    let url = database_url(world.ports().0, &world.name).replace("postgres@", &format!("{role}@"));
    let mut daemon = world.launch().with("TIDINGS_DATABASE_URL", url).start_ready().await;

    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key": "a", "body": 1}')"#).await;
    inbox.next().await;
    wait_until_ready(&mut daemon).await;
}
