//! The nominal instants of random rules, compared with PostgreSQL's own arithmetic of time zones: an independent program, with
//! its own copy of the time zone database.
//!
//! For each minute of a few days PostgreSQL says what clocks of the zone show. From that alone this file decides by the two
//! documented policies which minutes are instants.

use std::collections::BTreeSet;

use harness::world::World;
use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use tidings::recurrences::instants::Instants;
use tidings::recurrences::rule::Rule;
use tidings::recurrences::zone::Zone;

/// Zones and days on which their clocks change: by an hour, by half an hour, by two, at midnight, a whole day, for Ramadan.
const CHANGES: [(&str, &str); 24] = [
    ("Europe/Berlin", "2024-03-31"),
    ("Europe/Berlin", "2024-10-27"),
    ("America/New_York", "2024-03-10"),
    ("America/New_York", "2024-11-03"),
    ("Australia/Lord_Howe", "2024-04-07"),
    ("Australia/Lord_Howe", "2024-10-06"),
    ("Europe/Dublin", "2024-03-31"),
    ("Europe/Dublin", "2024-10-27"),
    ("Antarctica/Troll", "2024-03-31"),
    ("Antarctica/Troll", "2024-10-27"),
    ("Africa/Cairo", "2024-04-26"),
    ("Africa/Cairo", "2024-10-31"),
    ("Pacific/Apia", "2011-12-30"),
    ("Pacific/Apia", "2011-09-24"),
    ("America/Sao_Paulo", "2018-11-04"),
    ("America/Sao_Paulo", "2018-02-18"),
    ("Africa/Casablanca", "2024-03-10"),
    ("Africa/Casablanca", "2024-04-14"),
    ("Asia/Kathmandu", "1986-01-01"),
    ("America/Caracas", "2016-05-01"),
    ("Asia/Pyongyang", "2018-05-05"),
    ("Asia/Tehran", "2022-03-22"),
    ("America/Havana", "2024-03-10"),
    ("America/St_Johns", "2006-10-29"),
];

/// A field of a rule: as it is written, and the numbers that it admits.
#[derive(Clone, Debug)]
struct Field {
    written: String,
    numbers: Vec<i32>,
}

/// A random rule, zone and day.
#[derive(Clone, Debug)]
struct Case {
    zone: String,
    day: String,
    minute: Field,
    hour: Field,
    day_of_month: Field,
    month: Field,
    weekday: Field,
}

/// A list of values of a field, a step, or an asterisk.
fn field(low: i32, high: i32, likely: std::ops::RangeInclusive<i32>) -> impl Strategy<Value = Field> {
    let list =
        proptest::collection::btree_set(prop_oneof![3 => likely, 1 => low..=high], 1..4).prop_map(|numbers| Field {
            written: numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
            numbers: numbers.into_iter().collect(),
        });
    let range = (low..=high, low..=high).prop_map(|(one, other)| {
        let (from, to) = (one.min(other), one.max(other));
        Field { written: format!("{from}-{to}"), numbers: (from..=to).collect() }
    });
    let step = (1..=high).prop_map(move |step| Field {
        written: format!("*/{step}"),
        numbers: (low..=high).step_by(usize::try_from(step).expect("positive")).collect(),
    });
    prop_oneof![
        6 => list,
        1 => range,
        2 => step,
        2 => Just(Field { written: "*".into(), numbers: (low..=high).collect() }),
    ]
}

/// A field that admits everything more often than not.
fn mostly_any(low: i32, high: i32) -> impl Strategy<Value = Field> {
    prop_oneof![
        5 => Just(Field { written: "*".into(), numbers: (low..=high).collect() }),
        2 => field(low, high, low..=high),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    let place = prop_oneof![
        4 => proptest::sample::select(&CHANGES[..]).prop_map(|(zone, day)| (zone.to_owned(), day.to_owned())),
        1 => (proptest::sample::select(&CHANGES[..]), 1980..2024_i32, 1..=12_i32, 1..=28_i32)
            .prop_map(|((zone, _), year, month, day)| (zone.to_owned(), format!("{year}-{month:02}-{day:02}"))),
    ];
    (place, field(0, 59, 0..=59), field(0, 23, 0..=4), mostly_any(1, 31), mostly_any(1, 12), mostly_any(0, 6)).prop_map(
        |((zone, day), minute, hour, day_of_month, month, weekday)| Case {
            zone,
            day,
            minute,
            hour,
            day_of_month,
            month,
            weekday,
        },
    )
}

impl Case {
    fn rule(&self) -> String {
        [&self.minute, &self.hour, &self.day_of_month, &self.month, &self.weekday]
            .map(|field| &*field.written)
            .join(" ")
    }

    /// The instants, in seconds, by PostgreSQL.
    async fn by_postgresql(&self, connection: &mut sqlx::PgConnection) -> BTreeSet<i64> {
        let is_fixed = ![&self.minute, &self.hour].iter().any(|field| field.written.contains('*'));
        let restricted = |field: &Field| !field.written.contains('*');
        let either = restricted(&self.day_of_month) && restricted(&self.weekday);
        let instants: Vec<i64> = sqlx::query_scalar(
            "WITH minutes AS MATERIALIZED (
                SELECT at, at AT TIME ZONE $1 AS wall
                FROM generate_series($2::text::timestamptz - interval '4 days', $2::text::timestamptz + interval '4 days', '1 minute') AS at
            ), walls AS (
                -- What clocks would show if they did not change.
                SELECT wall
                FROM generate_series(
                    $2::text::timestamptz AT TIME ZONE 'UTC' - interval '4 days', $2::text::timestamptz AT TIME ZONE 'UTC' + interval '4 days',
                    '1 minute'
                ) AS wall
                WHERE $3 UNION SELECT wall FROM minutes WHERE NOT $3
            ), matching AS MATERIALIZED (
                SELECT wall
                FROM walls
                WHERE extract(minute FROM wall) = ANY ($4) AND extract(hour FROM wall) = ANY ($5)
                    AND extract(month FROM wall) = ANY ($7)
                    AND CASE
                        WHEN $9 THEN extract(day FROM wall) = ANY ($6) OR extract(dow FROM wall) = ANY ($8)
                        ELSE extract(day FROM wall) = ANY ($6) AND extract(dow FROM wall) = ANY ($8)
                    END
            ), instants AS (
                SELECT at FROM matching JOIN minutes USING (wall) WHERE NOT $3
                UNION
                SELECT coalesce(
                    (SELECT min(at) FROM minutes WHERE minutes.wall = matching.wall),
                    (SELECT min(at) FROM minutes WHERE minutes.wall > matching.wall)
                )
                FROM matching
                WHERE $3
            )
            SELECT extract(epoch FROM at)::bigint
            FROM instants
            WHERE at > $2::text::timestamptz - interval '2 days' AND at < $2::text::timestamptz + interval '2 days'",
        )
        .bind(&self.zone)
        .bind(&self.day)
        .bind(is_fixed)
        .bind(&self.minute.numbers)
        .bind(&self.hour.numbers)
        .bind(&self.day_of_month.numbers)
        .bind(&self.month.numbers)
        .bind(&self.weekday.numbers)
        .bind(either)
        .fetch_all(connection)
        .await
        .expect("computed");
        instants.into_iter().collect()
    }

    /// The instants of the same days, by the daemon's code.
    fn by_the_daemon(&self) -> BTreeSet<i64> {
        let day: Timestamp = format!("{}T00:00:00Z", self.day).parse().expect("a day");
        let two_days = SignedDuration::from_hours(48);
        let rule = Rule::parse(&self.rule()).unwrap_or_else(|error| panic!("{error}"));
        let instants = Instants::new(rule, Zone::named(&self.zone).expect("a zone"), day, None);
        // A rule that never comes, such as on 31 February, has none.
        let next = |at: &Timestamp| instants.after(*at).unwrap_or_default();
        std::iter::successors(next(&(day - two_days)), next)
            .take_while(|at| *at < day + two_days)
            .map(Timestamp::as_second)
            .collect()
    }
}

#[tokio::test]
async fn the_instants_of_random_rules_are_those_that_postgresql_computes() {
    let world = World::empty().await;
    // The planner knows nothing of the rows of a series, and would compare each with each.
    let mut connection = world.db.acquire().await.expect("a connection");
    sqlx::query("SET enable_nestloop = off").execute(&mut *connection).await.expect("set");
    let mut runner = TestRunner::default();
    let mut some = 0;
    for _ in 0..400 {
        let case = case().new_tree(&mut runner).expect("a case").current();
        let expected = case.by_postgresql(&mut connection).await;
        let computed = case.by_the_daemon();
        let differ: Vec<String> = expected
            .symmetric_difference(&computed)
            .map(|second| Timestamp::from_second(*second).expect("an instant").to_string())
            .collect();
        assert!(differ.is_empty(), "{:?} in {} around {}: {differ:?}", case.rule(), case.zone, case.day);
        some += usize::from(!expected.is_empty());
    }
    assert!(some >= 100, "most have instants: {some}");
}
