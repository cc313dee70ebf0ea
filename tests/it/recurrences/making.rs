//! What an occurrence is, and when it is made.

use harness::world::World;

/// The payload of the plugin `message`, as an SQL literal.
pub(crate) const PAYLOAD: &str = r#"'{"routing_key": "a", "body": 1}'"#;

#[tokio::test]
async fn an_occurrence_is_an_ordinary_row_with_the_instant_and_the_name_of_its_recurrence() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    let first: i64 = world
        .value(&format!(
            "SELECT (extract(epoch FROM tidings.repeat('beat/s', 'message', 'every 1 second', payload => {PAYLOAD},
                subject => 's', headers => '{{\"h\": \"v\"}}', expires_after => '1 hour', priority => 7)) * 1000)::bigint"
        ))
        .await;

    for seconds in 0..3 {
        let received = inbox.next().await;
        let nominal = received.number("tidings-nominal-ms");
        assert_eq!(nominal, first + seconds * 1_000, "one each second, in their order");
        assert_eq!(received.number("tidings-due-ms"), nominal);
        assert!(received.at_ms >= nominal, "never early");
        assert_eq!(received.number("tidings-expires-ms"), nominal + 3_600_000);
        assert_eq!(received.properties().priority().expect("it has one"), 7);
        let headers = received.headers();
        assert_eq!(headers["tidings-recurrence"], "beat/s");
        assert_eq!((&*headers["tidings-subject"], &*headers["h"]), ("s", "v"));
        let key = world
            .value::<String>(&format!(
                "SELECT 'beat/s/' || to_char(to_timestamp({nominal} / 1000) AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')"
            ))
            .await;
        assert_eq!(headers["tidings-key"], key);
        let (code, explained) = world.tidings(["explain", &key]).await;
        assert_eq!(code, 0, "{explained}");
        assert!(explained.contains(&received.id().to_string()), "{explained}");
    }
    // Made 30 s before it is due at most.
    let (ahead, made): (bool, bool) = (
        world.value("SELECT max(nominal_at) <= now() + interval '30 s' FROM tidings.schedules").await,
        world.value("SELECT count >= 3 AND last_at IS NOT NULL AND next_at > last_at FROM tidings.recurrences").await,
    );
    assert!(ahead && made);
}

#[tokio::test]
async fn a_recurrence_that_is_not_due_soon_is_computed_at_once_and_makes_nothing_yet() {
    let world = World::empty().await;
    let _daemon = world.start_daemon().await;
    world.sql("SELECT tidings.repeat('a', 'message', '0 0 0 1 1 * 2200', time_zone => 'Asia/Tokyo')").await;
    world
        .wait_until(
            "SELECT next_at IS NOT DISTINCT FROM '2199-12-31 15:00:00Z' FROM tidings.recurrences WHERE name = 'a'",
        )
        .await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules").await, 0);
    assert!(world.value::<bool>("SELECT make_at = next_at - interval '20 s' FROM tidings.recurrences").await);
}

#[tokio::test]
async fn what_only_a_daemon_can_tell_is_its_problem_and_stops_nothing_else() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let mut daemon = world.start_daemon().await;
    world
        .sql(&format!(
            "SELECT tidings.repeat('never', 'message', '0 0 30 2 *'), tidings.repeat('zone', 'message', '0 0 * * *'),
                tidings.repeat('past', 'message', '0 0 0 1 1 * 2020'),
                tidings.repeat('good', 'message', 'every 1 second', payload => {PAYLOAD})"
        ))
        .await;
    // A zone that PostgreSQL might know, and the daemon does not.
    world.sql("UPDATE tidings.recurrences SET time_zone = 'Mars/Olympus', next_at = NULL, not_before = NULL WHERE name = 'zone'").await;
    inbox.next().await;
    let problem = async |name: &str| {
        let sql = format!("SELECT coalesce(problem, '') FROM tidings.recurrences WHERE name = '{name}'");
        harness::eventually("a problem", async || {
            Some(world.value::<String>(&sql).await).filter(|text| !text.is_empty())
        })
        .await
    };
    assert_eq!(problem("never").await, r#"the rule "0 0 30 2 *" never comes: no date fits it"#);
    assert_eq!(problem("past").await, r#"the rule "0 0 0 1 1 * 2020" does not come any more: its years are past"#);
    assert!(problem("zone").await.starts_with(r#"the time zone "Mars/Olympus" is not in the time zone database 20"#));
    daemon.wait_for_line("no occurrence of a recurrence can be made").await;
    let (code, report) = world.launch().subcommand("doctor").run_to_end().await;
    assert_eq!(code, 1, "{report}");
    assert!(report.contains("never") && report.contains("no date fits it"), "{report}");

    // A change takes the problem away.
    world.sql("SELECT tidings.repeat('never', 'message', '0 0 28 2 *')").await;
    world
        .wait_until("SELECT problem IS NULL AND next_at IS NOT NULL FROM tidings.recurrences WHERE name = 'never'")
        .await;
}

#[tokio::test]
async fn an_occurrence_that_postgresql_refuses_is_its_problem_and_stops_nothing_else() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    world.sql("ALTER TABLE tidings.schedules ADD CONSTRAINT no_bad CHECK (subject <> 'bad')").await;
    world
        .sql(&format!(
            "SELECT tidings.repeat(name, 'message', 'every 1 second', payload => {PAYLOAD}, subject => name)
             FROM unnest('{{bad,good}}'::text[]) AS name"
        ))
        .await;
    assert_eq!(inbox.next().await.headers()["tidings-recurrence"], "good");
    world.wait_until("SELECT problem LIKE '%no_bad%' FROM tidings.recurrences WHERE name = 'bad'").await;

    // It is tried again by itself.
    world.sql("ALTER TABLE tidings.schedules DROP CONSTRAINT no_bad").await;
    world.sql("UPDATE tidings.recurrences SET not_before = now() WHERE name = 'bad'").await;
    world.wait_until("SELECT problem IS NULL AND count > 0 FROM tidings.recurrences WHERE name = 'bad'").await;
}

#[tokio::test]
async fn a_daemon_with_a_newer_time_zone_database_computes_the_next_instants_anew() {
    let world = World::empty().await;
    let daemon = world.start_daemon().await;
    world.sql("SELECT tidings.repeat('a', 'message', '0 12 1 7 *', time_zone => 'Europe/Berlin')").await;
    world.wait_until("SELECT next_at IS NOT NULL FROM tidings.recurrences").await;
    daemon.stop().await;
    let right: String = world.value("SELECT next_at::text FROM tidings.recurrences").await;
    // As if Berlin had had no daylight saving time by the rules that were known then.
    world
        .sql("UPDATE tidings.recurrences SET next_at = next_at + interval '1 hour', time_zone_version = '1999a'")
        .await;

    let daemon = world.start_daemon().await;

    world.wait_until(&format!("SELECT next_at IS NOT DISTINCT FROM '{right}' FROM tidings.recurrences")).await;
    daemon.stop().await;
    // What the same database computed stays.
    world.sql("UPDATE tidings.recurrences SET next_at = next_at + interval '1 hour'").await;
    let _daemon = world.start_daemon().await;
    world.sql("SELECT tidings.repeat('b', 'message', '0 12 1 7 *')").await;
    world.wait_until("SELECT next_at IS NOT NULL FROM tidings.recurrences WHERE name = 'b'").await;
    assert!(
        world.value::<bool>(&format!("SELECT next_at > '{right}' FROM tidings.recurrences WHERE name = 'a'")).await
    );
}

#[tokio::test]
async fn a_pause_of_the_kind_holds_its_occurrences_as_other_rows() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    assert_eq!(world.tidings(["pause", "message"]).await.0, 0);
    world
        .sql(&format!("SELECT tidings.repeat('a', 'message', 'every 1 second', payload => {PAYLOAD}, max_count => 2)"))
        .await;
    world.wait_until("SELECT count(*) = 2 FROM tidings.schedules WHERE held").await;
    assert!(world.value::<bool>("SELECT ended AND count = 2 AND next_at IS NULL FROM tidings.recurrences").await);
    assert_eq!(world.tidings(["resume", "message"]).await.0, 0);
    for _ in 0..2 {
        inbox.next().await;
    }
}

#[tokio::test]
async fn a_parked_occurrence_that_is_put_back_is_still_one() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.start_daemon().await;
    // The payload is none for the plugin.
    world.sql("SELECT tidings.repeat('a', 'message', 'every 1 second', payload => '1', max_count => 1)").await;
    world.wait_until("SELECT count(*) = 1 FROM tidings.parked WHERE recurrence = 'a' AND nominal_at = due_at").await;
    world.sql(&format!("UPDATE tidings.parked SET payload = {PAYLOAD}")).await;
    world.sql("SELECT tidings.unpark(id) FROM tidings.parked").await;
    assert_eq!(inbox.next().await.headers()["tidings-recurrence"], "a");
}
