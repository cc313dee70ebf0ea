//! Measures failovers of PostgreSQL: a primary with a synchronous standby is killed, the standby is promoted, and the killed one
//! becomes the standby of the new primary.

use std::time::Duration;

use harness::servers::{Server, Servers};
use harness::standby::Standby;
use harness::world::{World, database_url, execute};
use nix::sys::signal::Signal;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;

use super::{AFTER, BEFORE, Stream, explain, figures, now_ms};
use crate::report::Figure;

/// The longest time between the death of a primary and the promotion of its standby, which is spread from nothing to this: the
/// software that decides on a failover needs time to notice.
const UNNOTICED: Duration = Duration::from_secs(10);
/// From the promotion until rows are on time.
const LIMIT_MS: f64 = 3_000.0;

/// Two servers, of which one is the primary and the other one its standby.
struct Pair {
    /// Stops before the first server, in whose directory its data lies.
    second: Standby,
    first: Servers,
    is_first_primary: bool,
}

/// Measures `times` failovers.
pub(super) async fn measure(times: u32) -> Vec<Figure> {
    let first = tokio::task::spawn_blocking(|| Servers::start_private_with("fsync = on")).await;
    let first = first.expect("no panic").expect("servers");
    let world = World::on_servers(&first, &["message"]).await;
    let second = first.start_standby().expect("a standby");
    let mut pair = Pair { second, first, is_first_primary: true };
    pair.let_commits_wait_for_standby().await;
    let [primary, standby] = pair.ports();
    let hosts = format!("127.0.0.1:{primary},127.0.0.1:{standby}");
    let url = database_url(primary, &world.name).replace(&format!("127.0.0.1:{primary}"), &hosts);
    let daemon = world.launch().with("TIDINGS_DATABASE_URL", url).start_ready().await;
    let mut stream = Stream::start(&world).await;
    let mut outcomes = Vec::new();
    for number in 0..times {
        let unnoticed = UNNOTICED * number / times;
        let [old, new] = pair.ports();
        let db = connect(&world, old).await;
        stream.schedule(&db, BEFORE + unnoticed + AFTER).await;
        tokio::time::sleep(Duration::from_secs(1) + BEFORE).await;
        let db = connect(&world, new).await;
        let lines = daemon.log().lines().count();
        pair.kill_primary();
        tokio::time::sleep(unnoticed).await;
        let promoted: bool = sqlx::query_scalar("SELECT pg_promote()").fetch_one(&db).await.expect("an answer");
        assert!(promoted, "the standby was not promoted");
        let promoted_ms = now_ms();
        stream.wait_until_on_time(promoted_ms).await;
        stream.withdraw(&db).await;
        let outcome = stream.finish(promoted_ms).await;
        eprintln!(
            "failover {} of {times} of PostgreSQL, promoted {unnoticed:.1?} after the kill: {outcome:?}",
            number + 1
        );
        explain(&outcome, LIMIT_MS, &daemon, lines);
        outcomes.push(outcome);
        pair.rebuild_killed().await;
    }
    let counts = stream.count_lost_and_twice().await;
    assert!(daemon.stop().await.success());
    let _ = (std::fs::remove_dir_all(&world.plugin_dir), std::fs::remove_dir_all(world.state_dir()));
    figures("PostgreSQL", "promoted", LIMIT_MS, &outcomes, counts)
}

impl Pair {
    /// The ports of the primary and of the standby.
    fn ports(&self) -> [u16; 2] {
        let ports = [self.first.postgres_port, self.second.port];
        if self.is_first_primary { ports } else { [ports[1], ports[0]] }
    }

    fn kill_primary(&self) {
        // Stopped first, so that it starts no process after they have been listed.
        for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
            let sent = if self.is_first_primary {
                self.first.signal(Server::Postgres, signal)
            } else {
                self.second.signal(signal)
            };
            sent.expect("a signal");
        }
    }

    /// Makes the killed primary a standby of the server that was promoted, which is the primary from now on.
    async fn rebuild_killed(&mut self) {
        let [_, promoted] = self.ports();
        let rebuilt =
            if self.is_first_primary { self.first.rebuild_as_standby(promoted) } else { self.second.rebuild(promoted) };
        rebuilt.expect("a standby");
        self.is_first_primary = !self.is_first_primary;
        self.let_commits_wait_for_standby().await;
    }

    /// Makes the standby a synchronous one. The setting comes after the data was copied, so that the standby waits for nobody when it
    /// is promoted.
    async fn let_commits_wait_for_standby(&self) {
        let [primary, _] = self.ports();
        execute(primary, "ALTER SYSTEM SET synchronous_standby_names = '*'").await;
        execute(primary, "SELECT pg_reload_conf()").await;
        let db = PgPoolOptions::new().max_connections(1).connect(&database_url(primary, "postgres")).await;
        let db = db.expect("connected");
        let follows = "SELECT count(*) = 1 FROM pg_stat_replication WHERE sync_state = 'sync'";
        harness::eventually("the standby follows", async || {
            sqlx::query_scalar::<_, bool>(follows).fetch_one(&db).await.expect("an answer").then_some(())
        })
        .await;
        db.close().await;
    }
}

async fn connect(world: &World, port: u16) -> PgPool {
    let options = PgPoolOptions::new().max_connections(1);
    options.connect(&database_url(port, &world.name)).await.expect("connected")
}
