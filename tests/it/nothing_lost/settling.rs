//! What an operator may have done without, for speed: the history, and waiting for the disk.

use std::collections::BTreeSet;

use harness::daemon::Daemon;
use harness::eventually;
use harness::servers::{Server, Servers};
use harness::world::World;
use nix::sys::signal::Signal;
use uuid::Uuid;

/// More rows than are sent together with the COMMIT.
const BATCH: usize = 100;

/// Starts a daemon with one more setting, and lets it deliver a row alone, a batch of rows, a row that it skips, and one that
/// has expired.
async fn finish_rows(world: &World, name: &str, value: &str) -> Daemon {
    let mut inbox = world.inbox(&["misbehave.echo"]).await;
    let daemon = world.launch().with(name, value).start_ready().await;
    world.sql("SELECT tidings.schedule('echo', now())").await;
    world.sql(&format!("SELECT tidings.schedule('echo', now()) FROM generate_series(1, {BATCH})")).await;
    world.sql("SELECT tidings.schedule('skip', now())").await;
    world
        .sql("SELECT tidings.schedule('echo', now() - interval '2 min', expires_at => now() - interval '1 min')")
        .await;
    for _ in 0..=BATCH {
        inbox.next().await;
    }
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    daemon
}

/// Notes in the table `noted` the value that a setting has in each transaction that ends a delivery.
pub(crate) async fn note_setting(world: &World, name: &str) {
    world.sql("CREATE TABLE noted (value text)").await;
    world
        .sql(&format!(
            "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
             'BEGIN INSERT INTO public.noted VALUES (current_setting(''{name}'')); RETURN NULL; END'"
        ))
        .await;
    // A row is deleted in the transaction that ends its delivery.
    world.sql("CREATE TRIGGER note AFTER DELETE ON tidings.schedules FOR EACH ROW EXECUTE FUNCTION note()").await;
}

/// The outcomes in the history, with how many rows have each.
async fn history(world: &World) -> String {
    let counted = "SELECT outcome || ' ' || count(*) AS line FROM tidings.deliveries GROUP BY outcome";
    world
        .value(&format!("SELECT coalesce(string_agg(line, ', ' ORDER BY line), 'none') FROM ({counted}) AS counted"))
        .await
}

#[tokio::test]
async fn the_history_has_every_row_or_those_that_were_not_delivered_or_none() {
    for (name, value, expected) in [
        ("TIDINGS_HISTORY", "all", "delivered 101, expired 1, skipped 1"),
        ("TIDINGS_HISTORY", "undelivered", "expired 1, skipped 1"),
        ("TIDINGS_HISTORY_DAYS", "0", "none"),
    ] {
        let world = World::with_plugins(&["misbehave"]).await;
        let _daemon = finish_rows(&world, name, value).await;
        assert_eq!(history(&world).await, expected, "{name}={value}");
    }
}

#[tokio::test]
async fn a_daemon_that_writes_no_history_removes_what_there_is() {
    let world = World::with_plugins(&["misbehave"]).await;
    drop(finish_rows(&world, "TIDINGS_HISTORY", "all").await);
    let _daemon = world.launch().with("TIDINGS_HISTORY_DAYS", "0").start_ready().await;
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.deliveries)").await;
}

#[tokio::test]
async fn a_commit_waits_for_the_disk_unless_it_may_not() {
    for value in ["on", "off"] {
        let world = World::with_plugins(&["misbehave"]).await;
        note_setting(&world, "synchronous_commit").await;
        let _daemon = finish_rows(&world, "TIDINGS_SYNCHRONOUS_COMMIT", value).await;
        let noted: String = world.value("SELECT string_agg(DISTINCT value, ' ') FROM noted").await;
        assert_eq!((&*noted, world.value::<i64>("SELECT count(*) FROM noted").await), (value, 103));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_of_postgresql_loses_no_row_even_if_no_commit_waits_for_the_disk() {
    let mut servers = Servers::start_private_async().await;
    let world = World::on_servers(&servers, &["misbehave"]).await;
    let mut inbox = world.inbox(&["misbehave.echo"]).await;
    let _daemon = world.launch().with("TIDINGS_SYNCHRONOUS_COMMIT", "off").start_ready().await;
    world.sql(&format!("SELECT tidings.schedule('echo', now()) FROM generate_series(1, {BATCH})")).await;
    let mut ids: BTreeSet<Uuid> = [inbox.next().await.id()].into();
    // At once, before PostgreSQL has written that the rows are gone.
    tokio::task::block_in_place(|| servers.restart(Server::Postgres, Signal::SIGKILL)).expect("restarted");
    while ids.len() < BATCH {
        ids.insert(inbox.next().await.id());
    }
    eventually("nothing is pending", async || {
        // The connections of the test broke as well.
        let pending = sqlx::query("SELECT FROM tidings.schedules").fetch_all(&world.db).await;
        pending.is_ok_and(|rows| rows.is_empty()).then_some(())
    })
    .await;
    // Every row went one way only.
    let finished: i64 = world.value("SELECT count(*) FROM tidings.deliveries").await;
    assert_eq!(usize::try_from(finished), Ok(BATCH));
}
