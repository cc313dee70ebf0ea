//! Copies of a database: a daemon on one delivers nothing while daemons serve its origin, and a move, a failover or a restart
//! stops nothing.

use std::process::Stdio;

use harness::consumer::Inbox;
use harness::daemon::{Daemon, Launch};
use harness::eventually;
use harness::proxy::{Mode, Proxy};
use harness::servers::Servers;
use harness::setup;
use harness::world::{World, database_url, execute};
use serde_json::json;
use uuid::Uuid;

use crate::operations::health::{get_json, wait_until_ready, wait_until_unready};

/// What a daemon of a copy says.
const IS_COPY: &str = "is a copy, and daemons serve its origin";

/// Copies the world's database with `pg_dump` into a new one, and returns its name.
async fn restore_dump(world: &World) -> String {
    let copy = format!("{}_copy", world.name);
    execute(world.ports().0, &format!("CREATE DATABASE {copy}")).await;
    let (port, name, to) = (world.ports().0.to_string(), world.name.clone(), copy.clone());
    let restored = tokio::task::spawn_blocking(move || {
        let programs = setup::find_servers().expect("PostgreSQL").postgres;
        let server = ["--host", "127.0.0.1", "--port", &port, "--username", "postgres"];
        let mut dump = std::process::Command::new(programs.join("pg_dump"))
            .args(server)
            .arg(&name)
            .stdout(Stdio::piped())
            .spawn()
            .expect("pg_dump runs");
        let restore = std::process::Command::new(programs.join("psql"))
            .args(server)
            .args(["--quiet", "--set", "ON_ERROR_STOP=1", &to])
            .stdin(dump.stdout.take().expect("piped"))
            .stdout(Stdio::null())
            .status()
            .expect("psql runs");
        dump.wait().expect("it ended").success() && restore.success()
    });
    assert!(restored.await.expect("no panic"), "the dump is restored");
    copy
}

/// How to run a daemon on another database of the same RabbitMQ, with a state directory of its own.
fn launch_on(world: &World, port: u16, database: &str) -> Launch {
    let state = world.state_dir().with_extension(database);
    world.launch().with("TIDINGS_DATABASE_URL", database_url(port, database)).with("TIDINGS_STATE_DIR", state.display())
}

/// Schedules a row on the world's database that is due in the given time.
async fn schedule(world: &World, due_in: &str) -> Uuid {
    let sql = format!(
        r#"SELECT tidings.schedule('message', now() + interval '{due_in}', '{{"routing_key": "a", "body": 1}}')"#
    );
    world.value(&sql).await
}

/// Checks that nothing else is in the queue: a row that is written now is the next to arrive.
async fn check_nothing_else_came(world: &World, inbox: &mut Inbox) {
    let id = schedule(world, "0").await;
    assert_eq!(inbox.next().await.id(), id);
}

async fn wait_for_note(daemon: &mut Daemon, part: &str) {
    eventually(&format!("the note {part:?}"), async || {
        let (_, body) = get_json(daemon, "/readyz").await;
        let notes = body["notes"].as_array()?.iter();
        notes.filter_map(serde_json::Value::as_str).any(|note| note.contains(part)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_dump_that_is_restored_beside_its_origin_delivers_nothing_says_why_and_delivers_with_the_setting() {
    if std::env::var_os(harness::image::NEWEST_VARIABLE).is_some() {
        eprintln!("the programs of the image find their libraries only as servers");
        return;
    }
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut origin = world.start_daemon().await;
    let id = schedule(&world, "3 seconds").await;
    let copy = restore_dump(&world).await;
    let launch = launch_on(&world, world.ports().0, &copy);

    let mut daemon = launch.start();
    let line = daemon.wait_for_line(IS_COPY).await;
    assert!(line.contains(&copy) && line.contains(&world.name) && line.contains("TIDINGS_ADOPT=1"), "{line}");
    wait_until_unready(&mut daemon, IS_COPY).await;
    let doctor = launch.clone().subcommand("doctor").with("TIDINGS_HTTP_ADDR", daemon.http_addr().await);
    let (code, output) = doctor.run_to_end().await;
    assert!(code == 1 && output.contains(IS_COPY), "{code} {output}");
    assert_eq!(inbox.next().await.id(), id, "the origin delivers it");
    check_nothing_else_came(&world, &mut inbox).await;
    assert!(daemon.stop().await.success());
    wait_until_ready(&mut origin).await;

    let mut daemon = launch.with("TIDINGS_ADOPT", 1).start_ready().await;
    assert_eq!(inbox.next().await.id(), id, "the copy delivers it as well");
    wait_for_note(&mut daemon, "consumers get each message twice").await;
    wait_until_ready(&mut daemon).await;
}

#[tokio::test]
async fn a_dump_whose_origin_is_gone_delivers_and_says_so_once() {
    if std::env::var_os(harness::image::NEWEST_VARIABLE).is_some() {
        eprintln!("the programs of the image find their libraries only as servers");
        return;
    }
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let origin = world.start_daemon().await;
    let id = schedule(&world, "1 second").await;
    let copy = restore_dump(&world).await;
    assert_eq!(inbox.next().await.id(), id);
    assert!(origin.stop().await.success());

    let launch = launch_on(&world, world.ports().0, &copy);
    let mut daemon = launch.start_ready().await;
    assert_eq!(inbox.next().await.id(), id);
    daemon.wait_for_line("and are delivered from").await;
    assert!(daemon.stop().await.success());
    let daemon = launch.start_ready().await;
    assert!(!daemon.log().contains("and are delivered from"), "{}", daemon.log());
}

#[tokio::test]
async fn daemons_of_one_database_stop_each_other_never() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _first = world.start_daemon().await;
    // As after an upgrade: the database is elsewhere, and daemons of the same database answer.
    world.sql(r#"UPDATE tidings.installation SET servers = '[{"database": "elsewhere"}]'"#).await;
    let second = launch_on(&world, world.ports().0, &world.name).start_ready().await;
    assert!(!second.log().contains(IS_COPY), "{}", second.log());
    world.wait_until(&format!("SELECT servers->0->>'database' = '{}' FROM tidings.installation", world.name)).await;
    check_nothing_else_came(&world, &mut inbox).await;
}

#[tokio::test]
async fn two_installations_on_one_exchange_are_noted_and_deliver() {
    let world = World::with_plugins(&["message"]).await;
    let other = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut first = world.start_daemon().await;
    let mut second = launch_on(&world, other.ports().0, &other.name).start_ready().await;
    for daemon in [&mut first, &mut second] {
        wait_for_note(daemon, "daemons of another installation").await;
        wait_until_ready(daemon).await;
    }
    for from in [&world, &other] {
        check_nothing_else_came(from, &mut inbox).await;
    }
}

#[tokio::test]
async fn a_daemon_that_may_not_hear_others_says_so_and_delivers() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    assert!(world.start_daemon().await.stop().await.success());
    let user = format!("u{}", world.name);
    let _ = world.manage("PUT", &format!("users/{user}"), Some(&json!({ "password": "p", "tags": "" })));
    let permissions =
        json!({ "configure": "^$", "write": r"^(tidings|amq\.default)$", "read": r"^tidings\.(dead|parking)$" });
    let _ = world.manage("PUT", &format!("permissions/{}/{user}", world.name), Some(&permissions));
    world.sql(r#"UPDATE tidings.installation SET servers = '[{"database": "elsewhere"}]'"#).await;
    let url = harness::world::amqp_url(world.ports().1, &world.name).replace("guest:guest@", &format!("{user}:p@"));
    let mut daemon = world.launch().with("TIDINGS_AMQP_URL", url).start_ready().await;
    daemon.wait_for_line("may not hear the other daemons").await;
    check_nothing_else_came(&world, &mut inbox).await;
}

#[tokio::test]
async fn a_promoted_copy_beside_its_origin_delivers_nothing() {
    let servers = Servers::start_private_async().await;
    let world = World::on_servers(&servers, &["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _origin = world.start_daemon().await;
    let id = schedule(&world, "8 seconds").await;
    let standby = servers.start_standby().expect("a standby");
    execute(standby.port, "SELECT pg_promote()").await;

    let mut daemon = launch_on(&world, standby.port, &world.name).start();
    daemon.wait_for_line(IS_COPY).await;
    assert_eq!(inbox.next().await.id(), id);
    check_nothing_else_came(&world, &mut inbox).await;
}

#[tokio::test]
async fn a_failover_stops_neither_daemons_that_run_nor_those_that_start_afterwards() {
    let servers = Servers::start_private_async().await;
    let world = World::on_servers(&servers, &["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let proxy = Proxy::start(0, world.ports().0).await;
    let port = proxy.port;
    let mut daemon = launch_on(&world, port, &world.name).start_ready().await;
    check_nothing_else_came(&world, &mut inbox).await;
    let standby = servers.start_standby().expect("a standby");
    world.wait_until("SELECT count(*) = 1 AND coalesce(bool_and(replay_lsn = pg_current_wal_lsn()), false) FROM pg_stat_replication").await;
    proxy.set(Mode::Cut);
    drop(proxy);
    execute(standby.port, "SELECT pg_promote()").await;
    let _proxy = Proxy::start(port, standby.port).await;

    let db = sqlx::PgPool::connect(&database_url(standby.port, &world.name)).await.expect("the new primary");
    let schedule = r#"SELECT tidings.schedule('message', now(), '{"routing_key": "a", "body": 1}')"#;
    let id: Uuid = sqlx::query_scalar(schedule).fetch_one(&db).await.expect("scheduled");
    assert_eq!(inbox.next().await.id(), id);
    let other = launch_on(&world, standby.port, &world.name).with("TIDINGS_STATE_DIR", world.state_dir().display());
    let other = other.start_ready().await;
    wait_until_ready(&mut daemon).await;
    assert!(!daemon.log().contains(IS_COPY) && !other.log().contains(IS_COPY), "{}{}", daemon.log(), other.log());
}
