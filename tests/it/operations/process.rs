//! The daemon's process: its settings, its exit codes, servers that are away or refuse the login, and how it stops.

use std::net::TcpListener;
use std::time::Instant;

use harness::daemon::Launch;
use harness::proxy::{Mode, Proxy};
use harness::world::{World, amqp_url, database_url, execute};
use lapin::ExchangeKind;
use lapin::options::{ExchangeDeclareOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use nix::sys::signal::Signal;

use crate::on_time::delivery::start_row_in_flight;

#[tokio::test]
async fn all_mistakes_in_the_settings_are_reported_together_with_exit_code_64() {
    let world = World::empty().await;
    let launch = world
        .launch()
        .without("TIDINGS_DATABASE_URL")
        .with("TIDINGS_AMQP_URL", "http://user:secret@host")
        .with("TIDINGS_PLUGIN_DIR", "/nonexistent")
        .with("TIDINGS_SWEEP_MS", "soon")
        .with("TIDINGS_MAX_ATTEMPTS", "0")
        .with("TIDINGS_NOTIFY", "yes")
        .with("TIDINGS_HISTORY_DAYS", "-1")
        .with("TIDINGS_QUEUE_TYPE", "fast")
        .with("TIDINGS_EXCHANGE", "amq.topic")
        .with("TIDINGS_SWEEEP_MS", "1");

    let (code, output) = launch.run_to_end().await;

    assert_eq!(code, 64, "{output}");
    for mistake in [
        "TIDINGS_DATABASE_URL is not set",
        "TIDINGS_AMQP_URL does not begin with amqp:// or amqps://",
        "TIDINGS_PLUGIN_DIR is /nonexistent, which is not a directory",
        "TIDINGS_SWEEP_MS is \"soon\", which is not a whole number from 10 to 3600000",
        "TIDINGS_MAX_ATTEMPTS is \"0\"",
        "TIDINGS_NOTIFY is \"yes\", which is neither on nor off",
        "TIDINGS_HISTORY_DAYS is \"-1\"",
        "TIDINGS_QUEUE_TYPE is \"fast\"",
        "TIDINGS_EXCHANGE is \"amq.topic\"",
        "TIDINGS_SWEEEP_MS is not a setting",
    ] {
        assert!(output.contains(mistake), "{mistake}:\n{output}");
    }
    assert!(!output.contains("secret"), "{output}");
    assert_eq!(output.lines().count(), 10, "{output}");
}

#[tokio::test]
async fn an_invalid_url_is_reported_without_its_password() {
    let world = World::empty().await;
    let launch = world
        .launch()
        .with("TIDINGS_DATABASE_URL", "postgres://user:secret@host:port/db")
        .with("TIDINGS_AMQP_URL", "amqp://user:secret@host:port/vhost");

    let (code, output) = launch.run_to_end().await;

    assert_eq!(code, 64, "{output}");
    assert!(
        output.contains("TIDINGS_DATABASE_URL is not a URL") && output.contains("TIDINGS_AMQP_URL is not a URL"),
        "{output}"
    );
    assert!(!output.contains("secret"), "{output}");
}

#[tokio::test]
async fn unmigrated_older_and_newer_databases_are_refused_with_exit_code_65() {
    let world = World::with_plugins(&["message"]).await;

    world
        .sql("DELETE FROM tidings._sqlx_migrations WHERE version = (SELECT max(version) FROM tidings._sqlx_migrations)")
        .await;
    let (code, output) = world.launch().run_to_end().await;
    assert!(code == 65 && output.contains("run `tidings migrate` first"), "{code} {output}");

    world.sql("INSERT INTO tidings._sqlx_migrations VALUES (9999, 'later', now(), true, '', 0)").await;
    let (code, output) = world.launch().run_to_end().await;
    assert!(code == 65 && output.contains("by a newer tidings (migration 9999)"), "{code} {output}");

    world.sql("DROP SCHEMA tidings CASCADE").await;
    let (code, output) = world.launch().run_to_end().await;
    assert!(code == 65 && output.contains("has 0 of the"), "{code} {output}");
}

#[tokio::test]
async fn migrating_twice_changes_nothing_and_keeps_the_applications_own_migrations() {
    let world = World::empty().await;
    world.sql("DROP SCHEMA tidings CASCADE").await;
    world
        .sql("CREATE TABLE public._sqlx_migrations (version bigint PRIMARY KEY, description text NOT NULL, installed_on timestamptz NOT NULL DEFAULT now(), success boolean NOT NULL, checksum bytea NOT NULL, execution_time bigint NOT NULL)")
        .await;
    world.sql("INSERT INTO public._sqlx_migrations VALUES (1, 'theirs', now(), true, '', 0)").await;
    let (port, _) = world.ports();
    let migrate = world
        .launch()
        .subcommand("migrate")
        .without("TIDINGS_AMQP_URL")
        .without("TIDINGS_PLUGIN_DIR")
        .with("TIDINGS_DATABASE_URL", database_url(port, &world.name));

    let (code, output) = migrate.run_to_end().await;
    assert!(code == 0 && output.contains("migrations on"), "{code} {output}");
    let (code, output) = migrate.run_to_end().await;
    assert!(code == 0 && output.contains("is up to date"), "{code} {output}");

    assert_eq!(world.value::<i64>("SELECT count(*) FROM public._sqlx_migrations").await, 1);
    world.sql("SELECT tidings.schedule('a', now())").await;
}

#[tokio::test]
async fn a_database_with_another_encoding_than_utf8_is_refused() {
    let world = World::with_plugins(&["message"]).await;
    let (port, _) = world.ports();
    let name = format!("latin_{}", world.name);
    execute(port, &format!("CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")).await;
    let launch = world.launch().with("TIDINGS_DATABASE_URL", database_url(port, &name));
    let (code, output) = launch
        .clone()
        .subcommand("migrate")
        .without("TIDINGS_AMQP_URL")
        .without("TIDINGS_PLUGIN_DIR")
        .run_to_end()
        .await;
    assert_eq!(code, 0, "{output}");

    let (code, output) = launch.run_to_end().await;

    assert!(code == 65 && output.contains("has the encoding LATIN1; Tidings needs UTF8"), "{code} {output}");
}

/// A port on which no process listens now.
pub(crate) fn find_free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr()).expect("a port").port()
}

#[tokio::test]
async fn the_daemon_waits_for_servers_that_are_away_at_the_start_and_logs_a_line_for_each() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let (postgres, rabbitmq) = world.ports();
    let (postgres_away, rabbitmq_away) = (find_free_port(), find_free_port());
    let mut daemon = world
        .launch()
        .with("TIDINGS_DATABASE_URL", database_url(postgres_away, &world.name))
        .with("TIDINGS_AMQP_URL", amqp_url(rabbitmq_away, &world.name))
        .start();
    daemon.wait_for_line(&format!("could not reach PostgreSQL at 127.0.0.1:{postgres_away}")).await;
    daemon.wait_for_line(&format!("could not reach RabbitMQ at 127.0.0.1:{rabbitmq_away}")).await;

    let _postgres = Proxy::start(postgres_away, postgres).await;
    let _rabbitmq = Proxy::start(rabbitmq_away, rabbitmq).await;

    daemon.wait_for_line(" ready ").await;
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key":"a","body":1}')"#).await;
    inbox.next().await;
}

#[tokio::test]
async fn a_refused_login_is_logged_without_the_password_and_retried() {
    let world = World::with_plugins(&["message"]).await;
    let (postgres, rabbitmq) = world.ports();
    let role = format!("later_{}", world.name);
    let database = format!("postgres://{role}:s3cret@127.0.0.1:{postgres}/{}", world.name);
    let broker = format!("amqp://guest:s3cret@127.0.0.1:{rabbitmq}/{}", world.name);
    let mut daemon = world.launch().with("TIDINGS_DATABASE_URL", database).with("TIDINGS_AMQP_URL", broker).start();

    daemon.wait_for_line("RabbitMQ at 127.0.0.1").await;
    daemon.wait_for_line("as guest refused the login").await;
    daemon.wait_for_line(&format!("as {role} refused the login")).await;
    world.sql(&format!("CREATE ROLE {role} LOGIN SUPERUSER")).await;
    daemon.wait_for_line("connected to PostgreSQL").await;

    assert!(!daemon.log().contains("s3cret"), "{}", daemon.log());
}

#[tokio::test]
async fn rows_are_delivered_on_the_first_attempt_after_a_server_was_away() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let (postgres, rabbitmq) = world.ports();
    let (to_postgres, to_rabbitmq) = (Proxy::start(0, postgres).await, Proxy::start(0, rabbitmq).await);
    let mut daemon = world
        .launch()
        .with("TIDINGS_SWEEP_MS", 600_000)
        .with("TIDINGS_DATABASE_URL", database_url(to_postgres.port, &world.name))
        .with("TIDINGS_AMQP_URL", amqp_url(to_rabbitmq.port, &world.name))
        .start_ready()
        .await;
    for (proxy, line) in
        [(&to_postgres, "lost the connection for notifications"), (&to_rabbitmq, "lost the connection to RabbitMQ")]
    {
        proxy.set(Mode::Cut);
        daemon.wait_for_line(line).await;
        let id: uuid::Uuid =
            world.value(r#"SELECT tidings.schedule('message', now(), '{"routing_key":"a","body":1}')"#).await;
        proxy.set(Mode::Pass);

        let received = inbox.next().await;
        assert_eq!((received.id(), received.number("tidings-attempt")), (id, 1));
        world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    }
}

#[tokio::test]
async fn an_exchange_or_queue_with_other_arguments_is_a_start_up_error_that_names_the_difference() {
    let world = World::with_plugins(&["message"]).await;
    let channel = world.broker.channel().await;
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    channel
        .exchange_declare("shop".into(), ExchangeKind::Direct, durable, FieldTable::default())
        .await
        .expect("declared");
    let (code, output) = world.launch().with("TIDINGS_EXCHANGE", "shop").run_to_end().await;
    assert!(
        code == 1 && output.contains("the exchange shop") && output.contains("inequivalent arg 'type'"),
        "{code} {output}"
    );

    let mut arguments = FieldTable::default();
    arguments.insert("x-message-ttl".into(), AMQPValue::LongInt(1000));
    channel.queue_declare("tidings.dead".into(), QueueDeclareOptions::durable(), arguments).await.expect("declared");
    let (code, output) = world.launch().run_to_end().await;
    assert!(
        code == 1 && output.contains("the queue tidings.dead") && output.contains("x-message-ttl"),
        "{code} {output}"
    );
}

#[tokio::test]
async fn all_exchanges_and_queues_are_named_after_the_configured_exchange() {
    let world = World::with_plugins(&["message"]).await;
    let _daemon =
        world.launch().with("TIDINGS_EXCHANGE", "shop").with("TIDINGS_QUEUE_TYPE", "quorum").start_ready().await;
    let mut inbox = world.broker.inbox("shop", "q", &["a"], FieldTable::default()).await;

    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key":"a","body":1}')"#).await;

    let received = inbox.next().await;
    assert_eq!((received.delivery.exchange.as_str(), &*received.headers()["tidings-exchange"]), ("shop", "shop"));
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    for queue in ["shop.dead", "shop.parking"] {
        inbox.channel.queue_declare(queue.into(), passive, FieldTable::default()).await.expect(queue);
    }
}

#[tokio::test]
async fn a_rejected_message_becomes_a_dead_letter() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["a"]).await;
    let _daemon = world.start_daemon().await;
    let id: uuid::Uuid =
        world.value(r#"SELECT tidings.schedule('message', now(), '{"routing_key":"a","body":1}')"#).await;
    let received = inbox.next_unacknowledged().await;

    inbox.reject(&received).await;

    let dead = harness::eventually("the dead letter", async || {
        inbox
            .channel
            .basic_get("tidings.dead".into(), lapin::options::BasicGetOptions { no_ack: true })
            .await
            .expect("asked")
    })
    .await;
    let dead_id = dead.delivery.properties.message_id().as_ref().map(ToString::to_string);
    assert_eq!(dead_id, Some(id.to_string()));
}

#[tokio::test]
async fn a_signal_ends_an_idle_daemon_at_once_with_exit_code_0() {
    let world = World::with_plugins(&["message"]).await;
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut daemon = world.start_daemon().await;
        let asked_at = Instant::now();
        daemon.signal(signal);
        assert!(daemon.wait_for_end().await.success());
        // The promise is one second; a machine that runs other tests gets three. The sweep comes only every ten
        // minutes.
        assert!(asked_at.elapsed().as_secs() < 3, "it took {:?}", asked_at.elapsed());
    }
}

#[tokio::test]
async fn sigterm_ends_a_busy_daemon_after_it_finishes_the_rows_in_flight() {
    let world = World::with_plugins(&["misbehave"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let (mut daemon, _) = start_row_in_flight(&world).await;

    daemon.signal(Signal::SIGTERM);

    assert!(daemon.wait_for_end().await.success());
    inbox.next().await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.deliveries WHERE key = 'echo'").await, 1);
}

#[tokio::test]
async fn help_and_version_succeed_and_wrong_usage_has_exit_code_64() {
    let world = World::empty().await;
    let bare = |argument: &str| {
        let mut launch: Launch = world.launch().subcommand(argument);
        for name in ["TIDINGS_DATABASE_URL", "TIDINGS_AMQP_URL", "TIDINGS_PLUGIN_DIR"] {
            launch = launch.without(name);
        }
        launch
    };
    let (code, output) = bare("--help").run_to_end().await;
    assert!(code == 0 && output.contains("migrate"), "{code} {output}");
    let (code, _) = bare("--version").run_to_end().await;
    assert_eq!(code, 0);
    let (code, output) = bare("walk").run_to_end().await;
    assert!(code == 64 && output.contains("walk"), "{code} {output}");
    let (code, output) = bare("migrate").run_to_end().await;
    assert!(code == 64 && output.contains("TIDINGS_DATABASE_URL is not set"), "{code} {output}");
}
