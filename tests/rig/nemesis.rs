//! What breaks things. Each fault is chosen by the seed, printed, noted with its times, and mended before the next.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use harness::daemon::{Daemon, Launch};
use harness::guests::with_custom_section;
use harness::proxy::{Mode, Proxy};
use harness::servers::{Server, Servers};
use harness::world::World;
use lapin::options::{ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties};
use nix::sys::signal::Signal;
use sqlx::AssertSqlSafe;

use crate::consumer::{KEY, QUEUE, declare};
use crate::ledger::Fault;
use crate::random::Random;

/// Everything that can be broken.
pub(crate) struct Nemesis {
    pub(crate) random: Random,
    pub(crate) servers: Arc<std::sync::Mutex<Servers>>,
    pub(crate) world: World,
    pub(crate) amqp_url: String,
    pub(crate) daemons: Vec<Victim>,
    pub(crate) faults: Vec<Fault>,
    pub(crate) generation: u64,
    /// Only faults whose names contain this.
    pub(crate) only: String,
    /// What comes before any of these comes again.
    pub(crate) deck: Vec<(&'static str, bool)>,
}

/// A daemon and its links.
pub(crate) struct Victim {
    pub(crate) launch: Launch,
    pub(crate) daemon: Daemon,
    /// What those before it wrote.
    pub(crate) logged: String,
    pub(crate) postgres: Proxy,
    pub(crate) rabbitmq: Proxy,
}

/// The faults, and whether a message may arrive twice because of one.
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

pub(crate) fn now_ms() -> i64 {
    i64::try_from(time::OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000).expect("a time")
}

impl Nemesis {
    /// Breaks something, and mends it.
    pub(crate) async fn strike(&mut self) -> anyhow::Result<()> {
        if self.deck.is_empty() {
            self.deck = FAULTS.into_iter().filter(|(what, _)| what.contains(&self.only)).collect();
        }
        anyhow::ensure!(!self.deck.is_empty(), "no fault has {:?} in its name", self.only);
        let (what, doubles) = self.deck.swap_remove(usize::try_from(self.random.below(self.deck.len() as u64))?);
        let from_ms = now_ms();
        println!("{:>8.1} s  {what}", self.faults.first().map_or(0.0, |first| seconds(from_ms - first.from_ms)));
        // It counts as broken from now on, even if breaking it fails.
        self.faults.push(Fault { what, doubles, from_ms, until_ms: i64::MAX });
        self.break_and_mend(what).await.context(what)?;
        for victim in &mut self.daemons {
            anyhow::ensure!(!victim.daemon.has_ended(), "a daemon ended unasked:\n{}", victim.daemon.log());
        }
        self.faults.last_mut().expect("just noted").until_ms = now_ms();
        Ok(())
    }

    async fn break_and_mend(&mut self, what: &str) -> anyhow::Result<()> {
        let victim = usize::try_from(self.random.below(self.daemons.len() as u64))?;
        let moment = Duration::from_millis(500 + self.random.below(5_000));
        match what {
            "daemon killed" => {
                let victim = &mut self.daemons[victim];
                victim.daemon.signal(Signal::SIGKILL);
                victim.daemon.ended().await;
                victim.start_again().await;
            }
            "daemon frozen" => {
                // Sometimes so long that the database gives its sessions up.
                let moment = if self.random.below(4) == 0 { Duration::from_secs(35) } else { moment };
                self.daemons[victim].daemon.signal(Signal::SIGSTOP);
                tokio::time::sleep(moment).await;
                self.daemons[victim].daemon.signal(Signal::SIGCONT);
            }
            "daemons restarted one by one" => {
                for victim in &mut self.daemons {
                    victim.daemon.signal(Signal::SIGTERM);
                    let status = victim.daemon.ended().await;
                    anyhow::ensure!(status.success(), "a daemon did not stop in order:\n{}", victim.daemon.log());
                    victim.start_again().await;
                }
            }
            "listener terminated" => {
                self.terminate("query ILIKE '%LISTEN%' OR query = 'SELECT 1' OR query LIKE '%setval%'").await;
            }
            "sessions terminated" => self.terminate("true").await,
            "PostgreSQL frozen" => self.freeze(Server::Postgres, moment).await?,
            "RabbitMQ frozen" => self.freeze(Server::RabbitMq, moment).await?,
            "PostgreSQL stopped at once" => self.restart(Server::Postgres, Signal::SIGQUIT).await?,
            "PostgreSQL restarted" => self.restart(Server::Postgres, Signal::SIGINT).await?,
            "PostgreSQL killed" => self.restart(Server::Postgres, Signal::SIGKILL).await?,
            "RabbitMQ restarted" => self.restart(Server::RabbitMq, Signal::SIGTERM).await?,
            "RabbitMQ killed" => self.restart(Server::RabbitMq, Signal::SIGKILL).await?,
            "memory alarm" => {
                self.alarm(true).await?;
                tokio::time::sleep(moment).await;
                self.alarm(false).await?;
            }
            "exchange deleted" => {
                let connection = self.broker().await?;
                let channel = connection.create_channel().await?;
                channel.exchange_delete("tidings".into(), ExchangeDeleteOptions::default()).await?;
                tokio::time::sleep(moment).await;
                declare(&connection).await?;
            }
            "queue unbound" => {
                let connection = self.broker().await?;
                let channel = connection.create_channel().await?;
                channel.queue_unbind(QUEUE.into(), "tidings".into(), KEY.into(), FieldTable::default()).await?;
                tokio::time::sleep(moment).await;
                declare(&connection).await?;
            }
            // The other one's messages go with it, as whoever deletes it must want.
            "one of two bound queues deleted" => {
                let channel = self.broker().await?.create_channel().await?;
                let (options, none) = (QueueDeclareOptions::default(), FieldTable::default());
                channel.queue_declare("rig.other".into(), options, none.clone()).await?;
                let options = QueueBindOptions::default();
                channel.queue_bind("rig.other".into(), "tidings".into(), KEY.into(), options, none).await?;
                tokio::time::sleep(moment).await;
                channel.queue_delete("rig.other".into(), QueueDeleteOptions::default()).await?;
            }
            // Nothing that is not parked may be in it, and nothing is.
            "parking queue deleted" => {
                let channel = self.broker().await?.create_channel().await?;
                channel.queue_delete("tidings.parking".into(), QueueDeleteOptions::default()).await?;
            }
            "plugin replaced" => {
                self.generation += 1;
                let bytes = std::fs::read(World::built("message"))?;
                let section = format!("generation {}", self.generation);
                self.world.put("message.wasm", &with_custom_section(&bytes, &section));
            }
            link => self.disturb(victim, link, moment).await,
        }
        Ok(())
    }

    async fn disturb(&mut self, victim: usize, what: &str, moment: Duration) {
        let mode = match what {
            "link reset" => Mode::Cut,
            "link swallows" => Mode::Swallow,
            "link swallows answers" => Mode::SwallowAnswers,
            "link slow" => Mode::Delay(Duration::from_millis(20 + self.random.below(200))),
            _ => Mode::CutAfter(i64::try_from(self.random.below(20_000)).expect("few")),
        };
        let links = &self.daemons[victim];
        let link = if self.random.below(2) == 0 { &links.postgres } else { &links.rabbitmq };
        link.set(mode);
        tokio::time::sleep(moment).await;
        link.set(Mode::Cut);
        link.set(Mode::Pass);
    }

    async fn terminate(&self, which: &str) {
        let terminate = format!(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
             WHERE application_name = 'tidings' AND datname = current_database() AND ({which})"
        );
        let _ = sqlx::query(AssertSqlSafe(terminate)).execute(&self.world.db).await;
    }

    async fn freeze(&self, server: Server, moment: Duration) -> anyhow::Result<()> {
        self.servers.lock().expect("whole").signal(server, Signal::SIGSTOP)?;
        tokio::time::sleep(moment).await;
        self.servers.lock().expect("whole").signal(server, Signal::SIGCONT)
    }

    async fn restart(&self, server: Server, signal: Signal) -> anyhow::Result<()> {
        let servers = Arc::clone(&self.servers);
        tokio::task::spawn_blocking(move || servers.lock().expect("whole").restart(server, signal)).await?
    }

    async fn alarm(&self, on: bool) -> anyhow::Result<()> {
        let servers = Arc::clone(&self.servers);
        tokio::task::spawn_blocking(move || servers.lock().expect("whole").memory_alarm(on)).await?
    }

    async fn broker(&self) -> anyhow::Result<Connection> {
        Ok(Connection::connect(&self.amqp_url, ConnectionProperties::default()).await?)
    }
}

impl Victim {
    async fn start_again(&mut self) {
        let ended = std::mem::replace(&mut self.daemon, self.launch.ready().await);
        self.logged += &ended.log();
        self.logged += "\n";
    }

    /// What all the daemons that stood here wrote.
    pub(crate) fn log(&self) -> String {
        self.logged.clone() + &self.daemon.log()
    }
}

fn seconds(ms: i64) -> f64 {
    f64::from(i32::try_from(ms).unwrap_or(i32::MAX)) / 1000.0
}
