//! The stage with clusters: PostgreSQL is a primary with two standbys, for one of which every commit waits, and RabbitMQ has
//! three nodes and quorum queues. `postgres.rs` has the failovers, and `rabbitmq.rs` what happens to the nodes.
//!
//! Each fault ends when both servers are whole again: two standbys follow, all nodes run, and every queue has a member on each
//! of them. Otherwise the next fault would take a majority away that this one has already weakened. Where that is meant, it is a
//! fault of its own.

mod postgres;
mod rabbitmq;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use harness::cluster::MoreNodes;
use harness::place::RabbitMqSettings;
use harness::servers::{Server, Servers};
use harness::standby::Standby;
use harness::world::execute;
use nix::sys::signal::Signal;

use crate::nemesis::Nemesis;

/// The faults of the clusters, each with whether a message may arrive twice because of it.
pub(crate) const FAULTS: [(&str, bool); 10] = [
    ("primary killed", true),
    ("primary stopped at once", true),
    ("primary frozen", true),
    ("standby killed", true),
    ("node killed", true),
    ("node frozen", true),
    ("node cut off", true),
    ("two nodes frozen", true),
    ("nodes restarted one by one", true),
    ("memory alarm of a node", true),
];

/// The settings of PostgreSQL. A standby that was away finds what it lacks, and soon.
const POSTGRES: &str = "wal_keep_size = '512MB'\nwal_retrieve_retry_interval = '500ms'";
/// The settings of RabbitMQ: a node that is cut off stops. A message that was rejected, and whose dead letter was not confirmed,
/// is sent again after 20 s rather than 180 s, so that a short run can wait for that.
const RABBITMQ: RabbitMqSettings = RabbitMqSettings {
    lines: "cluster_partition_handling = pause_minority",
    erlang_arguments: "-rabbit dead_letter_worker_publisher_confirm_timeout 20000",
};

/// The servers of both clusters. Those with the number 0 belong to [`Servers`].
pub(crate) struct Cluster {
    machines: Arc<Mutex<Machines>>,
    /// The ports of PostgreSQL.
    pub(crate) postgres: [u16; 3],
    /// The ports of RabbitMQ.
    pub(crate) rabbitmq: [u16; 3],
    /// The names of RabbitMQ's nodes.
    names: [String; 3],
    /// Which PostgreSQL takes writes.
    primary: usize,
}

struct Machines {
    nodes: MoreNodes,
    standbys: [Standby; 2],
    servers: Arc<Mutex<Servers>>,
}

/// Starts the first server of both clusters.
pub(crate) fn start_servers() -> anyhow::Result<Servers> {
    Servers::start_private_with_settings(POSTGRES, RABBITMQ)
}

impl Cluster {
    /// Adds the other servers.
    pub(crate) async fn start(servers: &Arc<Mutex<Servers>>) -> anyhow::Result<Self> {
        let servers = Arc::clone(servers);
        let (machines, postgres, rabbitmq) = tokio::task::spawn_blocking(move || {
            let first = servers.lock().expect("no holder of the lock panics");
            let nodes = first.add_nodes(2)?;
            let standbys = [first.start_standby()?, first.start_standby()?];
            let postgres = [first.postgres_port, standbys[0].port, standbys[1].port];
            let rabbitmq = [first.rabbitmq_port, nodes.port(1), nodes.port(2)];
            drop(first);
            anyhow::Ok((Machines { nodes, standbys, servers }, postgres, rabbitmq))
        })
        .await??;
        let names = rabbitmq.map(|port| format!("t{port}@localhost"));
        let cluster = Self { machines: Arc::new(Mutex::new(machines)), postgres, rabbitmq, names, primary: 0 };
        for port in postgres {
            // The standbys as well, for the time when they are primaries.
            execute(port, "ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (*)'").await;
            execute(port, "SELECT pg_reload_conf()").await;
        }
        cluster.wait_until_whole().await?;
        Ok(cluster)
    }

    /// Does something with the servers that blocks.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Machines) -> anyhow::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        let machines = Arc::clone(&self.machines);
        tokio::task::spawn_blocking(move || work(&mut machines.lock().expect("no holder of the lock panics"))).await?
    }

    /// Waits until two standbys follow the primary and all of RabbitMQ's queues have all of their members.
    pub(crate) async fn wait_until_whole(&self) -> anyhow::Result<()> {
        self.wait_for_standbys().await?;
        self.wait_for_nodes().await
    }
}

impl Machines {
    fn first(&self) -> std::sync::MutexGuard<'_, Servers> {
        self.servers.lock().expect("no holder of the lock panics")
    }

    fn signal_postgres(&self, number: usize, signal: Signal) -> anyhow::Result<()> {
        match number {
            0 => self.first().signal(Server::Postgres, signal),
            _ => self.standbys[number - 1].signal(signal),
        }
    }

    fn restart_postgres(&mut self, number: usize) -> anyhow::Result<()> {
        match number {
            0 => self.first().restart(Server::Postgres, Signal::SIGKILL),
            _ => self.standbys[number - 1].restart(),
        }
    }

    fn rebuild_postgres(&mut self, number: usize, primary_port: u16) -> anyhow::Result<()> {
        match number {
            0 => self.first().rebuild_as_standby(primary_port),
            _ => self.standbys[number - 1].rebuild(primary_port),
        }
    }

    fn signal_node(&self, number: usize, signal: Signal) -> anyhow::Result<()> {
        match number {
            0 => self.first().signal(Server::RabbitMq, signal),
            _ => self.nodes.signal(number, signal),
        }
    }

    fn restart_node(&mut self, number: usize, signal: Signal) -> anyhow::Result<()> {
        match number {
            0 => self.first().restart(Server::RabbitMq, signal),
            _ => self.nodes.restart(number, signal),
        }
    }

    fn ask_node(&self, number: usize, expression: &str) -> anyhow::Result<String> {
        match number {
            0 => self.first().ask_rabbitmq(expression),
            _ => self.nodes.ask(number, expression),
        }
    }
}

impl Nemesis {
    /// Injects one of [`FAULTS`] and ends it.
    pub(crate) async fn break_cluster(&mut self, name: &str, duration: Duration) -> anyhow::Result<()> {
        let number = usize::try_from(self.random.below(3))?;
        let cluster = self.cluster.as_mut().context("the rig has no cluster")?;
        match name {
            "standby killed" => cluster.kill_standby(number).await?,
            primary if primary.starts_with("primary") => {
                let settled = cluster.fail_over(primary, duration, &self.world.name).await?;
                // A commit that waits for a standby is over there once its session is ended, and nobody was told that it is.
                // The rows are due on the new primary, and the ledger says whether one of them was lost.
                println!(
                    "{settled:>11}  rows were settled on the primary that was replaced, and not on the new one yet"
                );
                self.world.db = cluster.connect_primary(&self.world.name)?;
            }
            node => cluster.break_nodes(node, number, duration, &self.world.name).await?,
        }
        self.cluster.as_ref().context("the rig has no cluster")?.wait_until_whole().await
    }
}
