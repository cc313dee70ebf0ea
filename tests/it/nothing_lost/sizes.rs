//! Payloads of every permitted size: how much a claim reads, how large and small rows share the lanes, and how much
//! memory the daemon takes.

use std::collections::HashSet;

use harness::daemon::Daemon;
use harness::world::World;
use sqlx::AssertSqlSafe;

use crate::on_time::queries::{CLAIM, find_checked_query};

/// The SQL expression of a text of 32 × `times` bytes that hardly compresses.
fn incompressible_text(times: u32) -> String {
    format!("(SELECT string_agg(md5(n::text), '') FROM generate_series(1, {times}) AS n)")
}

/// The SQL expression of a text of `bytes` bytes that compresses very well.
fn compressible_text(bytes: u32) -> String {
    format!("repeat('x', {bytes})")
}

/// Writes `rows` rows that are due, with the SQL expression `body` as their body.
async fn write_due_rows(world: &World, kind: &str, rows: u32, body: &str) {
    let written = format!(
        "WITH said AS MATERIALIZED (SELECT jsonb_build_object('routing_key', 'a', 'body', {body}) AS payload)
         INSERT INTO tidings.schedules (kind, due_at, payload)
         SELECT '{kind}', now(), payload FROM said, generate_series(1, {rows})"
    );
    assert_eq!(world.sql(&written).await, u64::from(rows));
}

/// Raises the limits of `plugin`, so that it can build large bodies.
fn raise_limits(world: &World, plugin: &str) {
    let limits = "[limits]\ncpu-ms = 60000\nwall-ms = 60000\nmemory-mib = 512\noutput-kib = 32768\n";
    std::fs::write(world.plugin_dir.join(format!("{plugin}.toml")), limits).expect("written");
}

/// The peak of the daemon's resident memory, in MiB.
fn peak_resident_mib(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a size");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") / 1024
}

#[tokio::test]
async fn a_claim_reads_and_locks_only_rows_within_its_byte_limit_however_well_they_compress() {
    for body in [incompressible_text(28_000), compressible_text(900_000)] {
        let world = World::empty().await;
        write_due_rows(&world, "message", 100, &body).await;
        let claim = sqlx::query_scalar::<_, Option<uuid::Uuid>>(AssertSqlSafe(find_checked_query(CLAIM)));
        let claim = claim
            .bind(vec!["message"])
            .bind(500_i64)
            .bind(2_097_152_i64)
            .bind(None::<time::OffsetDateTime>)
            .bind(false);
        let mut transaction = world.db.begin().await.expect("a transaction");

        let rows = claim.fetch_all(&mut *transaction).await.expect("it runs");

        // Six rows of the result: two for each of the two rows that fit, one for a third row that does not fit, and one
        // for the next due time.
        assert_eq!(rows.len(), 6, "{body}");
        let free = "SELECT count(*) FROM (SELECT FROM tidings.schedules FOR UPDATE SKIP LOCKED) AS free";
        assert_eq!(world.value::<i64>(free).await, 97, "{body}");
    }
}

#[tokio::test]
async fn slow_large_rows_leave_lanes_free_for_small_rows() {
    for body in [incompressible_text(200_000), compressible_text(6_000_000)] {
        let world = World::with_plugins(&["misbehave"]).await;
        let mut inbox = world.inbox(&["#"]).await;
        raise_limits(&world, "misbehave");
        // More large rows than there are lanes, due before the small ones.
        write_due_rows(&world, "spin", 5, &body).await;
        write_due_rows(&world, "echo", 20, "'small'").await;

        let _daemon = world.start_daemon().await;

        let mut ids = HashSet::new();
        while ids.len() < 20 {
            ids.insert(inbox.next().await.id());
        }
        world.wait_until("SELECT count(*) = 20 FROM tidings.deliveries").await;
        let tried = "SELECT count(*) FROM tidings.schedules WHERE attempts > 0";
        assert_eq!(world.value::<i64>(tried).await, 0, "one of the large ones is still being built");
        let locked = "SELECT 5 - count(*) FROM (SELECT FROM tidings.schedules FOR UPDATE SKIP LOCKED) AS free";
        assert_eq!(world.value::<i64>(locked).await, 1, "and the others wait for it");
        world.remove().await;
    }
}

#[tokio::test]
async fn rows_of_nearly_a_megabyte_arrive_once_and_the_daemon_stays_below_128_mib() {
    for body in [incompressible_text(28_000), compressible_text(900_000)] {
        let world = World::with_plugins(&["message"]).await;
        let mut inbox = world.inbox(&["#"]).await;
        write_due_rows(&world, "message", 150, &body).await;

        let daemon = world.start_daemon().await;

        let mut ids = HashSet::new();
        for _ in 0..150 {
            let received = inbox.next().await;
            assert!(received.delivery.data.len() > 890_000);
            assert!(ids.insert(received.id()), "it came twice");
        }
        world.wait_until("SELECT count(*) = 150 FROM tidings.deliveries").await;
        let most = peak_resident_mib(&daemon);
        assert!(most < 128, "{most} MiB");
        world.remove().await;
    }
}

#[tokio::test]
async fn rows_of_the_largest_size_are_delivered_one_at_a_time_and_the_daemon_stays_below_256_mib() {
    for body in [incompressible_text(524_000), compressible_text(16_770_000)] {
        let world = World::with_plugins(&["message"]).await;
        let mut inbox = world.inbox(&["#"]).await;
        raise_limits(&world, "message");
        write_due_rows(&world, "message", 12, &body).await;
        write_due_rows(&world, "message", 300, "'small'").await;

        let daemon = world.start_daemon().await;

        let mut large = 0;
        for _ in 0..312 {
            large += u32::from(inbox.next().await.delivery.data.len() > 16_000_000);
        }
        assert_eq!(large, 12);
        world.wait_until("SELECT count(*) = 312 FROM tidings.deliveries").await;
        let most = peak_resident_mib(&daemon);
        assert!(most < 256, "{most} MiB");
        world.remove().await;
    }
}

#[tokio::test]
async fn a_row_whose_payload_is_too_long_as_text_is_parked_and_delays_no_other() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    // PostgreSQL itself cannot write the first payload as text, although it is stored in a few kilobytes. The second is
    // too long for the daemon.
    write_due_rows(&world, "message", 1, "(SELECT jsonb_agg(1e100000::numeric) FROM generate_series(1, 20000))").await;
    write_due_rows(&world, "message", 1, "repeat(E'\\x01', 16000000)").await;
    write_due_rows(&world, "message", 20, "'small'").await;

    let daemon = world.start_daemon().await;

    for _ in 0..20 {
        assert_eq!(inbox.next().await.text(), "small");
    }
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    let reasons: Vec<String> = world.value("SELECT array_agg(reason ORDER BY reason) FROM tidings.parked").await;
    assert!(reasons[0].starts_with("PostgreSQL cannot write its payload as JSON text"), "{reasons:?}");
    assert!(reasons[1].starts_with("its payload is too long as JSON text"), "{reasons:?}");
    let most = peak_resident_mib(&daemon);
    assert!(most < 128, "{most} MiB");
}
