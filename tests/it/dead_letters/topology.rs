//! What is the daemon's own in RabbitMQ: it is what it ought to be whatever the virtual host's defaults are, it is there
//! again when somebody has taken it away, and a user who may declare nothing uses what others have declared.

use std::time::Duration;

use harness::amqp_proxy::{AmqpProxy, Method, Verdict};
use harness::daemon::{Daemon, Launch};
use harness::world::{World, amqp_url};
use harness::{eventually, eventually_within};
use lapin::BasicProperties;
use lapin::options::{ExchangeDeclareOptions, ExchangeDeleteOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};

use crate::dead_letters::replay::{often, once, publish, reject, send, until_waiting, waiting};
use crate::operations::health::ask;
use crate::operations::process::free_port;

/// What the issue gives for a loss.
const SOON: Duration = Duration::from_secs(10);

/// Waits until a daemon that is ready notes something with all of `parts`.
async fn until_noted(daemon: &mut Daemon, parts: &[&str]) {
    eventually(&format!("a note of {parts:?}"), async || {
        let (status, body) = ask(daemon, "/readyz").await;
        let notes = body["notes"].to_string();
        (status == 200 && parts.iter().all(|part| notes.contains(part))).then_some(())
    })
    .await;
}

/// A queue as the management API describes it.
fn queue(world: &World, name: &str) -> Value {
    world.manage("GET", &format!("queues/{}/{name}", world.name), None)
}

/// Whether the queue for dead letters is bound.
fn is_bound(world: &World) -> bool {
    let path = format!("bindings/{}/e/tidings.dlx/q/tidings.dead", world.name);
    world.manage("GET", &path, None).as_array().is_some_and(|bindings| !bindings.is_empty())
}

/// The doctor of a world without a daemon.
fn doctor(world: &World) -> Launch {
    world.launch().subcommand("doctor").with("TIDINGS_HTTP_ADDR", format!("127.0.0.1:{}", free_port()))
}

/// Letters that nothing but a pass or a person moves.
async fn letters(world: &World, count: u32) {
    for number in 0..count {
        let properties = BasicProperties::default().with_message_id(format!("letter {number}").into());
        publish(world, "", "tidings.dead", b"lost", properties).await;
    }
    until_waiting(world, "tidings.dead", count).await;
}

/// What a daemon of before made in such a virtual host.
async fn declared_without_a_type(world: &World, name: &str) {
    let channel = world.broker.channel().await;
    let declared = channel.queue_declare(name.into(), QueueDeclareOptions::durable(), FieldTable::default()).await;
    declared.expect("declared");
}

/// A hundred lists, and fifty passes that are cut off with all letters in their hands.
async fn letters_survive_looks_and_broken_passes(queue_type: &str) {
    let world = World::of_quorum_queues().await;
    let with_type = |launch: Launch| launch.with("TIDINGS_QUEUE_TYPE", queue_type);
    assert!(with_type(once(&world)).ready().await.stop().await.success());
    for name in ["tidings.dead", "tidings.parking"] {
        let queue = queue(&world, name);
        assert_eq!(queue["type"], queue_type, "{queue}");
        let limit = (queue_type == "quorum").then_some(i32::MAX);
        assert_eq!(queue["arguments"]["x-delivery-limit"], json!(limit), "{queue}");
    }
    letters(&world, 3).await;

    let list = with_type(world.launch()).subcommand("dead").args(["list"]);
    for _ in 0..100 {
        let (code, output) = list.finished().await;
        assert!(code == 0 && output.contains("3 of 3 dead letters"), "{output}");
    }
    let proxy = AmqpProxy::start(world.ports().1, |method| match method {
        // The letters have no queue to go back to: a pass parks them.
        Method::Publish => Verdict::Cut,
        _ => Verdict::Pass,
    })
    .await;
    let behind = with_type(often(&world)).with("TIDINGS_AMQP_URL", amqp_url(proxy.port, &world.name));
    crate::dead_letters::replay::pass_at_start(&world).await;
    let daemon = behind.ready().await;
    eventually_within(Duration::from_mins(5), "fifty passes", async || {
        (daemon.log().matches("a pass over the dead letters broke off").count() >= 50).then_some(())
    })
    .await;
    assert!(daemon.stop().await.success());

    until_waiting(&world, "tidings.dead", 3).await;
}

#[tokio::test]
async fn a_hundred_lists_and_fifty_broken_passes_leave_every_letter_where_quorum_queues_are_the_default() {
    letters_survive_looks_and_broken_passes("classic").await;
}

#[tokio::test]
async fn a_hundred_lists_and_fifty_broken_passes_leave_every_letter_in_quorum_queues() {
    letters_survive_looks_and_broken_passes("quorum").await;
}

#[tokio::test]
async fn a_queue_of_another_type_that_holds_letters_is_told_with_the_way_out_and_never_looked_at() {
    let world = World::of_quorum_queues().await;
    world.install("message");
    declared_without_a_type(&world, "tidings.dead").await;
    letters(&world, 3).await;

    let way_out = ["the queue tidings.dead", "x-queue-type", "tidings dead replay", "delete it"];
    let (code, output) = world.launch().finished().await;
    assert!(code == 1 && way_out.iter().all(|part| output.contains(part)), "{code} {output}");
    let (code, output) = doctor(&world).finished().await;
    assert!(code == 1 && way_out.iter().all(|part| output.contains(part)), "{code} {output}");
    for arguments in [&["dead", "list"][..], &["dead", "replay", "--dry-run"]] {
        for _ in 0..2 {
            let (code, output) = world.tidings(arguments).await;
            assert!(code == 1 && way_out.iter().all(|part| output.contains(part)), "{code} {output}");
        }
    }
    until_waiting(&world, "tidings.dead", 3).await;
    let channel = world.broker.channel().await;
    let first = channel.basic_get("tidings.dead".into(), lapin::options::BasicGetOptions::default()).await;
    let first = first.expect("it exists").expect("a letter");
    let came_back = first.properties.headers().as_ref().and_then(|headers| headers.inner().get("x-delivery-count"));
    assert!(matches!(came_back, None | Some(AMQPValue::LongLongInt(0))), "{came_back:?}");
    drop(channel);
}

#[tokio::test]
async fn a_classic_queue_of_a_release_before_is_what_is_asked_for_whatever_the_default_is() {
    let world = World::with(&["message"]).await;
    declared_without_a_type(&world, "tidings.dead").await;
    declared_without_a_type(&world, "tidings.parking").await;
    let mut inbox = world.inbox(&["k"]).await;

    let _daemon = often(&world).ready().await;

    send(&world, r#"{"routing_key": "k", "body": 1}"#).await;
    reject(&mut inbox).await;
    assert_eq!(inbox.next().await.number("tidings-replay"), 1);
}

#[tokio::test]
async fn a_limit_on_returns_by_a_policy_is_told_by_the_daemon_and_the_doctor_with_the_way_out() {
    let world = World::with(&["message"]).await;
    let policy = json!({ "pattern": ".*", "apply-to": "queues", "definition": { "delivery-limit": 5 } });
    let _ = world.manage("PUT", &format!("policies/{}/short", world.name), Some(&policy));
    let with = |launch: Launch| {
        launch.with("TIDINGS_QUEUE_TYPE", "quorum").with("TIDINGS_MANAGEMENT_URL", world.management_url())
    };
    let mut daemon = with(world.launch()).ready().await;

    let parts =
        ["the queue tidings.dead", "the queue tidings.parking", "come back 5 times", "policy short", "delivery-limit"];
    for part in parts {
        daemon.wait_longer_for_line(part).await;
    }
    until_noted(&mut daemon, &parts).await;
    let (code, output) = with(doctor(&world)).finished().await;
    assert!(code == 0 && parts.iter().all(|part| output.contains(part)), "{output}");
}

#[tokio::test]
async fn what_is_its_own_is_declared_and_bound_again_within_ten_seconds_and_the_loss_is_told() {
    let world = World::with(&["message"]).await;
    let mut daemon = once(&world).ready().await;
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    for (queue, told) in [("tidings.dead", "consumers rejected"), ("tidings.parking", "the letters that lay in it")] {
        let channel = world.broker.channel().await;
        channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.expect("deleted");
        eventually_within(SOON, queue, async || {
            let channel = world.broker.channel().await;
            channel.queue_declare(queue.into(), passive, FieldTable::default()).await.ok()
        })
        .await;
        let line = daemon.wait_for_line(&format!("the queue {queue} was gone for up to ")).await;
        assert!(line.contains(told), "{line}");
        until_noted(&mut daemon, &[&format!("the queue {queue} was gone for up to "), told]).await;
    }
    for (exchange, kind, told) in [
        ("tidings", lapin::ExchangeKind::Topic, "bindings of consumers"),
        ("tidings.dlx", lapin::ExchangeKind::Fanout, "consumers rejected"),
    ] {
        let channel = world.broker.channel().await;
        channel.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await.expect("deleted");
        eventually_within(SOON, exchange, async || {
            let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
            let channel = world.broker.channel().await;
            channel.exchange_declare(exchange.into(), kind.clone(), passive, FieldTable::default()).await.ok()
        })
        .await;
        let line = daemon.wait_for_line(&format!("the exchange {exchange} was gone for up to ")).await;
        assert!(line.contains(told), "{line}");
        until_noted(&mut daemon, &[&format!("the exchange {exchange} was gone for up to "), told]).await;
    }
    eventually_within(SOON, "the binding", async || is_bound(&world).then_some(())).await;

    let mut inbox = world.inbox(&["k"]).await;
    send(&world, r#"{"routing_key": "k", "body": 1}"#).await;
    reject(&mut inbox).await;
    until_waiting(&world, "tidings.dead", 1).await;
}

#[tokio::test]
async fn a_binding_that_is_taken_away_is_there_again_within_ten_seconds_and_told_where_it_can_be_asked_for() {
    let world = World::with(&["message"]).await;
    let unbind = async || {
        let channel = world.broker.channel().await;
        let nothing = FieldTable::default();
        let (dead, source) = ("tidings.dead".into(), "tidings.dlx".into());
        channel.queue_unbind(dead, source, "".into(), nothing).await.expect("unbound");
        eventually_within(SOON, "the binding", async || is_bound(&world).then_some(())).await;
    };
    let daemon = once(&world).ready().await;
    unbind().await;
    assert!(daemon.stop().await.success());

    let mut daemon = once(&world).with("TIDINGS_MANAGEMENT_URL", world.management_url()).ready().await;
    // So that it has seen it.
    eventually("a look", async || (ask(&mut daemon, "/readyz").await.0 == 200).then_some(())).await;
    unbind().await;
    let told = "the binding of the queue tidings.dead to the exchange tidings.dlx was gone for up to ";
    let line = daemon.wait_for_line(told).await;
    assert!(line.contains("what consumers rejected meanwhile is lost"), "{line}");
    until_noted(&mut daemon, &[told]).await;
}

/// Lets `user` do in the world what a definition's permissions say, and returns the world's settings as that user.
fn as_user(world: &World, launch: Launch, user: &str, permissions: &Value) -> Launch {
    let _ = world.manage("PUT", &format!("users/{user}"), Some(&json!({ "password": "p", "tags": "" })));
    let _ = world.manage("PUT", &format!("permissions/{}/{user}", world.name), Some(permissions));
    launch.with("TIDINGS_AMQP_URL", url_of(world, user))
}

fn url_of(world: &World, user: &str) -> String {
    amqp_url(world.ports().1, &world.name).replace("guest:guest@", &format!("{user}:p@"))
}

/// What `tidings topology` prints for such a user.
async fn printed(world: &World, user: &str, queue_type: &str, arguments: &[&str]) -> Value {
    let launch = world.launch().with("TIDINGS_AMQP_URL", url_of(world, user)).with("TIDINGS_QUEUE_TYPE", queue_type);
    let (code, output) = launch.subcommand("topology").args(arguments).finished().await;
    assert_eq!(code, 0, "{output}");
    serde_json::from_str(&output).expect("JSON")
}

/// Imports what is printed, and does everything with the permissions in it.
async fn everything_works_as_printed(queue_type: &str, arguments: &[&str]) {
    let world = World::with(&["message"]).await;
    let user = format!("u{}", world.name);
    let definitions = printed(&world, &user, queue_type, arguments).await;
    let permissions = &definitions["permissions"][0];
    assert_eq!((&permissions["user"], &permissions["vhost"]), (&json!(user), &json!(world.name)));
    if arguments.is_empty() {
        let _ = world.manage("POST", &format!("definitions/{}", world.name), Some(&definitions));
        assert_eq!(permissions["configure"], "^$");
        assert!(is_bound(&world));
    }
    let launch = as_user(&world, often(&world), &user, permissions).with("TIDINGS_QUEUE_TYPE", queue_type);
    let launch = launch.with("TIDINGS_REPLAY_MAX", 1);
    let mut inbox = world.inbox(&["k"]).await;
    let mut daemon = launch.ready().await;
    assert_eq!(ask(&mut daemon, "/readyz").await, (200, json!({ "ready": true, "reasons": [], "notes": [] })));

    // Delivered, rejected, taken back, rejected again and parked.
    let id = send(&world, r#"{"routing_key": "k", "body": 1}"#).await;
    assert_eq!(reject(&mut inbox).await.id(), id);
    assert_eq!(reject(&mut inbox).await.number("tidings-replay"), 1);
    until_waiting(&world, "tidings.parking", 1).await;

    let addr = daemon.http_addr().await;
    let (code, output) = launch.clone().subcommand("doctor").with("TIDINGS_HTTP_ADDR", addr).finished().await;
    assert_eq!(code, 0, "{output}");
    assert!(daemon.stop().await.success());
    for (arguments, says) in
        [("dead list", "0 of 0 dead letters"), ("parked list", &id.to_string()), ("parked retry --all", "1 letters")]
    {
        let (first, rest) = arguments.split_once(' ').expect("two words");
        let (code, output) = launch.clone().subcommand(first).args(rest.split(' ')).finished().await;
        assert!(code == 0 && output.contains(says), "{arguments}: {output}");
    }
    assert_eq!(reject(&mut inbox).await.id(), id);
    until_waiting(&world, "tidings.dead", 1).await;
    let (code, output) = launch.clone().subcommand("dead").args(["list"]).finished().await;
    assert!(code == 0 && output.contains("1 of 1 dead letters"), "{output}");
    assert_eq!(waiting(&world, "tidings.parking").await, 0);
}

#[tokio::test]
async fn a_user_who_may_declare_nothing_does_everything_with_what_is_printed_for_classic_queues() {
    everything_works_as_printed("classic", &[]).await;
}

#[tokio::test]
async fn a_user_who_may_declare_nothing_does_everything_with_what_is_printed_for_quorum_queues() {
    everything_works_as_printed("quorum", &[]).await;
}

#[tokio::test]
async fn a_user_who_declares_it_all_does_everything_with_the_permissions_that_are_printed() {
    everything_works_as_printed("classic", &["--declares"]).await;
}

#[tokio::test]
async fn what_is_missing_and_may_not_be_declared_is_named_with_its_arguments_and_waited_for() {
    let world = World::with(&["message"]).await;
    let user = format!("u{}", world.name);
    let all = json!({ "configure": "^$", "write": ".*", "read": ".*" });
    let launch = as_user(&world, once(&world), &user, &all).with("TIDINGS_QUEUE_TYPE", "quorum");
    let mut daemon = launch.start();

    let missing = [
        "the exchange tidings (durable, of the type topic)",
        "the exchange tidings.dlx (durable, of the type fanout)",
        "the queue tidings.dead (durable, x-queue-type = quorum, x-delivery-limit = 2147483647, bound to tidings.dlx)",
        "the queue tidings.parking (durable, x-queue-type = quorum, x-delivery-limit = 2147483647)",
        "tidings topology",
    ];
    let line = daemon.wait_for_line("may not declare what is missing").await;
    assert!(missing.iter().all(|part| line.contains(part)), "{line}");
    let (status, body) = ask(&mut daemon, "/readyz").await;
    assert!(status == 503 && missing.iter().all(|part| body["reasons"].to_string().contains(part)), "{body}");
    let nowhere = format!("127.0.0.1:{}", free_port());
    let (code, output) = launch.clone().subcommand("doctor").with("TIDINGS_HTTP_ADDR", nowhere).finished().await;
    assert_eq!(code, 0, "{output}");
    assert!(missing[..4].iter().all(|part| output.contains(part)), "{output}");

    let definitions = printed(&world, &user, "quorum", &[]).await;
    let _ = world.manage("POST", &format!("definitions/{}", world.name), Some(&definitions));
    daemon.wait_for_line(" ready ").await;

    // Of what goes while it runs it says the same, and binds what it may.
    let channel = world.broker.channel().await;
    channel.queue_delete("tidings.dead".into(), QueueDeleteOptions::default()).await.expect("deleted");
    eventually_within(SOON, "503", async || {
        let (status, body) = ask(&mut daemon, "/readyz").await;
        (status == 503 && body["reasons"].to_string().contains(missing[2])).then_some(())
    })
    .await;
    let mut queues = definitions;
    queues.as_object_mut().expect("an object").remove("bindings");
    let _ = world.manage("POST", &format!("definitions/{}", world.name), Some(&queues));
    until_noted(&mut daemon, &["the queue tidings.dead was gone for up to "]).await;
    assert!(is_bound(&world));
}
