//! What happens with what was missed: occurrences of recurrences, and ordinary rows of a kind.

use harness::world::World;

use crate::recurrences::making::PAYLOAD;

/// Makes a recurrence each minute and moves it back by an hour, as if no daemon had run for so long. Starts a daemon, and
/// returns how many of the missed instants it has made when it has gone on to coming ones.
async fn missed_after_an_hour(parameters: &str) -> (World, i64) {
    let world = World::empty().await;
    world.sql(&format!("SELECT tidings.repeat('a', 'message', '* * * * *', payload => {PAYLOAD}{parameters})")).await;
    // Whole minutes, so that they are instants of the rule; the last is missed by seconds at least.
    world.sql("UPDATE tidings.recurrences SET next_at = date_trunc('minute', now()) - interval '1 hour'").await;
    let _daemon = world.start_daemon().await;
    world.wait_until("SELECT next_at > now() FROM tidings.recurrences").await;
    let missed = world.value("SELECT count(*) FROM tidings.schedules WHERE due_at < created_at").await;
    (world, missed)
}

#[tokio::test]
async fn of_the_missed_instants_one_all_or_none_are_made() {
    let (latest, missed) = missed_after_an_hour("").await;
    assert_eq!(missed, 1);
    // That of the latest.
    let age = "SELECT created_at - nominal_at < interval '1 minute' FROM tidings.schedules WHERE due_at < created_at";
    assert!(latest.value::<bool>(age).await);

    let (all, missed) = missed_after_an_hour(", catch_up => 'all'").await;
    // From an hour ago until now, both included, unless a minute began meanwhile.
    assert!((61..=62).contains(&missed), "{missed}");
    let distinct: i64 = all.value("SELECT count(DISTINCT key) FROM tidings.schedules WHERE due_at < created_at").await;
    assert_eq!(distinct, missed);

    assert_eq!(missed_after_an_hour(", catch_up => 'none'").await.1, 0);
}

#[tokio::test]
async fn what_was_missed_for_too_long_is_not_made() {
    let (_, missed) = missed_after_an_hour(", catch_up => 'all', catch_up_within => '10 minutes'").await;
    assert!((10..=11).contains(&missed), "{missed}");
    assert_eq!(missed_after_an_hour(", catch_up_within => '1 millisecond'").await.1, 0);
}

#[tokio::test]
async fn a_week_of_seconds_is_caught_up_with_in_batches_between_which_others_are_delivered() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["other"]).await;
    let _of_the_week = world.inbox(&["a"]).await;
    world
        .sql(&format!(
            "SELECT tidings.repeat('week', 'message', 'every 1 second', payload => {PAYLOAD}, catch_up => 'all'),
                tidings.repeat('other', 'message', 'every 1 second',
                    payload => '{{\"routing_key\": \"other\", \"body\": 1}}')"
        ))
        .await;
    world.sql("UPDATE tidings.recurrences SET next_at = next_at - interval '7 days' WHERE name = 'week'").await;
    let _daemon = world.start_daemon().await;
    for _ in 0..5 {
        inbox.next().await;
    }
    let (made, most): (i64, i64) = (
        world.value("SELECT count FROM tidings.recurrences WHERE name = 'week'").await,
        world
            .value(
                "SELECT max(rows) FROM (
                    SELECT count(*) AS rows FROM tidings.deliveries WHERE key LIKE 'week/%' GROUP BY xmin
                ) AS batches",
            )
            .await,
    );
    assert!(made >= 400, "several batches were made: {made}");
    assert!(most <= 500, "a batch is no more than a claim: {most}");
    assert!(
        world.value::<bool>("SELECT next_at < now() FROM tidings.recurrences WHERE name = 'week'").await,
        "it goes on"
    );
}

#[tokio::test]
async fn a_pause_of_a_recurrence_takes_back_what_is_not_due_and_is_caught_up_with() {
    let world = World::empty().await;
    let _daemon = world.start_daemon().await;
    world.sql("SELECT tidings.repeat('a', 'message', 'every 15 seconds', catch_up => 'none')").await;
    world.wait_until("SELECT count(*) >= 1 FROM tidings.schedules").await;
    let first: String = world.value("SELECT min(nominal_at)::text FROM tidings.schedules").await;

    let (code, answer) = world.tidings(["pause", "--recurrence", "a"]).await;
    assert_eq!((code, answer.trim()), (0, "the recurrence a is paused"));
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules").await, 0, "taken back");
    let state =
        format!("SELECT paused AND next_at = '{first}' AND count = 0 AND make_at IS NULL FROM tidings.recurrences");
    assert!(world.value::<bool>(&state).await);
    assert_eq!(world.tidings(["pause", "--recurrence", "a"]).await.1.trim(), "the recurrence a is paused already");
    assert_eq!(world.tidings(["pause", "--recurrence", "b"]).await.0, 66);

    // As if the pause had lasted for an hour.
    world.sql("UPDATE tidings.recurrences SET next_at = next_at - interval '1 hour'").await;
    let (code, answer) = world.tidings(["recurrences", "resume", "a"]).await;
    assert_eq!((code, answer.trim()), (0, "the recurrence a is resumed"));
    world.wait_until("SELECT count(*) >= 1 FROM tidings.schedules").await;
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.schedules WHERE due_at < created_at").await, 0);
}

#[tokio::test]
async fn rows_of_a_kind_that_were_missed_expire_if_the_kind_is_not_caught_up_with() {
    let world = World::with_plugins(&["message", "misbehave"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    world.sql("SELECT tidings.catch_up('message', 'none', within => '5 minutes')").await;
    // As if they had been written before they were due, and no daemon had run since.
    let missed = "INSERT INTO tidings.schedules (kind, key, due_at, created_at, payload)
         SELECT kind, key, now() - late::interval, now() - interval '1 day', payload
         FROM (VALUES ('message', 'long', '6 minutes'), ('message', 'short', '4 minutes'), ('echo', 'other', '1 hour'))
             AS missed (kind, key, late), ";
    world.sql(&format!("{missed} (SELECT {PAYLOAD}::jsonb AS payload) AS payload")).await;
    // Written late, and due before: it was not missed.
    world
        .sql(&format!(
            "SELECT tidings.schedule('message', now() - interval '1 hour', {PAYLOAD}, key => 'written late')"
        ))
        .await;
    let daemon = world.start_daemon().await;
    let mut delivered = Vec::new();
    for _ in 0..3 {
        delivered.push(inbox.next().await.headers()["tidings-key"].clone());
    }
    delivered.sort();
    assert_eq!(delivered, ["other", "short", "written late"]);
    world.wait_until("SELECT count(*) = 4 FROM tidings.deliveries").await;
    let detail: String =
        world.value("SELECT detail FROM tidings.deliveries WHERE key = 'long' AND outcome = 'expired'").await;
    assert!(detail.starts_with("it was missed: it had been due for 36"), "{detail}");
    assert!(detail.ends_with("tidings.catch_up lets rows of its kind be 300 s late"), "{detail}");
    let (_, explained) = world.tidings(["explain", "message/long"]).await;
    assert!(explained.contains("it was missed"), "{explained}");
    daemon.stop().await;

    // The rule can be taken back.
    world.sql("SELECT tidings.catch_up('message', 'all')").await;
    world.sql(&format!("{missed} (SELECT {PAYLOAD}::jsonb AS payload) AS payload")).await;
    let _daemon = world.start_daemon().await;
    for _ in 0..3 {
        inbox.next().await;
    }
}
