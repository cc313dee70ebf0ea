//! The daemon's health at `/livez` and `/readyz`, with reasons.

use harness::daemon::Daemon;
use harness::proxy::{Mode, Proxy};
use harness::world::{World, amqp_url, database_url};
use harness::{EVENT_TIMEOUT, eventually, eventually_within};
use sqlx::Executor as _;

/// Sends a GET request to a daemon, and returns the status and the JSON body.
pub(crate) async fn get_json(daemon: &mut Daemon, path: &str) -> (u16, serde_json::Value) {
    let url = format!("http://{}{path}", daemon.http_addr().await);
    let asked = tokio::task::spawn_blocking(move || {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let mut answer = agent.get(&url).call().expect("an answer");
        let body = answer.body_mut().read_to_string().expect("text");
        (answer.status().as_u16(), serde_json::from_str(&body).expect("JSON"))
    });
    asked.await.expect("asked")
}

/// Waits until the daemon is not ready for a reason that contains `part`, and checks that it is still alive.
pub(crate) async fn wait_until_unready(daemon: &mut Daemon, part: &str) {
    let event = format!("the reason {part:?}");
    eventually(&event, async || {
        let (status, body) = get_json(daemon, "/readyz").await;
        let reasons = body["reasons"].as_array().expect("reasons");
        assert_eq!(status == 200, reasons.is_empty(), "{body}");
        assert_eq!(body["ready"], reasons.is_empty(), "{body}");
        reasons.iter().any(|reason| reason.as_str().is_some_and(|reason| reason.contains(part))).then_some(())
    })
    .await;
    let (status, body) = get_json(daemon, "/livez").await;
    assert_eq!(
        (status, &body["alive"]),
        (200, &true.into()),
        "a server that is away is no reason to be started anew: {body}"
    );
}

pub(crate) async fn wait_until_ready(daemon: &mut Daemon) {
    eventually("being ready", async || (get_json(daemon, "/readyz").await.0 == 200).then_some(())).await;
}

#[tokio::test]
async fn while_rabbitmq_is_away_readyz_gives_its_address_as_the_reason() {
    let world = World::with_plugins(&["message"]).await;
    let proxy = Proxy::start(0, world.ports().1).await;
    let mut daemon = world.launch().with("TIDINGS_AMQP_URL", amqp_url(proxy.port, &world.name)).start_ready().await;
    wait_until_ready(&mut daemon).await;

    proxy.set(Mode::Cut);
    wait_until_unready(&mut daemon, &format!("RabbitMQ at 127.0.0.1:{}/{} is away", proxy.port, world.name)).await;
    proxy.set(Mode::Pass);
    wait_until_ready(&mut daemon).await;
}

#[tokio::test]
async fn while_postgresql_is_away_or_silent_readyz_gives_it_as_the_reason() {
    let world = World::with_plugins(&["message"]).await;
    let proxy = Proxy::start(0, world.ports().0).await;
    let mut daemon =
        world.launch().with("TIDINGS_DATABASE_URL", database_url(proxy.port, &world.name)).start_ready().await;
    wait_until_ready(&mut daemon).await;

    proxy.set(Mode::Swallow);
    wait_until_unready(&mut daemon, "PostgreSQL did not answer within 3 s").await;
    proxy.set(Mode::Cut);
    wait_until_unready(&mut daemon, "not listening for notifications").await;
    proxy.set(Mode::Pass);
    wait_until_ready(&mut daemon).await;
}

#[tokio::test]
async fn a_starting_daemon_answers_readyz_and_says_what_it_waits_for() {
    let world = World::empty().await;
    let proxy = Proxy::start(0, world.ports().0).await;
    proxy.set(Mode::Cut);
    let mut daemon = world.launch().with("TIDINGS_DATABASE_URL", database_url(proxy.port, &world.name)).start();

    wait_until_unready(&mut daemon, "starting").await;
    wait_until_unready(&mut daemon, &format!("could not reach PostgreSQL at 127.0.0.1:{}", proxy.port)).await;
    proxy.set(Mode::Pass);
    wait_until_ready(&mut daemon).await;
}

#[tokio::test]
async fn a_late_row_makes_the_daemon_unready_until_it_is_delivered_and_a_held_row_does_not() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world
        .sql(
            r#"INSERT INTO tidings.schedules (kind, due_at, not_before, payload) VALUES
               ('message', now() - interval '1 minute', now() - interval '1 minute', '{"routing_key": "a", "body": 1}'),
               ('nobody', now() - interval '1 hour', now() - interval '1 hour', '{}')"#,
        )
        .await;
    // Another transaction locks the row, so that the daemon cannot deliver it.
    let mut busy = world.db.begin().await.expect("a transaction");
    busy.execute("SELECT FROM tidings.schedules WHERE kind = 'message' FOR UPDATE").await.expect("locked");
    let mut daemon = world.start_daemon().await;

    wait_until_unready(&mut daemon, "late: a row that nothing holds back has been due for 6").await;
    busy.rollback().await.expect("rolled back");
    inbox.next().await;
    world.wait_until("SELECT held FROM tidings.schedules WHERE kind = 'nobody'").await;
    wait_until_ready(&mut daemon).await;
}

#[tokio::test]
async fn canaries_are_delivered_repeatedly_and_their_lateness_is_a_metric() {
    let world = World::with_plugins(&["message"]).await;
    let mut everything = world.inbox(&["tidings.canary.*"]).await;
    let mut daemon =
        world.launch().with("TIDINGS_SWEEP_MS", 600_000).with("TIDINGS_CANARY_MS", 100).start_ready().await;

    let (first, second) = (everything.next().await, everything.next().await);
    assert_ne!(first.id(), second.id());
    assert!(first.at_ms >= first.number("tidings-due-ms"));
    let url = format!("http://{}/metrics", daemon.http_addr().await);
    eventually("two canaries among the metrics", async || {
        let text = ureq::get(&url).call().expect("an answer").body_mut().read_to_string().expect("text");
        assert!(text.contains("tidings_canaries_lost_total 0\n"), "{text}");
        let count = text.lines().find_map(|line| line.strip_prefix("tidings_canary_lateness_seconds_count "))?;
        (count.parse::<u32>().expect("a number") >= 2).then_some(())
    })
    .await;
    wait_until_ready(&mut daemon).await;
}

#[tokio::test]
async fn a_lost_canary_makes_the_daemon_unready_until_the_next_one_arrives() {
    let world = World::with_plugins(&["message"]).await;
    let proxy = Proxy::start(0, world.ports().0).await;
    let url = database_url(proxy.port, &world.name);
    let mut daemon =
        world.launch().with("TIDINGS_DATABASE_URL", url).with("TIDINGS_CANARY_MS", 100).start_ready().await;
    wait_until_ready(&mut daemon).await;

    proxy.set(Mode::Cut);
    // A canary that is already on its way counts as lost only after half a minute.
    let lost = "the reason that a canary was lost";
    eventually_within(2 * EVENT_TIMEOUT, lost, async || {
        let (_, body) = get_json(&mut daemon, "/readyz").await;
        body.to_string().contains("the last canary was lost").then_some(())
    })
    .await;
    proxy.set(Mode::Pass);
    wait_until_ready(&mut daemon).await;
    daemon.wait_for_line("the canary came again").await;
}

/// This is the state of a deployment between a migration and the replacement of the daemon.
#[tokio::test]
async fn a_running_daemon_reports_a_newer_database_and_continues_to_deliver() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.start_daemon().await;

    world.sql("INSERT INTO tidings._sqlx_migrations VALUES (9999, 'later', now(), true, '', 0)").await;

    wait_until_unready(&mut daemon, "by a newer tidings (migration 9999)").await;
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key": "a", "body": 1}')"#).await;
    inbox.next().await;
}
