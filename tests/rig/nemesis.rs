//! Injects faults. Each fault is chosen by the seed, printed, recorded with its start and end, and ended before the
//! next one begins.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use harness::daemon::{Daemon, Launch};
use harness::guests::with_custom_section;
use harness::proxy::{Mode, Proxy};
use harness::servers::{Server, Servers};
use harness::world::World;
use lapin::Connection;
use lapin::options::{ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use nix::sys::signal::Signal;
use sqlx::AssertSqlSafe;

use crate::addresses::Nodes;
use crate::cluster::{self, Cluster};
use crate::consumer::{QUEUE, ROUTING_KEY, declare};
use crate::ledger::Fault;
use crate::random::Random;

/// The injector of faults, and everything that it can break.
pub(crate) struct Nemesis {
    pub(crate) random: Random,
    pub(crate) servers: Arc<std::sync::Mutex<Servers>>,
    pub(crate) world: World,
    pub(crate) nodes: Nodes,
    /// The further servers, if there are clusters.
    pub(crate) cluster: Option<Cluster>,
    pub(crate) daemons: Vec<Victim>,
    pub(crate) faults: Vec<Fault>,
    pub(crate) generation: u64,
    /// Use only faults whose names contain this text.
    pub(crate) only: String,
    /// The faults that have not yet been used in this round. Every fault is used once before any is used again.
    pub(crate) remaining_faults: Vec<(&'static str, bool)>,
}

/// A daemon and its proxied connections.
pub(crate) struct Victim {
    pub(crate) launch: Launch,
    pub(crate) daemon: Daemon,
    /// The logs of the earlier daemons in this place.
    pub(crate) earlier_logs: String,
    /// One for each server.
    pub(crate) postgres: Vec<Proxy>,
    pub(crate) rabbitmq: Vec<Proxy>,
}

/// The faults, each with whether a message may arrive twice because of it.
const FAULTS: [(&str, bool); 23] = [
    ("daemon killed", true),
    ("daemon frozen", true),
    ("daemons restarted one by one", false),
    ("listener terminated", false),
    ("sessions terminated", true),
    ("PostgreSQL frozen", true),
    ("PostgreSQL stopped at once", true),
    ("PostgreSQL restarted", true),
    ("PostgreSQL killed", true),
    ("RabbitMQ frozen", true),
    ("RabbitMQ restarted", true),
    ("RabbitMQ killed", true),
    ("memory alarm", true),
    ("exchange deleted", true),
    ("queue unbound", false),
    ("one of two bound queues deleted", false),
    ("parking queue deleted", false),
    ("link reset", true),
    ("link swallows", true),
    ("link swallows answers", true),
    ("link slow", true),
    ("link cut after some bytes", true),
    ("plugin replaced", false),
];

/// Whether a fault concerns a server that has no others beside it.
fn is_of_a_lone_server(name: &str) -> bool {
    name.starts_with("PostgreSQL") || name.starts_with("RabbitMQ") || name == "memory alarm"
}

pub(crate) fn now_ms() -> i64 {
    i64::try_from(time::OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000).expect("a time")
}

impl Nemesis {
    /// Injects the next fault and ends it.
    pub(crate) async fn strike(&mut self) -> anyhow::Result<()> {
        if self.remaining_faults.is_empty() {
            let here: Vec<_> = if self.cluster.is_some() {
                FAULTS.into_iter().filter(|(name, _)| !is_of_a_lone_server(name)).chain(cluster::FAULTS).collect()
            } else {
                FAULTS.into()
            };
            self.remaining_faults = here.into_iter().filter(|(name, _)| name.contains(&self.only)).collect();
        }
        anyhow::ensure!(!self.remaining_faults.is_empty(), "no fault has {:?} in its name", self.only);
        let (name, may_duplicate) =
            self.remaining_faults.swap_remove(usize::try_from(self.random.below(self.remaining_faults.len() as u64))?);
        let from_ms = now_ms();
        println!("{:>8.1} s  {name}", self.faults.first().map_or(0.0, |first| seconds(from_ms - first.from_ms)));
        // Recorded before the injection, so that the fault counts even if injecting it fails.
        self.faults.push(Fault { name, may_duplicate, from_ms, until_ms: i64::MAX });
        self.break_and_mend(name).await.context(name)?;
        for victim in &mut self.daemons {
            anyhow::ensure!(!victim.daemon.has_ended(), "a daemon ended by itself:\n{}", victim.daemon.log());
        }
        self.faults.last_mut().expect("just noted").until_ms = now_ms();
        Ok(())
    }

    async fn break_and_mend(&mut self, name: &str) -> anyhow::Result<()> {
        let victim = usize::try_from(self.random.below(self.daemons.len() as u64))?;
        let duration = Duration::from_millis(500 + self.random.below(5_000));
        match name {
            name if cluster::FAULTS.iter().any(|(fault, _)| *fault == name) => {
                self.break_cluster(name, duration).await?;
            }
            "daemon killed" => {
                let victim = &mut self.daemons[victim];
                victim.daemon.signal(Signal::SIGKILL);
                victim.daemon.wait_for_end().await;
                victim.restart().await;
            }
            "daemon frozen" => {
                // One time in four so long that PostgreSQL ends the daemon's sessions.
                let duration = if self.random.below(4) == 0 { Duration::from_secs(35) } else { duration };
                self.daemons[victim].daemon.signal(Signal::SIGSTOP);
                tokio::time::sleep(duration).await;
                self.daemons[victim].daemon.signal(Signal::SIGCONT);
            }
            "daemons restarted one by one" => {
                for victim in &mut self.daemons {
                    victim.daemon.signal(Signal::SIGTERM);
                    let status = victim.daemon.wait_for_end().await;
                    anyhow::ensure!(status.success(), "a daemon did not stop cleanly:\n{}", victim.daemon.log());
                    victim.restart().await;
                }
            }
            "listener terminated" => {
                self.terminate("query ILIKE '%LISTEN%' OR query = 'SELECT 1' OR query LIKE '%setval%'").await;
            }
            "sessions terminated" => self.terminate("true").await,
            "PostgreSQL frozen" => self.freeze(Server::Postgres, duration).await?,
            "RabbitMQ frozen" => self.freeze(Server::RabbitMq, duration).await?,
            "PostgreSQL stopped at once" => self.restart(Server::Postgres, Signal::SIGQUIT).await?,
            "PostgreSQL restarted" => self.restart(Server::Postgres, Signal::SIGINT).await?,
            "PostgreSQL killed" => self.restart(Server::Postgres, Signal::SIGKILL).await?,
            "RabbitMQ restarted" => self.restart(Server::RabbitMq, Signal::SIGTERM).await?,
            "RabbitMQ killed" => self.restart(Server::RabbitMq, Signal::SIGKILL).await?,
            "memory alarm" => {
                self.set_memory_alarm(true).await?;
                tokio::time::sleep(duration).await;
                self.set_memory_alarm(false).await?;
            }
            "exchange deleted" => {
                let connection = self.connect_broker().await?;
                let channel = connection.create_channel().await?;
                channel.exchange_delete("tidings".into(), ExchangeDeleteOptions::default()).await?;
                tokio::time::sleep(duration).await;
                declare(&connection, self.cluster.is_some()).await?;
            }
            "queue unbound" => {
                let connection = self.connect_broker().await?;
                let channel = connection.create_channel().await?;
                channel.queue_unbind(QUEUE.into(), "tidings".into(), ROUTING_KEY.into(), FieldTable::default()).await?;
                tokio::time::sleep(duration).await;
                declare(&connection, self.cluster.is_some()).await?;
            }
            // Deleting the second queue deletes its messages too. The first queue has its own copies.
            "one of two bound queues deleted" => {
                let channel = self.connect_broker().await?.create_channel().await?;
                let (options, none) = (QueueDeclareOptions::default(), FieldTable::default());
                channel.queue_declare("rig.other".into(), options, none.clone()).await?;
                let options = QueueBindOptions::default();
                channel.queue_bind("rig.other".into(), "tidings".into(), ROUTING_KEY.into(), options, none).await?;
                tokio::time::sleep(duration).await;
                channel.queue_delete("rig.other".into(), QueueDeleteOptions::default()).await?;
            }
            // Nothing is lost: the rig parks no messages, so the queue is empty.
            "parking queue deleted" => {
                let channel = self.connect_broker().await?.create_channel().await?;
                channel.queue_delete("tidings.parking".into(), QueueDeleteOptions::default()).await?;
            }
            "plugin replaced" => {
                self.generation += 1;
                let bytes = std::fs::read(World::built_plugin("message"))?;
                let section = format!("generation {}", self.generation);
                self.world.put("message.wasm", &with_custom_section(&bytes, &section));
            }
            link => self.disturb_link(victim, link, duration).await,
        }
        Ok(())
    }

    async fn disturb_link(&mut self, victim: usize, name: &str, duration: Duration) {
        let mode = match name {
            "link reset" => Mode::Cut,
            "link swallows" => Mode::Swallow,
            "link swallows answers" => Mode::SwallowAnswers,
            "link slow" => Mode::Delay(Duration::from_millis(20 + self.random.below(200))),
            _ => Mode::CutAfter(i64::try_from(self.random.below(20_000)).expect("few")),
        };
        let daemon = &self.daemons[victim];
        let links = if self.random.below(2) == 0 { &daemon.postgres } else { &daemon.rabbitmq };
        for link in links {
            link.set(mode);
        }
        tokio::time::sleep(duration).await;
        for link in links {
            link.set(Mode::Cut);
            link.set(Mode::Pass);
        }
    }

    async fn terminate(&self, which: &str) {
        let terminate = format!(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
             WHERE application_name = 'tidings' AND datname = current_database() AND ({which})"
        );
        let _ = sqlx::query(AssertSqlSafe(terminate)).execute(&self.world.db).await;
    }

    async fn freeze(&self, server: Server, duration: Duration) -> anyhow::Result<()> {
        self.servers.lock().expect("whole").signal(server, Signal::SIGSTOP)?;
        tokio::time::sleep(duration).await;
        self.servers.lock().expect("whole").signal(server, Signal::SIGCONT)
    }

    async fn restart(&self, server: Server, signal: Signal) -> anyhow::Result<()> {
        let servers = Arc::clone(&self.servers);
        tokio::task::spawn_blocking(move || servers.lock().expect("whole").restart(server, signal)).await?
    }

    async fn set_memory_alarm(&self, on: bool) -> anyhow::Result<()> {
        let servers = Arc::clone(&self.servers);
        tokio::task::spawn_blocking(move || servers.lock().expect("whole").set_memory_alarm(on)).await?
    }

    async fn connect_broker(&self) -> anyhow::Result<Connection> {
        self.nodes.connect().await
    }
}

impl Victim {
    async fn restart(&mut self) {
        let ended = std::mem::replace(&mut self.daemon, self.launch.start_ready().await);
        self.earlier_logs += &ended.log();
        self.earlier_logs += "\n";
    }

    /// The logs of all daemons that have run in this place.
    pub(crate) fn log(&self) -> String {
        self.earlier_logs.clone() + &self.daemon.log()
    }
}

fn seconds(ms: i64) -> f64 {
    f64::from(i32::try_from(ms).unwrap_or(i32::MAX)) / 1000.0
}
