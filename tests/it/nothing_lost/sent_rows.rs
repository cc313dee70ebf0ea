//! Rows whose message the broker has confirmed while PostgreSQL does not let them be finished: they are finished later, and
//! not sent again. And brokers that take no message although they are there.

use std::collections::HashMap;

use harness::consumer::Inbox;
use harness::daemon::Daemon;
use harness::eventually;
use harness::world::{World, amqp_url, database_url};
use lapin::BasicProperties;
use lapin::options::BasicPublishOptions;

use crate::operations::health::{ask, until_ready, until_unready};

/// A trigger that refuses what becomes of a row, as a full disk would.
async fn refuse(world: &World, table: &str, timing: &str, when: &str) {
    world.sql("CREATE SEQUENCE public.refusals").await;
    world
        .sql(
            "CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 -- Of sequences alone nothing is taken back.
                 PERFORM nextval('public.refusals');
                 RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100';
             END $$",
        )
        .await;
    world.sql(&format!("CREATE {timing} ON {table} {when} EXECUTE FUNCTION public.refuse()")).await;
}

const ALL: &str = "FOR EACH ROW";
const BAD: &str = "FOR EACH ROW WHEN (NEW.key = 'bad')";

async fn allow(world: &World) {
    world.sql("DROP FUNCTION public.refuse() CASCADE").await;
}

/// Writes as many rows that are due.
async fn write(world: &World, rows: usize) {
    world
        .sql(&format!(
            r#"INSERT INTO tidings.schedules (kind, key, due_at, payload)
               SELECT 'message', n, now(), '{{"routing_key": "k", "body": 1}}' FROM generate_series(1, {rows}) AS n"#
        ))
        .await;
}

/// Takes what is in the queue, and counts it by id.
async fn copies(world: &World, inbox: &mut Inbox) -> HashMap<uuid::Uuid, usize> {
    // After all of them.
    let channel = world.broker.channel().await;
    let options = BasicPublishOptions::default();
    let last = channel.basic_publish("".into(), "inbox.k".into(), options, b"last", BasicProperties::default());
    last.await.expect("written").await.expect("taken");
    let mut copies = HashMap::new();
    loop {
        let received = inbox.next().await;
        if received.delivery.data == b"last" {
            return copies;
        }
        *copies.entry(received.id()).or_default() += 1;
    }
}

/// Every row has come once, and is finished.
async fn each_came_once(world: &World, inbox: &mut Inbox, rows: usize) {
    world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    let copies = copies(world, inbox).await;
    assert_eq!((copies.len(), copies.values().sum::<usize>()), (rows, rows), "messages of so many rows, and in all");
    let history = "SELECT count(*) = count(DISTINCT id) AND bool_and(outcome = 'delivered') FROM tidings.deliveries";
    assert!(world.value::<bool>(history).await);
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.deliveries").await, i64::try_from(rows).expect("few"));
}

/// A daemon without a sweep, whose database is so.
async fn tried_again(world: &World, daemon: &mut Daemon) {
    until_unready(daemon, "No space left on device").await;
    // What is tried again is seen in the row; each refusal is one more.
    world.until("SELECT coalesce(max(refusals), 0) >= 2 FROM tidings.schedules").await;
}

#[tokio::test]
async fn rows_that_were_confirmed_and_cannot_be_finished_are_sent_once_and_said_to_be_so() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let mut daemon = world.daemon().await;
    refuse(&world, "tidings.deliveries", "TRIGGER refuse BEFORE INSERT", ALL).await;
    write(&world, 100).await;

    tried_again(&world, &mut daemon).await;
    assert_eq!(daemon.log().matches("PostgreSQL refuses to finish rows").count(), 1, "{}", daemon.log());
    allow(&world).await;

    each_came_once(&world, &mut inbox, 100).await;
    until_ready(&mut daemon).await;
}

#[tokio::test]
async fn while_rows_cannot_be_finished_hardly_more_are_sent() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let mut daemon = world.daemon().await;
    refuse(&world, "tidings.deliveries", "TRIGGER refuse BEFORE INSERT", ALL).await;
    // More than a claim of the few that go out at once takes, for each lane.
    write(&world, 5_000).await;

    until_unready(&mut daemon, "No space left on device").await;
    world.until("SELECT last_value > 40 FROM public.refusals").await;
    let sent = copies(&world, &mut inbox).await;
    assert!(sent.values().all(|copies| *copies == 1), "{sent:?}");
    assert!(sent.len() < 2_000, "{} of 5000 were sent", sent.len());
    allow(&world).await;
    world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;

    let later = copies(&world, &mut inbox).await;
    assert_eq!((sent.len() + later.len(), later.values().sum::<usize>()), (5_000, later.len()));
    assert!(later.keys().all(|id| !sent.contains_key(id)), "none of them came twice");
}

#[tokio::test]
async fn what_is_refused_only_at_the_commit_or_cannot_even_wait_is_sent_once_as_well() {
    for (table, timing) in [
        ("tidings.deliveries", "CONSTRAINT TRIGGER refuse AFTER INSERT"),
        ("tidings.schedules", "TRIGGER refuse BEFORE UPDATE OR DELETE"),
    ] {
        let world = World::with(&["message"]).await;
        let mut inbox = world.inbox(&["k"]).await;
        let mut daemon = world.daemon().await;
        let is_deferred = timing.starts_with("CONSTRAINT");
        write(&world, 0).await;
        refuse(&world, table, timing, if is_deferred { "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW" } else { ALL })
            .await;
        write(&world, 30).await;

        until_unready(&mut daemon, "No space left on device").await;
        // It is tried again and again.
        world.until("SELECT last_value > 30 FROM public.refusals").await;
        allow(&world).await;

        each_came_once(&world, &mut inbox, 30).await;
    }
}

#[tokio::test]
async fn sessions_that_are_ended_in_the_middle_of_a_drain_leave_no_second_copies() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    write(&world, 6_000).await;
    let daemon = world.launch().ready().await;

    for finished in [500, 2_000, 3_500] {
        world.until(&format!("SELECT count(*) > {finished} FROM tidings.deliveries")).await;
        world
            .sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                 WHERE datname = current_database() AND application_name = 'tidings'",
            )
            .await;
    }

    each_came_once(&world, &mut inbox, 6_000).await;
    assert!(daemon.stop().await.success());
}

#[tokio::test]
async fn one_row_that_cannot_be_finished_holds_up_no_other() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    refuse(&world, "tidings.deliveries", "TRIGGER refuse BEFORE INSERT", BAD).await;
    write(&world, 50).await;
    world.sql("UPDATE tidings.schedules SET key = 'bad' WHERE key = '25'").await;
    let mut daemon = world.daemon().await;

    world.until("SELECT count(*) = 49 FROM tidings.deliveries").await;
    world.until("SELECT refusals >= 2 AND last_error LIKE '%No space left on device' FROM tidings.schedules").await;
    // Those that come after it are not held up either, and all is well but for that row.
    write(&world, 10).await;
    world.until("SELECT count(*) = 59 FROM tidings.deliveries").await;
    until_ready(&mut daemon).await;
    let (_, output) = world.tidings(["explain", "message/bad"]).await;
    assert!(output.contains("PostgreSQL refuses to finish it"), "{output}");
    allow(&world).await;

    each_came_once(&world, &mut inbox, 60).await;
}

#[tokio::test]
async fn a_row_that_is_edited_after_its_message_was_confirmed_is_sent_anew() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let mut daemon = world.daemon().await;
    refuse(&world, "tidings.deliveries", "TRIGGER refuse BEFORE INSERT", ALL).await;
    write(&world, 2).await;
    tried_again(&world, &mut daemon).await;
    assert_eq!((inbox.next().await.text(), inbox.next().await.text()), ("1", "1"));

    world.sql(r#"UPDATE tidings.schedules SET payload = '{"routing_key": "k", "body": 2}' WHERE key = '1'"#).await;
    allow(&world).await;

    let again = inbox.next().await;
    assert_eq!(again.text(), "2");
    world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    assert!(copies(&world, &mut inbox).await.is_empty());
}

#[tokio::test]
async fn a_right_to_write_the_history_that_is_withdrawn_is_named_and_sends_nothing_twice() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let role = format!("r{}", world.name);
    world.sql(&format!("CREATE ROLE {role} LOGIN IN ROLE tidings_daemon")).await;
    let url = database_url(world.ports().0, &world.name).replace("postgres@", &format!("{role}@"));
    let mut daemon = world.launch().with("TIDINGS_DATABASE_URL", url).ready().await;
    world.sql("REVOKE INSERT ON tidings.deliveries FROM tidings_daemon").await;
    write(&world, 20).await;

    until_unready(&mut daemon, "permission denied for table deliveries").await;
    world.sql("GRANT INSERT ON tidings.deliveries TO tidings_daemon").await;

    each_came_once(&world, &mut inbox, 20).await;
    until_ready(&mut daemon).await;
}

/// Gives the user of a world these rights in its virtual host, and makes the user if need be.
fn permit(world: &World, write: &str) {
    let base = world.management_url();
    let user = format!("u{}", world.name);
    let put = |path: String, json: serde_json::Value| {
        let sent = ureq::put(format!("{base}/api/{path}"))
            .header("Authorization", "Basic Z3Vlc3Q6Z3Vlc3Q=")
            .send(json.to_string());
        sent.expect("RabbitMQ does it");
    };
    put(format!("users/{user}"), serde_json::json!({ "password": "secret", "tags": "" }));
    put(
        format!("permissions/{}/{user}", world.name),
        serde_json::json!({ "configure": ".*", "write": write, "read": ".*" }),
    );
}

#[tokio::test]
async fn a_right_to_publish_that_is_withdrawn_is_named_in_the_words_of_the_broker_and_logged_once() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    permit(&world, ".*");
    let url = amqp_url(world.ports().1, &world.name).replace("guest:guest", &format!("u{}:secret", world.name));
    // A channel that has published goes on with the right that it had: only what is opened later has lost it.
    permit(&world, r"^tidings\.(dead|parking|dlx)$");
    let mut daemon = world.launch().with("TIDINGS_AMQP_URL", url).ready().await;
    until_ready(&mut daemon).await;
    write(&world, 1).await;

    until_unready(&mut daemon, "ACCESS_REFUSED").await;
    eventually("several tries", async || {
        let (_, body) = ask(&mut daemon, "/readyz").await;
        assert!(body.to_string().contains("ACCESS_REFUSED"), "{body}");
        world.value::<bool>("SELECT now() - min(due_at) > '3 seconds' FROM tidings.schedules").await.then_some(())
    })
    .await;
    assert_eq!(daemon.log().matches("could not publish").count(), 1, "{}", daemon.log());
    let addr = daemon.http_addr().await;
    let doctor = world.launch().subcommand("doctor").with("TIDINGS_HTTP_ADDR", addr);
    let (code, output) = doctor.finished().await;
    assert!(code == 1 && output.contains("ACCESS_REFUSED"), "{output}");

    permit(&world, ".*");
    inbox.next().await;
    until_ready(&mut daemon).await;
}
