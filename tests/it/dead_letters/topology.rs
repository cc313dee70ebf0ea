//! The exchanges and queues that the daemon owns in RabbitMQ: they have the right type whatever the virtual host's
//! defaults are, they are declared again after they were deleted, and a daemon whose user may not declare them uses
//! those that exist.

use std::time::Duration;

use harness::amqp_proxy::{AmqpProxy, Method, Verdict};
use harness::daemon::{Daemon, Launch};
use harness::world::{World, amqp_url};
use harness::{eventually, eventually_within};
use lapin::BasicProperties;
use lapin::options::{ExchangeDeclareOptions, ExchangeDeleteOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};

use crate::dead_letters::replay::{
    count_messages, launch_with_frequent_passes, launch_with_hourly_passes, publish_message, reject_next,
    schedule_message, wait_for_message_count,
};
use crate::operations::health::get_json;
use crate::operations::process::find_free_port;

/// The promised time within which a lost exchange, queue or binding is restored.
const RESTORE_LIMIT: Duration = Duration::from_secs(10);

/// Waits until the daemon is ready and its notes in `/readyz` contain all of `parts`.
async fn wait_for_note(daemon: &mut Daemon, parts: &[&str]) {
    eventually(&format!("a note of {parts:?}"), async || {
        let (status, body) = get_json(daemon, "/readyz").await;
        let notes = body["notes"].to_string();
        (status == 200 && parts.iter().all(|part| notes.contains(part))).then_some(())
    })
    .await;
}

/// The description of a queue from the management API.
fn describe_queue(world: &World, name: &str) -> Value {
    world.manage("GET", &format!("queues/{}/{name}", world.name), None)
}

/// Whether `tidings.dead` is bound to `tidings.dlx`.
fn is_bound(world: &World) -> bool {
    let path = format!("bindings/{}/e/tidings.dlx/q/tidings.dead", world.name);
    world.manage("GET", &path, None).as_array().is_some_and(|bindings| !bindings.is_empty())
}

/// How to run the doctor in a world without a daemon.
fn launch_doctor(world: &World) -> Launch {
    world.launch().subcommand("doctor").with("TIDINGS_HTTP_ADDR", format!("127.0.0.1:{}", find_free_port()))
}

/// Publishes `count` dead letters without an `x-death` header.
async fn publish_dead_letters(world: &World, count: u32) {
    for number in 0..count {
        let properties = BasicProperties::default().with_message_id(format!("letter {number}").into());
        publish_message(world, "", "tidings.dead", b"lost", properties).await;
    }
    wait_for_message_count(world, "tidings.dead", count).await;
}

/// Declares a queue without a type, as an earlier release of the daemon did.
async fn declare_without_type(world: &World, name: &str) {
    let channel = world.broker.channel().await;
    let declared = channel.queue_declare(name.into(), QueueDeclareOptions::durable(), FieldTable::default()).await;
    declared.expect("declared");
}

/// Lists the dead letters a hundred times and interrupts fifty passes while they hold all of them; every one must
/// remain.
async fn check_that_dead_letters_survive(queue_type: &str) {
    let world = World::of_quorum_queues().await;
    let with_type = |launch: Launch| launch.with("TIDINGS_QUEUE_TYPE", queue_type);
    assert!(with_type(launch_with_hourly_passes(&world)).start_ready().await.stop().await.success());
    for name in ["tidings.dead", "tidings.parking"] {
        let queue = describe_queue(&world, name);
        assert_eq!(queue["type"], queue_type, "{queue}");
        let limit = (queue_type == "quorum").then_some(i32::MAX);
        assert_eq!(queue["arguments"]["x-delivery-limit"], json!(limit), "{queue}");
    }
    publish_dead_letters(&world, 3).await;

    let list = with_type(world.launch()).subcommand("dead").args(["list"]);
    for _ in 0..100 {
        let (code, output) = list.run_to_end().await;
        assert!(code == 0 && output.contains("3 of 3 dead letters"), "{output}");
    }
    let proxy = AmqpProxy::start(world.ports().1, |method| match method {
        // The dead letters have no `x-death`, so a pass publishes them to the parking queue.
        Method::Publish => Verdict::Cut,
        _ => Verdict::Pass,
    })
    .await;
    let behind =
        with_type(launch_with_frequent_passes(&world)).with("TIDINGS_AMQP_URL", amqp_url(proxy.port, &world.name));
    crate::dead_letters::replay::force_pass_at_start(&world).await;
    let daemon = behind.start_ready().await;
    eventually_within(Duration::from_mins(5), "fifty passes", async || {
        (daemon.log().matches("a pass over the dead letters broke off").count() >= 50).then_some(())
    })
    .await;
    assert!(daemon.stop().await.success());

    wait_for_message_count(&world, "tidings.dead", 3).await;
}

#[tokio::test]
async fn a_hundred_lists_and_fifty_broken_passes_lose_no_dead_letter_where_quorum_queues_are_the_default() {
    check_that_dead_letters_survive("classic").await;
}

#[tokio::test]
async fn a_hundred_lists_and_fifty_broken_passes_lose_no_dead_letter_in_quorum_queues() {
    check_that_dead_letters_survive("quorum").await;
}

#[tokio::test]
async fn a_dead_letter_queue_of_another_type_is_reported_with_the_solution_and_not_read() {
    let world = World::of_quorum_queues().await;
    world.install("message");
    declare_without_type(&world, "tidings.dead").await;
    publish_dead_letters(&world, 3).await;

    let way_out = ["the queue tidings.dead", "x-queue-type", "tidings dead replay", "delete it"];
    let (code, output) = world.launch().run_to_end().await;
    assert!(code == 1 && way_out.iter().all(|part| output.contains(part)), "{code} {output}");
    let (code, output) = launch_doctor(&world).run_to_end().await;
    assert!(code == 1 && way_out.iter().all(|part| output.contains(part)), "{code} {output}");
    for arguments in [&["dead", "list"][..], &["dead", "replay", "--dry-run"]] {
        for _ in 0..2 {
            let (code, output) = world.tidings(arguments).await;
            assert!(code == 1 && way_out.iter().all(|part| output.contains(part)), "{code} {output}");
        }
    }
    wait_for_message_count(&world, "tidings.dead", 3).await;
    let channel = world.broker.channel().await;
    let first = channel.basic_get("tidings.dead".into(), lapin::options::BasicGetOptions::default()).await;
    let first = first.expect("it exists").expect("a letter");
    let came_back = first.properties.headers().as_ref().and_then(|headers| headers.inner().get("x-delivery-count"));
    assert!(matches!(came_back, None | Some(AMQPValue::LongLongInt(0))), "{came_back:?}");
    drop(channel);
}

#[tokio::test]
async fn classic_queues_declared_by_an_earlier_release_are_accepted() {
    let world = World::with_plugins(&["message"]).await;
    declare_without_type(&world, "tidings.dead").await;
    declare_without_type(&world, "tidings.parking").await;
    let mut inbox = world.inbox(&["k"]).await;

    let _daemon = launch_with_frequent_passes(&world).start_ready().await;

    schedule_message(&world, r#"{"routing_key": "k", "body": 1}"#).await;
    reject_next(&mut inbox).await;
    assert_eq!(inbox.next().await.number("tidings-replay"), 1);
}

#[tokio::test]
async fn a_delivery_limit_set_by_a_policy_is_reported_by_the_daemon_and_the_doctor_with_the_solution() {
    let world = World::with_plugins(&["message"]).await;
    let policy = json!({ "pattern": ".*", "apply-to": "queues", "definition": { "delivery-limit": 5 } });
    let _ = world.manage("PUT", &format!("policies/{}/short", world.name), Some(&policy));
    let with = |launch: Launch| {
        launch.with("TIDINGS_QUEUE_TYPE", "quorum").with("TIDINGS_MANAGEMENT_URL", world.management_url())
    };
    let mut daemon = with(world.launch()).start_ready().await;

    let parts =
        ["the queue tidings.dead", "the queue tidings.parking", "come back 5 times", "policy short", "delivery-limit"];
    for part in parts {
        daemon.wait_longer_for_line(part).await;
    }
    wait_for_note(&mut daemon, &parts).await;
    let (code, output) = with(launch_doctor(&world)).run_to_end().await;
    assert!(code == 0 && parts.iter().all(|part| output.contains(part)), "{output}");
}

#[tokio::test]
async fn deleted_exchanges_and_queues_are_restored_within_ten_seconds_and_the_loss_is_reported() {
    let world = World::with_plugins(&["message"]).await;
    let mut daemon = launch_with_hourly_passes(&world).start_ready().await;
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    for (queue, loss) in [("tidings.dead", "consumers rejected"), ("tidings.parking", "the letters that lay in it")] {
        let channel = world.broker.channel().await;
        channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.expect("deleted");
        eventually_within(RESTORE_LIMIT, queue, async || {
            let channel = world.broker.channel().await;
            channel.queue_declare(queue.into(), passive, FieldTable::default()).await.ok()
        })
        .await;
        let line = daemon.wait_for_line(&format!("the queue {queue} was gone for up to ")).await;
        assert!(line.contains(loss), "{line}");
        wait_for_note(&mut daemon, &[&format!("the queue {queue} was gone for up to "), loss]).await;
    }
    for (exchange, kind, loss) in [
        ("tidings", lapin::ExchangeKind::Topic, "bindings of consumers"),
        ("tidings.dlx", lapin::ExchangeKind::Fanout, "consumers rejected"),
    ] {
        let channel = world.broker.channel().await;
        channel.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await.expect("deleted");
        eventually_within(RESTORE_LIMIT, exchange, async || {
            let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
            let channel = world.broker.channel().await;
            channel.exchange_declare(exchange.into(), kind.clone(), passive, FieldTable::default()).await.ok()
        })
        .await;
        let line = daemon.wait_for_line(&format!("the exchange {exchange} was gone for up to ")).await;
        assert!(line.contains(loss), "{line}");
        wait_for_note(&mut daemon, &[&format!("the exchange {exchange} was gone for up to "), loss]).await;
    }
    eventually_within(RESTORE_LIMIT, "the binding", async || is_bound(&world).then_some(())).await;

    let mut inbox = world.inbox(&["k"]).await;
    schedule_message(&world, r#"{"routing_key": "k", "body": 1}"#).await;
    reject_next(&mut inbox).await;
    wait_for_message_count(&world, "tidings.dead", 1).await;
}

#[tokio::test]
async fn a_removed_binding_is_restored_within_ten_seconds_and_reported_if_a_management_url_is_set() {
    let world = World::with_plugins(&["message"]).await;
    let unbind = async || {
        let channel = world.broker.channel().await;
        let nothing = FieldTable::default();
        let (dead, source) = ("tidings.dead".into(), "tidings.dlx".into());
        channel.queue_unbind(dead, source, "".into(), nothing).await.expect("unbound");
        eventually_within(RESTORE_LIMIT, "the binding", async || is_bound(&world).then_some(())).await;
    };
    let daemon = launch_with_hourly_passes(&world).start_ready().await;
    unbind().await;
    assert!(daemon.stop().await.success());

    let mut daemon =
        launch_with_hourly_passes(&world).with("TIDINGS_MANAGEMENT_URL", world.management_url()).start_ready().await;
    let loss = "the binding of the queue tidings.dead to the exchange tidings.dlx was gone for up to ";
    // A look asks the management API and then binds the queue. A binding that is removed between the two is restored
    // unseen, and the management API may be slow; so it is removed until a look has seen it.
    eventually("a report of the loss", async || {
        unbind().await;
        daemon.log().contains(loss).then_some(())
    })
    .await;
    let line = daemon.wait_for_line(loss).await;
    assert!(line.contains("what consumers rejected meanwhile is lost"), "{line}");
    wait_for_note(&mut daemon, &[loss]).await;
}

/// Creates `user` with these permissions in the world, and returns `launch` with that user.
fn launch_as_user(world: &World, launch: Launch, user: &str, permissions: &Value) -> Launch {
    let _ = world.manage("PUT", &format!("users/{user}"), Some(&json!({ "password": "p", "tags": "" })));
    let _ = world.manage("PUT", &format!("permissions/{}/{user}", world.name), Some(permissions));
    launch.with("TIDINGS_AMQP_URL", amqp_url_of(world, user))
}

fn amqp_url_of(world: &World, user: &str) -> String {
    amqp_url(world.ports().1, &world.name).replace("guest:guest@", &format!("{user}:p@"))
}

/// Runs `tidings topology` as `user`, and returns the printed definitions.
async fn print_topology(world: &World, user: &str, queue_type: &str, arguments: &[&str]) -> Value {
    let launch =
        world.launch().with("TIDINGS_AMQP_URL", amqp_url_of(world, user)).with("TIDINGS_QUEUE_TYPE", queue_type);
    let (code, output) = launch.subcommand("topology").args(arguments).run_to_end().await;
    assert_eq!(code, 0, "{output}");
    serde_json::from_str(&output).expect("JSON")
}

/// Imports the printed definitions, and checks that everything works with the permissions in them.
async fn check_everything_with_printed_topology(queue_type: &str, arguments: &[&str]) {
    let world = World::with_plugins(&["message"]).await;
    let user = format!("u{}", world.name);
    let definitions = print_topology(&world, &user, queue_type, arguments).await;
    let permissions = &definitions["permissions"][0];
    assert_eq!((&permissions["user"], &permissions["vhost"]), (&json!(user), &json!(world.name)));
    if arguments.is_empty() {
        let _ = world.manage("POST", &format!("definitions/{}", world.name), Some(&definitions));
        assert_eq!(permissions["configure"], "^$");
        assert!(is_bound(&world));
    }
    let launch = launch_as_user(&world, launch_with_frequent_passes(&world), &user, permissions)
        .with("TIDINGS_QUEUE_TYPE", queue_type);
    let launch = launch.with("TIDINGS_REPLAY_MAX", 1);
    let mut inbox = world.inbox(&["k"]).await;
    let mut daemon = launch.start_ready().await;
    assert_eq!(get_json(&mut daemon, "/readyz").await, (200, json!({ "ready": true, "reasons": [], "notes": [] })));

    // The message is delivered, rejected, replayed, rejected again and parked.
    let id = schedule_message(&world, r#"{"routing_key": "k", "body": 1}"#).await;
    assert_eq!(reject_next(&mut inbox).await.id(), id);
    assert_eq!(reject_next(&mut inbox).await.number("tidings-replay"), 1);
    wait_for_message_count(&world, "tidings.parking", 1).await;

    let addr = daemon.http_addr().await;
    let (code, output) = launch.clone().subcommand("doctor").with("TIDINGS_HTTP_ADDR", addr).run_to_end().await;
    assert_eq!(code, 0, "{output}");
    assert!(daemon.stop().await.success());
    for (arguments, says) in
        [("dead list", "0 of 0 dead letters"), ("parked list", &id.to_string()), ("parked retry --all", "1 letters")]
    {
        let (first, rest) = arguments.split_once(' ').expect("two words");
        let (code, output) = launch.clone().subcommand(first).args(rest.split(' ')).run_to_end().await;
        assert!(code == 0 && output.contains(says), "{arguments}: {output}");
    }
    assert_eq!(reject_next(&mut inbox).await.id(), id);
    wait_for_message_count(&world, "tidings.dead", 1).await;
    let (code, output) = launch.clone().subcommand("dead").args(["list"]).run_to_end().await;
    assert!(code == 0 && output.contains("1 of 1 dead letters"), "{output}");
    assert_eq!(count_messages(&world, "tidings.parking").await, 0);
}

#[tokio::test]
async fn a_user_without_configure_permission_can_run_everything_with_the_printed_topology_of_classic_queues() {
    check_everything_with_printed_topology("classic", &[]).await;
}

#[tokio::test]
async fn a_user_without_configure_permission_can_run_everything_with_the_printed_topology_of_quorum_queues() {
    check_everything_with_printed_topology("quorum", &[]).await;
}

#[tokio::test]
async fn a_user_who_may_declare_can_run_everything_with_the_printed_permissions() {
    check_everything_with_printed_topology("classic", &["--declares"]).await;
}

#[tokio::test]
async fn missing_exchanges_and_queues_that_may_not_be_declared_are_named_with_their_arguments_and_awaited() {
    let world = World::with_plugins(&["message"]).await;
    let user = format!("u{}", world.name);
    let all = json!({ "configure": "^$", "write": ".*", "read": ".*" });
    let launch =
        launch_as_user(&world, launch_with_hourly_passes(&world), &user, &all).with("TIDINGS_QUEUE_TYPE", "quorum");
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
    let (status, body) = get_json(&mut daemon, "/readyz").await;
    assert!(status == 503 && missing.iter().all(|part| body["reasons"].to_string().contains(part)), "{body}");
    let nowhere = format!("127.0.0.1:{}", find_free_port());
    let (code, output) = launch.clone().subcommand("doctor").with("TIDINGS_HTTP_ADDR", nowhere).run_to_end().await;
    assert_eq!(code, 0, "{output}");
    assert!(missing[..4].iter().all(|part| output.contains(part)), "{output}");

    let definitions = print_topology(&world, &user, "quorum", &[]).await;
    let _ = world.manage("POST", &format!("definitions/{}", world.name), Some(&definitions));
    daemon.wait_for_line(" ready ").await;

    // The same holds for a queue that is deleted while the daemon runs. The daemon binds it if it may.
    let channel = world.broker.channel().await;
    channel.queue_delete("tidings.dead".into(), QueueDeleteOptions::default()).await.expect("deleted");
    eventually_within(RESTORE_LIMIT, "503", async || {
        let (status, body) = get_json(&mut daemon, "/readyz").await;
        (status == 503 && body["reasons"].to_string().contains(missing[2])).then_some(())
    })
    .await;
    let mut queues = definitions;
    queues.as_object_mut().expect("an object").remove("bindings");
    let _ = world.manage("POST", &format!("definitions/{}", world.name), Some(&queues));
    wait_for_note(&mut daemon, &["the queue tidings.dead was gone for up to "]).await;
    assert!(is_bound(&world));
}
