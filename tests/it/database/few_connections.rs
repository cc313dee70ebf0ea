//! Databases with few connections: four are enough for all of the daemon's work. With fewer, `/readyz` gives
//! PostgreSQL's error as the reason.

use harness::world::{World, database_url};
use nix::sys::signal::Signal;

use crate::dead_letters::replay::{force_pass_at_start, reject_next, wait_for_message_count};
use crate::operations::health::{get_json, wait_until_ready, wait_until_unready};

/// Creates a role like the daemon's with a connection limit (-1 = no limit), and returns its name and the URL for its
/// login.
async fn create_role(world: &World, limit: i32) -> (String, String) {
    let role = format!("few_{}", world.name);
    world.sql(&format!("CREATE ROLE {role} LOGIN IN ROLE tidings_daemon CONNECTION LIMIT {limit}")).await;
    let url = database_url(world.ports().0, &world.name).replace("postgres@", &format!("{role}@"));
    (role, url)
}

/// Schedules `rows` rows of the kind `message`, due now.
async fn schedule_messages(world: &World, rows: usize) {
    world
        .sql(&format!(
            "INSERT INTO tidings.schedules (kind, due_at, payload)
             SELECT 'message', now(), '{{\"routing_key\": \"a\", \"body\": 1}}' FROM generate_series(1, {rows})"
        ))
        .await;
}

/// Checks a drain, held rows, a pass, the page and `/readyz` with the connections that `url` allows.
async fn check_everything(world: &World, url: &str, most: Option<u32>) {
    let mut inbox = world.inbox(&["#"]).await;
    let mut launch = world.launch().with("TIDINGS_DATABASE_URL", url).with("TIDINGS_REPLAY_INTERVAL_MS", 1_000);
    if let Some(most) = most {
        launch = launch.with("TIDINGS_DATABASE_CONNECTIONS", most);
    }
    force_pass_at_start(world).await;
    let mut daemon = launch.start_ready().await;
    wait_until_ready(&mut daemon).await;

    schedule_messages(world, 5_000).await;
    world.sql("SELECT tidings.schedule('nobody', now()) FROM generate_series(1, 20)").await;
    for _ in 0..10 {
        let (status, body) = get_json(&mut daemon, "/readyz").await;
        assert_eq!(status, 200, "while it drains: {body}\n{}", daemon.log());
        assert_eq!(get_json(&mut daemon, "/api/overview").await.0, 200);
    }
    for _ in 0..4_999 {
        inbox.next().await;
    }
    reject_next(&mut inbox).await;
    let again = inbox.next().await;
    assert_eq!(again.number("tidings-replay"), 1, "a pass took it back");
    wait_for_message_count(world, "tidings.dead", 0).await;
    world.wait_until("SELECT count(*) = 20 FROM tidings.schedules WHERE held").await;
    world.wait_until("SELECT count(*) = 5000 FROM tidings.deliveries").await;
    wait_until_ready(&mut daemon).await;
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait_for_end().await.success(), "{}", daemon.log());
    assert!(!daemon.log().contains("the database cannot be used"), "{}", daemon.log());
}

#[tokio::test]
async fn everything_works_with_four_connections_that_are_configured() {
    let world = World::with_plugins(&["message"]).await;
    let (_, url) = create_role(&world, 4).await;
    check_everything(&world, &url, Some(4)).await;
}

#[tokio::test]
async fn everything_works_with_four_connections_that_are_not_configured() {
    let world = World::with_plugins(&["message"]).await;
    let (_, url) = create_role(&world, 4).await;
    check_everything(&world, &url, None).await;
}

#[tokio::test]
async fn everything_works_with_five_connections_that_are_not_configured() {
    let world = World::with_plugins(&["message"]).await;
    let (_, url) = create_role(&world, 5).await;
    check_everything(&world, &url, None).await;
}

#[tokio::test]
async fn the_daemon_never_opens_more_connections_than_configured() {
    let world = World::with_plugins(&["message"]).await;
    let (role, url) = create_role(&world, -1).await;
    let mut inbox = world.inbox(&["#"]).await;
    let launch = world.launch().with("TIDINGS_DATABASE_URL", url).with("TIDINGS_DATABASE_CONNECTIONS", 4);
    let mut daemon = launch.with("TIDINGS_REPLAY_INTERVAL_MS", 1_000).start_ready().await;
    schedule_messages(&world, 3_000).await;

    for _ in 0..60 {
        let sessions: i64 =
            world.value(&format!("SELECT count(*) FROM pg_stat_activity WHERE usename = '{role}'")).await;
        assert!(sessions <= 4, "{sessions} sessions");
        get_json(&mut daemon, "/readyz").await;
    }
    for _ in 0..3_000 {
        inbox.next().await;
    }
}

#[tokio::test]
async fn with_fewer_than_four_connections_readyz_names_the_limit_until_it_is_raised() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    for limit in [3, 1] {
        let (role, url) = create_role(&world, limit).await;
        let mut daemon = world.launch().with("TIDINGS_DATABASE_URL", &url).start();

        wait_until_unready(&mut daemon, &format!("too many connections for role \"{role}\"")).await;
        if limit == 3 {
            schedule_messages(&world, 100).await;
            for _ in 0..100 {
                inbox.next().await;
            }
        }

        world.sql(&format!("ALTER ROLE {role} CONNECTION LIMIT 20")).await;
        wait_until_ready(&mut daemon).await;
        schedule_messages(&world, 1).await;
        inbox.next().await;
        drop(daemon);
        world.wait_until(&format!("SELECT count(*) = 0 FROM pg_stat_activity WHERE usename = '{role}'")).await;
        world.sql(&format!("DROP ROLE {role}")).await;
    }
}
