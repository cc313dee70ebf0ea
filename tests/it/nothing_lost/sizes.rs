//! Payloads of any permitted size: what a claim reads, what waits for what, and what the daemon takes of memory.

use std::collections::HashSet;

use harness::daemon::Daemon;
use harness::world::World;
use sqlx::AssertSqlSafe;

use crate::on_time::queries::{CLAIM, checked};

/// A text of some 32 bytes for each of `times`, which hardly gets smaller when it is compressed.
fn dense(times: u32) -> String {
    format!("(SELECT string_agg(md5(n::text), '') FROM generate_series(1, {times}) AS n)")
}

/// A text that gets smaller by far.
fn sparse(bytes: u32) -> String {
    format!("repeat('x', {bytes})")
}

/// Writes rows that are due, with this body.
async fn write(world: &World, kind: &str, rows: u32, body: &str) {
    let written = format!(
        "WITH said AS MATERIALIZED (SELECT jsonb_build_object('routing_key', 'a', 'body', {body}) AS payload)
         INSERT INTO tidings.schedules (kind, due_at, payload)
         SELECT '{kind}', now(), payload FROM said, generate_series(1, {rows})"
    );
    assert_eq!(world.sql(&written).await, u64::from(rows));
}

/// So that a call may take what a large body takes.
fn allow_large(world: &World, plugin: &str) {
    let limits = "[limits]\ncpu-ms = 60000\nwall-ms = 60000\nmemory-mib = 512\noutput-kib = 32768\n";
    std::fs::write(world.plugin_dir.join(format!("{plugin}.toml")), limits).expect("written");
}

/// What the daemon had resident at its most, in MiB.
fn most_resident_mib(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a size");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") / 1024
}

#[tokio::test]
async fn a_claim_reads_and_locks_no_more_than_fits_however_well_it_is_compressed() {
    for body in [dense(28_000), sparse(900_000)] {
        let world = World::empty().await;
        write(&world, "message", 100, &body).await;
        let claim = sqlx::query_scalar::<_, Option<uuid::Uuid>>(AssertSqlSafe(checked(CLAIM)));
        let claim = claim
            .bind(vec!["message"])
            .bind(500_i64)
            .bind(2_097_152_i64)
            .bind(None::<time::OffsetDateTime>)
            .bind(false);
        let mut transaction = world.db.begin().await.expect("a transaction");

        let rows = claim.fetch_all(&mut *transaction).await.expect("it runs");

        // Two of them fit, each with its beginning and its end; a third does not, and has no end; and what is ahead.
        assert_eq!(rows.len(), 6, "{body}");
        let free = "SELECT count(*) FROM (SELECT FROM tidings.schedules FOR UPDATE SKIP LOCKED) AS free";
        assert_eq!(world.value::<i64>(free).await, 97, "{body}");
    }
}

#[tokio::test]
async fn large_rows_that_take_their_time_leave_the_lanes_to_small_ones() {
    for body in [dense(200_000), sparse(6_000_000)] {
        let world = World::with(&["misbehave"]).await;
        let mut inbox = world.inbox(&["#"]).await;
        allow_large(&world, "misbehave");
        // More of them than there are lanes, and before the others.
        write(&world, "spin", 5, &body).await;
        write(&world, "echo", 20, "'small'").await;

        let _daemon = world.daemon().await;

        let mut ids = HashSet::new();
        while ids.len() < 20 {
            ids.insert(inbox.next().await.id());
        }
        world.until("SELECT count(*) = 20 FROM tidings.deliveries").await;
        let tried = "SELECT count(*) FROM tidings.schedules WHERE attempts > 0";
        assert_eq!(world.value::<i64>(tried).await, 0, "one of the large ones is still being built");
        let locked = "SELECT 5 - count(*) FROM (SELECT FROM tidings.schedules FOR UPDATE SKIP LOCKED) AS free";
        assert_eq!(world.value::<i64>(locked).await, 1, "and the others wait for it");
        world.remove().await;
    }
}

#[tokio::test]
async fn rows_of_nearly_a_megabyte_fit_into_128_mib_and_each_arrives_once() {
    for body in [dense(28_000), sparse(900_000)] {
        let world = World::with(&["message"]).await;
        let mut inbox = world.inbox(&["#"]).await;
        write(&world, "message", 150, &body).await;

        let daemon = world.daemon().await;

        let mut ids = HashSet::new();
        for _ in 0..150 {
            let received = inbox.next().await;
            assert!(received.delivery.data.len() > 890_000);
            assert!(ids.insert(received.id()), "it came twice");
        }
        world.until("SELECT count(*) = 150 FROM tidings.deliveries").await;
        let most = most_resident_mib(&daemon);
        assert!(most < 128, "{most} MiB");
        world.remove().await;
    }
}

#[tokio::test]
async fn the_largest_rows_that_sql_takes_go_one_at_a_time_and_fit_into_256_mib() {
    for body in [dense(524_000), sparse(16_770_000)] {
        let world = World::with(&["message"]).await;
        let mut inbox = world.inbox(&["#"]).await;
        allow_large(&world, "message");
        write(&world, "message", 12, &body).await;
        write(&world, "message", 300, "'small'").await;

        let daemon = world.daemon().await;

        let mut large = 0;
        for _ in 0..312 {
            large += u32::from(inbox.next().await.delivery.data.len() > 16_000_000);
        }
        assert_eq!(large, 12);
        world.until("SELECT count(*) = 312 FROM tidings.deliveries").await;
        let most = most_resident_mib(&daemon);
        assert!(most < 256, "{most} MiB");
        world.remove().await;
    }
}

#[tokio::test]
async fn a_payload_that_is_too_long_as_text_is_parked_and_delays_no_other() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    // The first is too long for PostgreSQL itself, and has a few kilobytes as it is stored; the second for us.
    write(&world, "message", 1, "(SELECT jsonb_agg(1e100000::numeric) FROM generate_series(1, 20000))").await;
    write(&world, "message", 1, "repeat(E'\\x01', 16000000)").await;
    write(&world, "message", 20, "'small'").await;

    let daemon = world.daemon().await;

    for _ in 0..20 {
        assert_eq!(inbox.next().await.text(), "small");
    }
    world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    let reasons: Vec<String> = world.value("SELECT array_agg(reason ORDER BY reason) FROM tidings.parked").await;
    assert!(reasons[0].starts_with("PostgreSQL cannot write its payload as JSON text"), "{reasons:?}");
    assert!(reasons[1].starts_with("its payload is too long as JSON text"), "{reasons:?}");
    let most = most_resident_mib(&daemon);
    assert!(most < 128, "{most} MiB");
}
