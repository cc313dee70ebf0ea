//! Settings that a platform imposes on roles and servers: each is set, and then everything must still work, or be named.
//! `host/docs/reference.md` has the table.

use std::time::Duration;

use harness::guests;
use harness::servers::Servers;
use harness::world::World;
use sqlx::Executor as _;

use crate::database::platforms::{
    TABLES, check_everything, check_everything_with, create_role, database_url_of, launch_migrate,
};
use crate::nothing_lost::settling::note_setting;
use crate::operations::health::wait_until_ready;

/// Sets something for the daemon's role, and checks that everything works.
async fn check_imposed(imposed: &str) {
    let world = World::with_plugins(&["message"]).await;
    check_everything_with(&world, imposed).await;
}

/// One test for each setting.
macro_rules! everything_works_with {
    ($($name:ident: $imposed:literal,)*) => { $(
        #[tokio::test]
        async fn $name() {
            check_imposed($imposed).await;
        }
    )* };
}

everything_works_with! {
    everything_works_where_transactions_are_serializable: "default_transaction_isolation = 'serializable'",
    everything_works_where_transactions_are_repeatable_reads: "default_transaction_isolation = 'repeatable read'",
    everything_works_where_transactions_are_read_only: "default_transaction_read_only = on",
    everything_works_where_transactions_are_deferrable: "default_transaction_deferrable = on",
    everything_works_with_a_short_statement_timeout: "statement_timeout = '1ms'",
    everything_works_with_a_short_lock_timeout: "lock_timeout = '1ms'",
    everything_works_with_a_short_timeout_in_transactions: "idle_in_transaction_session_timeout = '1ms'",
    everything_works_with_a_short_timeout_of_idle_sessions: "idle_session_timeout = '1ms'",
    everything_works_with_another_search_path: "search_path = 'nowhere'",
    everything_works_with_another_time_zone: "TimeZone = 'Pacific/Apia'",
    everything_works_with_another_style_of_dates: "DateStyle = 'SQL, DMY'",
    everything_works_with_another_style_of_intervals: "IntervalStyle = 'sql_standard'",
    everything_works_with_another_form_of_bytes: "bytea_output = 'escape'",
    everything_works_with_old_string_literals: "standard_conforming_strings = off",
    everything_works_where_null_equals_null: "transform_null_equals = on",
    everything_works_where_every_statement_is_logged: "log_statement = 'all'",
    everything_works_where_every_statement_is_compiled: "jit_above_cost = 0",
    everything_works_where_every_statement_is_planned_anew: "plan_cache_mode = 'force_custom_plan'",
    everything_works_with_little_memory: "work_mem = '64kB'",
    everything_works_where_triggers_do_not_fire: "session_replication_role = 'replica'",
    everything_works_with_another_encoding: "client_encoding = 'LATIN1'",
}

#[tokio::test]
async fn a_claim_needs_no_temporary_files() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let daemon = create_role(&world, "daemon", "IN ROLE tidings_daemon").await;
    world.sql(&format!("ALTER ROLE {daemon} SET work_mem = '64kB'")).await;
    world.sql(&format!("ALTER ROLE {daemon} SET temp_file_limit = 0")).await;
    let _daemon = world.launch().with("TIDINGS_DATABASE_URL", database_url_of(&world, &daemon)).start_ready().await;
    // Payloads that hardly compress, several claims of them.
    world
        .sql(
            "INSERT INTO tidings.schedules (kind, due_at, payload)
               SELECT 'message', now(), jsonb_build_object('routing_key', 'a', 'body',
                   (SELECT string_agg(md5((row + n)::text), '') FROM generate_series(1, 100) AS n))
               FROM generate_series(1, 1000) AS row",
        )
        .await;
    for _ in 0..1000 {
        inbox.next().await;
    }
    world.wait_until("SELECT count(*) = 1000 FROM tidings.deliveries").await;
}

#[tokio::test]
async fn a_delivery_may_take_longer_than_a_transaction_elsewhere() {
    let world = World::empty().await;
    if !world.value::<bool>("SELECT current_setting('transaction_timeout', true) IS NOT NULL").await {
        eprintln!("PostgreSQL has transaction_timeout from 17 on");
        return;
    }
    world.put("slow.wasm", &guests::slow("slow", &["slow"], "1", Duration::from_millis(80)));
    let mut inbox = world.inbox(&["#"]).await;
    let daemon = create_role(&world, "daemon", "IN ROLE tidings_daemon").await;
    world.sql(&format!("ALTER ROLE {daemon} SET transaction_timeout = '50ms'")).await;
    let _daemon = world.launch().with("TIDINGS_DATABASE_URL", database_url_of(&world, &daemon)).start_ready().await;
    world.sql("SELECT tidings.schedule('slow', now())").await;
    inbox.next().await;
    world.wait_until("SELECT count(*) = 1 FROM tidings.deliveries").await;
}

/// Checks which value a setting has in the daemon's transactions while each other one is set for its role.
async fn check_kept(name: &str, imposed_and_kept: &[(&str, &str)]) {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    note_setting(&world, name).await;
    for (imposed, kept) in imposed_and_kept {
        let role = create_role(&world, imposed, "IN ROLE tidings_daemon").await;
        world.sql(&format!("ALTER ROLE {role} SET {name} = '{imposed}'")).await;
        let daemon = world.launch().with("TIDINGS_DATABASE_URL", database_url_of(&world, &role)).start_ready().await;
        deliver(&world, &mut inbox, 1).await;
        world.wait_until(&format!("SELECT count(*) = 1 FROM noted WHERE value = '{kept}'")).await;
        assert!(daemon.stop().await.success());
    }
}

#[tokio::test]
async fn a_commit_of_the_daemon_waits_for_the_disk_even_if_those_of_its_role_do_not() {
    check_kept("synchronous_commit", &[("off", "on"), ("remote_apply", "remote_apply")]).await;
}

#[tokio::test]
async fn the_daemon_reads_by_indexes_even_if_its_role_does_not() {
    check_kept("enable_indexscan", &[("off", "on")]).await;
}

#[tokio::test]
async fn what_is_null_is_no_text_in_the_history_whatever_array_literals_mean() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let daemon = create_role(&world, "daemon", "IN ROLE tidings_daemon").await;
    world.sql(&format!("ALTER ROLE {daemon} SET array_nulls = off")).await;
    let _daemon = world.launch().with("TIDINGS_DATABASE_URL", database_url_of(&world, &daemon)).start_ready().await;
    // Alone, so that it is finished by literals.
    deliver(&world, &mut inbox, 1).await;
    world.wait_until("SELECT count(*) = 1 FROM tidings.deliveries").await;
    assert!(world.value::<bool>("SELECT detail IS NULL AND plugin LIKE 'message@%' FROM tidings.deliveries").await);
}

#[tokio::test]
async fn everything_works_without_row_security_where_tables_have_it() {
    let world = World::with_plugins(&["message"]).await;
    for table in TABLES {
        world.sql(&format!("ALTER TABLE tidings.{table} ENABLE ROW LEVEL SECURITY")).await;
    }
    let (code, output) = launch_migrate(&world, "postgres").run_to_end().await;
    assert_eq!(code, 0, "{output}");
    check_everything_with(&world, "row_security = off").await;
}

#[tokio::test]
async fn where_nobody_may_create_objects_migrate_says_so_and_the_daemon_works() {
    let world = World::with_plugins(&["message"]).await;
    world.sql("DELETE FROM tidings._sqlx_migrations WHERE version = 14").await;
    world
        .sql("CREATE FUNCTION forbid() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''no changes on Fridays''; END'")
        .await;
    world.sql("CREATE EVENT TRIGGER forbid ON ddl_command_start EXECUTE FUNCTION forbid()").await;
    let (code, output) = launch_migrate(&world, "postgres").run_to_end().await;
    assert!(code == 1 && output.contains("no changes on Fridays") && output.lines().count() == 1, "{code} {output}");

    world.sql("ALTER EVENT TRIGGER forbid DISABLE").await;
    let (code, output) = launch_migrate(&world, "postgres").run_to_end().await;
    assert_eq!(code, 0, "{output}");
    world.sql("ALTER EVENT TRIGGER forbid ENABLE ALWAYS").await;
    check_everything(&world).await;
}

/// Schedules rows and receives them, one after the other.
async fn deliver(world: &World, inbox: &mut harness::consumer::Inbox, rows: usize) {
    for _ in 0..rows {
        let id: uuid::Uuid =
            world.value(r#"SELECT tidings.schedule('message', now(), '{"routing_key": "a", "body": 1}')"#).await;
        assert_eq!(inbox.next().await.id(), id);
    }
}

#[tokio::test]
async fn the_history_may_be_partitioned() {
    let world = World::with_plugins(&["message"]).await;
    // As a partition manager does it, with all columns and no constraint that it would need.
    world
        .db
        .execute(
            "ALTER TABLE tidings.deliveries RENAME TO deliveries_old;
             CREATE TABLE tidings.deliveries (LIKE tidings.deliveries_old INCLUDING DEFAULTS)
                 PARTITION BY RANGE (finished_at);
             DROP TABLE tidings.deliveries_old;
             CREATE TABLE tidings.deliveries_past PARTITION OF tidings.deliveries
                 FOR VALUES FROM ('-infinity') TO ('2026-01-01');
             CREATE TABLE tidings.deliveries_now PARTITION OF tidings.deliveries DEFAULT;
             CREATE INDEX deliveries_finished_at ON tidings.deliveries USING brin (finished_at);
             CREATE INDEX deliveries_id ON tidings.deliveries (id);
             GRANT SELECT, INSERT, DELETE ON tidings.deliveries TO tidings_daemon;
             GRANT SELECT ON tidings.deliveries TO tidings_producer",
        )
        .await
        .expect("partitioned");
    let insert = |at: &str| {
        format!(
            "INSERT INTO tidings.deliveries (id, kind, due_at, finished_at, outcome, attempts, payload, headers)
             SELECT gen_random_uuid(), 'a', {at}, {at}, 'delivered', 1, '{{}}', '{{}}' FROM generate_series(1, 10)"
        )
    };
    // Rows of both partitions have the same ctids.
    world.sql(&insert("'2025-01-01'")).await;
    world.sql(&insert("now()")).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    world.wait_until("SELECT count(*) = 0 FROM tidings.deliveries_past").await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.deliveries").await, 10, "only the old rows are gone");
    deliver(&world, &mut inbox, 3).await;
    world.wait_until("SELECT count(*) = 13 FROM tidings.deliveries").await;
}

/// Starts servers of its own with further lines in `postgresql.conf`, and makes a world on them.
async fn start_world(settings: &'static str) -> (Servers, World) {
    let started = tokio::task::spawn_blocking(move || Servers::start_private_with(settings)).await;
    let servers = started.expect("no panic").expect("servers");
    let world = World::on_servers(&servers, &["message"]).await;
    (servers, world)
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_works_with_few_locks() {
    let (_servers, world) = start_world("max_locks_per_transaction = 10\nmax_connections = 25").await;
    check_everything(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tables_may_be_replicated_to_another_database() {
    let (servers, world) = start_world("wal_level = logical").await;
    let copy = World::on_servers(&servers, &["message"]).await;
    world.sql("CREATE PUBLICATION all_tables FOR ALL TABLES").await;
    // On the same server, a subscription cannot make the slot by itself.
    world.sql("SELECT pg_create_logical_replication_slot('copy', 'pgoutput')").await;
    // The copy has records of its own.
    copy.sql("TRUNCATE tidings._sqlx_migrations").await;
    let source = harness::world::database_url(world.ports().0, &world.name);
    copy.sql(&format!(
        "CREATE SUBSCRIPTION copy CONNECTION '{source}' PUBLICATION all_tables WITH (create_slot = false, slot_name = 'copy')"
    ))
    .await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    world.sql("SELECT tidings.schedule('message', now() + interval '1 hour', key => 'later')").await;
    deliver(&world, &mut inbox, 5).await;

    copy.wait_until("SELECT count(*) = 5 FROM tidings.deliveries").await;
    copy.wait_until("SELECT count(*) = 1 AND bool_and(key = 'later') FROM tidings.schedules").await;
    world.sql("UPDATE tidings.deliveries SET finished_at = now() - interval '30 days'").await;
    let state = world.state_dir().with_extension("other");
    let _other = world.launch().with("TIDINGS_STATE_DIR", state.display()).start_ready().await;
    copy.wait_until("SELECT count(*) = 0 FROM tidings.deliveries").await;
    copy.sql("DROP SUBSCRIPTION copy").await;
}

#[tokio::test]
async fn the_tables_may_be_repacked_while_rows_are_delivered() {
    if std::env::var_os(harness::image::NEWEST_VARIABLE).is_some() {
        eprintln!("pg_repack is not in the image");
        return;
    }
    let world = World::with_plugins(&["message"]).await;
    let program = harness::setup::find_servers().expect("PostgreSQL").postgres.join("pg_repack");
    assert!(program.exists(), "pg_repack is needed: cargo verify installs it");
    world.sql("CREATE EXTENSION pg_repack").await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.start_daemon().await;
    world.sql("SELECT tidings.schedule('message', now() + interval '1 hour', key => 'later')").await;
    // pg_repack leaves out the history, which has no primary key.
    for table in ["schedules", "parked"] {
        let mut repack = tokio::process::Command::new(&program)
            .args(["--host", "127.0.0.1", "--port", &world.ports().0.to_string(), "--username", "postgres"])
            .args(["--no-kill-backend", "--table", &format!("tidings.{table}"), &world.name])
            .spawn()
            .expect("pg_repack runs");
        while repack.try_wait().expect("it can be asked").is_none() {
            deliver(&world, &mut inbox, 1).await;
        }
        assert!(repack.wait().await.expect("it ended").success(), "{table}");
        deliver(&world, &mut inbox, 1).await;
    }
    assert!(world.value::<bool>("SELECT tidings.cancel('message', 'later')").await);
    wait_until_ready(&mut daemon).await;
}
