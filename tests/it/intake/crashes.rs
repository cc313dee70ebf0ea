//! No message is lost or doubled while the daemon, PostgreSQL or RabbitMQ is killed or away.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::StreamExt as _;
use harness::amqp_proxy::{AmqpProxy, Method, Verdict};
use harness::proxy::{Mode, Proxy};
use harness::servers::{Server, Servers};
use harness::world::{World, amqp_url, database_url};
use harness::{eventually, eventually_within};
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use nix::sys::signal::Signal;
use tokio::sync::mpsc;

use crate::intake::{FROM, Publisher, QUEUE, headers, inbox, launch, start};

/// Starts a daemon whose acknowledgements of messages never reach RabbitMQ, and kills it when it has sent one.
async fn kill_before_the_acknowledgement(world: &World) {
    let (reached, mut at) = mpsc::unbounded_channel();
    let (_, port) = world.ports();
    let proxy = AmqpProxy::start(port, move |method| match method {
        Method::Ack => {
            let _ = reached.send(());
            Verdict::Hang
        }
        _ => Verdict::Pass,
    })
    .await;
    let mut daemon = launch(world).with("TIDINGS_AMQP_URL", amqp_url(proxy.port, &world.name)).start_ready().await;
    at.recv().await.expect("an acknowledgement");
    daemon.signal(Signal::SIGKILL);
    daemon.wait_for_end().await;
}

/// What RabbitMQ says of the intake's queue.
fn queue(world: &World) -> serde_json::Value {
    world.manage("GET", &format!("queues/{}/{QUEUE}", world.name), None)
}

async fn wait_until_empty(world: &World) {
    eventually_within(Duration::from_secs(30), "an empty queue", async || {
        (queue(world)["messages"] == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_message_whose_acknowledgement_was_lost_finds_its_pending_row() {
    let world = World::empty().await;
    launch(&world).start_ready().await.stop().await;
    let properties = headers([("x-delay", AMQPValue::LongInt(600_000))]).with_message_id("a".into());
    Publisher::new(&world).await.publish("k", properties, b"a").await;
    kill_before_the_acknowledgement(&world).await;
    let rows = "SELECT array_agg(id || ' ' || due_at) FROM tidings.schedules";
    let before: Vec<String> = world.value(rows).await;
    assert_eq!(before.len(), 1);
    let _daemon = start(&world).await;
    wait_until_empty(&world).await;
    assert_eq!(world.value::<Vec<String>>(rows).await, before);
}

#[tokio::test]
async fn a_message_whose_acknowledgement_was_lost_finds_its_row_in_the_history() {
    let world = World::empty().await;
    launch(&world).start_ready().await.stop().await;
    let mut inbox = inbox(&world).await;
    let publisher = Publisher::new(&world).await;
    publisher.publish("k", BasicProperties::default().with_message_id("a".into()), b"a").await;
    kill_before_the_acknowledgement(&world).await;
    // Without an intake, so that the message stays in its queue.
    let daemon = world.start_daemon().await;
    daemon.stop().await;
    let daemon = start(&world).await;
    assert_eq!(inbox.next().await.text(), "a");
    wait_until_empty(&world).await;
    publisher.publish("k", BasicProperties::default(), b"last").await;
    assert_eq!(inbox.next().await.text(), "last");
    daemon.stop().await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.deliveries WHERE key = 'a'").await, 1);
}

#[tokio::test]
async fn a_message_that_a_consumer_publishes_again_with_its_id_is_a_new_message() {
    let world = World::empty().await;
    let _daemon = start(&world).await;
    let mut inbox = inbox(&world).await;
    let publisher = Publisher::new(&world).await;
    publisher.publish("k", BasicProperties::default().with_message_id("a".into()), b"a").await;
    for _ in 0..3 {
        let received = inbox.next().await;
        world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
        let mut own = received.properties().headers().clone().expect("headers");
        own.insert("x-delay".into(), AMQPValue::LongInt(100));
        publisher.publish("k", received.properties().clone().with_headers(own), b"a").await;
    }
    inbox.next().await;
}

#[tokio::test]
async fn while_postgresql_is_away_messages_stay_in_their_queue_and_a_delay_counts_from_when_they_were_published() {
    let world = World::empty().await;
    let proxy = Proxy::start(0, world.ports().0).await;
    let mut daemon =
        launch(&world).with("TIDINGS_DATABASE_URL", database_url(proxy.port, &world.name)).start_ready().await;
    let publisher = Publisher::new(&world).await;
    let mut inbox = inbox(&world).await;
    proxy.set(Mode::Cut);
    // The first batch fails, and its messages go back.
    publisher.publish("k", BasicProperties::default().with_message_id("first".into()), b"first").await;
    daemon.wait_for_line("an intake takes no messages, trying again").await;
    let addr = daemon.http_addr().await;
    let answer = ureq::get(format!("http://{addr}/readyz")).config().http_status_as_error(false).build().call();
    let reasons = answer.expect("an answer").body_mut().read_to_string().expect("text");
    assert!(reasons.contains("the intake orders.delayed takes no messages, and they wait in its queue"), "{reasons}");
    let hour_ago: i64 = world.value("SELECT floor(extract(epoch FROM now() - interval '1 hour'))::bigint").await;
    let published = |id: &str| {
        let delay = headers([("x-delay", AMQPValue::LongInt(3_000_000))]);
        delay.with_message_id(id.into()).with_timestamp(u64::try_from(hour_ago).expect("positive"))
    };
    publisher.publish("k", published("waited"), b"waited").await;
    proxy.set(Mode::Pass);
    assert_eq!(inbox.next().await.text(), "first");
    // It was due ten minutes ago.
    assert_eq!(inbox.next().await.text(), "waited");
    wait_until_empty(&world).await;
    // The publisher's clock is an hour behind: what did not wait is not due earlier for that.
    publisher.publish("k", published("fresh"), b"fresh").await;
    world.wait_until("SELECT EXISTS (SELECT FROM tidings.schedules WHERE key = 'fresh' AND due_at > now() + interval '49 minutes')").await;
}

#[tokio::test]
async fn what_expires_in_the_queue_while_no_daemon_takes_it_is_counted() {
    let world = World::empty().await;
    launch(&world).start_ready().await.stop().await;
    let publisher = Publisher::new(&world).await;
    publisher.publish("k", BasicProperties::default().with_expiration("1".into()), b"a").await;
    eventually("it is a dead letter", async || {
        let dead = world.manage("GET", &format!("queues/{}/tidings.dead", world.name), None);
        (dead["messages"] == 1).then_some(())
    })
    .await;
    world.sql("DELETE FROM tidings.passes").await;
    let mut daemon = start(&world).await;
    daemon.wait_for_line("took back dead letters replayed=0 expired=1").await;
}

#[tokio::test]
async fn large_bodies_wait_in_rabbitmq_and_not_in_the_memory_of_the_daemon() {
    let world = World::empty().await;
    launch(&world).start_ready().await.stop().await;
    let publisher = Publisher::new(&world).await;
    let body = vec![0xff; 1024 * 1024];
    for number in 0..150 {
        let properties =
            headers([("x-delay", AMQPValue::LongInt(6_000_000))]).with_message_id(number.to_string().into());
        publisher.publish("k", properties, &body).await;
    }
    let daemon = start(&world).await;
    eventually_within(Duration::from_mins(4), "all rows", async || {
        world.value::<bool>("SELECT count(*) = 150 FROM tidings.schedules").await.then_some(())
    })
    .await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a size");
    let peak: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    assert!(peak < 256 * 1024, "{} MiB", peak / 1024);
    world.remove().await;
}

/// Receives from the queue at `url` and sends the id, the due time in the body and the time of arrival of each message; connects
/// again when the connection is lost.
async fn receive(url: String, received: mpsc::UnboundedSender<(String, i64, i64)>) {
    loop {
        let consumed = async {
            let connection = Connection::connect(&url, ConnectionProperties::default()).await?;
            let channel = connection.create_channel().await?;
            let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
            let mut consumer = channel.basic_consume("inbox".into(), "".into(), options, arguments).await?;
            while let Some(delivery) = consumer.next().await {
                let delivery = delivery?;
                let now = time::OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000;
                let due = str::from_utf8(&delivery.data).expect("a text").parse().expect("a due time");
                let id = delivery.properties.message_id().as_ref().expect("an id").to_string();
                let _ = received.send((id, due, i64::try_from(now).expect("it fits")));
                delivery.ack(BasicAckOptions::default()).await?;
            }
            Ok::<(), lapin::Error>(())
        };
        let _ = consumed.await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Publishes a message to the intake, and returns whether RabbitMQ has confirmed it.
async fn try_publish(channel: &mut Option<Channel>, url: &str, properties: BasicProperties, body: &[u8]) -> bool {
    let publish = async {
        if channel.is_none() {
            let connection = Connection::connect(url, ConnectionProperties::default()).await?;
            let opened = connection.create_channel().await?;
            opened.confirm_select(ConfirmSelectOptions::default()).await?;
            *channel = Some(opened);
        }
        let open = channel.as_ref().expect("it is open");
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        open.basic_publish(FROM.into(), "k".into(), options, body, properties).await?.await
    };
    let confirmed = tokio::time::timeout(Duration::from_secs(5), publish).await;
    let confirmed = matches!(confirmed, Ok(Ok(Confirmation::Ack(None))));
    if !confirmed {
        *channel = None;
    }
    confirmed
}

/// A number from the environment, for a longer run than in the suite.
fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_with_random_delays_come_once_or_with_one_id_while_servers_and_daemons_are_killed() {
    let (count, seconds) = (number("HARNESS_MESSAGES", 1_500), number("HARNESS_SECONDS", 20));
    let mut servers = Servers::start_private_async().await;
    let world = World::on_servers(&servers, &[]).await;
    let mut daemons = [start(&world).await, start(&world).await];
    // Declares the queue.
    drop(inbox(&world).await);
    let url = amqp_url(world.ports().1, &world.name);
    let (arrived, mut arrivals) = mpsc::unbounded_channel();
    let consumer = tokio::spawn(receive(url.clone(), arrived));
    // Publishes until each message is confirmed, again with the same id if need be.
    let publisher = tokio::spawn(async move {
        let mut channel = None;
        for number in 0..count {
            let now = time::OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000;
            let due = i64::try_from(now).expect("it fits") + fastrand::i64(0..10_000);
            let properties = || {
                headers([("tidings-due-ms", AMQPValue::LongLongInt(due))])
                    .with_message_id(format!("m{number}").into())
                    .with_delivery_mode(2)
            };
            while !try_publish(&mut channel, &url, properties(), due.to_string().as_bytes()).await {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    });
    let until = tokio::time::Instant::now() + Duration::from_secs(seconds);
    while tokio::time::Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(200..1_500))).await;
        let restart = |server| {
            tokio::task::block_in_place(|| servers.restart(server, Signal::SIGKILL)).expect("it starts again");
        };
        let mut restart = restart;
        match fastrand::u8(0..10) {
            0 => restart(Server::Postgres),
            1 => restart(Server::RabbitMq),
            _ => {
                let victim = fastrand::usize(..daemons.len());
                daemons[victim].signal(Signal::SIGKILL);
                daemons[victim].wait_for_end().await;
                daemons[victim] = launch(&world).start();
            }
        }
    }
    publisher.await.expect("all are confirmed");
    let (mut copies, mut early) = (BTreeMap::<String, u32>::new(), 0);
    while copies.len() < usize::try_from(count).expect("it fits") {
        let arrival = tokio::time::timeout(Duration::from_mins(1), arrivals.recv()).await;
        let Ok(Some((id, due, at))) = arrival else { panic!("{} of {count} messages came", copies.len()) };
        early += u32::from(at < due);
        *copies.entry(id).or_default() += 1;
    }
    consumer.abort();
    assert_eq!(early, 0);
    let twice = copies.values().filter(|copies| **copies > 1).count();
    println!("{count} messages, of which {twice} came more than once");
    assert!(twice < copies.len() / 4, "{twice} of {count} came more than once");
}
