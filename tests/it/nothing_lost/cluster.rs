//! A RabbitMQ cluster of three nodes with quorum queues: when a node is killed, frozen, cut off from the others or restarted, with
//! the leaders of the queues on it, rows and dead letters are neither lost nor multiplied.

use std::collections::BTreeSet;
use std::time::Duration;

use harness::cluster::MoreNodes;
use harness::consumer::{Inbox, Received};
use harness::daemon::Daemon;
use harness::eventually_within;
use harness::servers::Servers;
use harness::world::World;
use lapin::options::{BasicAckOptions, BasicNackOptions};
use lapin::types::{AMQPValue, FieldTable};
use nix::sys::signal::Signal;
use uuid::Uuid;

use crate::dead_letters::replay::{count_messages, launch_with_frequent_passes, schedule_message};
use crate::operations::health::wait_until_ready;

/// Electing a leader and connecting to another node take seconds; a busy machine may take longer.
const GOES_ON_WITHIN: Duration = Duration::from_mins(1);
/// The queue of the consumer.
const QUEUE: &str = "inbox";

/// What happens to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Killed,
    Frozen,
    CutOff,
    Restarted,
}

/// Three nodes, the first of which is that of the world, and a daemon that knows all of them.
struct Trio {
    world: World,
    servers: Servers,
    nodes: MoreNodes,
    daemon: Daemon,
    inbox: Inbox,
}

async fn start_trio() -> Trio {
    let servers = Servers::start_private_async().await;
    let (servers, nodes) = tokio::task::spawn_blocking(move || {
        let nodes = servers.add_nodes(2).expect("two more nodes");
        (servers, nodes)
    })
    .await
    .expect("no panic");
    let world = World::on_servers(&servers, &["message"]).await;
    let hosts = [world.ports().1, nodes.port(1), nodes.port(2)].map(|port| format!("127.0.0.1:{port}")).join(",");
    let launch = launch_with_frequent_passes(&world)
        .with("TIDINGS_QUEUE_TYPE", "quorum")
        .with("TIDINGS_AMQP_URL", format!("amqp://guest:guest@{hosts}/{}", world.name));
    let daemon = launch.start_ready().await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("tidings.dlx".into()));
    let inbox = world.broker.inbox("tidings", QUEUE, &["k"], arguments).await;
    Trio { world, servers, nodes, daemon, inbox }
}

impl Trio {
    /// Makes a node the leader of these queues.
    fn lead(&self, node: usize, queues: &[&str]) {
        for queue in queues {
            let name = format!("rabbit_misc:r(<<\"{}\">>, queue, <<\"{queue}\">>)", self.world.name);
            let transfer = format!(
                "{{ok, Q}} = rabbit_amqqueue:lookup({name}), rabbit_quorum_queue:transfer_leadership(Q, '{}').",
                self.nodes.name(node)
            );
            self.servers.eval_on_rabbitmq(&transfer).expect("another leader");
        }
    }

    async fn begin(&mut self, fault: Fault, node: usize) {
        match fault {
            Fault::Killed => self.nodes.signal(node, Signal::SIGKILL).expect("killed"),
            Fault::Frozen => self.nodes.signal(node, Signal::SIGSTOP).expect("frozen"),
            Fault::CutOff => self.nodes.cut_off(node, &self.others(node), true).expect("cut off"),
            Fault::Restarted => self.nodes.signal(node, Signal::SIGTERM).expect("told to stop"),
        }
    }

    fn end(&mut self, fault: Fault, node: usize) {
        match fault {
            Fault::Killed | Fault::Restarted => self.nodes.restart(node, Signal::SIGKILL).expect("it starts again"),
            Fault::Frozen => self.nodes.signal(node, Signal::SIGCONT).expect("goes on"),
            Fault::CutOff => self.nodes.cut_off(node, &self.others(node), false).expect("joined again"),
        }
    }

    fn others(&self, node: usize) -> Vec<String> {
        vec![format!("t{}@localhost", self.world.ports().1), self.nodes.name(3 - node)]
    }

    /// Waits for a message with this id, and acknowledges it and all others that come meanwhile.
    async fn wait_for(&mut self, id: Uuid, replay: i64) -> Received {
        let inbox = &mut self.inbox;
        eventually_within(GOES_ON_WITHIN, &format!("the message {id} with tidings-replay {replay}"), async || {
            let received = inbox.next_within(Duration::from_secs(1)).await?;
            received.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
            (received.id() == id && received.number("tidings-replay") >= replay).then_some(received)
        })
        .await
    }

    /// Waits for a message with this id and rejects it.
    async fn reject(&mut self, id: Uuid) {
        let inbox = &mut self.inbox;
        let rejected = async || {
            let received = inbox.next_within(Duration::from_secs(1)).await?;
            let is_it = received.id() == id;
            let options = BasicNackOptions { requeue: false, multiple: false };
            let answered = if is_it {
                received.delivery.nack(options).await
            } else {
                received.delivery.ack(BasicAckOptions::default()).await
            };
            answered.expect("answered");
            is_it.then_some(())
        };
        eventually_within(GOES_ON_WITHIN, &format!("the message {id}"), rejected).await;
    }
}

const MESSAGE: &str = r#"{"routing_key": "k", "body": 1}"#;

async fn survives(fault: Fault) {
    let mut trio = start_trio().await;
    let mut ids = BTreeSet::new();
    for node in [1, 2] {
        // A row and a dead letter before the fault, and both again during it, with all leaders on the node.
        let before = schedule_message(&trio.world, MESSAGE).await;
        trio.wait_for(before, 0).await;
        trio.lead(node, &["tidings.dead", "tidings.parking", QUEUE]);
        let dead = schedule_message(&trio.world, MESSAGE).await;
        trio.reject(dead).await;

        trio.begin(fault, node).await;
        trio.wait_for(dead, 1).await;
        let during = schedule_message(&trio.world, MESSAGE).await;
        trio.reject(during).await;
        trio.wait_for(during, 1).await;
        wait_until_ready(&mut trio.daemon).await;

        trio.end(fault, node);
        let after = schedule_message(&trio.world, MESSAGE).await;
        trio.wait_for(after, 0).await;
        ids.extend([before, dead, during, after]);
    }
    trio.world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    wait_until_ready(&mut trio.daemon).await;
    // What comes late is a second copy of one of them, and passes over the dead letters make no more of it.
    while let Some(late) = trio.inbox.next_within(Duration::from_secs(3)).await {
        assert!(ids.remove(&late.id()), "more than one late copy of {}", late.id());
        late.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
    }
    for queue in ["tidings.dead", "tidings.parking", QUEUE] {
        assert_eq!(count_messages(&trio.world, queue).await, 0, "{queue}");
    }
}

#[tokio::test]
async fn rows_and_dead_letters_survive_the_killing_of_the_node_that_leads_their_queues() {
    survives(Fault::Killed).await;
}

#[tokio::test]
async fn rows_and_dead_letters_survive_the_freezing_of_the_node_that_leads_their_queues() {
    survives(Fault::Frozen).await;
}

#[tokio::test]
async fn rows_and_dead_letters_survive_a_partition_between_the_leader_of_their_queues_and_the_other_nodes() {
    survives(Fault::CutOff).await;
}

#[tokio::test]
async fn rows_and_dead_letters_survive_a_rolling_restart_of_the_nodes() {
    survives(Fault::Restarted).await;
}
