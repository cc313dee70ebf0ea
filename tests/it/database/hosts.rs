//! Several addresses: a daemon whose URL names the servers of a cluster works with the one that takes writes, and goes on with
//! another one after a failover, without a restart.

use harness::daemon::Launch;
use harness::servers::{Server, Servers};
use harness::standby::Standby;
use harness::world::{World, database_url, execute};
use nix::sys::signal::Signal;
use uuid::Uuid;

use crate::operations::health::wait_until_ready;

/// The statement that schedules a row that is due, and returns its id.
const SCHEDULE_ROW: &str = r#"SELECT tidings.schedule('message', now(), '{"routing_key": "a", "body": 1}')"#;

/// How to run a daemon whose URL names the servers on these ports.
fn launch_on(world: &World, ports: [u16; 2]) -> Launch {
    let hosts = ports.map(|port| format!("127.0.0.1:{port}")).join(",");
    let url = database_url(ports[0], &world.name).replace(&format!("127.0.0.1:{}", ports[0]), &hosts);
    world.launch().with("TIDINGS_SWEEP_MS", 600_000).with("TIDINGS_DATABASE_URL", url)
}

/// Schedules a row on the server at this port.
async fn schedule_on(world: &World, port: u16) -> Uuid {
    let db = sqlx::PgPool::connect(&database_url(port, &world.name)).await.expect("connected");
    sqlx::query_scalar(SCHEDULE_ROW).fetch_one(&db).await.expect("scheduled")
}

/// Starts a standby, and waits until it has everything that the primary has.
async fn start_standby(servers: &Servers, world: &World) -> Standby {
    let standby = servers.start_standby().expect("a standby");
    wait_for_replay(world).await;
    standby
}

/// Waits until the standby has everything that the primary has.
async fn wait_for_replay(world: &World) {
    let caught_up =
        "SELECT count(*) = 1 AND coalesce(bool_and(replay_lsn = pg_current_wal_lsn()), false) FROM pg_stat_replication";
    world.wait_until(caught_up).await;
}

#[tokio::test]
async fn of_several_servers_the_one_that_takes_writes_is_used_in_either_order() {
    let servers = Servers::start_private_async().await;
    let world = World::on_servers(&servers, &["message"]).await;
    let standby = start_standby(&servers, &world).await;
    let mut inbox = world.inbox(&["#"]).await;
    let primary = world.ports().0;
    for ports in [[primary, standby.port], [standby.port, primary]] {
        let mut daemon = launch_on(&world, ports).start_ready().await;
        daemon.wait_for_line(&format!("connected to PostgreSQL database=\"127.0.0.1:{primary}/")).await;
        let id = schedule_on(&world, primary).await;
        assert_eq!(inbox.next().await.id(), id);
        let doctor = launch_on(&world, ports).subcommand("doctor").with("TIDINGS_HTTP_ADDR", daemon.http_addr().await);
        let (_, report) = doctor.run_to_end().await;
        assert!(report.contains("no commit waits for a standby"), "{report}");
        assert!(daemon.stop().await.success());
    }
}

#[tokio::test]
async fn after_a_failover_the_daemon_goes_on_with_the_new_primary_and_does_not_return_to_the_old_one() {
    let servers = Servers::start_private_async().await;
    let world = World::on_servers(&servers, &["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let primary = world.ports().0;
    let standby = start_standby(&servers, &world).await;
    let mut daemon = launch_on(&world, [primary, standby.port]).start_ready().await;
    let id = schedule_on(&world, primary).await;
    assert_eq!(inbox.next().await.id(), id);
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    wait_for_replay(&world).await;

    // The old primary stands still: its connections stay open, and nothing answers.
    servers.signal(Server::Postgres, Signal::SIGSTOP).expect("stopped");
    execute(standby.port, "SELECT pg_promote()").await;
    let id = schedule_on(&world, standby.port).await;
    assert_eq!(inbox.next().await.id(), id);
    daemon.wait_for_line(&format!("PostgreSQL is used at 127.0.0.1:{} from now on", standby.port)).await;

    // The old primary comes back as if nothing had happened, and sessions on the new one break.
    servers.signal(Server::Postgres, Signal::SIGCONT).expect("goes on");
    for _ in 0..3 {
        let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tidings'";
        execute(standby.port, end).await;
        let id = schedule_on(&world, standby.port).await;
        assert_eq!(inbox.next().await.id(), id);
    }
    wait_until_ready(&mut daemon).await;
    let returned = format!("PostgreSQL is used at 127.0.0.1:{primary} from now on");
    assert!(!daemon.log().contains(&returned), "{}", daemon.log());
}

#[tokio::test]
async fn while_no_server_takes_writes_each_is_named_with_the_reason() {
    let servers = Servers::start_private_async().await;
    let world = World::on_servers(&servers, &["message"]).await;
    let standby = start_standby(&servers, &world).await;
    let gone = crate::operations::process::find_free_port();
    let mut daemon = launch_on(&world, [gone, standby.port]).start();

    let line = daemon.wait_for_line("none of the servers of the database").await;
    assert!(line.contains(&format!("127.0.0.1:{gone}: ")) && line.contains("refused"), "{line}");
    assert!(line.contains(&format!("127.0.0.1:{}: it is a standby, which takes no writes", standby.port)), "{line}");

    execute(standby.port, "SELECT pg_promote()").await;
    daemon.wait_for_line(" ready ").await;
}

#[tokio::test]
async fn a_server_that_takes_no_writes_any_more_is_left_and_said_so() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.launch().with("TIDINGS_SWEEP_MS", 600_000).start_ready().await;
    world
        .sql(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN RAISE EXCEPTION ''cannot execute DELETE in a read-only transaction'' USING ERRCODE = ''25006''; END'",
        )
        .await;
    let refuse =
        "CREATE TRIGGER refuse BEFORE DELETE ON tidings.schedules FOR EACH STATEMENT EXECUTE FUNCTION refuse()";
    world.sql(refuse).await;
    let id: Uuid = world.value(SCHEDULE_ROW).await;
    assert_eq!(inbox.next().await.id(), id);
    daemon.wait_for_line("takes no writes any more: it has become read-only, or a standby").await;

    world.sql("DROP TRIGGER refuse ON tidings.schedules").await;
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    assert!(inbox.next_within(std::time::Duration::from_secs(1)).await.is_none(), "it is not sent again");
}
