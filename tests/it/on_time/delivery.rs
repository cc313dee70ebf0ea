//! From a due row to a confirmed message: the properties of the message, and the moment at which it is published.

use harness::daemon::Daemon;
use harness::world::World;
use uuid::Uuid;

/// The query for the number of rows that were finished after the row with the key `late`.
const FINISHED_AFTER_THE_LATE_ONE: &str = "SELECT count(*) FROM tidings.deliveries AS one, tidings.deliveries AS late
     WHERE late.key = 'late' AND one.finished_at > late.finished_at";

/// Starts a daemon that has claimed the row with the key `echo` and not published it yet, because another row of the
/// batch runs until its CPU limit. Both are of the plugin `misbehave`. Returns the daemon and the id of the row `echo`.
pub(crate) async fn start_row_in_flight(world: &World) -> (Daemon, Uuid) {
    std::fs::write(world.plugin_dir.join("misbehave.toml"), "[limits]\ncpu-ms = 1000\nwall-ms = 5000\n")
        .expect("written");
    let daemon = world.start_daemon().await;
    world
        .sql("INSERT INTO tidings.schedules (kind, key, due_at) SELECT kind, kind, now() FROM unnest('{echo,spin}'::text[]) AS kind")
        .await;
    let id = world.value("SELECT id FROM tidings.schedules WHERE key = 'echo'").await;
    world.wait_until("SELECT count(*) = 0 FROM (SELECT FROM tidings.schedules WHERE key = 'echo' FOR UPDATE SKIP LOCKED) AS free").await;
    (daemon, id)
}

#[tokio::test]
async fn an_overdue_row_becomes_exactly_one_message_with_the_properties_of_the_contract() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    let id: Uuid = world
        .value(
            r#"SELECT tidings.schedule('message', now() - interval '1 minute', '{"routing_key":"a.b","body":{"n":1}}',
                key => 'k', subject => 's', headers => '{"traceparent":"00-ab-cd-01"}')"#,
        )
        .await;

    let received = inbox.next().await;

    assert_eq!(received.id(), id);
    let properties = received.properties();
    let text = |value: &Option<lapin::types::ShortString>| value.as_ref().map(ToString::to_string);
    assert_eq!(received.delivery.exchange.as_str(), "tidings");
    assert_eq!(received.delivery.routing_key.as_str(), "a.b");
    assert_eq!(text(properties.kind()).as_deref(), Some("message"));
    assert_eq!(text(properties.app_id()).as_deref(), Some("tidings"));
    assert_eq!(text(properties.content_type()).as_deref(), Some("application/json"));
    assert_eq!(text(properties.expiration()), None, "no deadline, no expiration");
    assert_eq!(*properties.delivery_mode(), Some(2));
    let timestamp = properties.timestamp().expect("a timestamp");
    assert!((received.at_ms / 1000 - i64::try_from(timestamp).expect("seconds")).abs() <= 5);
    assert_eq!(received.text(), r#"{"n": 1}"#);

    world.wait_until("SELECT count(*) = 1 FROM tidings.deliveries WHERE outcome = 'delivered'").await;
    let headers = received.headers();
    let plugin = headers["tidings-plugin"].clone();
    let due_ms: i64 =
        world.value("SELECT floor(extract(epoch FROM due_at) * 1000)::bigint FROM tidings.deliveries").await;
    assert!(plugin.starts_with("message@0.1.0+") && plugin.len() == "message@0.1.0+".len() + 8, "{plugin}");
    let expected = [
        ("tidings-kind", "message"),
        ("tidings-key", "k"),
        ("tidings-subject", "s"),
        ("tidings-due-ms", &due_ms.to_string()),
        ("tidings-attempt", "1"),
        ("tidings-replay", "0"),
        ("tidings-plugin", &plugin),
        ("tidings-exchange", "tidings"),
        ("tidings-routing-key", "a.b"),
        ("traceparent", "00-ab-cd-01"),
    ];
    assert_eq!(headers, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());

    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules").await, 0);
}

#[tokio::test]
async fn a_row_due_soon_is_published_when_it_is_due_and_never_before() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    for after_ms in [1_500, 400, 900] {
        world
            .sql(&format!(
                r#"SELECT tidings.schedule('message', clock_timestamp() + interval '{after_ms} ms', '{{"routing_key":"a","body":{after_ms}}}')"#
            ))
            .await;
    }

    let mut order = Vec::new();
    for _ in 0..3 {
        let received = inbox.next().await;
        assert!(received.at_ms >= received.number("tidings-due-ms"), "published before it was due");
        order.push(received.text().to_owned());
    }

    assert_eq!(order, ["400", "900", "1500"]);
    world.wait_until("SELECT count(*) = 3 FROM tidings.deliveries WHERE finished_at >= due_at").await;
}

#[tokio::test]
async fn rows_that_fell_due_without_a_daemon_are_published_when_one_starts_and_later_rows_wait() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world
        .sql(
            r#"INSERT INTO tidings.schedules (kind, due_at, payload)
               SELECT 'message', now() + due, '{"routing_key":"a","body":1}'
               FROM unnest('{-3 days, -5 min, -1 s, 10 min, 2 hours}'::interval[]) AS due"#,
        )
        .await;

    let _daemon = world.start_daemon().await;

    for _ in 0..3 {
        inbox.next().await;
    }
    world.wait_until("SELECT count(*) = 3 FROM tidings.deliveries").await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules WHERE attempts = 0").await, 2);
}

#[tokio::test]
async fn two_daemons_deliver_ten_thousand_due_rows_without_a_duplicate() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world
        .sql(
            "INSERT INTO tidings.schedules (kind, due_at, payload)
             SELECT 'message', now(), jsonb_build_object('routing_key', 'a', 'body', n) FROM generate_series(1, 10000) AS n",
        )
        .await;

    let (_one, _other) = (world.start_daemon().await, world.start_daemon().await);

    let mut ids = std::collections::HashSet::new();
    for _ in 0..10_000 {
        assert!(ids.insert(inbox.next().await.id()), "a duplicate");
    }
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    assert_eq!(world.value::<i64>("SELECT count(DISTINCT id) FROM tidings.deliveries").await, 10_000);
}

#[tokio::test]
async fn a_row_due_right_after_a_spike_is_delivered_before_the_spike_has_ended() {
    let world = World::with_plugins(&["message"]).await;
    let _inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    let payload = "jsonb_build_object('routing_key', 'a', 'body', n)";
    world
        .sql(&format!(
            "INSERT INTO tidings.schedules (kind, due_at, payload, key)
             SELECT 'message', now() + interval '6 s', {payload}, NULL FROM generate_series(1, 20000) AS n
             UNION ALL SELECT 'message', now() + interval '6005 ms', {payload}, 'late' FROM generate_series(0, 0) AS n"
        ))
        .await;

    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;

    let after: i64 = world.value(FINISHED_AFTER_THE_LATE_ONE).await;
    assert!(after > 10_000, "{after} of 20000 rows of the spike went out after it");
}

#[tokio::test]
async fn a_row_that_becomes_due_during_a_spike_is_delivered_before_the_spike_has_ended() {
    let world = World::with_plugins(&["message"]).await;
    let _inbox = world.inbox(&["#"]).await;
    world
        .sql(
            "INSERT INTO tidings.schedules (kind, due_at, payload)
             SELECT 'message', now(), jsonb_build_object('routing_key', 'a', 'body', n) FROM generate_series(1, 20000) AS n",
        )
        .await;
    let _daemon = world.start_daemon().await;
    world.wait_until("SELECT count(*) >= 1000 FROM tidings.deliveries").await;

    let left: i64 = world.value("SELECT count(*) FROM tidings.schedules").await;
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key":"a","body":0}', key => 'late')"#).await;

    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    let after: i64 = world.value(FINISHED_AFTER_THE_LATE_ONE).await;
    assert!(left > 10_000, "{left} rows were left when it came: the spike was no spike");
    assert!(after > left / 2, "{after} of {left} rows of the spike went out after it");
}

#[tokio::test]
async fn the_expiration_is_the_smaller_of_the_rows_deadline_and_the_events_time_to_live() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    for (expires_at, ttl_ms, expected_ms) in [
        ("now() + interval '1 hour'", "null", 3_600_000),
        ("now() + interval '1 hour'", "60000", 60_000),
        ("now() + interval '1 minute'", "3600000", 60_000),
        ("null", "60000", 60_000),
        ("null", "18446744073709551615", 315_360_000_000),
        ("'9999-12-31'", "null", 315_360_000_000),
    ] {
        world
            .sql(&format!(
                r#"SELECT tidings.schedule('message', now(), '{{"routing_key":"a","body":1,"ttl_ms":{ttl_ms}}}', expires_at => {expires_at})"#
            ))
            .await;

        let received = inbox.next().await;

        let expiration = received.properties().expiration().as_ref().expect("an expiration").to_string();
        let expiration: i64 = expiration.parse().expect("an integer");
        assert!((expected_ms - 20_000..=expected_ms).contains(&expiration), "{expires_at} {ttl_ms}: {expiration}");
        // The header has the true deadline, even if `expiration` is clamped.
        let left = received.number("tidings-expires-ms") - received.at_ms;
        assert!((left.min(315_360_000_000) - expiration).abs() < 20_000, "{left} {expiration}");
    }
}

#[tokio::test]
async fn a_row_past_its_deadline_is_finished_as_expired_and_never_published() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    let payload = |body: &str, ttl: &str| format!(r#"{{"routing_key":"a","body":"{body}"{ttl}}}"#);
    for (body, ttl, expires_at) in
        [("row", "", "now() - interval '1 ms'"), ("event", r#","ttl_ms":0"#, "null"), ("seen", "", "null")]
    {
        world
            .sql(&format!(
                "SELECT tidings.schedule('message', now() - interval '1 hour', '{}', key => '{body}', expires_at => {expires_at})",
                payload(body, ttl)
            ))
            .await;
    }

    assert_eq!(inbox.next().await.text(), "seen");
    world.wait_until("SELECT count(*) = 3 FROM tidings.deliveries").await;
    let expired: Vec<String> =
        world.value("SELECT array_agg(key ORDER BY key) FROM tidings.deliveries WHERE outcome = 'expired'").await;
    assert_eq!(expired, ["event", "row"]);
    let asked: bool = world.value("SELECT plugin IS NOT NULL FROM tidings.deliveries WHERE key = 'row'").await;
    assert!(!asked, "a row past its deadline is finished without its plugin");
}

#[tokio::test]
async fn a_row_whose_message_no_queue_takes_spends_no_attempt_and_is_delivered_when_a_queue_is_bound() {
    let world = World::with_plugins(&["message"]).await;
    let _elsewhere = world.inbox(&["elsewhere"]).await;
    let mut daemon = world.start_daemon().await;
    let id: Uuid =
        world.value(r#"SELECT tidings.schedule('message', now(), '{"routing_key":"nowhere","body":1}')"#).await;

    world.wait_until("SELECT refusals > 0 FROM tidings.schedules").await;
    daemon.wait_for_line("RabbitMQ did not take").await;
    let error: String = world.value("SELECT last_error FROM tidings.schedules WHERE attempts = 0").await;
    assert!(error.contains("nowhere") && error.contains("NO_ROUTE"), "{error}");

    let mut inbox = world.inbox(&["nowhere"]).await;
    let received = inbox.next().await;
    assert_eq!((received.id(), received.number("tidings-attempt")), (id, 1));
}

#[tokio::test]
async fn a_returned_message_does_not_affect_the_rest_of_its_batch() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["somewhere"]).await;
    world
        .sql(
            "INSERT INTO tidings.schedules (kind, due_at, payload)
             SELECT 'message', now(), jsonb_build_object('routing_key', CASE WHEN n % 7 = 0 THEN 'nowhere' ELSE 'somewhere' END, 'body', n)
             FROM generate_series(1, 350) AS n",
        )
        .await;

    let _daemon = world.start_daemon().await;

    for _ in 0..300 {
        assert_ne!(inbox.next().await.text().parse::<u32>().expect("a number") % 7, 0);
    }
    world.wait_until("SELECT count(*) = 300 FROM tidings.deliveries").await;
    world.wait_until("SELECT count(*) = 50 AND bool_and(refusals > 0 AND attempts = 0) FROM tidings.schedules").await;
}

#[tokio::test]
async fn a_row_whose_message_a_full_queue_refuses_is_delivered_when_the_queue_has_room() {
    use lapin::types::{AMQPValue, FieldTable};
    let world = World::with_plugins(&["message"]).await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    let mut inbox = world.broker.inbox("tidings", "small", &["a"], arguments).await;
    // The consumer prefetches one message, so that another one fills the queue.
    inbox.channel.basic_qos(1, lapin::options::BasicQosOptions { global: true }).await.expect("one at a time");
    let _daemon = world.start_daemon().await;
    for _ in 0..4 {
        world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key":"a","body":1}')"#).await;
    }

    world
        .wait_until(
            "SELECT count(*) > 0 AND bool_and(last_error LIKE '%nack%') FROM tidings.schedules WHERE refusals > 0",
        )
        .await;
    for _ in 0..4 {
        inbox.next().await;
    }
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
}

#[tokio::test]
async fn a_deleted_exchange_is_declared_again_and_rows_wait_until_a_queue_is_bound() {
    let world = World::with_plugins(&["message"]).await;
    let mut daemon = world.start_daemon().await;
    let channel = world.broker.channel().await;
    channel.exchange_delete("tidings".into(), lapin::options::ExchangeDeleteOptions::default()).await.expect("deleted");
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key":"a","body":1}')"#).await;

    // Either the publisher or the periodic check of the exchanges and queues notices the loss.
    daemon.wait_for_line("the exchange tidings was gone").await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules WHERE attempts = 0").await, 1);
    // A passive declaration only checks that the exchange exists.
    let passive = lapin::options::ExchangeDeclareOptions { passive: true, ..Default::default() };
    let channel = world.broker.channel().await;
    let kind = lapin::ExchangeKind::Topic;
    channel
        .exchange_declare("tidings".into(), kind, passive, lapin::types::FieldTable::default())
        .await
        .expect("it is there");

    world.inbox(&["a"]).await.next().await;
}

#[tokio::test]
async fn cancel_and_reschedule_wait_for_a_claim_and_return_false_for_a_delivered_row() {
    let world = World::with_plugins(&["misbehave"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _in_flight = start_row_in_flight(&world).await;

    let (cancelled, moved) = (
        world.value::<bool>("SELECT tidings.cancel('echo', 'echo')").await,
        world.value::<bool>("SELECT tidings.reschedule('echo', 'echo', now() + interval '1 day')").await,
    );

    assert!(!cancelled && !moved, "the row was on its way");
    inbox.next().await;
}

#[tokio::test]
async fn a_row_whose_claim_loses_its_connection_is_delivered_with_the_same_id() {
    let world = World::with_plugins(&["misbehave"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let (_daemon, id) = start_row_in_flight(&world).await;

    world
        .sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'tidings' AND xact_start IS NOT NULL")
        .await;

    assert_eq!(inbox.next().await.id(), id);
    world.wait_until("SELECT count(*) = 1 FROM tidings.deliveries WHERE key = 'echo'").await;
}

#[tokio::test]
async fn a_batch_that_cannot_be_settled_is_retried_ever_less_often_until_it_succeeds() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.start_daemon().await;
    world.sql("ALTER TABLE tidings.deliveries ADD CONSTRAINT full_disk CHECK (false) NOT VALID").await;
    let id: Uuid = world.value(r#"SELECT tidings.schedule('message', now(), '{"routing_key":"a","body":1}')"#).await;
    assert_eq!(inbox.next().await.id(), id);

    let tried = async |times: i32| {
        harness::eventually("another try", async || {
            // Notifications must not make the daemon retry more often.
            world.sql("NOTIFY tidings").await;
            world.value::<bool>(&format!("SELECT refusals >= {times} FROM tidings.schedules")).await.then_some(())
        })
        .await;
    };
    tried(1).await;
    let began = std::time::Instant::now();
    tried(3).await;
    // The pauses are 1 s and 2 s, each at most a fifth shorter.
    assert!(began.elapsed().as_millis() > 2_000, "twice in {:?}", began.elapsed());
    daemon.wait_for_line("PostgreSQL refuses to finish rows").await;

    world.sql("ALTER TABLE tidings.deliveries DROP CONSTRAINT full_disk").await;
    world.wait_until("SELECT count(*) = 1 FROM tidings.deliveries").await;
    assert!(inbox.next_within(std::time::Duration::ZERO).await.is_none(), "it was sent a second time");
}
