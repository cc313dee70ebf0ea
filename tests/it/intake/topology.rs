//! What the daemon declares for an intake, and what it uses as it is.

use harness::servers::Servers;
use harness::world::World;
use lapin::options::{ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, ExchangeKind};
use serde_json::{Value, json};

use crate::intake::{FROM, Publisher, QUEUE, TO, inbox, launch, start};

async fn declare(world: &World, name: &str, kind: ExchangeKind) {
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let channel = world.broker.channel().await;
    channel.exchange_declare(name.into(), kind, options, FieldTable::default()).await.expect("declared");
}

fn exchange(world: &World, name: &str) -> Value {
    world.manage("GET", &format!("exchanges/{}/{name}", world.name), None)
}

#[tokio::test]
async fn the_daemon_declares_both_exchanges_and_the_queue_and_binds_it() {
    for (queue_type, limit) in [("classic", Value::Null), ("quorum", json!(i32::MAX))] {
        let world = World::empty().await;
        let _daemon = launch(&world).with("TIDINGS_QUEUE_TYPE", queue_type).start_ready().await;
        for name in [FROM, TO] {
            let exchange = exchange(&world, name);
            assert_eq!((&exchange["type"], &exchange["durable"]), (&json!("topic"), &json!(true)), "{name}");
        }
        let queue = world.manage("GET", &format!("queues/{}/{QUEUE}", world.name), None);
        let arguments = &queue["arguments"];
        assert_eq!(queue["durable"], true);
        assert_eq!(arguments["x-queue-type"], queue_type);
        assert_eq!(arguments["x-delivery-limit"], limit);
        assert_eq!(arguments["x-dead-letter-exchange"], "tidings.dlx");
        let mut inbox = inbox(&world).await;
        Publisher::new(&world).await.publish("any.key", BasicProperties::default(), b"a").await;
        assert_eq!(inbox.next().await.text(), "a");
    }
}

#[tokio::test]
async fn exchanges_of_other_types_are_used_as_they_are() {
    let world = World::empty().await;
    declare(&world, FROM, ExchangeKind::Fanout).await;
    declare(&world, TO, ExchangeKind::Direct).await;
    let _daemon = start(&world).await;
    // The harness would declare the exchange as topic.
    let mut inbox = world.broker.inbox("amq.topic", "inbox", &[], FieldTable::default()).await;
    let (options, arguments) = (QueueBindOptions::default(), FieldTable::default());
    inbox.channel.queue_bind("inbox".into(), TO.into(), "exact".into(), options, arguments).await.expect("bound");
    Publisher::new(&world).await.publish("exact", BasicProperties::default(), b"a").await;
    assert_eq!(inbox.next().await.text(), "a");
    assert_eq!(exchange(&world, FROM)["type"], "fanout");
}

#[tokio::test]
async fn an_exchange_that_holds_messages_back_itself_is_a_start_up_error_that_says_what_to_do() {
    let servers = Servers::start_private_async().await;
    servers.add_exchange_type("x-delayed-message").expect("registered");
    let world = World::on_servers(&servers, &[]).await;
    declare(&world, FROM, ExchangeKind::Custom("x-delayed-message".into())).await;
    let (code, log) = launch(&world).run_to_end().await;
    assert_eq!(code, 1, "{log}");
    let sentence =
        "the exchange orders.delayed is of the type x-delayed-message, whose plugin holds messages back itself";
    assert!(log.contains(sentence), "{log}");
    let (code, report) = launch(&world).subcommand("doctor").run_to_end().await;
    assert!(code == 1 && report.contains(sentence), "{report}");
}

#[tokio::test]
async fn a_direct_exchange_is_bound_by_an_operator_and_the_daemon_says_so() {
    let world = World::empty().await;
    declare(&world, FROM, ExchangeKind::Direct).await;
    let mut daemon = start(&world).await;
    let addr = daemon.http_addr().await;
    harness::eventually("a note", async || {
        let ready = ureq::get(format!("http://{addr}/readyz")).call().ok()?.body_mut().read_to_string().ok()?;
        ready.contains("the exchange orders.delayed is of the type direct").then_some(())
    })
    .await;
    let channel = world.broker.channel().await;
    let (options, arguments) = (QueueBindOptions::default(), FieldTable::default());
    channel.queue_bind(QUEUE.into(), FROM.into(), "exact".into(), options, arguments).await.expect("bound");
    let mut inbox = inbox(&world).await;
    Publisher::new(&world).await.publish("exact", BasicProperties::default(), b"a").await;
    assert_eq!(inbox.next().await.text(), "a");
    let (_, report) =
        world.launch().subcommand("doctor").with("TIDINGS_INTAKE", format!("{FROM}={TO}")).run_to_end().await;
    assert!(report.contains("is of the type direct, so an operator has to bind"), "{report}");
}

#[tokio::test]
async fn what_was_deleted_is_declared_again_and_the_loss_is_told() {
    let world = World::empty().await;
    let mut daemon = start(&world).await;
    let channel = world.broker.channel().await;
    channel.queue_delete(QUEUE.into(), QueueDeleteOptions::default()).await.expect("deleted");
    daemon.wait_for_line("the queue tidings.intake.orders.delayed was gone for up to").await;
    let mut inbox = inbox(&world).await;
    let publisher = Publisher::new(&world).await;
    harness::eventually("it is bound", async || {
        let confirmed = publisher.try_publish(FROM, "k", BasicProperties::default(), b"a").await;
        matches!(confirmed, lapin::Confirmation::Ack(None)).then_some(())
    })
    .await;
    assert_eq!(inbox.next().await.text(), "a");
    channel.exchange_delete(FROM.into(), ExchangeDeleteOptions::default()).await.expect("deleted");
    daemon.wait_for_line("the exchange orders.delayed was gone for up to").await;
    // The queue is bound a moment later.
    harness::eventually("it is bound", async || {
        let confirmed = publisher.try_publish(FROM, "k", BasicProperties::default(), b"b").await;
        matches!(confirmed, lapin::Confirmation::Ack(None)).then_some(())
    })
    .await;
    assert_eq!(inbox.next().await.text(), "b");
}

#[tokio::test]
async fn a_queue_with_other_arguments_is_a_start_up_error_that_names_them() {
    let world = World::empty().await;
    let channel = world.broker.channel().await;
    let durable = lapin::options::QueueDeclareOptions::durable();
    channel.queue_declare(QUEUE.into(), durable, FieldTable::default()).await.expect("declared");
    let (code, log) = launch(&world).run_to_end().await;
    assert_eq!(code, 1, "{log}");
    assert!(log.contains("the queue tidings.intake.orders.delayed (durable, x-queue-type = classic, x-dead-letter-exchange = tidings.dlx, bound to orders.delayed with #)"), "{log}");
}

#[tokio::test]
async fn mistakes_in_the_settings_are_reported_together() {
    let world = World::empty().await;
    let settings = launch(&world)
        .with("TIDINGS_INTAKE", "a,b=b")
        .with("TIDINGS_INTAKE_MAX_BODY", "1 MiB")
        .with("TIDINGS_INTAKE_RATE", "-1");
    let (code, log) = settings.run_to_end().await;
    assert_eq!(code, 64);
    for sentence in [
        r#"TIDINGS_INTAKE cannot be used: "a" is not FROM=TO, such as orders.delayed=orders"#,
        "TIDINGS_INTAKE cannot be used: b=b would take in again what it has sent",
        r#"TIDINGS_INTAKE_MAX_BODY is "1 MiB", which is not a whole number from 1 to 8388608"#,
        r#"TIDINGS_INTAKE_RATE is "-1", which is not a whole number from 0 to 1000000"#,
    ] {
        assert!(log.contains(sentence), "{sentence} is not in {log}");
    }
}

#[tokio::test]
async fn the_definitions_for_rabbitmq_have_what_an_intake_needs_and_a_user_with_their_permissions_can_run_it() {
    let world = World::empty().await;
    let (code, output) = world
        .launch()
        .subcommand("topology")
        .without("TIDINGS_SWEEP_MS")
        .with("TIDINGS_INTAKE", format!("{FROM}={TO}"))
        .run_to_end()
        .await;
    assert_eq!(code, 0, "{output}");
    let definitions: Value = serde_json::from_str(&output).expect("JSON");
    let names = |what: &str| {
        definitions[what]
            .as_array()
            .expect("a list")
            .iter()
            .map(|one| one["name"].as_str().unwrap_or_default().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(names("exchanges"), ["tidings", "tidings.dlx", FROM, TO]);
    assert_eq!(names("queues"), ["tidings.dead", "tidings.parking", QUEUE]);
    assert_eq!(definitions["bindings"][1]["routing_key"], "#");
    // An operator imports them, and gives a user those permissions and no others.
    let permissions = definitions["permissions"][0].clone();
    let user = format!("user-{}", world.name);
    let _ = world.manage("PUT", &format!("users/{user}"), Some(&json!({"password": "secret", "tags": ""})));
    let mut objects = definitions.clone();
    objects.as_object_mut().expect("an object").remove("permissions");
    let _ = world.manage("POST", &format!("definitions/{}", world.name), Some(&objects));
    let granted =
        json!({"configure": permissions["configure"], "write": permissions["write"], "read": permissions["read"]});
    let _ = world.manage("PUT", &format!("permissions/{}/{user}", world.name), Some(&granted));
    let (_, port) = world.ports();
    let url = format!("amqp://{user}:secret@127.0.0.1:{port}/{}", world.name);
    let _daemon = launch(&world).with("TIDINGS_AMQP_URL", url).start_ready().await;
    let mut inbox = inbox(&world).await;
    Publisher::new(&world).await.publish("k", BasicProperties::default(), b"a").await;
    assert_eq!(inbox.next().await.text(), "a");
}

#[tokio::test]
async fn doctor_and_the_command_show_the_intake_and_who_else_is_bound_to_its_exchange() {
    let world = World::empty().await;
    let _daemon = start(&world).await;
    let doctor = || {
        world
            .launch()
            .subcommand("doctor")
            .with("TIDINGS_INTAKE", format!("{FROM}={TO}"))
            .with("TIDINGS_MANAGEMENT_URL", world.management_url())
    };
    let (_, report) = doctor().run_to_end().await;
    assert!(
        report.contains("the queue tidings.intake.orders.delayed is bound to the exchange orders.delayed"),
        "{report}"
    );
    assert!(!report.contains("bound to the exchange orders.delayed as well"), "{report}");
    let _other = world.broker.inbox(FROM, "impatient", &["#"], FieldTable::default()).await;
    let (_, report) = doctor().run_to_end().await;
    assert!(
        report.contains("impatient is bound to the exchange orders.delayed as well, and gets each message when it is published: bind it to the exchange orders, where messages come when they are due"),
        "{report}"
    );
    let (code, line) =
        world.launch().subcommand("intakes").with("TIDINGS_INTAKE", format!("{FROM}={TO}")).run_to_end().await;
    assert_eq!(code, 0, "{line}");
    assert!(
        line.contains(
            "orders.delayed → orders: 0 messages wait in tidings.intake.orders.delayed, from which 1 daemons take"
        ),
        "{line}"
    );
}
