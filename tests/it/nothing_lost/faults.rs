//! Faults during deliveries, one mechanism for each test: connections that fall silent, messages that RabbitMQ refuses
//! by closing the channel, daemons that freeze or are replaced. The rig combines all faults.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use harness::amqp_proxy::{AmqpProxy, Method, Verdict};
use harness::consumer::Inbox;
use harness::daemon::Daemon;
use harness::eventually_within;
use harness::pg_proxy::{Fate, PgProxy};
use harness::proxy::Proxy;
use harness::servers::{Server, Servers};
use harness::world::{World, amqp_url, database_url};
use lapin::options::BasicAckOptions;
use nix::sys::signal::Signal;
use uuid::Uuid;

use crate::on_time::delivery::start_row_in_flight;
use crate::operations::health::wait_until_ready;

/// The promised time within which the daemon is on time again after the packets of a connection vanish.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);
/// PostgreSQL frees the rows of a frozen daemon after 30 s; a busy machine may take longer.
const FREED_WITHIN: Duration = Duration::from_mins(1);
/// How long an operator may look for a connection in the management API.
const LISTED_WITHIN: Duration = Duration::from_mins(1);

/// The statement that schedules a row that is due, and returns its id.
const SCHEDULE_ROW: &str = r#"SELECT tidings.schedule('message', now(), '{"routing_key": "a", "body": 1}')"#;

/// Waits for the message of this row, for as long as a silent connection may delay it.
async fn wait_for_row(inbox: &mut Inbox, id: Uuid) {
    let next = async || inbox.next_within(Duration::from_secs(1)).await;
    assert_eq!(eventually_within(SILENCE_LIMIT, "the message", next).await.id(), id);
}

/// A daemon without sweeps whose connections to PostgreSQL lead to this port, after it has delivered a row.
async fn start_through(world: &World, port: u16, inbox: &mut Inbox) -> Daemon {
    let launch = world.launch().with("TIDINGS_SWEEP_MS", 600_000);
    let daemon = launch.with("TIDINGS_DATABASE_URL", database_url(port, &world.name)).start_ready().await;
    world.sql(SCHEDULE_ROW).await;
    inbox.next().await;
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    daemon
}

#[tokio::test]
async fn silent_connections_to_postgresql_are_replaced_within_ten_seconds_without_a_sweep() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let proxy = Proxy::start(0, world.ports().0).await;
    let mut daemon = start_through(&world, proxy.port, &mut inbox).await;

    proxy.swallow_open_connections();
    let id: Uuid = world.value(SCHEDULE_ROW).await;

    wait_for_row(&mut inbox, id).await;
    daemon.wait_for_line("its packets vanish").await;
    daemon.wait_for_line("lost the connection for notifications").await;
}

#[tokio::test]
async fn a_claim_whose_answer_vanishes_keeps_its_rows_no_longer_than_ten_seconds() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let claims = AtomicUsize::new(0);
    let proxy = PgProxy::start(world.ports().0, move |statement| {
        let is_claim = statement.contains("EXECUTE tidings_claim");
        // The first claim is that of the row that shows that the daemon is ready.
        if is_claim && claims.fetch_add(1, Ordering::Relaxed) == 1 { Fate::LoseReply } else { Fate::Pass }
    })
    .await;
    let mut daemon = start_through(&world, proxy.port, &mut inbox).await;

    let id: Uuid = world.value(SCHEDULE_ROW).await;

    wait_for_row(&mut inbox, id).await;
    daemon.wait_for_line("its packets vanish").await;
    assert!(inbox.next_within(Duration::from_secs(2)).await.is_none(), "it comes once");
}

#[tokio::test]
async fn a_statement_that_is_merely_slow_is_waited_for() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let daemon = start_through(&world, world.ports().0, &mut inbox).await;
    let sleep = "'BEGIN PERFORM pg_sleep(8); RETURN NULL; END'";
    world.sql(&format!("CREATE FUNCTION be_slow() RETURNS trigger LANGUAGE plpgsql AS {sleep}")).await;
    world
        .sql("CREATE TRIGGER slow AFTER DELETE ON tidings.schedules FOR EACH STATEMENT EXECUTE FUNCTION be_slow()")
        .await;

    let id: Uuid = world.value(SCHEDULE_ROW).await;

    assert_eq!(inbox.next().await.id(), id);
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    assert!(!daemon.log().contains("WARN"), "{}", daemon.log());
}

#[tokio::test]
async fn a_server_that_stands_still_for_a_few_seconds_is_waited_for() {
    let servers = Servers::start_private_async().await;
    let world = World::on_servers(&servers, &["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let daemon = start_through(&world, world.ports().0, &mut inbox).await;
    let due_soon = SCHEDULE_ROW.replace("now()", "now() + interval '1 second'");
    let id: Uuid = world.value(&due_soon).await;

    servers.signal(Server::Postgres, Signal::SIGSTOP).expect("stopped");
    tokio::time::sleep(Duration::from_secs(6)).await;
    servers.signal(Server::Postgres, Signal::SIGCONT).expect("goes on");

    assert_eq!(inbox.next().await.id(), id);
    assert!(!daemon.log().contains("its packets vanish"), "{}", daemon.log());
}

#[tokio::test]
async fn a_silent_connection_to_rabbitmq_is_replaced_within_ten_seconds() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let proxy = Proxy::start(0, world.ports().1).await;
    let url = amqp_url(proxy.port, &world.name);
    let mut daemon = world.launch().with("TIDINGS_SWEEP_MS", 600_000).with("TIDINGS_AMQP_URL", url).start_ready().await;

    proxy.swallow_open_connections();
    let id: Uuid = world.value(SCHEDULE_ROW).await;

    wait_for_row(&mut inbox, id).await;
    daemon.wait_for_line("lost the connection to RabbitMQ").await;
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
}

/// Closes a connection of the daemon by the name that it gave itself, as an operator does.
async fn close_connection(world: &World, name: &str) {
    let named = async || {
        let list = world.manage("GET", &format!("vhosts/{}/connections", world.name), None);
        let connections = list.as_array()?.iter();
        let found =
            connections.clone().find(|connection| connection["client_properties"]["connection_name"] == name)?;
        Some(found["name"].as_str()?.replace(' ', "%20").replace('>', "%3E"))
    };
    let path = eventually_within(LISTED_WITHIN, &format!("the connection {name:?} in the list"), named).await;
    let _ = world.manage("DELETE", &format!("connections/{path}"), None);
}

#[tokio::test]
async fn each_of_the_two_connections_to_rabbitmq_may_be_closed_alone() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.launch().with("TIDINGS_SWEEP_MS", 600_000).start_ready().await;

    for name in ["tidings publishing", "tidings"] {
        close_connection(&world, name).await;
        daemon.wait_for_line("lost the connection to RabbitMQ").await;
        let id: Uuid = world.value(SCHEDULE_ROW).await;
        assert_eq!(inbox.next().await.id(), id, "after the connection {name:?} was closed");
        wait_until_ready(&mut daemon).await;
    }
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
}

#[tokio::test]
async fn a_message_that_closes_the_channel_is_parked_and_the_rest_of_its_batch_arrives() {
    let servers = Servers::start_private_async().await;
    servers.set_max_message_size(1000).expect("told");
    let world = World::on_servers(&servers, &["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    // Written before the daemon starts, so that all rows are in one batch.
    world
        .sql(
            "INSERT INTO tidings.schedules (kind, key, due_at, payload, headers)
               SELECT 'message', n, now(),
                      jsonb_build_object('routing_key', 'a', 'body', repeat('x', CASE WHEN n IN (7, 13) THEN 1001 ELSE 1 END)),
                      '{}'
               FROM generate_series(1, 40) AS n",
        )
        .await;
    let daemon = world.start_daemon().await;

    let mut ids = HashSet::new();
    while ids.len() < 38 {
        ids.insert(inbox.next().await.id());
    }
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    assert_eq!(world.value::<String>("SELECT string_agg(key, ' ' ORDER BY key) FROM tidings.parked").await, "13 7");
    let reason: String = world.value("SELECT reason FROM tidings.parked WHERE key = '7'").await;
    assert!(
        reason.starts_with("RabbitMQ closed the channel over its message") && reason.contains("larger than"),
        "{reason}"
    );
    // The channel was closed once for the whole batch, and not again.
    assert_eq!(daemon.log().matches("could not publish").count(), 1, "{}", daemon.log());
}

#[tokio::test]
async fn a_daemon_frozen_until_another_has_delivered_its_row_publishes_nothing() {
    let world = World::with_plugins(&["misbehave"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let (mut frozen, id) = start_row_in_flight(&world).await;
    frozen.signal(Signal::SIGSTOP);
    let other = world
        .launch()
        .with("TIDINGS_STATE_DIR", world.state_dir().with_extension("other").display())
        .start_ready()
        .await;

    // PostgreSQL ends the frozen daemon's session after 30 s in an idle transaction.
    let received =
        eventually_within(FREED_WITHIN, "the message", async || inbox.next_within(Duration::from_secs(1)).await).await;
    assert_eq!(received.id(), id);
    let delivered = format!("SELECT count(*) = 1 FROM tidings.deliveries WHERE id = '{id}'");
    world.wait_until(&delivered).await;

    frozen.signal(Signal::SIGCONT);
    frozen.wait_for_line("could not say whether a claim still holds").await;
    assert!(frozen.stop().await.success());
    assert!(other.stop().await.success());
    assert!(inbox.next_within(Duration::ZERO).await.is_none(), "a second copy");
    assert!(world.value::<bool>(&delivered).await);
}

#[tokio::test]
async fn replacing_daemons_one_by_one_neither_loses_nor_duplicates_messages() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let launch = |number: usize| {
        world.launch().with("TIDINGS_STATE_DIR", world.state_dir().with_extension(format!("{number}")).display())
    };
    let mut daemons: Vec<Daemon> = Vec::new();
    for number in 0..3 {
        daemons.push(launch(number).start_ready().await);
    }
    let (done, mut is_done) = tokio::sync::watch::channel(false);
    let written = tokio::spawn({
        let db = world.db.clone();
        async move {
            let mut written = HashSet::new();
            let mut pace = tokio::time::interval(Duration::from_millis(5));
            while !*is_done.borrow_and_update() {
                pace.tick().await;
                written.insert(sqlx::query_scalar::<_, Uuid>(SCHEDULE_ROW).fetch_one(&db).await.expect("written"));
            }
            written
        }
    });

    for (number, daemon) in daemons.iter_mut().enumerate() {
        daemon.signal(Signal::SIGTERM);
        assert!(daemon.wait_for_end().await.success(), "{}", daemon.log());
        *daemon = launch(number).start_ready().await;
    }
    done.send_replace(true);
    let written = written.await.expect("written");

    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    for daemon in daemons {
        assert!(daemon.stop().await.success());
    }
    let mut received = Vec::new();
    while received.len() < written.len() {
        received.push(inbox.next().await.id());
    }
    assert!(inbox.next_within(Duration::from_millis(100)).await.is_none(), "a second copy");
    assert_eq!(HashSet::from_iter(received), written);
}

#[tokio::test]
async fn while_rabbitmq_blocks_publishing_no_row_is_claimed_and_afterwards_all_rows_are_delivered() {
    let servers = Servers::start_private_async().await;
    let world = World::on_servers(&servers, &["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.launch().with("TIDINGS_SWEEP_MS", 100).start_ready().await;
    world.sql(SCHEDULE_ROW).await;
    inbox.next().await;
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;

    servers.set_memory_alarm(true).expect("an alarm");
    // RabbitMQ reports that it blocks only when a client publishes.
    let first: Uuid = world.value(SCHEDULE_ROW).await;
    daemon.wait_for_line("RabbitMQ blocks publishing").await;
    let before = resident_kib(daemon.pid());
    world
        .sql(
            "INSERT INTO tidings.schedules (kind, due_at, payload)
               SELECT 'message', now(), jsonb_build_object('routing_key', 'a', 'body', repeat('x', 10000))
               FROM generate_series(1, 5000)",
        )
        .await;
    // The batch of the first row ends without a confirm. Many sweeps follow, and none may claim a row.
    let unlocked = "SELECT count(*) = 5001 FROM (SELECT FROM tidings.schedules FOR UPDATE SKIP LOCKED) AS free";
    world.wait_until(unlocked).await;
    for _ in 0..100 {
        assert!(world.value::<bool>(unlocked).await, "something was claimed");
    }
    let grown = resident_kib(daemon.pid()).saturating_sub(before);
    assert!(grown < 16 * 1024, "{grown} KiB more");

    servers.set_memory_alarm(false).expect("no alarm");
    let mut ids = HashSet::new();
    while ids.len() < 5001 {
        let received = inbox.next().await;
        assert_eq!(received.number("tidings-attempt"), 1, "no attempt was spent");
        ids.insert(received.id());
    }
    assert!(ids.contains(&first));
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[tokio::test]
async fn a_row_whose_confirm_never_arrives_is_published_again_with_the_same_id() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let lost = AtomicUsize::new(0);
    let proxy = AmqpProxy::start(world.ports().1, move |method| match method {
        Method::Confirm if lost.fetch_add(1, Ordering::SeqCst) == 0 => Verdict::Lose,
        _ => Verdict::Pass,
    })
    .await;
    let mut daemon = world
        .launch()
        .with("TIDINGS_SWEEP_MS", 600_000)
        .with("TIDINGS_AMQP_URL", amqp_url(proxy.port, &world.name))
        .start_ready()
        .await;

    let id: Uuid = world.value(SCHEDULE_ROW).await;

    for copy in 1..=2 {
        let received = inbox.next().await;
        assert_eq!((received.id(), received.number("tidings-attempt")), (id, 1), "copy {copy}");
    }
    daemon.wait_for_line("gave up after 10 s waiting for RabbitMQ to take 1 messages").await;
    world.wait_until("SELECT count(*) = 1 FROM tidings.deliveries WHERE outcome = 'delivered'").await;
    // The confirm of the second copy was not mistaken for that of a later message.
    let next: Uuid = world.value(SCHEDULE_ROW).await;
    assert_eq!(inbox.next().await.id(), next);
}

#[tokio::test]
async fn a_daemon_that_stands_still_in_a_backlog_causes_no_more_second_copies_than_its_lanes_had_claimed() {
    const ROWS: usize = 6_000;
    // Three lanes with 500 rows each.
    const MOST_TWICE: usize = 1_500;
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let first = world.start_daemon().await;
    let other = world.launch().with("TIDINGS_STATE_DIR", world.state_dir().with_extension("other").display());
    let _other = other.start_ready().await;
    world
        .sql(&format!(
            r#"INSERT INTO tidings.schedules (kind, due_at, payload)
               SELECT 'message', now(), '{{"routing_key": "a", "body": 1}}' FROM generate_series(1, {ROWS})"#
        ))
        .await;
    world.wait_until("SELECT count(*) > 500 FROM tidings.deliveries").await;
    first.signal(Signal::SIGSTOP);

    let mut ids = HashSet::new();
    let mut copies = 0;
    let all = async || {
        let received = inbox.next_within(Duration::from_secs(1)).await?;
        received.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
        copies += usize::from(!ids.insert(received.id()));
        (ids.len() == ROWS).then_some(())
    };
    eventually_within(2 * FREED_WITHIN, "all messages", all).await;
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    first.signal(Signal::SIGCONT);
    while let Some(received) = inbox.next_within(Duration::from_secs(2)).await {
        received.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
        copies += 1;
    }

    println!("{copies} second copies");
    assert!(copies <= MOST_TWICE, "{copies} second copies");
}
