//! Databases that lack something the daemon needs: the daemon says which database, why and what to do, and starts as
//! soon as the problem is solved.

use harness::pooler::Pooler;
use harness::servers::Servers;
use harness::world::{World, database_url, execute};

#[tokio::test]
async fn the_daemon_refuses_to_run_behind_a_pooler_and_says_why() {
    let world = World::with_plugins(&["message"]).await;
    for (mode, ignores_settings, reason) in [
        ("transaction", true, "our sessions are shared, as behind PgBouncer in transaction mode"),
        ("session", true, "does not pass our settings on"),
        ("session", false, "does not pass our settings on"),
    ] {
        let pooler = Pooler::start(world.ports().0, mode, ignores_settings).expect("a pooler");
        let mut daemon = world.launch().with("TIDINGS_DATABASE_URL", database_url(pooler.port, &world.name)).start();

        let line = daemon.wait_for_line(reason).await;

        assert!(line.contains(&format!("127.0.0.1:{}", pooler.port)), "{line}");
        assert!(line.contains("give PostgreSQL's own address"), "{line}");
        assert!(!daemon.log().contains(" ready "), "{}", daemon.log());
    }
}

#[tokio::test]
async fn the_daemon_refuses_a_standby_until_it_is_promoted() {
    let servers = Servers::start_private_async().await;
    let world = World::on_servers(&servers, &["message"]).await;
    let standby = servers.start_standby().expect("a standby");
    let mut daemon = world.launch().with("TIDINGS_DATABASE_URL", database_url(standby.port, &world.name)).start();

    let line = daemon.wait_for_line("it is a standby, which takes no writes").await;
    assert!(line.contains("give the address of the primary"), "{line}");

    execute(standby.port, "SELECT pg_promote()").await;
    daemon.wait_for_line(" ready ").await;
}

#[tokio::test]
async fn a_daemon_without_rights_says_what_to_grant_and_starts_once_it_is_granted() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let role = format!("r{}", world.name);
    world.sql(&format!("CREATE ROLE {role} LOGIN")).await;
    let url = database_url(world.ports().0, &world.name).replace("postgres@", &format!("{role}@"));
    let mut daemon = world.launch().with("TIDINGS_DATABASE_URL", &url).start();

    daemon.wait_for_line("GRANT tidings_daemon TO").await;
    world.sql(&format!("GRANT tidings_producer TO {role}")).await;
    daemon
        .wait_for_line(
            "our role may not SELECT tidings._sqlx_migrations, INSERT tidings.schedules, UPDATE tidings.schedules",
        )
        .await;
    world.sql(&format!("GRANT tidings_daemon TO {role}")).await;
    daemon.wait_for_line(" ready ").await;
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key": "a", "body": 1}')"#).await;
    inbox.next().await;
}
