//! What changing, stopping and spreading a recurrence does, in the caller's transaction.

use harness::world::World;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use crate::database::platforms::{create_role, database_url_of};

const REPEAT: &str = "SELECT tidings.repeat('a', 'message', 'every 15 seconds', starts_at => '2020-01-01Z'";

/// A world with a daemon and a recurrence that has occurrences in the queue.
async fn start() -> (World, harness::daemon::Daemon) {
    let world = World::empty().await;
    let daemon = world.start_daemon().await;
    world.sql(&format!("{REPEAT})")).await;
    world.wait_until("SELECT count(*) >= 1 FROM tidings.schedules").await;
    (world, daemon)
}

#[tokio::test]
async fn repeating_the_same_again_changes_nothing() {
    let (world, _daemon) = start().await;
    let state = "SELECT row(r.*)::text || (SELECT array_agg(id ORDER BY id) FROM tidings.schedules)::text FROM tidings.recurrences AS r";
    let before: String = world.value(state).await;
    let same: bool = world.value(&format!("{REPEAT}) = (SELECT next_at FROM tidings.recurrences)")).await;
    assert!(same);
    assert_eq!(world.value::<String>(state).await, before);
    assert!(
        world
            .value::<bool>(&format!(
                "{REPEAT}, payload => '[7]', on_conflict => 'keep') = (SELECT next_at FROM tidings.recurrences)"
            ))
            .await
    );
    assert_eq!(world.value::<String>(state).await, before);
    let error = world.expect_error(&format!("{REPEAT}, on_conflict => 'error')")).await;
    assert!(error.contains(r#"recurrence "a" exists already"#), "{error}");
}

#[tokio::test]
async fn a_changed_payload_is_in_occurrences_that_were_made_already() {
    let (world, _daemon) = start().await;
    let first: String = world.value("SELECT min(nominal_at)::text FROM tidings.schedules").await;
    world.sql(&format!("{REPEAT}, payload => '[7]', subject => 'new')")).await;
    world
        .wait_until("SELECT count(*) >= 1 AND bool_and(payload = '[7]' AND subject = 'new') FROM tidings.schedules")
        .await;
    // The same instants, unless the first became due meanwhile.
    assert!(
        world
            .value::<bool>(&format!(
                "SELECT min(nominal_at) <= timestamptz '{first}' + interval '15 s' FROM tidings.schedules"
            ))
            .await
    );
    let instants = "SELECT count = (SELECT count(*) FROM tidings.schedules) AND last_at = (SELECT max(nominal_at) FROM tidings.schedules)
                    FROM tidings.recurrences";
    world.wait_until(instants).await;
}

#[tokio::test]
async fn a_changed_rule_takes_back_what_is_not_due_and_counts_from_now() {
    let (world, _daemon) = start().await;
    world.sql("SELECT tidings.repeat('a', 'message', '0 0 0 1 1 * 2200')").await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules WHERE due_at > now()").await, 0);
    world.wait_until("SELECT next_at IS NOT DISTINCT FROM '2200-01-01Z' FROM tidings.recurrences").await;
}

#[tokio::test]
async fn a_change_that_is_rolled_back_never_happened() {
    let (world, _daemon) = start().await;
    let ids =
        "SELECT array_agg(id ORDER BY id)::text FROM tidings.schedules WHERE nominal_at < now() + interval '20 s'";
    let before: Option<String> = world.value(ids).await;
    let mut transaction = world.db.begin().await.expect("begun");
    sqlx::query("SELECT tidings.stop_repeating('a')").execute(&mut *transaction).await.expect("stopped");
    transaction.rollback().await.expect("rolled back");
    assert_eq!(world.value::<Option<String>>(ids).await, before);
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.recurrences").await, 1);
}

#[tokio::test]
async fn stopping_removes_the_recurrence_and_what_it_has_in_the_queue() {
    let (world, _daemon) = start().await;
    // A row of other origin stays.
    world.sql("SELECT tidings.schedule('message', now() + interval '1 hour', key => 'a/1')").await;
    assert!(world.value::<bool>("SELECT tidings.stop_repeating('a')").await);
    assert_eq!(world.value::<String>("SELECT string_agg(key, ' ') FROM tidings.schedules").await, "a/1");
    assert!(!world.value::<bool>("SELECT tidings.stop_repeating('a')").await);
    let (code, answer) = world.tidings(["recurrences", "stop", "a"]).await;
    assert_eq!((code, answer.trim()), (66, "there is no recurrence named a"));
}

#[tokio::test]
async fn a_recurrence_ends_at_its_end_and_after_its_last_occurrence_and_can_be_prolonged() {
    let world = World::empty().await;
    let _daemon = world.start_daemon().await;
    world
        .sql(
            "SELECT tidings.repeat('count', 'message', 'every 1 second', max_count => 3),
                tidings.repeat('end', 'message', 'every 1 second', starts_at => date_trunc('second', now()) + interval '3 s',
                    ends_at => date_trunc('second', now()) + interval '5 s'),
                tidings.repeat('over', 'message', '* * * * *', ends_at => '2020-01-01Z')",
        )
        .await;
    world.wait_until("SELECT bool_and(ended) FROM tidings.recurrences").await;
    let counts = "SELECT string_agg(name || ' ' || count, ', ' ORDER BY name) FROM tidings.recurrences";
    assert_eq!(world.value::<String>(counts).await, "count 3, end 3, over 0");
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules").await, 6);
    world.sql("SELECT tidings.repeat('count', 'message', 'every 1 second', max_count => 5)").await;
    world.wait_until("SELECT count = 5 AND ended FROM tidings.recurrences WHERE name = 'count'").await;
}

#[tokio::test]
async fn a_spread_moves_what_has_the_same_name_by_the_same_time_and_others_by_others() {
    let world = World::empty().await;
    let _daemon = world.start_daemon().await;
    world
        .sql(
            "SELECT tidings.repeat('r' || number, 'message', 'every 1 second', spread => '10 seconds')
             FROM generate_series(1, 50) AS number",
        )
        .await;
    world.wait_until("SELECT count(DISTINCT recurrence) = 50 FROM tidings.schedules").await;
    let offsets = "SELECT count(DISTINCT due_at - nominal_at) = 1 AND min(due_at - nominal_at) >= '0'
            AND max(due_at - nominal_at) < '10 s' AND min(due_at - nominal_at) = tidings.spread_offset(recurrence, '10 s') AS fits
        FROM tidings.schedules GROUP BY recurrence";
    assert!(world.value::<bool>(&format!("SELECT bool_and(fits) FROM ({offsets}) AS offsets")).await);
    let different: i64 = world.value("SELECT count(DISTINCT due_at - nominal_at) FROM tidings.schedules").await;
    assert!(different >= 45, "{different}");
    assert!(
        world.value::<bool>("SELECT bool_and(due_at <= created_at + interval '31 s') FROM tidings.schedules").await
    );
}

#[tokio::test]
async fn a_row_with_a_spread_is_due_later_by_a_part_that_follows_from_its_key() {
    let world = World::empty().await;
    let offset = "SELECT extract(epoch FROM due_at - '2100-01-01Z')::float8 FROM tidings.schedules WHERE key = 'k'";
    world.sql("SELECT tidings.schedule('a', '2100-01-01Z', key => 'k', spread => '1 hour')").await;
    let first: f64 = world.value(offset).await;
    assert!((0.0..3_600.0).contains(&first), "{first}");
    let args = ["schedule", "a", "--at", "2100-01-01T00:00:00Z", "--key", "k", "--spread", "1h"];
    assert_eq!(world.tidings(args).await.0, 0);
    assert!((world.value::<f64>(offset).await - first).abs() < 0.000_5);
    world.sql("SELECT tidings.schedule('b', '2100-01-01Z', key => 'k2', spread => '1 hour')").await;
    let others: i64 = world.value("SELECT count(DISTINCT due_at) FROM tidings.schedules").await;
    assert_eq!(others, 2);
}

#[tokio::test]
async fn a_producer_makes_and_stops_recurrences_through_functions_alone() {
    let world = World::empty().await;
    let producer = create_role(&world, "producer", "IN ROLE tidings_producer").await;
    let mut connection = PgConnection::connect(&database_url_of(&world, &producer)).await.expect("connected");
    let mut run = async |sql: &str| sqlx::query(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await;
    run("SELECT tidings.repeat('a', 'message', '* * * * *')").await.expect("made");
    run("SELECT * FROM tidings.recurrences").await.expect("read");
    for forbidden in [
        "UPDATE tidings.recurrences SET count = 0",
        "DELETE FROM tidings.recurrences",
        "INSERT INTO tidings.schedules (kind, due_at, recurrence) VALUES ('a', now(), 'a')",
        "SELECT tidings.pause_recurrence('a', true)",
        "SELECT tidings.withdraw_occurrences('a')",
    ] {
        let error = run(forbidden).await.expect_err(forbidden).to_string();
        assert!(error.contains("permission denied"), "{forbidden}: {error}");
    }
    run("SELECT tidings.stop_repeating('a'), tidings.catch_up('message', 'none')").await.expect("stopped");
}

#[tokio::test]
async fn commands_make_list_and_show_recurrences() {
    let world = World::empty().await;
    let _daemon = world.start_daemon().await;
    let args = ["repeat", "nightly", "message", "30 2 * * *", "--zone", "Europe/Berlin", "--payload", "[1]"];
    let (code, answer) = world.tidings([&args[..], &["--priority", "2"]].concat()).await;
    assert_eq!((code, answer.trim()), (0, "a daemon computes the first instant: tidings recurrences show nightly"));
    world.wait_until("SELECT next_at IS NOT NULL FROM tidings.recurrences").await;
    let (code, list) = world.tidings(["recurrences", "list"]).await;
    assert_eq!(code, 0, "{list}");
    assert!(list.contains("nightly") && list.contains("Europe/Berlin") && list.contains("30 2 * * *"), "{list}");
    let (code, shown) = world.tidings(["recurrences", "show", "nightly"]).await;
    assert_eq!(code, 0, "{shown}");
    assert!(shown.contains("in words   At 02:30") && shown.contains("catch-up   latest"), "{shown}");
    assert!(shown.contains("priority   2"), "{shown}");
    let (code, next) = world.tidings(["next"]).await;
    assert_eq!(code, 0, "{next}");
    assert!(next.contains("nightly"), "{next}");
    let (code, missing) = world.tidings(["explain", "nightly/2200-01-01T01:30:00Z"]).await;
    assert_eq!(code, 66, "{missing}");
    assert!(missing.contains("no occurrence of nightly at 2200-01-01T01:30:00Z is made yet"), "{missing}");
    let (code, refused) = world.tidings(["repeat", "b", "message", "61 * * * *"]).await;
    assert_eq!(code, 64, "{refused}");
    let (code, refused) = world.tidings(["repeat", "b", "message", "* * * * *", "--zone", "Mars/Olympus"]).await;
    assert!(code != 0 && refused.contains("'Mars/Olympus' is unknown"), "{refused}");
}
