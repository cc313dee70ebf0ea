//! Which rules and parameters are refused, with what sentence, and that SQL and the daemon agree about it.

use harness::world::World;
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use tidings::recurrences::rule::Rule;

#[tokio::test]
async fn a_mistake_is_an_error_that_names_the_parameter() {
    let world = World::empty().await;
    for (parameters, sentence) in [
        ("'n', 'k', '61 * * * *'", "rule has a minute that cannot be read: 61 is not between 0 and 59"),
        ("'n', 'k', '0/15 * * * *'", "rule has a minute that cannot be read: write 0-59/15"),
        ("'n', 'k', '0 0 * * fri-mon'", "rule has a day of the week that cannot be read: fri-mon begins after its end"),
        ("'n', 'k', '0 0 * foo *'", "rule has a month that cannot be read: 'foo' is no name of a month"),
        ("'n', 'k', '*/0 * * * *'", "rule has a minute that cannot be read: the step of */0 is not between 1 and 59"),
        ("'n', 'k', '0 0 1,,2 * *'", "rule has a day of the month that cannot be read: a part of it is empty"),
        ("'n', 'k', '* * *'", "rule '* * *' has 3 fields, and needs 5 to 7"),
        ("'n', 'k', ''", "rule '' has 0 fields, and needs 5 to 7"),
        ("'n', 'k', '@reboot'", "rule '@reboot' is unknown"),
        ("'n', 'k', 'every 2 months'", "rule 'every 2 months' cannot be read"),
        ("'n', 'k', 'every 0 seconds'", "rule 'every 0 seconds' must be between one second and ten years"),
        ("'n', 'k', 'every 11 million years'", "cannot be read"),
        ("'n', 'k', null", "rule must be 1 to 255 bytes"),
        ("'n', 'k', '@daily', time_zone => 'Mars/Olympus'", "time_zone 'Mars/Olympus' is unknown"),
        ("'n', 'k', '@daily', time_zone => 'CEST'", "time_zone 'CEST' is unknown"),
        ("'n', 'k', '@daily', time_zone => null", "time_zone null is unknown"),
        ("'n', 'K', '@daily'", "kind must match [a-z0-9][a-z0-9._-]{0,99}"),
        ("'', 'k', '@daily'", "name must be 1 to 230 bytes"),
        ("repeat('n', 231), 'k', '@daily'", "name must be 1 to 230 bytes"),
        ("null, 'k', '@daily'", "null value in column \"name\""),
        ("'n', 'k', '@daily', payload => null", "null value in column \"payload\""),
        ("'n', 'k', '@daily', subject => ''", "subject must be 1 to 255 bytes"),
        ("'n', 'k', '@daily', headers => '{\"x-a\": \"1\"}'", "headers must not be named"),
        ("'n', 'k', '@daily', headers => '[]'", "headers must be an object of strings"),
        ("'n', 'k', '@daily', expires_after => '0'", "expires_after must be from 1 ms to 1000 years"),
        ("'n', 'k', '@daily', catch_up => 'most'", "catch_up must be latest, all or none"),
        ("'n', 'k', '@daily', catch_up_within => '-1 s'", "catch_up_within must be from 1 ms to 1000 years"),
        ("'n', 'k', '@daily', spread => '-1 s'", "spread must be from 0 to 10 years"),
        ("'n', 'k', '@daily', starts_at => 'infinity'", "starts_at must be between the years 1970 and 9999"),
        ("'n', 'k', '@daily', ends_at => '-infinity'", "ends_at must be between the years 1970 and 9999"),
        ("'n', 'k', '@daily', starts_at => now(), ends_at => now()", "ends_at must be after starts_at"),
        ("'n', 'k', '@daily', max_count => 0", "max_count must be 1 at least"),
        ("'n', 'k', '@daily', priority => 10", "priority must be from 0 to 9, not 10"),
        ("'n', 'k', '@daily', priority => null", "priority must be from 0 to 9, not null"),
        ("'n', 'k', '@daily', on_conflict => 'ignore'", "on_conflict must be replace, keep or error, not 'ignore'"),
    ] {
        let error = world.expect_error(&format!("SELECT tidings.repeat({parameters})")).await;
        assert!(error.contains(sentence), "{parameters}: {error}");
    }
    for (call, sentence) in [
        ("catch_up('k', 'latest')", "what must be all or none, not 'latest'"),
        ("catch_up('k', null)", "what must be all or none, not null"),
        ("catch_up('K', 'none')", "kind must match"),
        ("catch_up('k', 'none', within => '0')", "within must be from 1 second to 1000 years"),
        ("schedule('k', now(), spread => '1 h')", "spread needs a key"),
        ("schedule('k', now(), key => 'k', spread => '-1 h')", "spread must be from 0 to 10 years, not -01:00:00"),
        ("schedule('k', now(), key => 'k', spread => null)", "spread must be from 0 to 10 years, not null"),
    ] {
        let error = world.expect_error(&format!("SELECT tidings.{call}")).await;
        assert!(error.contains(sentence), "{call}: {error}");
    }
    assert_eq!(world.value::<i64>("SELECT count(*) FROM tidings.recurrences").await, 0);
}

/// A field of a cron rule, mostly right.
fn field(low: u32, high: u32, names: &'static [&'static str]) -> impl Strategy<Value = String> {
    let number = move || prop_oneof![20 => (low..=high).prop_map(|number| number.to_string()), 1 => (0..100_u32).prop_map(|number| number.to_string())];
    let value = move || {
        if names.is_empty() {
            number().boxed()
        } else {
            prop_oneof![2 => number(), 1 => proptest::sample::select(names).prop_map(str::to_owned)].boxed()
        }
    };
    let part = prop_oneof![
        4 => Just("*".to_owned()),
        6 => value(),
        3 => (value(), value()).prop_map(|(from, to)| format!("{from}-{to}")),
        2 => (0..70_u32).prop_map(|step| format!("*/{step}")),
        1 => (value(), value(), 0..40_u32).prop_map(|(from, to, step)| format!("{from}-{to}/{step}")),
        1 => (value(), 0..40_u32).prop_map(|(from, step)| format!("{from}/{step}")),
        1 => proptest::sample::select(&["", "?", "L", "LW", "15W", "5L", "3#2", "1#6", "x", "*-3", "-", "1-", "FRI", "99W"][..]).prop_map(str::to_owned),
    ];
    proptest::collection::vec(part, 1..3).prop_map(|parts| parts.join(","))
}

const MONTHS: &[&str] = &["jan", "Feb", "MAR", "dec", "foo"];
const DAYS: &[&str] = &["sun", "Mon", "SAT", "thu", "bar"];

/// A rule, mostly right.
fn rule() -> impl Strategy<Value = String> {
    let cron = (
        field(0, 59, &[]),
        field(0, 59, &[]),
        field(0, 23, &[]),
        field(1, 31, &[]),
        field(1, 12, MONTHS),
        field(0, 7, DAYS),
        field(2020, 2040, &[]),
        5..=7_usize,
    )
        .prop_map(|(second, minute, hour, day, month, weekday, year, fields)| match fields {
            5 => format!("{minute} {hour} {day} {month} {weekday}"),
            6 => format!("{second} {minute} {hour} {day} {month} {weekday}"),
            _ => format!("{second} {minute} {hour} {day} {month} {weekday} {year}"),
        });
    let every = proptest::sample::select(
        &[
            "every 90 minutes",
            "every minute",
            "EVERY 1 Day 12 hours",
            "every",
            "every day 3",
            "every -1 hours",
            "every 1.5 hours",
            "every 999999999 weeks",
            "@hourly",
            "@Daily",
            "@midnight",
            "@weekly",
            "@monthly",
            "@yearly",
            "@annually",
            "@daily 1",
            "@x",
            "  0   0 * * *  ",
            "0 0 * * +1",
            "0 0 * *",
            "0 0 0 0 0 0 0 0",
        ][..],
    );
    prop_oneof![8 => cron, 1 => every.prop_map(str::to_owned)]
}

#[tokio::test]
async fn sql_and_the_daemon_agree_which_rules_can_be_read() {
    let world = World::empty().await;
    let mut runner = TestRunner::default();
    let rules: Vec<String> = (0..3_000).map(|_| rule().new_tree(&mut runner).expect("a rule").current()).collect();
    world
        .sql(
            "CREATE FUNCTION complaint(rule text) RETURNS text LANGUAGE plpgsql AS
             'BEGIN PERFORM tidings.check_rule(rule); RETURN NULL; EXCEPTION WHEN invalid_parameter_value THEN RETURN sqlerrm; END'",
        )
        .await;
    let by_sql: Vec<Option<String>> = sqlx::query_scalar(
        "SELECT complaint(rule) FROM unnest($1::text[]) WITH ORDINALITY AS rules (rule, place) ORDER BY place",
    )
    .bind(&rules)
    .fetch_all(&world.db)
    .await
    .expect("checked");
    let mut readable = 0;
    for (rule, by_sql) in rules.iter().zip(by_sql) {
        let by_daemon = Rule::parse(rule).map(drop);
        match (&by_sql, &by_daemon) {
            (None, Ok(())) => readable += 1,
            (Some(sentence), Err(error)) => {
                // The same complaint, where it is about a field.
                let of_field = sentence.split_once("that cannot be read: ").map(|(_, complaint)| complaint);
                assert!(
                    of_field.is_none_or(|complaint| error.to_string().contains(complaint)),
                    "{rule:?}: {sentence} {error}"
                );
            }
            _ => panic!("{rule:?}: {by_sql:?} {by_daemon:?}"),
        }
    }
    assert!((100..2_900).contains(&readable), "both kinds are among them: {readable}");
}
