//! Runs every command and statement of the documentation with real servers, in the order of each page.

use std::sync::OnceLock;

use futures_util::StreamExt as _;
use harness::consumer::Broker;
use harness::pages::{ExternalCommand, Page, Reader, Substitute, find_missing_line};
use harness::repository;
use harness::servers::Servers;
use harness::world::World;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicNackOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use tokio::sync::{Mutex, MutexGuard};

/// The pages whose blocks are run.
pub(crate) const PAGES: [&str; 12] = [
    "README.md",
    "host/docs/first-steps.md",
    "host/docs/reference.md",
    "host/docs/recurrences.md",
    "host/docs/intake.md",
    "plugins/README.md",
    "migrations/README.md",
    "host/docs/operations.md",
    "host/docs/growing.md",
    "host/docs/limits.md",
    "host/docs/security.md",
    "host/docs/moving-here.md",
];
/// Pages of which only the links are checked.
const PAGES_WITH_LINKS_ONLY: [&str; 4] =
    ["host/ARCHITECTURE.md", "host/CHANGELOG.md", "host/core/README.md", "tests/bench/README.md"];

/// Commands that the tests cannot run: they need Docker, a second cargo, or a registry. Each names the file that runs
/// it, and the text with which it does.
const EXTERNAL_COMMANDS: &[ExternalCommand] = &[
    in_compose("cp .env.example .env", ".env.example", Substitute::Nothing),
    in_compose(
        "docker compose --profile demo up --build --detach tidings consumer",
        "compose up --detach tidings consumer",
        Substitute::Deployment,
    ),
    in_compose(
        r#"tidings() { docker compose exec tidings tidings "$@"; }"#,
        "compose exec -T tidings tidings",
        Substitute::Nothing,
    ),
    in_compose("docker compose exec postgres psql -U tidings", "compose exec -T postgres psql", Substitute::Nothing),
    in_compose(
        r#"docker compose run --rm --no-deps --user "$(id -u)" --volume "$PWD:/work" --workdir /work tidings plugin new greeting"#,
        r#"compose run --rm --no-deps --user "$(id -u)" --volume "$dir:/work" --workdir /work tidings plugin new greeting"#,
        Substitute::Shell("tidings plugin new greeting"),
    ),
    in_compose(
        r#"docker run --rm --user "$(id -u)" --volume "$PWD/greeting:/work" --workdir /work rust:1.95-bookworm sh -c 'rustup target add wasm32-wasip2 && cargo build --release --target wasm32-wasip2'"#,
        r#"docker run --rm --user "$(id -u)" --volume "$dir/greeting:/work" --workdir /work rust:1.95-bookworm sh -c 'rustup target add wasm32-wasip2 && cargo build --release --target wasm32-wasip2'"#,
        Substitute::Shell("(cd greeting && cargo build --release --target wasm32-wasip2)"),
    ),
    in_file("promtool check rules host/deploy/alerts.yml", "host/deploy/alerts.yml", "promtool check rules alerts.yml"),
    in_file(
        "promtool test rules host/deploy/alerts.test.yml",
        "host/deploy/alerts.yml",
        "promtool test rules alerts.test.yml",
    ),
    in_file("rustup target add wasm32-wasip2", "tests/testkit/src/build.rs", "rustup target add"),
    in_file("npm install @bytecodealliance/jco@1.17.9", "tests/testkit/src/build/languages.rs", "\"ci\", \"--silent\""),
    in_file(
        "npx jco componentize greeting.js --wit wit -n plugin --disable http fetch-event clocks random -o greeting-js.wasm",
        "tests/testkit/src/build/languages.rs",
        r#"["--disable", "http", "fetch-event", "clocks", "random", "-o"]"#,
    ),
    in_file(
        "pip install componentize-py==0.25.1",
        "tests/fixtures/languages/requirements.txt",
        "componentize-py==0.25.1",
    ),
    in_file(
        "componentize-py -d wit -w plugin componentize --stub-wasi greeting_py -o greeting-py.wasm",
        "tests/testkit/src/build/languages.rs",
        r#"["-w", "plugin", "componentize", "--stub-wasi", "-p"]"#,
    ),
    in_file("touch host/src/store/mod.rs", "tests/it/on_time/queries.rs", "migrations/README.md"),
    in_file(
        "DATABASE_URL=postgres://… SQLX_OFFLINE_DIR=$PWD/.sqlx cargo check --package tidings",
        "tests/it/on_time/queries.rs",
        "migrations/README.md",
    ),
];

const fn in_compose(command: &'static str, text: &'static str, substitute: Substitute) -> ExternalCommand {
    ExternalCommand { command, file: "tests/compose/run", text, substitute }
}

const fn in_file(command: &'static str, file: &'static str, text: &'static str) -> ExternalCommand {
    ExternalCommand { command, file, text, substitute: Substitute::Nothing }
}

/// The servers for readers of pages, and a lock: readers create users and roles, so only one may run at a time.
async fn lock_servers() -> (&'static Servers, MutexGuard<'static, ()>) {
    static SERVERS: OnceLock<Servers> = OnceLock::new();
    static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());
    let guard = ONE_AT_A_TIME.lock().await;
    let start = || SERVERS.get_or_init(|| Servers::start_private().expect("servers"));
    (tokio::task::spawn_blocking(start).await.expect("started"), guard)
}

pub(crate) fn pages() -> Vec<Page> {
    PAGES.into_iter().chain(PAGES_WITH_LINKS_ONLY).map(Page::read).collect()
}

/// Fails with all mistakes at once, if there are any.
pub(crate) fn fail_on_mistakes(mistakes: &[String]) {
    assert!(mistakes.is_empty(), "{}", mistakes.join("\n"));
}

#[tokio::test]
async fn a_user_who_follows_the_readme_and_the_reference_schedules_moves_and_cancels_a_row() {
    let (servers, _guard) = lock_servers().await;
    let world = World::on_servers(servers, &["message"]).await;
    let mut reader = Reader::new(&world, servers, EXTERNAL_COMMANDS);
    reader.follow(&Page::read("README.md")).await;
    world
        .wait_until("SELECT due_at > now() + interval '2 days' FROM tidings.schedules WHERE key = 'feedback 42'")
        .await;
    reader.follow(&Page::read("host/docs/reference.md")).await;
    world.wait_until("SELECT count(*) = 0 FROM tidings.schedules").await;
}

#[tokio::test]
async fn a_user_who_follows_the_first_steps_schedules_a_row_adds_a_kind_and_repairs_a_failure() {
    let (servers, _guard) = lock_servers().await;
    let world = World::on_servers(servers, &["message", "game-reminder", "game-status"]).await;
    let mut reader = Reader::new(&world, servers, EXTERNAL_COMMANDS);
    reader.follow(&Page::read("host/docs/first-steps.md")).await;

    // All three messages have had their effects, the last one after it was rejected and replayed.
    world
        .wait_until("SELECT array_agg(routing_key ORDER BY at) = '{hello,greeting.due,hello}' FROM consumer_effects")
        .await;
}

#[tokio::test]
async fn an_author_who_follows_the_page_on_plugins_gets_an_event_from_a_new_plugin() {
    let (servers, _guard) = lock_servers().await;
    let world = World::on_servers(servers, &["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut reader = Reader::new(&world, servers, EXTERNAL_COMMANDS);
    reader.start_daemon().await;
    reader.follow(&Page::read("plugins/README.md")).await;
    assert_eq!(inbox.next().await.delivery.routing_key.as_str(), "greeting.due");
}

#[tokio::test]
async fn every_command_of_the_page_on_migrations_is_run_by_another_test() {
    let (servers, _guard) = lock_servers().await;
    let world = World::on_servers(servers, &[]).await;
    Reader::new(&world, servers, EXTERNAL_COMMANDS).follow(&Page::read("migrations/README.md")).await;
}

#[tokio::test]
async fn an_operator_who_follows_the_page_on_operations_sees_what_it_shows() {
    let (servers, _guard) = lock_servers().await;
    let world = World::on_servers(servers, &["message", "game-reminder"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut reader = Reader::new(&world, servers, EXTERNAL_COMMANDS);
    reader.start_daemon().await;
    // The page shows a deployment with a history.
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key": "hello", "body": 1}')"#).await;
    inbox.next().await;
    world.wait_until("SELECT count(*) = 1 FROM tidings.deliveries").await;
    reader.follow(&Page::read("host/docs/operations.md")).await;
}

#[tokio::test]
async fn an_operator_who_follows_the_page_on_growing_sees_what_it_shows() {
    let (servers, _guard) = lock_servers().await;
    let world = World::on_servers(servers, &[]).await;
    Reader::new(&world, servers, EXTERNAL_COMMANDS).follow(&Page::read("host/docs/growing.md")).await;
}

#[tokio::test]
async fn a_user_who_follows_the_page_on_limits_sees_what_it_shows() {
    let (servers, _guard) = lock_servers().await;
    let world = World::on_servers(servers, &["message"]).await;
    let _inbox = world.inbox(&["#"]).await;
    let mut reader = Reader::new(&world, servers, EXTERNAL_COMMANDS);
    reader.start_daemon().await;
    reader.follow(&Page::read("host/docs/limits.md")).await;
}

#[tokio::test]
async fn a_team_that_follows_the_page_on_moving_here_sees_what_it_shows() {
    let (servers, _guard) = lock_servers().await;
    let world = World::on_servers(servers, &["message"]).await;
    Reader::new(&world, servers, EXTERNAL_COMMANDS).follow(&Page::read("host/docs/moving-here.md")).await;
}

#[tokio::test]
async fn a_user_who_follows_the_page_on_recurrences_sees_what_it_shows() {
    let (servers, _guard) = lock_servers().await;
    let world = World::on_servers(servers, &["message"]).await;
    let mut reader = Reader::new(&world, servers, EXTERNAL_COMMANDS);
    reader.start_daemon().await;
    reader.follow(&Page::read("host/docs/recurrences.md")).await;
}

#[tokio::test]
async fn every_block_of_the_page_on_intakes_runs() {
    let (servers, _guard) = lock_servers().await;
    let world = World::on_servers(servers, &["message"]).await;
    let mut reader = Reader::new(&world, servers, EXTERNAL_COMMANDS);
    reader.follow(&Page::read("host/docs/intake.md")).await;
}

/// With the permissions of the page, the daemon delivers and replays and the doctor is satisfied, and a consumer can
/// declare, consume and reject.
#[tokio::test]
async fn the_permissions_of_the_page_on_security_are_all_that_a_daemon_and_a_consumer_need() {
    let (servers, _guard) = lock_servers().await;
    let world = World::on_servers(servers, &["message"]).await;
    let mut reader = Reader::new(&world, servers, EXTERNAL_COMMANDS);
    reader.start_daemon().await;
    reader.follow(&Page::read("host/docs/security.md")).await;

    let (_, rabbitmq) = world.ports();
    let broker = Broker::connect(&format!("amqp://shop_app:change-me@127.0.0.1:{rabbitmq}/{}", world.name)).await;
    let channel = broker.channel().await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("tidings.dlx".into()));
    let nothing = FieldTable::default();
    let declared = channel.queue_declare("shop.orders".into(), QueueDeclareOptions::durable(), arguments).await;
    declared.expect("its queue is declared");
    let options = QueueBindOptions::default();
    let bound = channel.queue_bind("shop.orders".into(), "tidings".into(), "#".into(), options, nothing.clone()).await;
    bound.expect("its queue is bound");
    let options = BasicConsumeOptions::default();
    let mut consumer =
        channel.basic_consume("shop.orders".into(), "".into(), options, nothing).await.expect("it is consumed");
    let (code, output) = reader
        .shell(r#"psql "postgres://shop_app@$PGHOST:$PGPORT/$PGDATABASE" -c "SELECT tidings.schedule('message', now(), '{\"routing_key\": \"k\", \"body\": 1}')""#)
        .run_to_end()
        .await;
    assert_eq!(code, 0, "{output}");
    let delivery = consumer.next().await.expect("the consumer goes on").expect("the message");
    delivery.nack(BasicNackOptions { requeue: false, multiple: false }).await.expect("rejected");

    for command in ["dead list", "dead replay --dry-run", "parked list", "doctor"] {
        let (code, output) = reader.shell(&format!("tidings {command}")).run_to_end().await;
        assert!(code == 0 && !output.contains("FAIL"), "{command}: {output}");
    }
    // The daemon itself may be making a pass, so each command is repeated until it succeeds.
    let until = async |command: &str, comes_to: &str| {
        harness::eventually(command, async || {
            let (_, output) = reader.shell(command).run_to_end().await;
            output.contains(comes_to).then_some(())
        })
        .await;
    };
    until("tidings dead replay", "1 replayed").await;
    let again = consumer.next().await.expect("the consumer goes on").expect("the letter");
    again.nack(BasicNackOptions { requeue: false, multiple: false }).await.expect("rejected");
    until("tidings dead replay --replay-max 1", "1 parked").await;
    until("tidings parked list", "shop.orders").await;
    until("tidings parked retry --all", "1 letters").await;
    let again = consumer.next().await.expect("the consumer goes on").expect("the letter");
    again.ack(BasicAckOptions::default()).await.expect("acknowledged");
}

#[test]
fn every_command_that_is_not_run_here_is_run_in_the_listed_file_and_occurs_in_a_page() {
    let commands: Vec<String> = pages().iter().flat_map(Page::blocks).flat_map(|block| block.commands()).collect();
    let mut mistakes = Vec::new();
    for external in EXTERNAL_COMMANDS {
        let text = std::fs::read_to_string(repository().join(external.file)).expect(external.file);
        if !text.contains(external.text) {
            mistakes.push(format!("{} does not run {}", external.file, external.text));
        }
        if !commands.iter().any(|line| external.matches(line)) {
            mistakes.push(format!("no page has the command {}", external.command));
        }
    }
    fail_on_mistakes(&mistakes);
}

#[test]
fn output_may_differ_from_a_page_only_in_numbers_ids_and_times() {
    let output = "ok    a notification takes 12.5 ms\nwaits until 2031-01-02T03:04:05Z: no hurry\n kind  | id\n-------+------\n a     | 0199a6b2-1c2d-7000-8000-000000000001\n";
    for shown in [
        "ok    a notification takes 0.8 ms",
        "waits until 2026-12-24T18:00:10.123Z: no hurry",
        "waits until …: no hurry",
        "ok … takes 0.8 ms\n…\n kind | id\n------+----\n a | 01a202d8-434a-771c-b8e7-f145e9a4ba20",
    ] {
        assert_eq!(find_missing_line(shown, output), None);
    }
    for shown in [
        "ok    a notification takes 0.8 s",
        "kind",
        "waits until tomorrow",
        " kind | id\nok … ms",
        "FAIL …",
        "ok … takes 0.8",
    ] {
        assert!(find_missing_line(shown, output).is_some(), "{shown}");
    }
}

#[test]
fn every_block_of_a_page_has_a_fence() {
    let mut mistakes = Vec::new();
    for page in PAGES.map(Page::read) {
        let mut before = "";
        for (line, text) in page.prose() {
            if before.is_empty() && text.starts_with("    ") {
                mistakes.push(format!("{}:{line}: a block without a fence is not run", page.path));
            }
            before = text;
        }
    }
    fail_on_mistakes(&mistakes);
}
