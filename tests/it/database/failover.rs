//! A primary with two standbys: it is killed while rows are written and delivered, and the standby that has more is promoted. A
//! standby for which commits wait loses nothing; one that lags may lose what was written last. The daemon sends nothing again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use harness::consumer::Inbox;
use harness::servers::{Server, Servers};
use harness::standby::Standby;
use harness::world::{World, database_url, execute};
use lapin::options::BasicAckOptions;
use nix::sys::signal::Signal;
use sqlx::PgPool;
use uuid::Uuid;

/// How many rows are written before the failover, and again after it.
const ROWS: usize = 400;

/// The statement that schedules a row, and returns its id.
const SCHEDULE_ROW: &str =
    r#"SELECT tidings.schedule('message', now() + random() * interval '1 second', '{"routing_key": "a", "body": 1}')"#;

async fn connect(world: &World, port: u16) -> PgPool {
    let options = sqlx::postgres::PgPoolOptions::new().max_connections(2).acquire_timeout(Duration::from_secs(2));
    options.connect(&database_url(port, &world.name)).await.expect("connected")
}

/// Writes rows one by one until the server is gone, at most [`ROWS`], and adds the ids of those whose commit was confirmed.
async fn write_rows(db: &PgPool, committed: &mut BTreeSet<Uuid>) {
    for _ in 0..ROWS {
        let Ok(id) = sqlx::query_scalar(SCHEDULE_ROW).fetch_one(db).await else { return };
        committed.insert(id);
    }
}

/// Which of two standbys has received more.
async fn find_further(world: &World, standbys: &[Standby; 2]) -> usize {
    let mut positions = Vec::new();
    for standby in standbys {
        let db = connect(world, standby.port).await;
        let position = "SELECT (pg_last_wal_receive_lsn() - '0/0')::bigint";
        positions.push(sqlx::query_scalar::<_, i64>(position).fetch_one(&db).await.expect("a position"));
    }
    usize::from(positions[1] > positions[0])
}

/// Takes messages until none has come for a while, and counts them by id.
async fn take_all(inbox: &mut Inbox) -> BTreeMap<Uuid, usize> {
    let mut taken = BTreeMap::new();
    while let Some(received) = inbox.next_within(Duration::from_secs(8)).await {
        received.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
        *taken.entry(received.id()).or_default() += 1;
    }
    taken
}

/// Kills the primary while rows are written and delivered, and returns how many rows that were committed were lost, and how many
/// came twice.
async fn fail_over(is_synchronous: bool) -> (usize, usize) {
    let servers = Servers::start_private_async().await;
    let world = World::on_servers(&servers, &["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let primary = world.ports().0;
    let standbys = [servers.start_standby().expect("a standby"), servers.start_standby().expect("a standby")];
    if is_synchronous {
        execute(primary, "ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (*)'").await;
        execute(primary, "SELECT pg_reload_conf()").await;
        world.wait_until("SELECT count(*) = 2 AND bool_and(sync_state = 'quorum') FROM pg_stat_replication").await;
    }
    let ports = [primary, standbys[0].port, standbys[1].port];
    let hosts = ports.map(|port| format!("127.0.0.1:{port}")).join(",");
    let url = database_url(primary, &world.name).replace(&format!("127.0.0.1:{primary}"), &hosts);
    let daemon = world.launch().with("TIDINGS_DATABASE_URL", url).start_ready().await;

    let mut committed = BTreeSet::new();
    let db = connect(&world, primary).await;
    write_rows(&db, &mut committed).await;
    if !is_synchronous {
        // From now on the standbys receive nothing: neither the ends of rows that they have, nor new rows.
        for standby in &standbys {
            execute(standby.port, "ALTER SYSTEM SET primary_conninfo = ''").await;
            execute(standby.port, "SELECT pg_reload_conf()").await;
        }
        world.wait_until("SELECT NOT EXISTS (SELECT FROM pg_stat_replication)").await;
        world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    }
    // The row and its neighbours are being delivered when the primary dies.
    let (mut last, killed) = (BTreeSet::new(), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        servers.signal(Server::Postgres, Signal::SIGKILL).expect("killed");
    });
    tokio::join!(write_rows(&db, &mut last), killed);
    let written_last = last.len();
    committed.extend(last);
    let promoted = find_further(&world, &standbys).await;
    let (new, other) = (standbys[promoted].port, standbys[1 - promoted].port);
    execute(new, "SELECT pg_promote()").await;
    execute(other, &format!("ALTER SYSTEM SET primary_conninfo = 'host=127.0.0.1 port={new} user=postgres'")).await;
    execute(other, "SELECT pg_reload_conf()").await;
    write_rows(&connect(&world, new).await, &mut committed).await;

    let taken = take_all(&mut inbox).await;
    assert!(committed.len() > ROWS, "rows were written before and after the failover");
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM tidings.schedules")
        .fetch_one(&connect(&world, new).await)
        .await
        .expect("counted");
    assert_eq!(left, 0, "{}", daemon.log());
    let lost = committed.iter().filter(|id| !taken.contains_key(id)).count();
    let twice = taken.values().filter(|count| **count > 1).count();
    println!("synchronous: {is_synchronous}; {} rows committed, {lost} lost, {twice} twice", committed.len());
    assert!(lost <= written_last, "{lost} rows were lost, of {written_last} that the standbys had not received");
    (lost, twice)
}

#[tokio::test]
async fn a_failover_to_a_synchronous_standby_loses_no_row_that_was_committed() {
    let (lost, twice) = fail_over(true).await;
    assert_eq!((lost, twice), (0, 0));
}

#[tokio::test]
async fn a_failover_to_an_asynchronous_standby_loses_only_what_it_had_not_received() {
    let (_, twice) = fail_over(false).await;
    assert_eq!(twice, 0, "the daemon remembers what it has sent");
}
