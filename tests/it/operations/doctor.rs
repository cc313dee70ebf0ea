//! `tidings doctor`: what it reports about healthy and unhealthy deployments. It never changes anything.

use harness::daemon::Launch;
use harness::eventually;
use harness::servers::Servers;
use harness::world::World;
use lapin::BasicProperties;
use lapin::options::QueueDeclareOptions;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};

use crate::dead_letters::replay::{publish_message, wait_for_message_count};
use crate::operations::process::find_free_port;

/// How to run the doctor in a world without a daemon.
fn launch_doctor(world: &World) -> Launch {
    world.launch().subcommand("doctor").with("TIDINGS_HTTP_ADDR", format!("127.0.0.1:{}", find_free_port()))
}

/// The lines of the output that begin with `level`.
fn lines_at_level<'a>(output: &'a str, level: &str) -> Vec<&'a str> {
    output.lines().filter(|line| line.starts_with(&format!("{level:<6}"))).collect()
}

/// The number of lines at each level: ok, note, warn and FAIL. Other lines, such as those of the log, are not counted.
fn count_levels(output: &str) -> [usize; 4] {
    ["ok", "note", "warn", "FAIL"].map(|level| lines_at_level(output, level).len())
}

/// Whether a line at `level` contains all of `parts`.
fn has_line(output: &str, level: &str, parts: &[&str]) -> bool {
    lines_at_level(output, level).iter().any(|line| parts.iter().all(|part| line.contains(part)))
}

/// The answer of RabbitMQ's management API to a GET request.
fn get_management(world: &World, path: &str) -> Value {
    let url = format!("{}/api/{path}", world.management_url());
    let text = ureq::get(&url).call().expect("an answer").body_mut().read_to_string().expect("text");
    serde_json::from_str(&text).expect("JSON")
}

#[tokio::test]
async fn doctor_reports_a_healthy_deployment_as_ok_in_every_line() {
    let world = World::with_plugins(&["message"]).await;
    // The daemon and the doctor run with the same settings.
    let settings = world.launch().with("TIDINGS_MANAGEMENT_URL", world.management_url());
    let mut daemon = settings.start_ready().await;
    let addr = daemon.http_addr().await;

    let (code, output) = settings.subcommand("doctor").with("TIDINGS_HTTP_ADDR", addr).run_to_end().await;

    assert_eq!(code, 0, "{output}");
    assert_eq!(count_levels(&output), [30, 0, 0, 0], "{output}");
    assert!(output.contains("6 triggers") && output.contains("22 indexes"), "{output}");
}

#[tokio::test]
async fn doctor_reports_what_is_missing_without_a_daemon_and_changes_nothing() {
    let world = World::with_plugins(&["message"]).await;
    let seen = async || {
        let exchanges = get_management(&world, &format!("exchanges/{}", world.name));
        let queues = get_management(&world, &format!("queues/{}", world.name));
        let names = |of: &Value| -> Vec<String> {
            let mut names: Vec<String> =
                of.as_array().expect("a list").iter().map(|one| one["name"].to_string()).collect();
            names.sort();
            names
        };
        let rows = "SELECT (SELECT count(*) FROM tidings.schedules) + (SELECT count(*) FROM tidings.deliveries)
            + (SELECT count(*) FROM tidings.parked) + (SELECT count(*) FROM tidings.passes)";
        (names(&exchanges), names(&queues), world.value::<i64>(rows).await, world.state_dir().exists())
    };
    let before = seen().await;

    let (code, output) = launch_doctor(&world).run_to_end().await;

    assert_eq!(code, 0, "{output}");
    for item in ["exchange tidings ", "exchange tidings.dlx", "queue tidings.dead", "queue tidings.parking"] {
        assert!(has_line(&output, "note", &[item, "`tidings run` declares it"]), "{item}:\n{output}");
    }
    assert!(has_line(&output, "note", &["no daemon answers at 127.0.0.1"]), "{output}");
    assert!(has_line(&output, "note", &["state directory", "`tidings run` makes it"]), "{output}");
    assert!(has_line(&output, "note", &["TIDINGS_MANAGEMENT_URL"]), "{output}");
    let after = seen().await;
    assert!(before.2 == 0 && !before.3 && !before.0.iter().any(|name| name.contains("tidings")), "{before:?}");
    assert_eq!(after, before);
}

#[tokio::test]
async fn doctor_reports_a_disabled_trigger_and_a_dropped_index_with_the_repairing_statements() {
    let world = World::with_plugins(&["message"]).await;
    world.sql("ALTER TABLE tidings.schedules DISABLE TRIGGER notify_after_insert").await;
    world.sql("DROP INDEX tidings.schedules_slot_at").await;

    let (code, output) = launch_doctor(&world).run_to_end().await;

    assert_eq!(code, 1, "{output}");
    let enable = "ALTER TABLE tidings.schedules ENABLE TRIGGER notify_after_insert";
    let create = "CREATE INDEX schedules_slot_at ON tidings.schedules (slot_at)";
    assert!(has_line(&output, "FAIL", &["notify_after_insert is disabled", enable]), "{output}");
    assert!(has_line(&output, "FAIL", &["schedules_slot_at is missing", create]), "{output}");
    assert_eq!(lines_at_level(&output, "FAIL").len(), 2, "{output}");

    world.sql(enable).await;
    world.sql(create).await;
    let (code, output) = launch_doctor(&world).run_to_end().await;
    assert_eq!(code, 0, "{output}");
}

#[tokio::test]
async fn doctor_reports_every_missing_trigger_and_index() {
    let world = World::with_plugins(&["message"]).await;
    let names: Vec<String> = world
        .value(
            "SELECT array_agg(name) FROM (
                SELECT indexname::text AS name FROM pg_indexes WHERE schemaname = 'tidings'
                UNION ALL
                SELECT tgname::text FROM pg_trigger WHERE tgrelid = 'tidings.schedules'::regclass AND NOT tgisinternal
            ) AS made",
        )
        .await;
    world
        .sql(
            "DO $$
            DECLARE
                made record;
            BEGIN
                FOR made IN SELECT conname, conrelid::regclass AS place FROM pg_constraint
                    WHERE connamespace = 'tidings'::regnamespace AND contype = 'p' LOOP
                    EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', made.place, made.conname);
                END LOOP;
                FOR made IN SELECT indexname FROM pg_indexes WHERE schemaname = 'tidings' LOOP
                    EXECUTE format('DROP INDEX tidings.%I', made.indexname);
                END LOOP;
                FOR made IN SELECT tgname FROM pg_trigger
                    WHERE tgrelid = 'tidings.schedules'::regclass AND NOT tgisinternal LOOP
                    EXECUTE format('DROP TRIGGER %I ON tidings.schedules', made.tgname);
                END LOOP;
            END
            $$",
        )
        .await;

    let (code, output) = launch_doctor(&world).run_to_end().await;

    assert_eq!(code, 1, "{output}");
    for name in &names {
        assert!(has_line(&output, "FAIL", &[&format!("{name} is missing (")]), "{name}:\n{output}");
    }
    assert_eq!(output.matches(" is missing (").count(), names.len(), "{output}");
}

#[tokio::test]
async fn doctor_reports_a_queue_with_other_arguments_and_the_difference() {
    let world = World::with_plugins(&["message"]).await;
    let channel = world.broker.channel().await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-message-ttl".into(), AMQPValue::LongInt(1000));
    channel.queue_declare("tidings.dead".into(), QueueDeclareOptions::durable(), arguments).await.expect("declared");

    let (code, output) = launch_doctor(&world).run_to_end().await;

    assert_eq!(code, 1, "{output}");
    assert!(has_line(&output, "FAIL", &["the queue tidings.dead", "x-message-ttl", "TIDINGS_EXCHANGE"]), "{output}");
    assert_eq!(lines_at_level(&output, "FAIL").len(), 1, "{output}");
}

#[tokio::test]
async fn doctor_names_the_session_or_prepared_transaction_with_the_oldest_snapshot() {
    let world = World::with_plugins(&["message"]).await;
    let mut session = world.db.acquire().await.expect("a connection");
    for statement in [
        "SET application_name = 'somebody slow'",
        "BEGIN ISOLATION LEVEL REPEATABLE READ",
        "SELECT count(*) FROM tidings.schedules",
    ] {
        sqlx::query(statement).execute(&mut *session).await.expect(statement);
    }
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *session).await.expect("a pid");

    let (code, output) = launch_doctor(&world).run_to_end().await;
    assert_eq!(code, 0, "{output}");
    assert!(has_line(&output, "ok", &[&format!("pid {pid} (somebody slow, user postgres)")]), "{output}");

    sqlx::query("ROLLBACK").execute(&mut *session).await.expect("rolled back");
    let gid = format!("of {}", world.name);
    let prepare = format!("PREPARE TRANSACTION '{gid}'");
    for statement in ["BEGIN", "DELETE FROM tidings.schedules", "CREATE TABLE public.mine ()", &prepare] {
        sqlx::query(sqlx::AssertSqlSafe(statement)).execute(&mut *session).await.expect(statement);
    }

    let (code, output) = launch_doctor(&world).run_to_end().await;

    // Rolled back before any assertion can fail, because a prepared transaction outlives the test.
    world.sql(&format!("ROLLBACK PREPARED '{gid}'")).await;
    assert_eq!(code, 0, "{output}");
    assert!(has_line(&output, "ok", &[&format!("the prepared transaction {gid} of user postgres")]), "{output}");
}

#[tokio::test]
async fn doctor_reports_refused_logins_and_checks_nothing_more_on_those_servers() {
    let world = World::with_plugins(&["message"]).await;
    let (postgres, rabbitmq) = world.ports();
    let database = format!("postgres://nobody_{0}:s3cret@127.0.0.1:{postgres}/{0}", world.name);
    let broker = format!("amqp://guest:s3cret@127.0.0.1:{rabbitmq}/{}", world.name);
    let refused = launch_doctor(&world).with("TIDINGS_DATABASE_URL", database).with("TIDINGS_AMQP_URL", broker);

    let (code, output) = refused.with("TIDINGS_MANAGEMENT_URL", world.management_url()).run_to_end().await;

    assert_eq!(code, 1, "{output}");
    assert!(has_line(&output, "FAIL", &["PostgreSQL", "refused the login", "TIDINGS_DATABASE_URL"]), "{output}");
    assert!(has_line(&output, "FAIL", &["RabbitMQ", "refused the login", "TIDINGS_AMQP_URL"]), "{output}");
    // The other four lines are about the plugin directory, the state directory and the daemon.
    assert_eq!(count_levels(&output), [2, 2, 0, 2], "{output}");
    assert!(!output.contains("s3cret"), "{output}");
}

#[tokio::test]
async fn doctor_checks_no_tables_when_the_schema_is_missing() {
    let world = World::with_plugins(&["message"]).await;
    let mut daemon = world.start_daemon().await;
    world.sql("DROP SCHEMA tidings CASCADE").await;

    let addr = daemon.http_addr().await;
    let (code, output) = launch_doctor(&world).with("TIDINGS_HTTP_ADDR", addr).run_to_end().await;

    assert_eq!(code, 1, "{output}");
    assert!(has_line(&output, "FAIL", &["run `tidings migrate` first"]), "{output}");
    assert!(has_line(&output, "FAIL", &["the daemon at", "is not ready", "tidings migrate"]), "{output}");
    assert_eq!(lines_at_level(&output, "FAIL").len(), 2, "{output}");
    assert!(has_line(&output, "ok", &["a notification takes"]) && !output.contains("triggers"), "{output}");
}

#[tokio::test]
async fn doctor_needs_only_the_daemons_rights_and_names_missing_ones() {
    let world = World::with_plugins(&["message"]).await;
    let role = format!("role_{}", world.name);
    world.sql(&format!("CREATE ROLE {role} LOGIN")).await;
    let database = format!("postgres://{role}@127.0.0.1:{}/{}", world.ports().0, world.name);
    let doctor = launch_doctor(&world).with("TIDINGS_DATABASE_URL", database);

    let (code, output) = doctor.run_to_end().await;
    assert_eq!(code, 1, "{output}");
    assert!(has_line(&output, "FAIL", &["permission denied", "GRANT tidings_daemon TO our_role"]), "{output}");
    assert_eq!(lines_at_level(&output, "FAIL").len(), 1, "{output}");

    world.sql(&format!("GRANT tidings_daemon TO {role}")).await;
    let mut session = world.db.acquire().await.expect("a connection");
    for statement in ["BEGIN ISOLATION LEVEL REPEATABLE READ", "SELECT count(*) FROM tidings.schedules"] {
        sqlx::query(statement).execute(&mut *session).await.expect(statement);
    }
    let (code, output) = doctor.run_to_end().await;
    assert_eq!(code, 0, "{output}");
    assert!(has_line(&output, "note", &["1 sessions of other roles", "GRANT pg_read_all_stats"]), "{output}");

    world.sql(&format!("GRANT pg_read_all_stats TO {role}")).await;
    let (_, output) = doctor.run_to_end().await;
    assert!(has_line(&output, "ok", &["the oldest is that of the session"]), "{output}");
}

#[tokio::test]
async fn doctor_reports_late_held_and_parked_rows() {
    let world = World::with_plugins(&["message"]).await;
    let oldest: uuid::Uuid = world
        .value(
            "INSERT INTO tidings.schedules (kind, due_at, not_before, last_error)
             VALUES ('message', now() - interval '1 hour', now() - interval '1 hour', 'nobody came') RETURNING id",
        )
        .await;
    world
        .sql(
            "INSERT INTO tidings.schedules (kind, due_at, not_before, held)
             SELECT kind, now() - interval '50 s', now() - interval '50 s', held
             FROM (VALUES ('message', false), ('nobody-b', true), ('nobody-a', true), ('nobody-a', true)) AS of (kind, held)",
        )
        .await;
    world
        .sql(
            "INSERT INTO tidings.parked (id, kind, due_at, payload, headers, attempts, created_at, reason)
             VALUES (gen_random_uuid(), 'message', now(), '{}', '{}', 1, now(), 'because')",
        )
        .await;

    let (code, output) = launch_doctor(&world).run_to_end().await;

    assert_eq!(code, 1, "{output}");
    assert!(
        has_line(&output, "FAIL", &["2 rows", &oldest.to_string(), "kind message", "1h", "nobody came"]),
        "{output}"
    );
    assert!(has_line(&output, "warn", &["held", "2 of the kind nobody-a, 1 of the kind nobody-b"]), "{output}");

    world.sql("INSERT INTO tidings.pauses (kind, reason) VALUES ('nobody-a', 'on purpose')").await;
    let (_, output) = launch_doctor(&world).run_to_end().await;
    assert!(has_line(&output, "note", &["the kind nobody-a is paused by postgres", "on purpose"]), "{output}");
    assert!(!has_line(&output, "warn", &["of the kind nobody-a"]), "{output}");
    assert!(has_line(&output, "warn", &["1 of the kind nobody-b"]), "{output}");
    assert!(has_line(&output, "note", &["1 rows are parked"]), "{output}");
}

#[tokio::test]
async fn doctor_reports_policies_on_the_daemons_queues_and_the_letters_in_them() {
    let world = World::with_plugins(&["message"]).await;
    assert!(world.start_daemon().await.stop().await.success());
    let lost = BasicProperties::default().with_message_id("lost".into());
    publish_message(&world, "tidings.dlx", "", b"lost", lost).await;
    wait_for_message_count(&world, "tidings.dead", 1).await;
    let policy =
        json!({ "pattern": "^tidings\\.dead$", "apply-to": "queues", "definition": { "message-ttl": 600_000 } });
    ureq::put(&format!("{}/api/policies/{}/short", world.management_url(), world.name))
        .header("Content-Type", "application/json")
        .send(policy.to_string())
        .expect("it is set");
    let doctor = launch_doctor(&world).with("TIDINGS_MANAGEMENT_URL", world.management_url());

    // RabbitMQ applies a policy with a delay.
    let output = eventually("a warning of the policy", async || {
        let (code, output) = doctor.run_to_end().await;
        assert_eq!(code, 0, "{output}");
        (!lines_at_level(&output, "warn").is_empty()).then_some(output)
    })
    .await;

    assert!(has_line(&output, "warn", &["policy short", "tidings.dead", "message-ttl = 600000"]), "{output}");
    assert!(has_line(&output, "ok", &["no policy", "tidings.parking"]), "{output}");
    assert!(has_line(&output, "ok", &["no alarm"]), "{output}");
    assert!(has_line(&output, "note", &["1 letters are dead", "0 are parked"]), "{output}");

    let wrong = world.management_url().replace(":guest@", ":s3cret@");
    let (code, output) = doctor.with("TIDINGS_MANAGEMENT_URL", wrong).run_to_end().await;
    assert_eq!(code, 0, "{output}");
    assert!(has_line(&output, "warn", &["401", "TIDINGS_MANAGEMENT_URL"]) && !output.contains("s3cret"), "{output}");
}

/// Uses private servers, because an alarm blocks all users of a RabbitMQ.
#[tokio::test]
async fn doctor_reports_an_alarm_of_rabbitmq_as_a_failure() {
    let servers = Servers::start_private_async().await;
    let world = World::on_servers(&servers, &["message"]).await;
    let doctor = launch_doctor(&world).with("TIDINGS_MANAGEMENT_URL", world.management_url());
    servers.set_memory_alarm(true).expect("it is told");

    // RabbitMQ checks its memory about every second.
    let output = eventually("an alarm", async || {
        let (code, output) = doctor.run_to_end().await;
        (code == 1).then_some(output)
    })
    .await;

    assert!(has_line(&output, "FAIL", &["alarm", "nobody can publish", "memory of "]), "{output}");
    assert_eq!(lines_at_level(&output, "FAIL").len(), 1, "{output}");
}

#[tokio::test]
async fn doctor_accepts_the_daemons_settings_and_reports_the_same_mistakes() {
    let world = World::with_plugins(&["message"]).await;
    let mistaken = launch_doctor(&world)
        .with("TIDINGS_MANAGEMENT_URL", "ftp://user:secret@host")
        .with("TIDINGS_SWEEP_MS", "soon")
        .with("TIDINGS_DOCTOR", "1");

    let (code, output) = mistaken.run_to_end().await;

    assert_eq!(code, 64, "{output}");
    for mistake in ["TIDINGS_MANAGEMENT_URL does not begin", "TIDINGS_SWEEP_MS is", "TIDINGS_DOCTOR is not a setting"] {
        assert!(output.contains(mistake), "{mistake}:\n{output}");
    }
    assert!(!output.contains("secret"), "{output}");

    // A missing directory is not a mistake in the settings here, but a finding of the doctor.
    let (code, output) = launch_doctor(&world).with("TIDINGS_PLUGIN_DIR", "/nonexistent").run_to_end().await;
    assert_eq!(code, 1, "{output}");
    assert!(has_line(&output, "FAIL", &["/nonexistent", "TIDINGS_PLUGIN_DIR"]), "{output}");
}
