//! Rows whose message RabbitMQ has confirmed while PostgreSQL refuses to settle them: they are settled later and not
//! published again. Also a RabbitMQ that answers but refuses to publish.

use std::collections::HashMap;

use harness::consumer::Inbox;
use harness::daemon::Daemon;
use harness::eventually;
use harness::world::{World, amqp_url, database_url};
use lapin::BasicProperties;
use lapin::options::BasicPublishOptions;

use crate::operations::health::{get_json, wait_until_ready, wait_until_unready};

/// Creates a trigger that makes statements on `table` fail, with the error of a full disk.
async fn create_refusing_trigger(world: &World, table: &str, timing: &str, when: &str) {
    world.sql("CREATE SEQUENCE public.refusals").await;
    world
        .sql(
            "CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 -- A sequence is not rolled back, so it counts the refusals.
                 PERFORM nextval('public.refusals');
                 RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100';
             END $$",
        )
        .await;
    world.sql(&format!("CREATE {timing} ON {table} {when} EXECUTE FUNCTION public.refuse()")).await;
}

const EVERY_ROW: &str = "FOR EACH ROW";
const BAD_ROWS: &str = "FOR EACH ROW WHEN (NEW.key = 'bad')";

async fn drop_refusing_trigger(world: &World) {
    world.sql("DROP FUNCTION public.refuse() CASCADE").await;
}

/// Writes `rows` rows that are due.
async fn write_due_rows(world: &World, rows: usize) {
    world
        .sql(&format!(
            r#"INSERT INTO tidings.schedules (kind, key, due_at, payload)
               SELECT 'message', n, now(), '{{"routing_key": "k", "body": 1}}' FROM generate_series(1, {rows}) AS n"#
        ))
        .await;
}

/// Receives all messages in the queue, and counts them by id.
async fn count_copies_by_id(world: &World, inbox: &mut Inbox) -> HashMap<uuid::Uuid, usize> {
    // A last message, which is behind all others in the queue.
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

/// Checks that the message of every row arrived once, and that every row is in the history.
async fn check_each_arrived_once(world: &World, inbox: &mut Inbox, rows: usize) {
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    let copies = count_copies_by_id(world, inbox).await;
    assert_eq!((copies.len(), copies.values().sum::<usize>()), (rows, rows), "messages of so many rows, and in all");
    let history = "SELECT count(*) = count(DISTINCT id) AND bool_and(outcome = 'delivered') FROM tidings.deliveries";
    assert!(world.value::<bool>(history).await);
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.deliveries").await, i64::try_from(rows).expect("few"));
}

/// Waits until the daemon reports the refusal and has retried it.
async fn wait_for_retries(world: &World, daemon: &mut Daemon) {
    wait_until_unready(daemon, "No space left on device").await;
    // Each refusal is counted in the row.
    world.wait_until("SELECT coalesce(max(refusals), 0) >= 2 FROM tidings.schedules").await;
}

#[tokio::test]
async fn confirmed_rows_that_cannot_be_settled_are_published_once_and_reported() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let mut daemon = world.start_daemon().await;
    create_refusing_trigger(&world, "tidings.deliveries", "TRIGGER refuse BEFORE INSERT", EVERY_ROW).await;
    write_due_rows(&world, 100).await;

    wait_for_retries(&world, &mut daemon).await;
    assert_eq!(daemon.log().matches("PostgreSQL refuses to finish rows").count(), 1, "{}", daemon.log());
    drop_refusing_trigger(&world).await;

    check_each_arrived_once(&world, &mut inbox, 100).await;
    wait_until_ready(&mut daemon).await;
}

#[tokio::test]
async fn while_rows_cannot_be_settled_few_more_are_published() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let mut daemon = world.start_daemon().await;
    create_refusing_trigger(&world, "tidings.deliveries", "TRIGGER refuse BEFORE INSERT", EVERY_ROW).await;
    // More rows than the lanes claim together while settlements are refused.
    write_due_rows(&world, 5_000).await;

    wait_until_unready(&mut daemon, "No space left on device").await;
    world.wait_until("SELECT last_value > 40 FROM public.refusals").await;
    let sent = count_copies_by_id(&world, &mut inbox).await;
    assert!(sent.values().all(|copies| *copies == 1), "{sent:?}");
    assert!(sent.len() < 2_000, "{} of 5000 were sent", sent.len());
    drop_refusing_trigger(&world).await;
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;

    let later = count_copies_by_id(&world, &mut inbox).await;
    assert_eq!((sent.len() + later.len(), later.values().sum::<usize>()), (5_000, later.len()));
    assert!(later.keys().all(|id| !sent.contains_key(id)), "none of them came twice");
}

#[tokio::test]
async fn rows_whose_commit_or_backoff_is_refused_are_published_once() {
    for (table, timing) in [
        ("tidings.deliveries", "CONSTRAINT TRIGGER refuse AFTER INSERT"),
        ("tidings.schedules", "TRIGGER refuse BEFORE UPDATE OR DELETE"),
    ] {
        let world = World::with_plugins(&["message"]).await;
        let mut inbox = world.inbox(&["k"]).await;
        let mut daemon = world.start_daemon().await;
        let is_deferred = timing.starts_with("CONSTRAINT");
        write_due_rows(&world, 0).await;
        create_refusing_trigger(
            &world,
            table,
            timing,
            if is_deferred { "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW" } else { EVERY_ROW },
        )
        .await;
        write_due_rows(&world, 30).await;

        wait_until_unready(&mut daemon, "No space left on device").await;
        // The daemon keeps retrying.
        world.wait_until("SELECT last_value > 30 FROM public.refusals").await;
        drop_refusing_trigger(&world).await;

        check_each_arrived_once(&world, &mut inbox, 30).await;
    }
}

#[tokio::test]
async fn terminating_sessions_during_a_drain_causes_no_second_copies() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    write_due_rows(&world, 6_000).await;
    let daemon = world.launch().start_ready().await;

    for finished in [500, 2_000, 3_500] {
        world.wait_until(&format!("SELECT count(*) > {finished} FROM tidings.deliveries")).await;
        world
            .sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                 WHERE datname = current_database() AND application_name = 'tidings'",
            )
            .await;
    }

    check_each_arrived_once(&world, &mut inbox, 6_000).await;
    assert!(daemon.stop().await.success());
}

#[tokio::test]
async fn one_row_that_cannot_be_settled_delays_no_other() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    create_refusing_trigger(&world, "tidings.deliveries", "TRIGGER refuse BEFORE INSERT", BAD_ROWS).await;
    write_due_rows(&world, 50).await;
    world.sql("UPDATE tidings.schedules SET key = 'bad' WHERE key = '25'").await;
    let mut daemon = world.start_daemon().await;

    world.wait_until("SELECT count(*) = 49 FROM tidings.deliveries").await;
    world
        .wait_until("SELECT refusals >= 2 AND last_error LIKE '%No space left on device' FROM tidings.schedules")
        .await;
    // Later rows are delivered too, and the daemon is ready in spite of the one row.
    write_due_rows(&world, 10).await;
    world.wait_until("SELECT count(*) = 59 FROM tidings.deliveries").await;
    wait_until_ready(&mut daemon).await;
    let (_, output) = world.tidings(["explain", "message/bad"]).await;
    assert!(output.contains("PostgreSQL refuses to finish it"), "{output}");
    drop_refusing_trigger(&world).await;

    check_each_arrived_once(&world, &mut inbox, 60).await;
}

#[tokio::test]
async fn a_row_that_is_edited_after_its_confirm_is_published_again() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let mut daemon = world.start_daemon().await;
    create_refusing_trigger(&world, "tidings.deliveries", "TRIGGER refuse BEFORE INSERT", EVERY_ROW).await;
    write_due_rows(&world, 2).await;
    wait_for_retries(&world, &mut daemon).await;
    assert_eq!((inbox.next().await.text(), inbox.next().await.text()), ("1", "1"));

    world.sql(r#"UPDATE tidings.schedules SET payload = '{"routing_key": "k", "body": 2}' WHERE key = '1'"#).await;
    drop_refusing_trigger(&world).await;

    let again = inbox.next().await;
    assert_eq!(again.text(), "2");
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    assert!(count_copies_by_id(&world, &mut inbox).await.is_empty());
}

#[tokio::test]
async fn a_revoked_right_to_write_the_history_is_reported_and_causes_no_second_copies() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    let role = format!("r{}", world.name);
    world.sql(&format!("CREATE ROLE {role} LOGIN IN ROLE tidings_daemon")).await;
    let url = database_url(world.ports().0, &world.name).replace("postgres@", &format!("{role}@"));
    let mut daemon = world.launch().with("TIDINGS_DATABASE_URL", url).start_ready().await;
    world.sql("REVOKE INSERT ON tidings.deliveries FROM tidings_daemon").await;
    write_due_rows(&world, 20).await;

    wait_until_unready(&mut daemon, "permission denied for table deliveries").await;
    world.sql("GRANT INSERT ON tidings.deliveries TO tidings_daemon").await;

    check_each_arrived_once(&world, &mut inbox, 20).await;
    wait_until_ready(&mut daemon).await;
}

/// Sets the write permission of this world's user in its virtual host, and creates the user if need be.
fn set_write_permission(world: &World, write: &str) {
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
async fn a_revoked_right_to_publish_is_reported_with_rabbitmqs_error_and_logged_once() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    set_write_permission(&world, ".*");
    let url = amqp_url(world.ports().1, &world.name).replace("guest:guest", &format!("u{}:secret", world.name));
    // RabbitMQ checks the permission once for each channel, so only channels that are opened later lose it.
    set_write_permission(&world, r"^tidings\.(dead|parking|dlx)$");
    let mut daemon = world.launch().with("TIDINGS_AMQP_URL", url).start_ready().await;
    wait_until_ready(&mut daemon).await;
    write_due_rows(&world, 1).await;

    wait_until_unready(&mut daemon, "ACCESS_REFUSED").await;
    eventually("several tries", async || {
        let (_, body) = get_json(&mut daemon, "/readyz").await;
        assert!(body.to_string().contains("ACCESS_REFUSED"), "{body}");
        world.value::<bool>("SELECT now() - min(due_at) > '3 seconds' FROM tidings.schedules").await.then_some(())
    })
    .await;
    assert_eq!(daemon.log().matches("could not publish").count(), 1, "{}", daemon.log());
    let addr = daemon.http_addr().await;
    let doctor = world.launch().subcommand("doctor").with("TIDINGS_HTTP_ADDR", addr);
    let (code, output) = doctor.run_to_end().await;
    assert!(code == 1 && output.contains("ACCESS_REFUSED"), "{output}");

    set_write_permission(&world, ".*");
    inbox.next().await;
    wait_until_ready(&mut daemon).await;
}
