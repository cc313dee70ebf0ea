//! Outcomes of rows that are not delivered at once: parked, skipped, retried, held or expired, and what users see of
//! them.

use harness::world::World;

/// Schedules a row of `kind` that is due now, with `payload`.
async fn schedule(world: &World, kind: &str, payload: &str) -> uuid::Uuid {
    world.value(&format!("SELECT tidings.schedule('{kind}', now(), '{payload}', key => '{kind}')")).await
}

#[tokio::test]
async fn a_row_with_an_invalid_payload_is_parked_with_the_plugins_reason() {
    let world = World::with_plugins(&["game-reminder"]).await;
    let mut daemon = world.start_daemon().await;

    let id = schedule(&world, "game-reminder", r#"{"game_id": 7}"#).await;

    world.wait_until("SELECT count(*) = 1 FROM tidings.parked").await;
    let reason: String =
        world.value(&format!("SELECT reason FROM tidings.parked WHERE id = '{id}' AND parked_at > due_at")).await;
    assert!(reason.starts_with("the payload is not a game reminder: invalid type"), "{reason}");
    assert!(world.value::<String>("SELECT plugin FROM tidings.parked").await.starts_with("game-reminder@"));
    daemon.wait_for_line(&format!("parked {id}")).await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules").await, 0);
}

#[tokio::test]
async fn unpark_puts_a_row_back_with_its_id_unless_its_key_is_taken() {
    let world = World::with_plugins(&["misbehave"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    let id = schedule(&world, "invalid", "{}").await;
    world.wait_until("SELECT count(*) = 1 FROM tidings.parked").await;

    world.sql("SELECT tidings.schedule('invalid', now() + interval '1 hour', key => 'invalid')").await;
    let error = world.expect_error(&format!("SELECT tidings.unpark('{id}')")).await;
    assert!(error.contains(r#"key "invalid" of kind "invalid" has been scheduled again"#), "{error}");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.parked").await, 1, "it is still parked");
    world.sql("SELECT tidings.cancel('invalid', 'invalid')").await;

    // The row is repaired while it is parked: its new kind can be built.
    world.sql("UPDATE tidings.parked SET kind = 'echo', attempts = 7").await;
    assert!(world.value::<bool>(&format!("SELECT tidings.unpark('{id}')")).await);
    let received = inbox.next().await;
    assert_eq!((received.id(), received.number("tidings-attempt")), (id, 1));
    assert!(!world.value::<bool>(&format!("SELECT tidings.unpark('{id}')")).await, "it is not parked any more");
}

#[tokio::test]
async fn a_skipped_row_finishes_without_a_message_and_the_error_other_parks_a_row() {
    let world = World::with_plugins(&["misbehave", "game-reminder"]).await;
    let _daemon = world.start_daemon().await;

    schedule(&world, "skip", "{}").await;
    schedule(&world, "other", "{}").await;
    let started = r#"{"game_id":"6f0f5e2e-6a2b-4b0e-9d0b-3a4f0a6b1c2d","title":"t","starts_at":"2020-01-01T00:00:00Z","reminder_minutes":5}"#;
    schedule(&world, "game-reminder", started).await;

    world.wait_until("SELECT count(*) = 2 FROM tidings.deliveries WHERE outcome = 'skipped'").await;
    assert_eq!(
        world.value::<String>("SELECT detail FROM tidings.deliveries WHERE kind = 'skip'").await,
        "nothing to send"
    );
    assert!(
        world
            .value::<String>("SELECT detail FROM tidings.deliveries WHERE kind = 'game-reminder'")
            .await
            .contains("has started")
    );
    world.wait_until("SELECT count(*) = 1 FROM tidings.parked WHERE reason = 'something else'").await;
}

#[tokio::test]
async fn a_row_is_retried_at_the_time_for_which_its_plugin_asks() {
    let world = World::with_plugins(&["misbehave"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;

    schedule(&world, "retry-once", "{}").await;
    assert_eq!(inbox.next().await.number("tidings-attempt"), 2);

    schedule(&world, "retry", "3600000").await;
    // Selected by kind, because the first row may not be committed yet.
    world.wait_until("SELECT count(*) = 1 FROM tidings.schedules WHERE kind = 'retry' AND attempts = 1").await;
    let waits: bool = world
        .value(
            "SELECT failures = 0 AND last_error = 'not yet' AND slot_at - now() BETWEEN interval '59 min' AND interval '60 min'
             FROM tidings.schedules WHERE kind = 'retry'",
        )
        .await;
    assert!(waits, "it does not count towards the maximum, and waits as long as it asked");
    // The plugin may ask for any time, however long.
    schedule(&world, "retry", "18446744073709551615").await;
    let far = "kind = 'retry' AND attempts = 1 AND slot_at > now() + interval '9 years'";
    world.wait_until(&format!("SELECT count(*) = 1 FROM tidings.schedules WHERE {far}")).await;
}

#[tokio::test]
async fn a_row_at_which_its_plugin_fails_backs_off_with_the_reason_and_delays_no_other() {
    let world = World::with_plugins(&["misbehave"]).await;
    let mut inbox = world.inbox(&["misbehave.echo"]).await;
    let _daemon = world.start_daemon().await;
    let broken = [
        ("trap", "it trapped (unreachable)"),
        ("spin", "more than 100 ms of CPU time (cpu-ms)"),
        ("recurse", "its stack overflowed"),
        ("empty-key", "its routing-key has 0 bytes"),
        ("reserved-header", r#"a header is named "x-death""#),
        ("many-headers", "its headers have"),
    ];
    for (kind, _) in broken {
        world.sql(&format!("SELECT tidings.schedule('{kind}', now() - interval '1 day', key => '{kind}')")).await;
    }
    for number in 0..20 {
        world.sql(&format!("SELECT tidings.schedule('echo', now(), '{number}')")).await;
    }

    for _ in 0..20 {
        inbox.next().await;
    }
    for (kind, reason) in broken {
        world
            .wait_until(&format!(
                "SELECT attempts > 0 AND failures = attempts FROM tidings.schedules WHERE kind = '{kind}'"
            ))
            .await;
        let error: String =
            world.value(&format!("SELECT last_error FROM tidings.schedules WHERE kind = '{kind}'")).await;
        assert!(error.starts_with("plugin misbehave@1+") && error.contains(reason), "{kind}: {error}");
    }
    assert_eq!(
        world.value::<i64>("SELECT count(*) FROM tidings.schedules WHERE slot_at > due_at").await,
        6,
        "all back off"
    );
}

#[tokio::test]
async fn a_row_beyond_a_memory_or_output_limit_is_parked_at_once_with_the_limit_and_the_solution() {
    let world = World::with_plugins(&["misbehave"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    for (kind, limit) in [
        ("grow", "MiB of memory and may have 64 (memory-mib)"),
        ("flood", "handed more than 1024 KiB to the host in one call (output-kib)"),
    ] {
        let id = schedule(&world, kind, "{}").await;
        world.wait_until(&format!("SELECT count(*) = 1 FROM tidings.parked WHERE id = '{id}' AND attempts = 0")).await;
        let reason: String = world.value(&format!("SELECT reason FROM tidings.parked WHERE id = '{id}'")).await;
        for part in ["plugin misbehave@1+", limit, "raise the limit in the plugin's NAME.toml", "put the row back"] {
            assert!(reason.contains(part), "{part}: {reason}");
        }
    }
    // The operator does what the reason says: raises the limit and puts the row back.
    std::fs::write(world.plugin_dir.join("misbehave.toml"), "[limits]\noutput-kib = 4096\n").expect("written");
    harness::eventually("the row", async || {
        world.sql("SELECT tidings.unpark(id) FROM tidings.parked WHERE kind = 'flood'").await;
        inbox.next_within(std::time::Duration::from_millis(500)).await
    })
    .await;
}

#[tokio::test]
async fn a_row_at_which_its_plugin_keeps_failing_is_parked_after_the_maximum_of_attempts() {
    let world = World::with_plugins(&["misbehave"]).await;
    let _daemon = world.launch().with("TIDINGS_MAX_ATTEMPTS", 2).start_ready().await;

    schedule(&world, "trap", "{}").await;

    world.wait_until("SELECT count(*) = 1 FROM tidings.parked").await;
    let (reason, attempts): (String, i32) = (
        world.value("SELECT reason FROM tidings.parked").await,
        world.value("SELECT attempts FROM tidings.parked").await,
    );
    assert!(reason.starts_with("failed 2 times, at last: plugin misbehave@1+"), "{reason}");
    assert_eq!(attempts, 1, "the attempts before the last");
}

#[tokio::test]
async fn a_reason_with_a_nul_character_is_stored_with_a_replacement_character() {
    let world = World::with_plugins(&["misbehave"]).await;
    let _daemon = world.start_daemon().await;

    schedule(&world, "invalid-nul", "{}").await;

    world.wait_until("SELECT count(*) = 1 FROM tidings.parked WHERE reason = 'nul \u{FFFD} inside'").await;
}

#[tokio::test]
async fn a_row_spends_no_attempt_when_earlier_rows_have_filled_the_plugins_memory() {
    let world = World::with_plugins(&["misbehave"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    // Each row leaks 5 MB: a dozen fit into the plugin's memory, fifty do not.
    world.sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'leak', now() FROM generate_series(1, 50)").await;

    let _daemon = world.start_daemon().await;

    for _ in 0..50 {
        assert_eq!(inbox.next().await.number("tidings-attempt"), 1);
    }
}

#[tokio::test]
async fn rows_of_a_kind_without_a_plugin_are_held_until_a_daemon_with_the_plugin_starts() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.start_daemon().await;
    schedule(&world, "echo", "{}").await;
    world.sql("SELECT tidings.schedule('echo', now() + interval '1 day', key => 'future')").await;

    world
        .wait_until("SELECT held AND last_error LIKE 'held: no plugin%' FROM tidings.schedules WHERE key = 'echo'")
        .await;
    daemon.wait_for_line("no plugin serves it").await;
    assert!(
        world.value::<bool>("SELECT NOT held FROM tidings.schedules WHERE key = 'future'").await,
        "what is not due is not held"
    );
    schedule(&world, "message", r#"{"routing_key":"a","body":"in time"}"#).await;
    assert_eq!(inbox.next().await.text(), "in time", "a held row delays no other");

    world.install("misbehave");
    let _second = world.start_daemon().await;
    let received = inbox.next().await;
    assert_eq!((received.delivery.routing_key.as_str(), received.number("tidings-attempt")), ("misbehave.echo", 1));
}

#[tokio::test]
async fn a_held_row_expires_at_its_deadline() {
    let world = World::with_plugins(&["message"]).await;
    let mut daemon = world.start_daemon().await;

    world.sql("SELECT tidings.schedule('nobody', now(), expires_at => now() + interval '3 seconds')").await;

    daemon.wait_for_line("no plugin serves it").await;
    world
        .wait_until(
            "SELECT count(*) = 1 FROM tidings.deliveries WHERE outcome = 'expired' AND finished_at >= expires_at",
        )
        .await;
}

#[tokio::test]
async fn a_daemon_does_not_hold_rows_of_a_kind_that_another_daemon_serves() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.start_daemon().await;
    let dir = world.plugin_dir.join("other");
    std::fs::create_dir(&dir).expect("made");
    std::fs::copy(World::built_plugin("misbehave"), dir.join("misbehave.wasm")).expect("copied");
    let _other =
        world.launch().with("TIDINGS_SWEEP_MS", 600_000).with("TIDINGS_PLUGIN_DIR", dir.display()).start_ready().await;

    for number in 0..50 {
        schedule(&world, "echo", &number.to_string()).await;
        inbox.next().await;
    }

    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(daemon.wait_for_end().await.success());
    assert!(!daemon.log().contains("held"), "{}", daemon.log());
}

#[tokio::test]
async fn only_history_older_than_the_retention_is_removed() {
    let world = World::with_plugins(&["message"]).await;
    world.sql("SELECT tidings.schedule('message', now() + interval '1 day')").await;
    world
        .sql(
            "INSERT INTO tidings.deliveries (id, kind, due_at, finished_at, outcome, attempts, payload, headers)
             SELECT gen_random_uuid(), 'message', now(), now() - age, 'delivered', 0, '{}', '{}'
             FROM unnest('{1 day, 47 hours, 49 hours, 30 days}'::interval[]) AS age",
        )
        .await;

    let _daemon = world.launch().with("TIDINGS_HISTORY_DAYS", 2).start_ready().await;

    world
        .wait_until("SELECT count(*) = 2 AND min(finished_at) > now() - interval '2 days' FROM tidings.deliveries")
        .await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules").await, 1);
}

#[tokio::test]
async fn a_thousand_rows_with_the_same_error_are_all_parked_without_flooding_the_log() {
    let world = World::with_plugins(&["misbehave"]).await;
    let daemon = world.start_daemon().await;

    world
        .sql("INSERT INTO tidings.schedules (kind, due_at) SELECT 'invalid', now() FROM generate_series(1, 1000)")
        .await;

    world.wait_until("SELECT count(*) = 1000 FROM tidings.parked").await;
    let lines = daemon.log().matches("its plugin cannot use it").count();
    // On a busy machine the rows may take longer than one of the periods in which the log limits repeated lines.
    assert!((200..1000).contains(&lines), "{lines} lines");
}
