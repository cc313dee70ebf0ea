//! Kills the daemon at each step between claim and commit, and at each step of a pass. The row is delivered in every
//! case, and a second copy of its message exists only where the database could not know of the first.

use harness::amqp_proxy::{AmqpProxy, Method, Verdict};
use harness::consumer::Inbox;
use harness::pg_proxy::{Fate, PgProxy};
use harness::world::{World, amqp_url, database_url};
use nix::sys::signal::Signal;
use tokio::sync::mpsc;

use crate::dead_letters::replay::{
    count_messages, force_pass_at_start, launch_with_hourly_passes, reject_next, schedule_message,
    suppress_pass_at_start, wait_for_message_count,
};

/// The step of a delivery or of a pass at which the daemon is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// PostgreSQL has executed a statement that contains this text, and the daemon never gets the reply.
    Answer(&'static str),
    /// A statement that contains this text never reaches PostgreSQL.
    Statement(&'static str),
    /// This AMQP method never reaches its receiver.
    Method(Method),
}

const CLAIM: &str = "FOR UPDATE SKIP LOCKED";
const SETTLE: &str = "INSERT INTO tidings.deliveries";
const COMMIT: &str = "COMMIT";
const RECORD_PASS: &str = "INSERT INTO tidings.passes";

/// Runs a daemon until it reaches `step`, and kills it there.
async fn kill_daemon_at(world: &World, step: Step) {
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
    let mut daemon = launch_with_hourly_passes(world)
        .with("TIDINGS_DATABASE_URL", database_url(postgres.port, &world.name))
        .with("TIDINGS_AMQP_URL", amqp_url(rabbitmq.port, &world.name))
        .start_ready()
        .await;
    at.recv().await.expect("it gets there");
    daemon.signal(Signal::SIGKILL);
    daemon.wait_for_end().await;
}

/// Kills a daemon at `step`, lets the next one finish the row, and returns how many copies of the message arrived.
async fn count_copies_of_row(step: Step) -> usize {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    suppress_pass_at_start(&world).await;
    let id = schedule_message(&world, r#"{"routing_key": "k", "body": 1}"#).await;
    kill_daemon_at(&world, step).await;
    // PostgreSQL may still be executing the last statement of the killed daemon.
    world.wait_until("SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'tidings')").await;

    let daemon = launch_with_hourly_passes(&world).start_ready().await;
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    assert!(daemon.stop().await.success());
    let history =
        format!("SELECT count(*) = 1 AND bool_and(id = '{id}' AND outcome = 'delivered') FROM tidings.deliveries");
    assert!(world.value::<bool>(&history).await);
    count_copies(&world, &mut inbox, id).await
}

/// Receives all messages in the queue, which must be copies of `id`, and returns their number.
async fn count_copies(world: &World, inbox: &mut Inbox, id: uuid::Uuid) -> usize {
    // A last message, which is behind all others in the queue.
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
async fn a_daemon_killed_after_the_claim_causes_no_second_copy() {
    assert_eq!(count_copies_of_row(Step::Answer(CLAIM)).await, 1);
}

#[tokio::test]
async fn a_daemon_killed_before_it_publishes_causes_no_second_copy() {
    assert_eq!(count_copies_of_row(Step::Method(Method::Publish)).await, 1);
}

#[tokio::test]
async fn a_daemon_killed_before_it_receives_the_confirm_causes_one_second_copy() {
    assert_eq!(count_copies_of_row(Step::Method(Method::Confirm)).await, 2);
}

#[tokio::test]
async fn a_daemon_killed_between_confirm_and_settlement_causes_one_second_copy() {
    assert_eq!(count_copies_of_row(Step::Statement(SETTLE)).await, 2);
}

#[tokio::test]
async fn a_daemon_killed_before_the_commit_causes_one_second_copy() {
    assert_eq!(count_copies_of_row(Step::Statement(COMMIT)).await, 2);
}

#[tokio::test]
async fn a_daemon_killed_before_it_receives_the_reply_to_commit_causes_no_second_copy() {
    assert_eq!(count_copies_of_row(Step::Answer(COMMIT)).await, 1);
}

/// Kills a daemon at `step` of a pass, lets the next one finish it, and returns how many copies of the dead letter
/// arrived.
async fn count_copies_of_dead_letter(step: Step) -> usize {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["k"]).await;
    suppress_pass_at_start(&world).await;
    let daemon = launch_with_hourly_passes(&world).start_ready().await;
    let id = schedule_message(&world, r#"{"routing_key": "k", "body": 1}"#).await;
    reject_next(&mut inbox).await;
    wait_for_message_count(&world, "tidings.dead", 1).await;
    assert!(daemon.stop().await.success());
    force_pass_at_start(&world).await;
    kill_daemon_at(&world, step).await;
    wait_for_message_count(&world, "tidings.dead", 1).await;

    force_pass_at_start(&world).await;
    let mut daemon = launch_with_hourly_passes(&world).start_ready().await;
    daemon.wait_for_line("took back dead letters replayed=1").await;
    assert!(daemon.stop().await.success());
    assert_eq!(count_messages(&world, "tidings.dead").await, 0);
    count_copies(&world, &mut inbox, id).await
}

#[tokio::test]
async fn a_daemon_killed_before_it_records_a_pass_causes_no_second_copy_of_a_dead_letter() {
    assert_eq!(count_copies_of_dead_letter(Step::Statement(RECORD_PASS)).await, 1);
}

#[tokio::test]
async fn a_daemon_killed_while_it_fetches_causes_no_second_copy_of_a_dead_letter() {
    assert_eq!(count_copies_of_dead_letter(Step::Method(Method::Get)).await, 1);
}

#[tokio::test]
async fn a_daemon_killed_before_it_replays_causes_no_second_copy_of_a_dead_letter() {
    assert_eq!(count_copies_of_dead_letter(Step::Method(Method::Publish)).await, 1);
}

#[tokio::test]
async fn a_daemon_killed_before_it_receives_the_confirm_of_a_replay_causes_one_second_copy() {
    assert_eq!(count_copies_of_dead_letter(Step::Method(Method::Confirm)).await, 2);
}

#[tokio::test]
async fn a_daemon_killed_before_it_acknowledges_a_dead_letter_causes_one_second_copy() {
    assert_eq!(count_copies_of_dead_letter(Step::Method(Method::Ack)).await, 2);
}
