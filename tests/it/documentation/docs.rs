//! The documentation: every command and statement of its pages is run, against real servers, in the order of the page.

use std::sync::OnceLock;

use futures_util::StreamExt as _;
use harness::consumer::Broker;
use harness::pages::{Elsewhere, Here, Page, Reader, missing};
use harness::repository;
use harness::servers::Servers;
use harness::world::World;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicNackOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use tokio::sync::{Mutex, MutexGuard};

/// The pages whose blocks are run.
pub(crate) const PAGES: [&str; 8] = [
    "README.md",
    "host/docs/first-steps.md",
    "host/docs/reference.md",
    "plugins/README.md",
    "migrations/README.md",
    "host/docs/operations.md",
    "host/docs/security.md",
    "host/docs/moving-here.md",
];
/// Pages with links alone.
const OTHERS: [&str; 4] = ["host/ARCHITECTURE.md", "host/CHANGELOG.md", "host/core/README.md", "tests/bench/README.md"];

/// What cannot be run here: no Docker, no other cargo beside us, no registry. Each with what runs it instead, as it is written
/// there.
const ELSEWHERE: &[Elsewhere] = &[
    compose("cp .env.example .env", ".env.example", Here::Nothing),
    compose(
        "docker compose --profile demo up --build --detach tidings consumer",
        "compose up --detach tidings consumer",
        Here::Deployment,
    ),
    compose(
        r#"tidings() { docker compose exec tidings tidings "$@"; }"#,
        "compose exec -T tidings tidings",
        Here::Nothing,
    ),
    compose("docker compose exec postgres psql -U tidings", "compose exec -T postgres psql", Here::Nothing),
    compose(
        r#"docker compose run --rm --no-deps --user "$(id -u)" --volume "$PWD:/work" --workdir /work tidings plugin new greeting"#,
        r#"compose run --rm --no-deps --user "$(id -u)" --volume "$dir:/work" --workdir /work tidings plugin new greeting"#,
        Here::Shell("tidings plugin new greeting"),
    ),
    compose(
        r#"docker run --rm --user "$(id -u)" --volume "$PWD/greeting:/work" --workdir /work rust:1.95-bookworm sh -c 'rustup target add wasm32-wasip2 && cargo build --release --target wasm32-wasip2'"#,
        r#"docker run --rm --user "$(id -u)" --volume "$dir/greeting:/work" --workdir /work rust:1.95-bookworm sh -c 'rustup target add wasm32-wasip2 && cargo build --release --target wasm32-wasip2'"#,
        Here::Shell("(cd greeting && cargo build --release --target wasm32-wasip2)"),
    ),
    elsewhere(
        "promtool check rules host/deploy/alerts.yml",
        "host/deploy/alerts.yml",
        "promtool check rules alerts.yml",
    ),
    elsewhere(
        "promtool test rules host/deploy/alerts.test.yml",
        "host/deploy/alerts.yml",
        "promtool test rules alerts.test.yml",
    ),
    elsewhere("rustup target add wasm32-wasip2", "tests/testkit/src/build.rs", "rustup target add"),
    elsewhere(
        "npm install @bytecodealliance/jco@1.17.9",
        "tests/testkit/src/build/languages.rs",
        "\"ci\", \"--silent\"",
    ),
    elsewhere(
        "npx jco componentize greeting.js --wit wit -n plugin --disable http fetch-event clocks random -o greeting-js.wasm",
        "tests/testkit/src/build/languages.rs",
        r#"["--disable", "http", "fetch-event", "clocks", "random", "-o"]"#,
    ),
    elsewhere(
        "pip install componentize-py==0.25.1",
        "tests/fixtures/languages/requirements.txt",
        "componentize-py==0.25.1",
    ),
    elsewhere(
        "componentize-py -d wit -w plugin componentize --stub-wasi greeting_py -o greeting-py.wasm",
        "tests/testkit/src/build/languages.rs",
        r#"["-w", "plugin", "componentize", "--stub-wasi", "-p"]"#,
    ),
    elsewhere("touch host/src/store/mod.rs", "tests/it/on_time/queries.rs", "migrations/README.md"),
    elsewhere(
        "DATABASE_URL=postgres://… SQLX_OFFLINE_DIR=$PWD/.sqlx cargo check --package tidings",
        "tests/it/on_time/queries.rs",
        "migrations/README.md",
    ),
];

const fn compose(command: &'static str, as_: &'static str, here: Here) -> Elsewhere {
    Elsewhere { command, runs: "tests/compose/run", as_, here }
}

const fn elsewhere(command: &'static str, runs: &'static str, as_: &'static str) -> Elsewhere {
    Elsewhere { command, runs, as_, here: Here::Nothing }
}

/// Servers for the readers of pages, who make users and roles, and one of them at a time.
async fn servers() -> (&'static Servers, MutexGuard<'static, ()>) {
    static SERVERS: OnceLock<Servers> = OnceLock::new();
    static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());
    let guard = ONE_AT_A_TIME.lock().await;
    let start = || SERVERS.get_or_init(|| Servers::private().expect("servers"));
    (tokio::task::spawn_blocking(start).await.expect("started"), guard)
}

pub(crate) fn pages() -> Vec<Page> {
    PAGES.into_iter().chain(OTHERS).map(Page::read).collect()
}

/// What is wrong, all of it at once.
pub(crate) fn assert_none(mistakes: &[String]) {
    assert!(mistakes.is_empty(), "{}", mistakes.join("\n"));
}

#[tokio::test]
async fn a_user_who_follows_the_readme_and_the_reference_schedules_moves_and_cancels_a_row() {
    let (servers, _guard) = servers().await;
    let world = World::on(servers, &["message"]).await;
    let mut reader = Reader::new(&world, servers, ELSEWHERE);
    reader.follow(&Page::read("README.md")).await;
    world.until("SELECT due_at > now() + interval '2 days' FROM tidings.schedules WHERE key = 'feedback 42'").await;
    reader.follow(&Page::read("host/docs/reference.md")).await;
    world.until("SELECT count(*) = 0 FROM tidings.schedules").await;
}

#[tokio::test]
async fn a_user_who_follows_the_first_steps_schedules_a_row_adds_a_kind_and_repairs_a_failure() {
    let (servers, _guard) = servers().await;
    let world = World::on(servers, &["message", "game-reminder", "game-status"]).await;
    let mut reader = Reader::new(&world, servers, ELSEWHERE);
    reader.follow(&Page::read("host/docs/first-steps.md")).await;

    // All three have had their effect, the last after it was rejected.
    world.until("SELECT array_agg(routing_key ORDER BY at) = '{hello,greeting.due,hello}' FROM consumer_effects").await;
}

#[tokio::test]
async fn an_author_who_follows_the_page_comes_from_nothing_to_a_live_event() {
    let (servers, _guard) = servers().await;
    let world = World::on(servers, &["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut reader = Reader::new(&world, servers, ELSEWHERE);
    reader.start_daemon().await;
    reader.follow(&Page::read("plugins/README.md")).await;
    assert_eq!(inbox.next().await.delivery.routing_key.as_str(), "greeting.due");
}

#[tokio::test]
async fn the_commands_of_the_page_on_migrations_are_run_elsewhere() {
    let (servers, _guard) = servers().await;
    let world = World::on(servers, &[]).await;
    Reader::new(&world, servers, ELSEWHERE).follow(&Page::read("migrations/README.md")).await;
}

#[tokio::test]
async fn an_operator_who_follows_the_page_on_operations_sees_what_it_shows() {
    let (servers, _guard) = servers().await;
    let world = World::on(servers, &["message", "game-reminder"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut reader = Reader::new(&world, servers, ELSEWHERE);
    reader.start_daemon().await;
    // A deployment with a history.
    world.sql(r#"SELECT tidings.schedule('message', now(), '{"routing_key": "hello", "body": 1}')"#).await;
    inbox.next().await;
    world.until("SELECT count(*) = 1 FROM tidings.deliveries").await;
    reader.follow(&Page::read("host/docs/operations.md")).await;
}

#[tokio::test]
async fn a_team_that_follows_the_page_on_moving_here_sees_what_it_shows() {
    let (servers, _guard) = servers().await;
    let world = World::on(servers, &["message"]).await;
    Reader::new(&world, servers, ELSEWHERE).follow(&Page::read("host/docs/moving-here.md")).await;
}

/// The daemon runs, delivers, takes dead letters back and satisfies the doctor with the permissions of the page, and a
/// consumer does its work with those of its own.
#[tokio::test]
async fn the_permissions_of_the_page_on_security_are_all_that_a_daemon_and_a_consumer_need() {
    let (servers, _guard) = servers().await;
    let world = World::on(servers, &["message"]).await;
    let mut reader = Reader::new(&world, servers, ELSEWHERE);
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
        .finished()
        .await;
    assert_eq!(code, 0, "{output}");
    let delivery = consumer.next().await.expect("the consumer goes on").expect("the message");
    delivery.nack(BasicNackOptions { requeue: false, multiple: false }).await.expect("rejected");

    for command in ["dead list", "dead replay --dry-run", "parked list", "doctor"] {
        let (code, output) = reader.shell(&format!("tidings {command}")).finished().await;
        assert!(code == 0 && !output.contains("FAIL"), "{command}: {output}");
    }
    // The daemon's own pass may be at work.
    let until = async |command: &str, comes_to: &str| {
        harness::eventually(command, async || {
            let (_, output) = reader.shell(command).finished().await;
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
fn what_cannot_be_run_here_is_run_where_the_list_says_and_the_list_has_nothing_else() {
    let commands: Vec<String> = pages().iter().flat_map(Page::blocks).flat_map(|block| block.commands()).collect();
    let mut mistakes = Vec::new();
    for elsewhere in ELSEWHERE {
        let text = std::fs::read_to_string(repository().join(elsewhere.runs)).expect(elsewhere.runs);
        if !text.contains(elsewhere.as_) {
            mistakes.push(format!("{} does not run {}", elsewhere.runs, elsewhere.as_));
        }
        if !commands.iter().any(|line| elsewhere.is(line)) {
            mistakes.push(format!("no page has the command {}", elsewhere.command));
        }
    }
    assert_none(&mistakes);
}

#[test]
fn what_a_page_shows_is_an_example_in_its_numbers_and_times_and_in_nothing_else() {
    let output = "ok    a notification takes 12.5 ms\nwaits until 2031-01-02T03:04:05Z: no hurry\n kind  | id\n-------+------\n a     | 0199a6b2-1c2d-7000-8000-000000000001\n";
    for shown in [
        "ok    a notification takes 0.8 ms",
        "waits until 2026-12-24T18:00:10.123Z: no hurry",
        "waits until …: no hurry",
        "ok … takes 0.8 ms\n…\n kind | id\n------+----\n a | 01a202d8-434a-771c-b8e7-f145e9a4ba20",
    ] {
        assert_eq!(missing(shown, output), None);
    }
    for shown in [
        "ok    a notification takes 0.8 s",
        "kind",
        "waits until tomorrow",
        " kind | id\nok … ms",
        "FAIL …",
        "ok … takes 0.8",
    ] {
        assert!(missing(shown, output).is_some(), "{shown}");
    }
}

#[test]
fn no_block_escapes_the_reader() {
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
    assert_none(&mistakes);
}
