//! A RabbitMQ cluster of three nodes with quorum queues: when the node that leads the queues is killed, rows and dead letters are
//! neither lost nor multiplied.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use harness::cluster::MoreNodes;
use harness::consumer::Inbox;
use harness::daemon::{Daemon, Launch};
use harness::eventually_within;
use harness::place::RabbitMqSettings;
use harness::servers::Servers;
use harness::world::World;
use lapin::options::BasicAckOptions;
use lapin::types::{AMQPValue, FieldTable};
use nix::sys::signal::Signal;
use uuid::Uuid;

use crate::dead_letters::replay::{count_messages, launch_with_hourly_passes, schedule_message};
use crate::operations::health::wait_until_ready;

/// Electing a leader and connecting to another node take seconds. RabbitMQ 3.10 refuses for up to 45 s more, with nacks, what a new
/// connection publishes to a queue whose leader was killed, and a refused row waits for up to 30 s.
pub(crate) const GOES_ON_WITHIN: Duration = Duration::from_mins(3);
/// The queue of the consumer.
pub(crate) const QUEUE: &str = "inbox";

/// Three nodes, the first of which is that of the world, and a daemon that knows all of them.
pub(crate) struct Trio {
    pub(crate) world: World,
    servers: Servers,
    pub(crate) nodes: MoreNodes,
    launch: Launch,
    pub(crate) daemon: Daemon,
    pub(crate) inbox: Inbox,
}

pub(crate) async fn start_trio() -> Trio {
    start_trio_on(&[0, 1, 2], "").await
}

/// The daemon knows only nodes with these numbers, and `settings` are lines of `rabbitmq.conf`.
pub(crate) async fn start_trio_on(numbers: &[usize], settings: &'static str) -> Trio {
    let (servers, nodes) = tokio::task::spawn_blocking(move || {
        let rabbitmq = RabbitMqSettings { lines: settings, ..RabbitMqSettings::default() };
        let servers = Servers::start_private_with_settings("", rabbitmq).expect("servers");
        let nodes = servers.add_nodes(2).expect("two more nodes");
        (servers, nodes)
    })
    .await
    .expect("no panic");
    let world = World::on_servers(&servers, &["message"]).await;
    let ports = [world.ports().1, nodes.port(1), nodes.port(2)];
    let hosts: Vec<String> = numbers.iter().map(|number| format!("127.0.0.1:{}", ports[*number])).collect();
    let hosts = hosts.join(",");
    // Passes begin when a person asks for one, so that dead letters lie in their queue meanwhile.
    let launch = launch_with_hourly_passes(&world)
        .with("TIDINGS_QUEUE_TYPE", "quorum")
        .with("TIDINGS_AMQP_URL", format!("amqp://guest:guest@{hosts}/{}", world.name));
    let daemon = launch.start_ready().await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    arguments.insert("x-dead-letter-exchange".into(), AMQPValue::LongString("tidings.dlx".into()));
    let inbox = world.broker.inbox("tidings", QUEUE, &["k"], arguments).await;
    let trio = Trio { world, servers, nodes, launch, daemon, inbox };
    // A queue has members only on the nodes that run when it is declared.
    trio.wait_for_nodes().await;
    trio
}

impl Trio {
    /// The name of a node. That with the number 0 belongs to the world.
    fn name(&self, node: usize) -> String {
        if node == 0 { format!("t{}@localhost", self.world.ports().1) } else { self.nodes.name(node) }
    }

    /// Makes a node the leader of these queues.
    pub(crate) fn lead(&self, node: usize, queues: &[&str]) {
        for queue in queues {
            let name = format!("rabbit_misc:r(<<\"{}\">>, queue, <<\"{queue}\">>)", self.world.name);
            let transfer = format!(
                "{{ok, Q}} = rabbit_amqqueue:lookup({name}), rabbit_quorum_queue:transfer_leadership(Q, '{}').",
                self.name(node)
            );
            self.servers.eval_on_rabbitmq(&transfer).expect("another leader");
        }
    }

    /// Schedules a row, and acknowledges its message and all others that come before it.
    pub(crate) async fn deliver_row(&mut self) {
        let (id, inbox) = (schedule_message(&self.world, MESSAGE).await, &mut self.inbox);
        let mut next = async || {
            let received = inbox.next_within(Duration::from_secs(1)).await?;
            received.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
            (received.id() == id).then_some(())
        };
        let began = Instant::now();
        while next().await.is_none() {
            assert!(began.elapsed() < GOES_ON_WITHIN, "the row {id} has not arrived: {}", self.describe().await);
        }
    }

    /// Where rows and messages are, for a test that fails.
    async fn describe(&self) -> String {
        let rows: String =
            self.world.value("SELECT coalesce(string_agg(schedules::text, '; '), 'none') FROM tidings.schedules").await;
        let counts = "[{element(4, amqqueue:get_name(Q)), rabbit_amqqueue:info(Q, [messages_ready, messages_unacknowledged, consumers, leader])} || Q <- rabbit_amqqueue:list()].";
        format!("rows that wait: {rows}; queues: {:?}", self.servers.ask_rabbitmq(counts))
    }

    /// Delivers and rejects rows, until so many dead letters lie in their queue. Returns their ids.
    pub(crate) async fn reject_rows(&mut self, count: u32) -> BTreeSet<Uuid> {
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
    pub(crate) async fn replay(&mut self, ids: &BTreeSet<Uuid>) {
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

    /// The number of the node to which the daemon was connected last.
    pub(crate) fn node_of_daemon(&self) -> usize {
        let log = self.daemon.log();
        let line = log.lines().rev().find(|line| line.contains("connected to RabbitMQ")).expect("a connection");
        let ports = [self.world.ports().1, self.nodes.port(1), self.nodes.port(2)];
        ports.iter().position(|port| line.contains(&format!(":{port}/"))).expect("the port of a node")
    }

    /// Cuts a node off from the others, until it starts again: neither side knows the other's cookie any more.
    pub(crate) fn cut_off(&self, node: usize) {
        let others = (0..3).filter(|other| *other != node).map(|other| format!("'{}'", self.name(other)));
        let others = others.collect::<Vec<_>>().join(", ");
        let cut = format!("[begin erlang:set_cookie(N, wrong), erlang:disconnect_node(N) end || N <- [{others}]].");
        self.nodes.ask(node, &cut).expect("it is cut off");
    }

    /// Waits until all nodes run, and each has a member of every quorum queue.
    pub(crate) async fn wait_for_nodes(&self) {
        let names = [0, 1, 2].map(|node| self.name(node));
        let are_whole = async || self.servers.are_nodes_whole(&names).then_some(());
        eventually_within(GOES_ON_WITHIN, "the nodes are whole again", are_whole).await;
    }

    /// Checks that every row was delivered, and that no message is left in a queue.
    pub(crate) async fn expect_nothing_left(mut self) {
        self.world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
        wait_until_ready(&mut self.daemon).await;
        while let Some(late) = self.inbox.next_within(Duration::from_secs(2)).await {
            late.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
        }
        for queue in ["tidings.dead", "tidings.parking", QUEUE] {
            assert_eq!(count_messages(&self.world, queue).await, 0, "{queue}");
        }
    }
}

pub(crate) const MESSAGE: &str = r#"{"routing_key": "k", "body": 1}"#;

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
    trio.expect_nothing_left().await;
}
