//! Databases that give few connections: four are enough for everything, and below that the reason is in PostgreSQL's words.

use harness::world::{World, database_url};
use nix::sys::signal::Signal;

use crate::dead_letters::replay::{pass_at_start, reject, until_waiting};
use crate::operations::health::{ask, until_ready, until_unready};

/// A role like the daemon's, which may have so many connections (-1 = as many as it likes), and the URL that it logs in with.
async fn role_with(world: &World, limit: i32) -> (String, String) {
    let role = format!("few_{}", world.name);
    world.sql(&format!("CREATE ROLE {role} LOGIN IN ROLE tidings_daemon CONNECTION LIMIT {limit}")).await;
    let url = database_url(world.ports().0, &world.name).replace("postgres@", &format!("{role}@"));
    (role, url)
}

/// `rows` messages, due now.
async fn schedule(world: &World, rows: usize) {
    world
        .sql(&format!(
            "INSERT INTO tidings.schedules (kind, due_at, payload)
             SELECT 'message', now(), '{{\"routing_key\": \"a\", \"body\": 1}}' FROM generate_series(1, {rows})"
        ))
        .await;
}

/// A drain, held and paused rows, a pass, the page and `/readyz`, all with the connections that there are.
async fn everything_works(world: &World, url: &str, most: Option<u32>) {
    let mut inbox = world.inbox(&["#"]).await;
    let mut launch = world.launch().with("TIDINGS_DATABASE_URL", url).with("TIDINGS_REPLAY_INTERVAL_MS", 1_000);
    if let Some(most) = most {
        launch = launch.with("TIDINGS_DATABASE_CONNECTIONS", most);
    }
    pass_at_start(world).await;
    let mut daemon = launch.ready().await;
    until_ready(&mut daemon).await;

    schedule(world, 5_000).await;
    world.sql("SELECT tidings.schedule('nobody', now()) FROM generate_series(1, 20)").await;
    for _ in 0..10 {
        let (status, body) = ask(&mut daemon, "/readyz").await;
        assert_eq!(status, 200, "while it drains: {body}\n{}", daemon.log());
        assert_eq!(ask(&mut daemon, "/api/overview").await.0, 200);
    }
    for _ in 0..4_999 {
        inbox.next().await;
    }
    reject(&mut inbox).await;
    let again = inbox.next().await;
    assert_eq!(again.number("tidings-replay"), 1, "a pass took it back");
    until_waiting(world, "tidings.dead", 0).await;
    world.until("SELECT count(*) = 20 FROM tidings.schedules WHERE held").await;
    world.until("SELECT count(*) = 5000 FROM tidings.deliveries").await;
    until_ready(&mut daemon).await;
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.ended().await.success(), "{}", daemon.log());
    assert!(!daemon.log().contains("the database cannot be used"), "{}", daemon.log());
}

#[tokio::test]
async fn with_four_connections_that_it_was_told_of_everything_works() {
    let world = World::with(&["message"]).await;
    let (_, url) = role_with(&world, 4).await;
    everything_works(&world, &url, Some(4)).await;
}

#[tokio::test]
async fn with_four_connections_that_nobody_told_it_of_everything_works() {
    let world = World::with(&["message"]).await;
    let (_, url) = role_with(&world, 4).await;
    everything_works(&world, &url, None).await;
}

#[tokio::test]
async fn with_five_connections_that_nobody_told_it_of_everything_works() {
    let world = World::with(&["message"]).await;
    let (_, url) = role_with(&world, 5).await;
    everything_works(&world, &url, None).await;
}

#[tokio::test]
async fn it_never_has_more_connections_than_it_may() {
    let world = World::with(&["message"]).await;
    let (role, url) = role_with(&world, -1).await;
    let mut inbox = world.inbox(&["#"]).await;
    let launch = world.launch().with("TIDINGS_DATABASE_URL", url).with("TIDINGS_DATABASE_CONNECTIONS", 4);
    let mut daemon = launch.with("TIDINGS_REPLAY_INTERVAL_MS", 1_000).ready().await;
    schedule(&world, 3_000).await;

    for _ in 0..60 {
        let sessions: i64 =
            world.value(&format!("SELECT count(*) FROM pg_stat_activity WHERE usename = '{role}'")).await;
        assert!(sessions <= 4, "{sessions} sessions");
        ask(&mut daemon, "/readyz").await;
    }
    for _ in 0..3_000 {
        inbox.next().await;
    }
}

#[tokio::test]
async fn with_fewer_than_four_the_reason_names_the_limit_and_it_is_ready_once_it_is_raised() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    for limit in [3, 1] {
        let (role, url) = role_with(&world, limit).await;
        let mut daemon = world.launch().with("TIDINGS_DATABASE_URL", &url).start();

        until_unready(&mut daemon, &format!("too many connections for role \"{role}\"")).await;
        if limit == 3 {
            schedule(&world, 100).await;
            for _ in 0..100 {
                inbox.next().await;
            }
        }

        world.sql(&format!("ALTER ROLE {role} CONNECTION LIMIT 20")).await;
        until_ready(&mut daemon).await;
        schedule(&world, 1).await;
        inbox.next().await;
        drop(daemon);
        world.until(&format!("SELECT count(*) = 0 FROM pg_stat_activity WHERE usename = '{role}'")).await;
        world.sql(&format!("DROP ROLE {role}")).await;
    }
}
