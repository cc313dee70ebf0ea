//! A RabbitMQ cluster of three nodes with quorum queues: when the node that leads the queues is killed, rows and dead letters are
//! neither lost nor multiplied.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use harness::cluster::MoreNodes;
use harness::consumer::Inbox;
use harness::daemon::{Daemon, Launch};
use harness::eventually_within;
use harness::servers::Servers;
use harness::world::World;
use lapin::options::BasicAckOptions;
use lapin::types::{AMQPValue, FieldTable};
use nix::sys::signal::Signal;
use uuid::Uuid;

use crate::dead_letters::replay::{count_messages, launch_with_hourly_passes, schedule_message};
use crate::operations::health::wait_until_ready;

/// Electing a leader and connecting to another node take seconds; a busy machine may take longer.
const GOES_ON_WITHIN: Duration = Duration::from_mins(1);
/// The queue of the consumer.
const QUEUE: &str = "inbox";

/// Three nodes, the first of which is that of the world, and a daemon that knows all of them.
struct Trio {
    world: World,
    servers: Servers,
    nodes: MoreNodes,
    launch: Launch,
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
    // Passes begin when a person asks for one, so that dead letters lie in their queue meanwhile.
    let launch = launch_with_hourly_passes(&world)
        .with("TIDINGS_QUEUE_TYPE", "quorum")
        .with("TIDINGS_AMQP_URL", format!("amqp://guest:guest@{hosts}/{}", world.name));
    let daemon = launch.start_ready().await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("tidings.dlx".into()));
    let inbox = world.broker.inbox("tidings", QUEUE, &["k"], arguments).await;
    Trio { world, servers, nodes, launch, daemon, inbox }
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

    /// Schedules a row, and acknowledges its message and all others that come before it.
    async fn deliver_row(&mut self) {
        let (id, inbox) = (schedule_message(&self.world, MESSAGE).await, &mut self.inbox);
        let next = async || {
            let received = inbox.next_within(Duration::from_secs(1)).await?;
            received.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
            (received.id() == id).then_some(())
        };
        eventually_within(GOES_ON_WITHIN, "the message", next).await;
    }

    /// Delivers and rejects rows, until so many dead letters lie in their queue. Returns their ids.
    async fn reject_rows(&mut self, count: u32) -> BTreeSet<Uuid> {
        let mut ids = BTreeSet::new();
        for _ in 0..count {
            ids.insert(schedule_message(&self.world, MESSAGE).await);
        }
        let (mut rejected, inbox) = (BTreeSet::new(), &mut self.inbox);
        let reject = async || {
            let received = inbox.next_within(Duration::from_secs(1)).await?;
            if ids.contains(&received.id()) && rejected.insert(received.id()) {
                inbox.reject(&received).await;
            } else {
                received.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
            }
            (rejected.len() == ids.len()).then_some(())
        };
        eventually_within(GOES_ON_WITHIN, "the messages to reject", reject).await;
        let all_dead = async || (count_messages(&self.world, "tidings.dead").await == count).then_some(());
        eventually_within(GOES_ON_WITHIN, "the dead letters", all_dead).await;
        ids
    }

    /// Lets a command replay the dead letters until each of these has come, and checks that none comes more than twice.
    async fn replay(&mut self, ids: &BTreeSet<Uuid>) {
        let mut came: BTreeMap<Uuid, usize> = BTreeMap::new();
        let began = Instant::now();
        while came.len() < ids.len() {
            assert!(began.elapsed() < GOES_ON_WITHIN, "{} of {} dead letters came back", came.len(), ids.len());
            // It may fail while a leader is elected; then the letters are where they were.
            let _ = self.launch.clone().subcommand("dead").args(["replay"]).run_to_end().await;
            while let Some(received) = self.inbox.next_within(Duration::from_secs(1)).await {
                received.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
                if ids.contains(&received.id()) && received.number("tidings-replay") > 0 {
                    *came.entry(received.id()).or_default() += 1;
                }
            }
        }
        assert!(came.values().all(|copies| *copies <= 2), "{came:?}");
    }
}

const MESSAGE: &str = r#"{"routing_key": "k", "body": 1}"#;

#[tokio::test]
async fn rows_and_dead_letters_survive_the_killing_of_the_node_that_leads_their_queues() {
    let mut trio = start_trio().await;
    for node in [1, 2] {
        trio.deliver_row().await;
        let dead = trio.reject_rows(10).await;
        trio.lead(node, &["tidings.dead", "tidings.parking", QUEUE]);

        trio.nodes.signal(node, Signal::SIGKILL).expect("killed");
        // As soon as the queues have leaders again, rows are delivered, and what is rejected comes back.
        trio.deliver_row().await;
        trio.replay(&dead).await;
        let dead = trio.reject_rows(10).await;
        trio.replay(&dead).await;
        wait_until_ready(&mut trio.daemon).await;

        trio.nodes.restart(node, Signal::SIGKILL).expect("it starts again");
        trio.deliver_row().await;
    }
    trio.world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    wait_until_ready(&mut trio.daemon).await;
    while let Some(late) = trio.inbox.next_within(Duration::from_secs(2)).await {
        late.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
    }
    for queue in ["tidings.dead", "tidings.parking", QUEUE] {
        assert_eq!(count_messages(&trio.world, queue).await, 0, "{queue}");
    }
}
