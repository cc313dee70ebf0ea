//! What platforms and other people do to a database: a schema of the same name, a restore of some tables, row-level security
//! on every table, a publication of all of them.

use harness::daemon::Launch;
use harness::world::{World, database_url};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};

use crate::dead_letters::replay::{pass_at_start, reject, until_waiting};
use crate::operations::health::{until_ready, until_unready};

/// `tidings migrate` as `user`.
fn migrate(world: &World, user: &str) -> Launch {
    let url = database_url(world.ports().0, &world.name).replace("postgres@", &format!("{user}@"));
    let launch = world.launch().subcommand("migrate").without("TIDINGS_AMQP_URL").without("TIDINGS_PLUGIN_DIR");
    launch.with("TIDINGS_DATABASE_URL", url)
}

/// Everything that lies in the schema, in order.
const CONTENTS: &str = "SELECT coalesce(string_agg(identity, ' ' ORDER BY identity), '') FROM (
    SELECT (pg_identify_object(classid, objid, objsubid)).identity FROM pg_depend
    WHERE refclassid = 'pg_namespace'::regclass AND refobjid = to_regnamespace('tidings')) AS contents";

/// A login role of this world's own.
async fn role(world: &World, name: &str, options: &str) -> String {
    let role = format!("{name}_{}", world.name);
    world.sql(&format!("CREATE ROLE {role} LOGIN {options}")).await;
    role
}

fn url_of(world: &World, role: &str) -> String {
    database_url(world.ports().0, &world.name).replace("postgres@", &format!("{role}@"))
}

#[tokio::test]
async fn a_schema_that_is_somebody_elses_is_left_as_it_is_with_one_sentence() {
    let world = World::empty().await;
    for theirs in [
        "CREATE TABLE tidings.schedules (id int)",
        "CREATE TABLE tidings.news (id int); CREATE FUNCTION tidings.schedule() RETURNS int LANGUAGE sql RETURN 1",
        "CREATE TYPE tidings.mood AS ENUM ('good')",
        "CREATE TABLE tidings._sqlx_migrations (version bigint PRIMARY KEY, description text NOT NULL, installed_on timestamptz NOT NULL DEFAULT now(), success boolean NOT NULL, checksum bytea NOT NULL, execution_time bigint NOT NULL);
         INSERT INTO tidings._sqlx_migrations VALUES (1, 'theirs', now(), true, '', 0)",
    ] {
        world.db.execute(AssertSqlSafe(format!("DROP SCHEMA tidings CASCADE; CREATE SCHEMA tidings; {theirs}"))).await.expect(theirs);
        let before: String = world.value(CONTENTS).await;

        let (code, output) = migrate(&world, "postgres").finished().await;

        assert_eq!(code, 65, "{output}");
        assert_eq!(output.matches("somebody else's").count(), 1, "{output}");
        assert!(output.contains("ALTER SCHEMA tidings RENAME TO") && output.lines().count() == 1, "{output}");
        assert_eq!(world.value::<String>(CONTENTS).await, before, "{theirs}");
        let (code, output) = world.launch().finished().await;
        assert!(code == 65 && output.contains("somebody else's"), "{code} {output}");
    }
}

#[tokio::test]
async fn a_schema_that_was_restored_in_part_is_left_as_it_is_and_what_is_missing_is_named() {
    let world = World::empty().await;
    for (fault, named) in [
        ("DROP SEQUENCE tidings.polling_until", "tidings.polling_until are missing"),
        (
            "DROP VIEW tidings.paused; DROP TABLE tidings.pauses, tidings.passes",
            "tidings.passes, tidings.paused, tidings.pauses",
        ),
        ("DROP FUNCTION tidings.unpark(uuid)", "tidings.unpark are missing"),
        ("DELETE FROM tidings._sqlx_migrations WHERE version > 8", "tidings.passes, tidings.paused"),
        ("DELETE FROM tidings._sqlx_migrations", "no record of our migrations"),
        ("DROP TABLE tidings._sqlx_migrations", "no record of our migrations"),
    ] {
        world.db.execute("DROP SCHEMA tidings CASCADE").await.expect("gone");
        let (code, output) = migrate(&world, "postgres").finished().await;
        assert_eq!(code, 0, "{output}");
        world.db.execute(AssertSqlSafe(fault.to_owned())).await.expect(fault);
        let before: String = world.value(CONTENTS).await;

        let (code, output) = migrate(&world, "postgres").finished().await;

        assert!(code == 65 && output.contains(named) && output.contains("in part"), "{fault}: {code} {output}");
        assert_eq!(output.lines().count(), 1, "{output}");
        assert_eq!(world.value::<String>(CONTENTS).await, before, "{fault}");
        let (code, output) = world.launch().finished().await;
        assert_eq!(code, 65, "{output}");
    }
}

#[tokio::test]
async fn an_empty_schema_that_an_administrator_made_is_migrated_by_whoever_may_create_in_it() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let (owner, migrator) = (role(&world, "owner", "").await, role(&world, "migrator", "").await);
    let prepare = format!(
        "DROP SCHEMA tidings CASCADE; CREATE SCHEMA tidings AUTHORIZATION {owner};
         ALTER DEFAULT PRIVILEGES IN SCHEMA tidings GRANT SELECT ON TABLES TO {owner}"
    );
    world.db.execute(AssertSqlSafe(prepare)).await.expect("prepared");

    let (code, output) = migrate(&world, &migrator).finished().await;
    let grant = format!("as {owner}: GRANT USAGE, CREATE ON SCHEMA tidings TO");
    assert!(code == 1 && output.contains(&grant), "{code} {output}");

    world.sql(&format!("GRANT USAGE, CREATE ON SCHEMA tidings TO {migrator}")).await;
    let (code, output) = migrate(&world, &migrator).finished().await;
    let grant = "GRANT USAGE ON SCHEMA tidings TO tidings_daemon, tidings_producer";
    assert!(code == 1 && output.contains(grant), "{code} {output}");

    world.sql(grant).await;
    let (code, output) = migrate(&world, &migrator).finished().await;
    assert!(code == 0 && output.contains("is up to date"), "{code} {output}");
    let daemon = role(&world, "daemon", "IN ROLE tidings_daemon").await;
    let _daemon = world.launch().with("TIDINGS_DATABASE_URL", url_of(&world, &daemon)).ready().await;
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key": "a", "body": 1}')"#).await;
    inbox.next().await;
}

#[tokio::test]
async fn several_may_migrate_at_once() {
    let world = World::empty().await;
    for _ in 0..3 {
        world.sql("DROP SCHEMA tidings CASCADE").await;
        let migrate = migrate(&world, "postgres");
        let ended = futures_util::future::join_all((0..4).map(|_| migrate.finished())).await;
        for (code, output) in &ended {
            assert_eq!(*code, 0, "{output}");
        }
        let ran = ended.iter().filter(|(_, output)| output.contains("ran ")).count();
        assert_eq!(ran, 1, "{ended:?}");
    }
}

#[tokio::test]
async fn a_cause_is_told_once() {
    let world = World::empty().await;
    let nobody = role(&world, "nobody", "").await;
    world.sql("DROP SCHEMA tidings CASCADE").await;

    let (code, output) = migrate(&world, &nobody).finished().await;

    assert_eq!(code, 1, "{output}");
    assert_eq!(output.matches("permission denied for database").count(), 1, "{output}");
}

/// Each table of ours.
const TABLES: [&str; 6] = ["_sqlx_migrations", "schedules", "deliveries", "parked", "passes", "pauses"];

#[tokio::test]
async fn row_level_security_is_named_at_the_start_by_readyz_and_by_the_doctor_with_what_mends_it() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let role = role(&world, "daemon", "IN ROLE tidings_daemon").await;
    let launch = world.launch().with("TIDINGS_DATABASE_URL", url_of(&world, &role));
    for table in TABLES {
        let hides = format!("hides the rows of tidings.{table} from us");
        let off = format!("ALTER TABLE tidings.{table} DISABLE ROW LEVEL SECURITY");
        world.sql(&format!("ALTER TABLE tidings.{table} ENABLE ROW LEVEL SECURITY")).await;

        let mut daemon = launch.start();
        let line = daemon.wait_for_line(&hides).await;
        assert!(line.contains(&off) && line.contains("CREATE POLICY tidings_daemon ON"), "{line}");
        until_unready(&mut daemon, &hides).await;
        let (code, output) =
            launch.clone().subcommand("doctor").with("TIDINGS_HTTP_ADDR", daemon.http_addr().await).finished().await;
        let told = output.lines().any(|line| line.starts_with("FAIL") && line.contains(&hides) && line.contains(&off));
        assert!(code == 1 && told, "{output}");
        world.sql(&off).await;
        daemon.wait_for_line(" ready ").await;
        until_ready(&mut daemon).await;

        // While it runs.
        world.sql(&format!("ALTER TABLE tidings.{table} ENABLE ROW LEVEL SECURITY")).await;
        until_unready(&mut daemon, &hides).await;
        world.sql(&off).await;
        until_ready(&mut daemon).await;
        world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key": "a", "body": 1}')"#).await;
        inbox.next().await;
    }
}

/// Producers and the daemon do what they do, through members of the two roles.
async fn everything_works(world: &World) {
    let mut inbox = world.inbox(&["#"]).await;
    let daemon = role(world, "daemon", "IN ROLE tidings_daemon").await;
    let producer = role(world, "producer", "IN ROLE tidings_producer").await;
    let launch = world.launch().with("TIDINGS_DATABASE_URL", url_of(world, &daemon));
    pass_at_start(world).await;
    let mut running = launch.clone().with("TIDINGS_REPLAY_INTERVAL_MS", 1_000).ready().await;
    until_ready(&mut running).await;

    let mut app = PgConnection::connect(&url_of(world, &producer)).await.expect("the application logs in");
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
    reject(&mut inbox).await;
    assert_eq!(inbox.next().await.number("tidings-replay"), 1);
    until_waiting(world, "tidings.dead", 0).await;
    world.until("SELECT count(*) = 1 FROM tidings.parked").await;
    world.until("SELECT count(*) = 1 FROM tidings.deliveries").await;
    let seen = app.execute("SELECT FROM tidings.deliveries, tidings.parked").await.expect("seen").rows_affected();
    assert_eq!(seen, 1);
    for command in [&["pause", "message"][..], &["resume", "message"]] {
        let (code, output) = launch.clone().subcommand(command[0]).args(&command[1..]).finished().await;
        assert_eq!(code, 0, "{output}");
    }
    let (code, output) = launch.clone().subcommand("parked").args(["drop", "--all"]).finished().await;
    assert_eq!(code, 0, "{output}");
    until_ready(&mut running).await;
    world.sql("UPDATE tidings.deliveries SET finished_at = now() - interval '30 days'").await;
    let _other = launch.ready().await;
    world.until("SELECT count(*) = 0 FROM tidings.deliveries").await;
}

#[tokio::test]
async fn where_row_level_security_is_on_migrate_makes_the_policies_for_both_roles() {
    for (how, owner) in [("ENABLE", "postgres"), ("FORCE", "owner")] {
        let world = World::with(&["message"]).await;
        let owner = if owner == "owner" { role(&world, "owner", "").await } else { owner.to_owned() };
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

        let (code, output) = migrate(&world, &owner).finished().await;
        assert!(code == 0 && output.contains("is up to date"), "{how}: {output}");

        everything_works(&world).await;
        let (code, output) = migrate(&world, &owner).finished().await;
        assert_eq!(code, 0, "{output}");
        let on: i64 = world
            .value("SELECT count(*) FROM pg_class WHERE relnamespace = 'tidings'::regnamespace AND relrowsecurity")
            .await;
        assert_eq!(on, 6);
    }
}

#[tokio::test]
async fn policies_that_others_made_for_producers_are_left_alone() {
    let world = World::empty().await;
    world.sql("ALTER TABLE tidings.schedules ENABLE ROW LEVEL SECURITY").await;
    world.sql("CREATE POLICY shop ON tidings.schedules TO tidings_producer USING (kind = 'shop')").await;

    let (code, output) = migrate(&world, "postgres").finished().await;

    assert_eq!(code, 0, "{output}");
    let policies: String =
        world.value("SELECT string_agg(policyname::text, ' ' ORDER BY policyname) FROM pg_policies WHERE schemaname = 'tidings'").await;
    assert_eq!(policies, "shop tidings_daemon");
}

#[tokio::test]
async fn where_every_new_table_gets_row_level_security_a_fresh_database_is_migrated_in_one_go() {
    for how in ["ENABLE", "FORCE"] {
        let world = World::with(&["message"]).await;
        let owner = role(&world, "owner", "").await;
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

        let (code, output) = migrate(&world, &owner).finished().await;
        assert!(code == 0 && output.contains("ran "), "{how}: {code} {output}");

        everything_works(&world).await;
    }
}

#[tokio::test]
async fn with_a_publication_of_all_tables_everything_works() {
    let world = World::with(&["message"]).await;
    world.sql("CREATE PUBLICATION everything FOR ALL TABLES").await;
    let without: i64 = world
        .value(
            "SELECT count(*) FROM pg_class WHERE relnamespace = 'tidings'::regnamespace AND relkind = 'r'
                AND NOT (relreplident = 'f' OR relreplident = 'd' AND EXISTS (
                    SELECT FROM pg_index WHERE indrelid = pg_class.oid AND indisprimary))",
        )
        .await;
    assert_eq!(without, 0, "tables that cannot be deleted from");

    // Delivers, parks, retries, pauses, makes a pass and removes history.
    everything_works(&world).await;

    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.daemon().await;
    world.sql("SELECT tidings.schedule('message', now(), '{}', key => 'parked')").await;
    world.until("SELECT count(*) = 1 FROM tidings.parked").await;
    world.sql(r#"UPDATE tidings.parked SET payload = '{"routing_key": "a", "body": 1}'"#).await;
    world.sql("SELECT tidings.unpark(id) FROM tidings.parked").await;
    inbox.next().await;
    world.sql("SELECT tidings.schedule('nobody', now())").await;
    world.until("SELECT count(*) = 1 FROM tidings.schedules WHERE held").await;
    world.sql("UPDATE tidings.schedules SET payload = '1'").await;
    world.sql("SELECT tidings.cancel_subject('s'), tidings.cancel('nobody', 'k')").await;
    for command in ["pause", "resume"] {
        let (code, output) = world.tidings([command, "message"]).await;
        assert_eq!(code, 0, "{output}");
    }
    until_ready(&mut daemon).await;
}

#[tokio::test]
async fn the_history_is_given_its_identity_although_somebody_reads_it_for_a_while() {
    let world = World::empty().await;
    world.sql("ALTER TABLE tidings.deliveries REPLICA IDENTITY DEFAULT").await;
    world.sql("DELETE FROM tidings._sqlx_migrations WHERE version = 12").await;
    let mut reader = world.db.begin().await.expect("a transaction");
    reader.execute("SELECT FROM tidings.deliveries").await.expect("read");
    let mut migrating = migrate(&world, "postgres").start();
    world
        .until("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = 'tidings.deliveries'::regclass)")
        .await;

    // Whoever writes history waits for half a second at most.
    let mut writer = world.db.begin().await.expect("a transaction");
    writer.execute("SET LOCAL lock_timeout = '10s'").await.expect("set");
    let write = "INSERT INTO tidings.deliveries (id, kind, due_at, finished_at, outcome, attempts, payload, headers)
        VALUES (gen_random_uuid(), 'a', now(), now(), 'delivered', 1, '{}', '{}')";
    writer.execute(write).await.expect("written");
    writer.commit().await.expect("written");
    reader.commit().await.expect("read");

    assert!(migrating.ended().await.success(), "{}", migrating.log());
    assert!(
        world.value::<bool>("SELECT relreplident = 'f' FROM pg_class WHERE oid = 'tidings.deliveries'::regclass").await
    );
}
