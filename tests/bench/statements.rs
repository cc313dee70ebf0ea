//! What the daemon's statements cost, counted by `pg_stat_statements` while the daemon works: pages and time for each call.

use std::time::Duration;

use harness::world::World;
use sqlx::AssertSqlSafe;

/// Calls are counted in windows of `CALLS` wakes, `APART` from each other. One or two of the windows contain a sweep, which reads
/// the index from its beginning; their median ignores it.
const WINDOWS: usize = 7;
pub(crate) const CALLS: u32 = 30;
pub(crate) const APART: Duration = Duration::from_millis(30);

/// What a statement costs for each call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// Pages of tables and indexes that it reads.
    pub(crate) pages: f64,
    /// The time for planning, if that is counted, and execution, in ms.
    pub(crate) ms: f64,
}

/// Lets `pg_stat_statements` count the statements of sessions that begin from now on.
pub(crate) async fn count_statements(world: &World) {
    world.sql("CREATE EXTENSION pg_stat_statements").await;
    world.sql(&format!("ALTER DATABASE {} SET pg_stat_statements.track = 'top'", world.name)).await;
}

/// The cost in several windows of a look when nothing is due: the statement that is called most among those that read the queue.
pub(crate) async fn windows_of_looks(world: &World) -> Vec<Cost> {
    // The daemon needs a moment to see that no row is due any more.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let which = "query LIKE '%tidings.schedules%' AND query LIKE '%slot_at%'";
    let notify = async |_| {
        world.sql("NOTIFY tidings").await;
    };
    windows(world, which, notify).await
}

/// The cost in several windows of the most frequent statement that the SQL condition `which` selects, while `wake` makes the daemon
/// call it. `wake` gets a number that it has not got before.
pub(crate) async fn windows(world: &World, which: &str, wake: impl AsyncFn(usize)) -> Vec<Cost> {
    let mut costs = Vec::new();
    let calls = usize::try_from(CALLS).expect("few");
    for window in 0..WINDOWS {
        world.sql("SELECT pg_stat_statements_reset()").await;
        for call in 0..calls {
            wake(window * calls + call).await;
            tokio::time::sleep(APART).await;
        }
        costs.push(cost_of(world, which).await);
    }
    costs
}

/// The cost of each call since the statistics were reset.
async fn cost_of(world: &World, which: &str) -> Cost {
    let select = format!(
        "SELECT calls, (shared_blks_hit + shared_blks_read) / calls::float8, (total_plan_time + total_exec_time) / calls
         FROM pg_stat_statements
         WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND {which}
         ORDER BY calls DESC LIMIT 1"
    );
    let found: Option<(i64, f64, f64)> =
        sqlx::query_as(AssertSqlSafe(select)).fetch_optional(&world.db).await.expect("statistics");
    let often = found.filter(|(calls, ..)| *calls >= i64::from(CALLS / 2));
    let (_, pages, ms) = often.unwrap_or_else(|| panic!("the daemon did not call it often enough: {found:?}"));
    Cost { pages, ms }
}
