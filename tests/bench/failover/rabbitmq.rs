//! Measures failovers of RabbitMQ: in a cluster of three nodes, the node that leads the quorum queues is killed, another one is
//! elected, and the killed node comes back. The daemon knows all three nodes. The consumer, and a plain publisher that stands
//! beside the daemon, are connected to the one that is never killed, so that they lose no connection.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use harness::cluster::MoreNodes;
use harness::daemon::Daemon;
use harness::servers::Servers;
use harness::world::World;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{BasicProperties, Channel, Confirmation};
use nix::sys::signal::Signal;
use tokio::task::JoinSet;

use super::{AFTER, BEFORE, Stream, explain, figures, from, now_ms};
use crate::load::{BODY_BYTES, QUEUE};
use crate::report::{Figure, Times};

/// From the election of a leader until rows are on time.
const LIMIT_MS: f64 = 10_000.0;
/// The queues that the killed node leads: the consumer's, and the daemon's for dead letters.
const QUEUES: [&str; 2] = [QUEUE, "tidings.dead"];
/// The time between two messages of the plain publisher.
const STEP: Duration = Duration::from_millis(20);

struct Cluster {
    nodes: MoreNodes,
    servers: Arc<Servers>,
    world: World,
}

/// Measures `times` failovers. The daemon is connected to the node that is killed in every other one.
pub(super) async fn measure(times: u32) -> Vec<Figure> {
    let started = tokio::task::spawn_blocking(|| {
        let servers = Servers::start_private_with("fsync = on").expect("servers");
        let nodes = servers.add_nodes(2).expect("two more nodes");
        (servers, nodes)
    });
    let (servers, nodes) = started.await.expect("no panic");
    let world = World::on_servers(&servers, &["message"]).await;
    let mut cluster = Cluster { nodes, servers: Arc::new(servers), world };
    let mut daemon = cluster.start_daemon().await;
    let mut stream = Stream::start(&cluster.world).await;
    let (mut outcomes, mut plain, mut beside) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..times {
        let victim = 1 + usize::try_from(number / 2).expect("few") % 2;
        let is_used = number % 2 == 0;
        while (cluster.find_node_of(&daemon) == victim) != is_used {
            assert!(daemon.stop().await.success());
            daemon = cluster.start_daemon().await;
        }
        cluster.lead(victim).await;
        stream.schedule(&cluster.world.db, BEFORE + AFTER).await;
        // Started before the kill, because rabbitmqctl takes a second or two to start.
        let (servers, election) = (Arc::clone(&cluster.servers), cluster.election(victim));
        let elected = tokio::task::spawn_blocking(move || servers.ask_rabbitmq(&election));
        let publisher = PlainPublisher::start(&cluster.world).await;
        tokio::time::sleep(Duration::from_secs(3) + BEFORE).await;
        let lines = daemon.log().lines().count();
        cluster.nodes.signal(victim, Signal::SIGKILL).expect("killed");
        let killed_ms = now_ms();
        let elected = elected.await.expect("no panic").expect("an answer");
        let elected_ms: i64 = elected.parse().expect("a leader was elected, and at a time");
        assert!(elected_ms >= killed_ms, "the leader was not the killed node");
        let confirmed_ms = publisher.first_confirm(killed_ms).await;
        // On a busy machine, rabbitmqctl may begin to ask after the election. Without a leader there is no confirm either.
        let elected_ms = elected_ms.min(confirmed_ms);
        stream.wait_until_on_time(elected_ms).await;
        stream.withdraw(&cluster.world.db).await;
        let outcome = stream.finish(elected_ms).await;
        eprintln!(
            "failover {} of {times} of RabbitMQ, the daemon on the killed node: {is_used}, elected after {} ms, \
             a plain confirm {} ms later: {outcome:?}",
            number + 1,
            elected_ms - killed_ms,
            confirmed_ms - elected_ms
        );
        explain(&outcome, LIMIT_MS, &daemon, lines);
        plain.push(from(elected_ms, confirmed_ms));
        (if is_used { &mut outcomes } else { &mut beside }).push(outcome);
        cluster.restart(victim).await;
    }
    let counts = stream.count_lost_and_twice().await;
    assert!(daemon.stop().await.success());
    let Cluster { world, .. } = &cluster;
    let _ = (std::fs::remove_dir_all(&world.plugin_dir), std::fs::remove_dir_all(world.state_dir()));
    let is_split = |outcomes: &[super::Outcome]| Times::new(outcomes.iter().map(|outcome| outcome.on_time));
    let split = [("on the killed node", is_split(&outcomes)), ("on another node", is_split(&beside))];
    outcomes.extend(beside);
    let mut all = figures("RabbitMQ", "elected", LIMIT_MS, &outcomes, counts);
    for (name, times) in split {
        all.push(Figure::new(format!("RabbitMQ: the daemon {name}, p50"), "ms", [times.percentile(50)]));
        all.push(Figure::new(format!("RabbitMQ: the daemon {name}, most"), "ms", [times.percentile(100)]));
    }
    let times = Times::new(plain.iter().copied());
    all.push(Figure::new("RabbitMQ: elected to a plain confirm, p50", "ms", plain));
    all.push(Figure::new("RabbitMQ: elected to a plain confirm, most", "ms", [times.percentile(100)]));
    all
}

impl Cluster {
    /// A daemon that begins at any of the nodes.
    async fn start_daemon(&self) -> Daemon {
        let ports = [self.servers.rabbitmq_port, self.nodes.port(1), self.nodes.port(2)];
        let hosts = ports.map(|port| format!("127.0.0.1:{port}")).join(",");
        let url = format!("amqp://guest:guest@{hosts}/{}", self.world.name);
        let launch = self.world.launch().with("TIDINGS_QUEUE_TYPE", "quorum");
        launch.with("TIDINGS_AMQP_URL", url).start_ready().await
    }

    /// The node that the daemon is connected to, by its log; 0 = the one that is never killed.
    fn find_node_of(&self, daemon: &Daemon) -> usize {
        let log = daemon.log();
        let line = log.lines().rfind(|line| line.contains("connected to RabbitMQ")).expect("it is connected");
        let is_at = |node: &usize| line.contains(&format!("127.0.0.1:{}/", self.nodes.port(*node)));
        [1, 2].into_iter().find(is_at).unwrap_or(0)
    }

    /// An Erlang expression that binds `Name` to the name under which the members of a queue run.
    fn bind_name(&self, queue: &str) -> String {
        format!(
            "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"{}\">>, queue, <<\"{queue}\">>)), \
             {{Name, _}} = amqqueue:get_pid(Q)",
            self.world.name
        )
    }

    /// Makes a node the leader of the queues.
    async fn lead(&self, node: usize) {
        let node = self.nodes.name(node);
        for queue in QUEUES {
            let (bind, leader) = (self.bind_name(queue), "ra_leaderboard:lookup_leader(Name)");
            let lead = format!(
                "{bind}, case {leader} of {{_, '{node}'}} -> ok; _ -> rabbit_quorum_queue:transfer_leadership(Q, '{node}') end, \
                 timer:sleep(200), {{_, L}} = {leader}, L == '{node}'."
            );
            self.wait_for_answer(&lead, "another leader").await;
        }
    }

    /// An Erlang expression that waits until the consumer's queue has another leader than this node, and is the time then.
    fn election(&self, victim: usize) -> String {
        format!(
            "{}, Wait = fun Wait(0) -> none; Wait(N) -> case ra_leaderboard:lookup_leader(Name) of \
             {{_, L}} when L =/= '{}', L =/= undefined -> os:system_time(millisecond); _ -> timer:sleep(5), Wait(N - 1) end end, \
             Wait(20000).",
            self.bind_name(QUEUE),
            self.nodes.name(victim)
        )
    }

    /// Starts the killed node again, and waits until each queue has all its members.
    async fn restart(&mut self, node: usize) {
        self.nodes.restart(node, Signal::SIGKILL).expect("it starts again");
        for queue in QUEUES {
            let online = format!(
                "{}, #{{nodes := Nodes}} = amqqueue:get_type_state(Q), \
                 length([N || N <- Nodes, is_pid(rpc:call(N, erlang, whereis, [Name]))]) == 3.",
                self.bind_name(queue)
            );
            self.wait_for_answer(&online, "all members of the queue").await;
        }
    }

    /// Evaluates an expression until it is true.
    async fn wait_for_answer(&self, expression: &str, event: &str) {
        let answers = async || {
            let answer = self.servers.ask_rabbitmq(expression);
            answer.is_ok_and(|answer| answer == "true").then_some(())
        };
        harness::eventually_within(Duration::from_mins(2), event, answers).await;
    }
}

/// Publishes to the consumer's queue at a steady pace, and notes when each message was published and confirmed.
struct PlainPublisher {
    confirmed: Arc<Mutex<Vec<[i64; 2]>>>,
    _publishing: JoinSet<()>,
}

impl PlainPublisher {
    async fn start(world: &World) -> Self {
        let channel = world.broker.channel().await;
        channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
        let confirmed = Arc::default();
        let mut publishing = JoinSet::new();
        publishing.spawn(publish(channel, Arc::clone(&confirmed)));
        Self { confirmed, _publishing: publishing }
    }

    /// When the first message was confirmed that was published after `killed_ms`.
    async fn first_confirm(&self, killed_ms: i64) -> i64 {
        harness::eventually("a plain confirm", async || {
            let confirmed = self.confirmed.lock().expect("no holder of the lock panics");
            let after = confirmed.iter().filter(|[published_ms, _]| *published_ms > killed_ms);
            after.map(|[_, confirmed_ms]| *confirmed_ms).min()
        })
        .await
    }
}

async fn publish(channel: Channel, confirmed: Arc<Mutex<Vec<[i64; 2]>>>) {
    let mut pace = tokio::time::interval(STEP);
    let mut waiting = JoinSet::new();
    loop {
        pace.tick().await;
        let (channel, confirmed) = (channel.clone(), Arc::clone(&confirmed));
        waiting.spawn(async move {
            let (published_ms, body) = (now_ms(), [b'x'; BODY_BYTES]);
            let properties = BasicProperties::default().with_delivery_mode(2);
            let options = BasicPublishOptions::default();
            let published = channel.basic_publish("".into(), QUEUE.into(), options, &body, properties).await;
            if let Ok(confirm) = published
                && matches!(confirm.await, Ok(Confirmation::Ack(None)))
            {
                confirmed.lock().expect("no holder of the lock panics").push([published_ms, now_ms()]);
            }
        });
    }
}
