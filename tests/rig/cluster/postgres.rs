//! Failovers of PostgreSQL: the primary goes away, the standby that has received more is promoted, the other one follows it, and
//! the old primary comes back as a standby.

use std::time::{Duration, Instant};

use harness::world::{database_url, execute};
use nix::sys::signal::Signal;
use sqlx::postgres::{PgPool, PgPoolOptions};
use uuid::Uuid;

use crate::cluster::Cluster;

/// How long copying a primary and following it may take.
const FOLLOW_WITHIN: Duration = Duration::from_mins(2);
/// After a primary has gone, its standbys write what they have received for a moment.
const SETTLE: Duration = Duration::from_millis(500);

impl Cluster {
    /// A pool of connections to the primary.
    pub(super) fn connect_primary(&self, database: &str) -> anyhow::Result<PgPool> {
        connect(self.postgres[self.primary], database)
    }

    /// Kills a standby, the one with this number or the next, and starts it again.
    pub(super) async fn kill_standby(&self, number: usize) -> anyhow::Result<()> {
        let number = if number == self.primary { (number + 1) % 3 } else { number };
        self.run(move |machines| machines.restart_postgres(number)).await
    }

    /// Takes the primary away and lets a standby replace it. Returns how many rows were settled on the old primary alone.
    pub(super) async fn fail_over(&mut self, name: &str, duration: Duration, database: &str) -> anyhow::Result<usize> {
        let old = self.primary;
        let signal = match name {
            "primary killed" => Signal::SIGKILL,
            "primary stopped at once" => Signal::SIGQUIT,
            "primary frozen" => Signal::SIGSTOP,
            other => anyhow::bail!("there is no fault {other}"),
        };
        self.run(move |machines| machines.signal_postgres(old, signal)).await?;
        tokio::time::sleep(SETTLE).await;
        let standbys = [(old + 1) % 3, (old + 2) % 3];
        let further = self.find_further(standbys).await?;
        let (new, other) = (standbys[further], standbys[1 - further]);
        let port = self.postgres[new];
        execute(port, "SELECT pg_promote()").await;
        let follow = format!("ALTER SYSTEM SET primary_conninfo = 'host=127.0.0.1 port={port} user=postgres'");
        execute(self.postgres[other], &follow).await;
        execute(self.postgres[other], "SELECT pg_reload_conf()").await;
        self.primary = new;
        let mut settled = 0;
        if signal == Signal::SIGSTOP {
            // It does not know that it was replaced, and takes writes, but no commit is confirmed: all wait for a standby.
            self.run(move |machines| machines.signal_postgres(old, Signal::SIGCONT)).await?;
            tokio::time::sleep(Duration::from_secs(2) + duration).await;
            settled = self.count_settled_alone(old, database).await?;
        }
        self.run(move |machines| machines.rebuild_postgres(old, port)).await?;
        Ok(settled)
    }

    /// Which of two standbys has received more.
    async fn find_further(&self, standbys: [usize; 2]) -> anyhow::Result<usize> {
        let mut positions = [0_i64; 2];
        for (position, number) in positions.iter_mut().zip(standbys) {
            let db = connect(self.postgres[number], "postgres")?;
            // One that was started a moment ago has received nothing yet, and has what it replayed.
            let query = "SELECT (greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) - '0/0')::bigint";
            *position = sqlx::query_scalar(query).fetch_one(&db).await?;
        }
        Ok(usize::from(positions[1] > positions[0]))
    }

    /// How many rows have come to an end on an old primary, and not on the primary.
    async fn count_settled_alone(&self, old: usize, database: &str) -> anyhow::Result<usize> {
        let query = "SELECT id FROM tidings.deliveries WHERE finished_at > clock_timestamp() - interval '1 minute'";
        let settled: Vec<Uuid> = sqlx::query_scalar(query).fetch_all(&connect(self.postgres[old], database)?).await?;
        let query = "SELECT count(*) FROM unnest($1::uuid[]) AS id WHERE id NOT IN (SELECT id FROM tidings.deliveries)";
        let alone: i64 = sqlx::query_scalar(query).bind(&settled).fetch_one(&self.connect_primary(database)?).await?;
        Ok(usize::try_from(alone)?)
    }

    /// Waits until two standbys follow the primary, and commits wait for either. While a standby is being copied, a commit may
    /// have waited for that copy instead, which is no server yet.
    pub(super) async fn wait_for_standbys(&self) -> anyhow::Result<()> {
        let db = self.connect_primary("postgres")?;
        let query = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND sync_state = 'quorum'";
        let begun = Instant::now();
        while sqlx::query_scalar::<_, i64>(query).fetch_one(&db).await? < 2 {
            anyhow::ensure!(begun.elapsed() < FOLLOW_WITHIN, "the standbys do not follow the primary");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }
}

fn connect(port: u16, database: &str) -> anyhow::Result<PgPool> {
    let options = PgPoolOptions::new().max_connections(2).acquire_timeout(Duration::from_secs(10));
    Ok(options.connect_lazy(&database_url(port, database))?)
}
