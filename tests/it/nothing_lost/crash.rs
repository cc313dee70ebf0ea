//! The daemon killed at each step between claim and commit, and of a pass: the row is delivered all the same, and a second
//! copy of its message exists only where nobody could know of the first.

use harness::amqp_proxy::{AmqpProxy, Method, Verdict};
use harness::consumer::Inbox;
use harness::pg_proxy::{Fate, PgProxy};
use harness::world::{World, amqp_url, database_url};
use nix::sys::signal::Signal;
use tokio::sync::mpsc;

use crate::dead_letters::replay::{no_pass_at_start, once, pass_at_start, reject, send, until_waiting, waiting};

/// A step of a delivery or of a pass, at which everything stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The database executes a statement with this in it, and nobody hears of it.
    Answer(&'static str),
    /// A statement with this in it never arrives.
    Statement(&'static str),
    /// A method never arrives.
    Method(Method),
}

const CLAIM: &str = "FOR UPDATE SKIP LOCKED";
const SETTLE: &str = "INSERT INTO tidings.deliveries";
const COMMIT: &str = "COMMIT";
const PASS: &str = "INSERT INTO tidings.passes";

/// Runs a daemon until it is at `step`, and kills it there.
async fn killed_at(world: &World, step: Step) {
    let (reached, mut at) = mpsc::unbounded_channel();
    let (postgres_port, rabbitmq_port) = world.ports();
    let tell = reached.clone();
    let postgres = PgProxy::start(postgres_port, move |statement| match step {
        Step::Answer(part) if statement.contains(part) => {
            let _ = tell.send(());
            Fate::LoseReply
        }
        Step::Statement(part) if statement.contains(part) => {
            let _ = tell.send(());
            Fate::Hang
        }
        _ => Fate::Pass,
    })
    .await;
    let rabbitmq = AmqpProxy::start(rabbitmq_port, move |method| {
        if step == Step::Method(method) {
            let _ = reached.send(());
            Verdict::Hang
        } else {
            Verdict::Pass
        }
    })
    .await;
    let mut daemon = once(world)
        .with("TIDINGS_DATABASE_URL", database_url(postgres.port, &world.name))
        .with("TIDINGS_AMQP_URL", amqp_url(rabbitmq.port, &world.name))
        .ready()
        .await;
    at.recv().await.expect("it gets there");
    daemon.signal(Signal::SIGKILL);
    daemon.ended().await;
}

/// How many copies of its message a row has in the end.
async fn copies_of_a_row(step: Step) -> usize {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    no_pass_at_start(&world).await;
    let id = send(&world, r#"{"routing_key": "k", "body": 1}"#).await;
    killed_at(&world, step).await;
    // What the database was told before the connection broke, it may still be doing.
    world.until("SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'tidings')").await;

    let daemon = once(&world).ready().await;
    world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    assert!(daemon.stop().await.success());
    let history =
        format!("SELECT count(*) = 1 AND bool_and(id = '{id}' AND outcome = 'delivered') FROM tidings.deliveries");
    assert!(world.value::<bool>(&history).await);
    copies(&world, &mut inbox, id).await
}

/// Takes what is in the queue, all of which must be copies of `id`.
async fn copies(world: &World, inbox: &mut Inbox, id: uuid::Uuid) -> usize {
    // After all of them.
    let channel = world.broker.channel().await;
    let options = lapin::options::BasicPublishOptions::default();
    let last = channel.basic_publish("".into(), "inbox.k".into(), options, b"last", lapin::BasicProperties::default());
    last.await.expect("written").await.expect("taken");
    let mut copies = 0;
    loop {
        let received = inbox.next().await;
        if received.delivery.data == b"last" {
            return copies;
        }
        assert_eq!(received.id(), id);
        copies += 1;
    }
}

#[tokio::test]
async fn killed_after_the_claim_the_daemon_leaves_the_row_to_the_next() {
    assert_eq!(copies_of_a_row(Step::Answer(CLAIM)).await, 1);
}

#[tokio::test]
async fn killed_before_the_message_is_on_the_wire_the_daemon_leaves_the_row_to_the_next() {
    assert_eq!(copies_of_a_row(Step::Method(Method::Publish)).await, 1);
}

#[tokio::test]
async fn killed_before_it_hears_the_confirm_the_daemon_leaves_a_copy() {
    assert_eq!(copies_of_a_row(Step::Method(Method::Confirm)).await, 2);
}

#[tokio::test]
async fn killed_between_confirm_and_settlement_the_daemon_leaves_a_copy() {
    assert_eq!(copies_of_a_row(Step::Statement(SETTLE)).await, 2);
}

#[tokio::test]
async fn killed_before_the_commit_the_daemon_leaves_a_copy() {
    assert_eq!(copies_of_a_row(Step::Statement(COMMIT)).await, 2);
}

#[tokio::test]
async fn killed_before_it_hears_of_the_commit_the_daemon_leaves_nothing_behind() {
    assert_eq!(copies_of_a_row(Step::Answer(COMMIT)).await, 1);
}

/// How many copies of a dead letter come back in the end.
async fn copies_of_a_letter(step: Step) -> usize {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    no_pass_at_start(&world).await;
    let daemon = once(&world).ready().await;
    let id = send(&world, r#"{"routing_key": "k", "body": 1}"#).await;
    reject(&mut inbox).await;
    until_waiting(&world, "tidings.dead", 1).await;
    assert!(daemon.stop().await.success());
    pass_at_start(&world).await;
    killed_at(&world, step).await;
    until_waiting(&world, "tidings.dead", 1).await;

    pass_at_start(&world).await;
    let mut daemon = once(&world).ready().await;
    daemon.wait_for_line("took back dead letters replayed=1").await;
    assert!(daemon.stop().await.success());
    assert_eq!(waiting(&world, "tidings.dead").await, 0);
    copies(&world, &mut inbox, id).await
}

#[tokio::test]
async fn killed_before_a_pass_is_noted_the_daemon_leaves_the_letter() {
    assert_eq!(copies_of_a_letter(Step::Statement(PASS)).await, 1);
}

#[tokio::test]
async fn killed_while_it_fetches_the_daemon_leaves_the_letter() {
    assert_eq!(copies_of_a_letter(Step::Method(Method::Get)).await, 1);
}

#[tokio::test]
async fn killed_before_it_sends_a_letter_on_the_daemon_leaves_it() {
    assert_eq!(copies_of_a_letter(Step::Method(Method::Publish)).await, 1);
}

#[tokio::test]
async fn killed_before_it_hears_that_a_letter_arrived_the_daemon_leaves_a_copy() {
    assert_eq!(copies_of_a_letter(Step::Method(Method::Confirm)).await, 2);
}

#[tokio::test]
async fn killed_before_it_acknowledges_a_letter_the_daemon_leaves_a_copy() {
    assert_eq!(copies_of_a_letter(Step::Method(Method::Ack)).await, 2);
}
