//! What the daemon says of its own health: `/livez` and `/readyz`, each with reasons.

use harness::daemon::Daemon;
use harness::proxy::{Mode, Proxy};
use harness::world::{World, amqp_url, database_url};
use harness::{PATIENCE, eventually, eventually_within};
use sqlx::Executor as _;

/// Status and body of what a daemon answers.
pub(crate) async fn ask(daemon: &mut Daemon, path: &str) -> (u16, serde_json::Value) {
    let url = format!("http://{}{path}", daemon.http_addr().await);
    let asked = tokio::task::spawn_blocking(move || {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let mut answer = agent.get(&url).call().expect("an answer");
        let body = answer.body_mut().read_to_string().expect("text");
        (answer.status().as_u16(), serde_json::from_str(&body).expect("JSON"))
    });
    asked.await.expect("asked")
}

/// Waits until the daemon is not ready for a reason that contains `part`, and alive all the same.
pub(crate) async fn until_unready(daemon: &mut Daemon, part: &str) {
    let what = format!("the reason {part:?}");
    eventually(&what, async || {
        let (status, body) = ask(daemon, "/readyz").await;
        let reasons = body["reasons"].as_array().expect("reasons");
        assert_eq!(status == 200, reasons.is_empty(), "{body}");
        assert_eq!(body["ready"], reasons.is_empty(), "{body}");
        reasons.iter().any(|reason| reason.as_str().is_some_and(|reason| reason.contains(part))).then_some(())
    })
    .await;
    let (status, body) = ask(daemon, "/livez").await;
    assert_eq!(
        (status, &body["alive"]),
        (200, &true.into()),
        "a server that is away is no reason to be started anew: {body}"
    );
}

pub(crate) async fn until_ready(daemon: &mut Daemon) {
    eventually("being ready", async || (ask(daemon, "/readyz").await.0 == 200).then_some(())).await;
}

#[tokio::test]
async fn a_broker_that_is_away_is_a_reason_with_its_address_until_it_is_back() {
    let world = World::with(&["message"]).await;
    let proxy = Proxy::start(0, world.ports().1).await;
    let mut daemon = world.launch().with("TIDINGS_AMQP_URL", amqp_url(proxy.port, &world.name)).ready().await;
    until_ready(&mut daemon).await;

    proxy.set(Mode::Cut);
    until_unready(&mut daemon, &format!("RabbitMQ at 127.0.0.1:{}/{} is away", proxy.port, world.name)).await;
    proxy.set(Mode::Pass);
    until_ready(&mut daemon).await;
}

#[tokio::test]
async fn a_database_that_is_away_or_silent_is_a_reason_until_it_is_back() {
    let world = World::with(&["message"]).await;
    let proxy = Proxy::start(0, world.ports().0).await;
    let mut daemon = world.launch().with("TIDINGS_DATABASE_URL", database_url(proxy.port, &world.name)).ready().await;
    until_ready(&mut daemon).await;

    proxy.set(Mode::Swallow);
    until_unready(&mut daemon, "PostgreSQL did not answer within 3 s").await;
    proxy.set(Mode::Cut);
    until_unready(&mut daemon, "not listening for notifications").await;
    proxy.set(Mode::Pass);
    until_ready(&mut daemon).await;
}

#[tokio::test]
async fn before_it_has_started_it_answers_and_says_what_it_waits_for() {
    let world = World::empty().await;
    let proxy = Proxy::start(0, world.ports().0).await;
    proxy.set(Mode::Cut);
    let mut daemon = world.launch().with("TIDINGS_DATABASE_URL", database_url(proxy.port, &world.name)).start();

    until_unready(&mut daemon, "starting").await;
    until_unready(&mut daemon, &format!("could not reach PostgreSQL at 127.0.0.1:{}", proxy.port)).await;
    proxy.set(Mode::Pass);
    until_ready(&mut daemon).await;
}

#[tokio::test]
async fn a_row_that_is_late_is_a_reason_until_it_is_delivered_and_a_held_or_expired_one_is_none() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world
        .sql(
            r#"INSERT INTO tidings.schedules (kind, due_at, not_before, payload) VALUES
               ('message', now() - interval '1 minute', now() - interval '1 minute', '{"routing_key": "a", "body": 1}'),
               ('nobody', now() - interval '1 hour', now() - interval '1 hour', '{}')"#,
        )
        .await;
    // Somebody works on it, so that nobody can deliver it.
    let mut busy = world.db.begin().await.expect("a transaction");
    busy.execute("SELECT FROM tidings.schedules WHERE kind = 'message' FOR UPDATE").await.expect("locked");
    let mut daemon = world.daemon().await;

    until_unready(&mut daemon, "late: a row that nothing holds back has been due for 6").await;
    busy.rollback().await.expect("rolled back");
    inbox.next().await;
    world.until("SELECT held FROM tidings.schedules WHERE kind = 'nobody'").await;
    until_ready(&mut daemon).await;
}

#[tokio::test]
async fn the_canary_goes_the_whole_way_again_and_again_and_its_lateness_is_a_metric() {
    let world = World::with(&["message"]).await;
    let mut everything = world.inbox(&["tidings.canary.*"]).await;
    let mut daemon = world.launch().with("TIDINGS_SWEEP_MS", 600_000).with("TIDINGS_CANARY_MS", 100).ready().await;

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
    until_ready(&mut daemon).await;
}

#[tokio::test]
async fn a_lost_canary_is_a_reason_until_one_comes_again() {
    let world = World::with(&["message"]).await;
    let proxy = Proxy::start(0, world.ports().0).await;
    let url = database_url(proxy.port, &world.name);
    let mut daemon = world.launch().with("TIDINGS_DATABASE_URL", url).with("TIDINGS_CANARY_MS", 100).ready().await;
    until_ready(&mut daemon).await;

    proxy.set(Mode::Cut);
    // One that is on its way already is lost after half a minute.
    let lost = "the reason that a canary was lost";
    eventually_within(2 * PATIENCE, lost, async || {
        let (_, body) = ask(&mut daemon, "/readyz").await;
        body.to_string().contains("the last canary was lost").then_some(())
    })
    .await;
    proxy.set(Mode::Pass);
    until_ready(&mut daemon).await;
    daemon.wait_for_line("the canary came again").await;
}

/// So it is between the migration and the replacement of a daemon.
#[tokio::test]
async fn a_daemon_that_runs_says_that_the_database_is_newer_and_goes_on_delivering() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.daemon().await;

    world.sql("INSERT INTO tidings._sqlx_migrations VALUES (9999, 'later', now(), true, '', 0)").await;

    until_unready(&mut daemon, "by a newer tidings (migration 9999)").await;
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key": "a", "body": 1}')"#).await;
    inbox.next().await;
}
