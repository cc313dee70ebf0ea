//! Many recurrences and several daemons, which are killed again and again: each nominal instant is made once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use harness::daemon::Daemon;
use harness::eventually_within;
use harness::world::World;
use nix::sys::signal::Signal;
use uuid::Uuid;

use crate::recurrences::making::PAYLOAD;

/// A number from the environment, for a longer run than in the suite. `HARNESS_TIDINGS` is another build to run.
fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

#[tokio::test(flavor = "multi_thread")]
async fn three_daemons_that_are_killed_at_random_make_every_instant_once() {
    // Longer than the 30 s for which one transaction makes occurrences: the next one must not make them again.
    let (recurrences, seconds) = (number("HARNESS_RECURRENCES", 100), number("HARNESS_SECONDS", 45));
    if let Some(binary) = std::env::var_os("HARNESS_TIDINGS") {
        harness::world::put_under_test(Path::new(&binary));
    }
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    // Half of them each second, and half of them each minute, by cron and by time.
    world
        .sql(&format!(
            "SELECT tidings.repeat(
                'r' || number, 'message',
                (ARRAY['every 1 second', '* * * * * *', 'every 1 minute', '* * * * *'])[number % 4 + 1],
                payload => {PAYLOAD}, catch_up => 'all', starts_at => starts_at, ends_at => starts_at + interval '{seconds} s'
            )
            FROM (SELECT date_trunc('second', now()) + interval '5 s' AS starts_at) AS start, generate_series(1, {recurrences}) AS number"
        ))
        .await;
    let expected: BTreeSet<(String, i64)> = sqlx::query_as(
        "SELECT name, extract(epoch FROM at)::bigint * 1000
         FROM tidings.recurrences
         CROSS JOIN LATERAL generate_series(starts_at, ends_at, '1 second') AS at
         WHERE rule IN ('every 1 second', '* * * * * *')
            OR rule = 'every 1 minute' AND extract(epoch FROM at - starts_at)::int % 60 = 0
            OR rule = '* * * * *' AND extract(second FROM at) = 0",
    )
    .fetch_all(&world.db)
    .await
    .expect("expected")
    .into_iter()
    .collect();

    let mut daemons: Vec<Daemon> = Vec::new();
    for _ in 0..3 {
        daemons.push(world.start_daemon().await);
    }
    let killer = async {
        let until = tokio::time::Instant::now() + Duration::from_secs(seconds);
        while tokio::time::Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(fastrand::u64(200..2_000))).await;
            let victim = fastrand::usize(..daemons.len());
            daemons[victim].signal(Signal::SIGKILL);
            daemons[victim].wait_for_end().await;
            daemons[victim] = world.start_daemon().await;
        }
    };
    let mut ids: BTreeMap<(String, i64), BTreeSet<Uuid>> = BTreeMap::new();
    let mut early = 0;
    let consumer = async {
        loop {
            let received = inbox.next().await;
            let nominal = received.number("tidings-nominal-ms");
            early += usize::from(received.at_ms < nominal);
            ids.entry((received.headers()["tidings-recurrence"].clone(), nominal)).or_default().insert(received.id());
            if ids.len() >= expected.len() {
                break;
            }
        }
    };
    tokio::join!(killer, consumer);
    let done =
        "SELECT (SELECT bool_and(ended) FROM tidings.recurrences) AND NOT EXISTS (SELECT FROM tidings.schedules)";
    eventually_within(Duration::from_mins(1), "all are delivered", async || {
        world.value::<bool>(done).await.then_some(())
    })
    .await;

    let made: BTreeSet<(String, i64)> = ids.keys().cloned().collect();
    assert_eq!(made.difference(&expected).collect::<Vec<_>>(), Vec::<&(String, i64)>::new(), "no other instant");
    assert_eq!(expected.difference(&made).collect::<Vec<_>>(), Vec::<&(String, i64)>::new(), "none is missing");
    assert!(ids.values().all(|ids| ids.len() == 1), "a second copy has the same id");
    assert_eq!(early, 0);
    let twice: i64 = world.value("SELECT count(*) - count(DISTINCT key) FROM tidings.deliveries").await;
    assert_eq!(twice, 0, "one row for each instant");
}
