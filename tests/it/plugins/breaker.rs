//! Plugins that fail at every row: their rows wait, a version that never worked is rolled back, and rows of other kinds
//! are not affected.

use harness::eventually;
use harness::guests::{trapping, trapping_at_true, well_behaved};
use harness::world::World;

use crate::plugins::reload::{schedule_row, wait_for_log_count};

#[tokio::test]
async fn while_a_plugin_fails_at_every_row_its_rows_wait_without_spending_attempts_and_other_kinds_do_not() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("bad.wasm", &trapping("bad", &["bad"]));
    world.put("good.wasm", &well_behaved("good", &["good"], "good"));
    let mut daemon = world.start_daemon().await;

    world.sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'bad', now() FROM generate_series(1, 40)").await;
    daemon.wait_for_line("the breaker is open").await;
    world
        .wait_until("SELECT count(*) = 40 FROM tidings.schedules WHERE last_error IS NOT NULL AND slot_at > now()")
        .await;
    let spent: i64 = world.value("SELECT sum(attempts) FROM tidings.schedules").await;
    assert!((5..12).contains(&spent), "five failures open it, and then one row at a time is tried: {spent}");
    let (code, list) = world.tidings(["plugin", "list", "--http-addr", &daemon.http_addr().await]).await;
    assert!(code == 0 && list.contains("breaker open"), "{list}");
    for _ in 0..20 {
        schedule_row(&world, "good", "{}").await;
        assert_eq!(inbox.next().await.text(), "good");
    }

    // A new version starts with a closed breaker.
    world.put("bad.wasm", &well_behaved("bad", &["bad"], "mended"));
    for _ in 0..40 {
        assert_eq!(inbox.next().await.text(), "mended");
    }
}

#[tokio::test]
async fn one_row_that_succeeds_closes_the_breaker() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("p.wasm", &trapping_at_true("p", &["p"], "p"));
    let mut daemon = world.start_daemon().await;
    world.sql("INSERT INTO tidings.schedules (kind, due_at, payload) SELECT 'p', now(), 'true' FROM generate_series(1, 5)").await;
    daemon.wait_for_line("the breaker is open").await;

    world.sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'p', now() FROM generate_series(1, 20)").await;
    for _ in 0..20 {
        assert_eq!(inbox.next().await.number("tidings-attempt"), 1, "waiting is no attempt");
    }
    daemon.wait_for_line("the breaker is closed").await;
}

#[tokio::test]
async fn a_version_that_fails_from_the_start_is_rolled_back_and_stays_quarantined_across_restarts() {
    let world = World::empty().await;
    let mut inbox = world.inbox(&["#"]).await;
    world.put("p.wasm", &well_behaved("p", &["p"], "one"));
    let mut daemon = world.start_daemon().await;
    schedule_row(&world, "p", "{}").await;
    assert_eq!(inbox.next().await.text(), "one");
    // This version has built a row, so the daemon keeps its bytes for a rollback.
    let good = world.state_dir().join("good");
    eventually("the bytes are kept", async || {
        let dirs = std::fs::read_dir(&good).ok()?.filter_map(Result::ok);
        dirs.map(|dir| dir.path().join("kinds/p")).find(|path| path.exists())
    })
    .await;

    world.put("p.wasm", &trapping("p", &["p"]));
    daemon.wait_for_line("generation=2").await;
    world.sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'p', now() FROM generate_series(1, 20)").await;
    let line = daemon.wait_for_line("rolled back").await;
    assert!(
        line.contains("ERROR") && line.contains("failed at every row of the kind") && line.contains("p@1+"),
        "{line}"
    );
    for _ in 0..20 {
        assert_eq!(inbox.next().await.text(), "one");
    }
    let (_, list) = world.tidings(["plugin", "list", "--http-addr", &daemon.http_addr().await]).await;
    assert!(
        list.contains("generation 3") && list.contains("REFUSED  this version was rolled back and is quarantined"),
        "{list}"
    );
    assert!(daemon.stop().await.success());

    let mut daemon = world.start_daemon().await;
    daemon.wait_for_line("the version that built rows last serves").await;
    schedule_row(&world, "p", "{}").await;
    assert_eq!(inbox.next().await.text(), "one");
    world.put("p.wasm", &well_behaved("p", &["p"], "two"));
    wait_for_log_count(&daemon, "loaded ", 2).await;
    schedule_row(&world, "p", "{}").await;
    assert_eq!(inbox.next().await.text(), "two");
}
