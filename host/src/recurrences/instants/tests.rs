//! The instants of rules around changes of the clocks, with real dates.

use super::*;

fn instants(rule: &str, zone: &str, after: &str, count: usize) -> Vec<String> {
    let after: Timestamp = after.parse().expect("an instant");
    let instants = Instants::new(Rule::parse(rule).expect("a rule"), Zone::named(zone).expect("a zone"), after, None);
    let next = |at: &Timestamp| instants.after(*at).expect("it comes");
    std::iter::successors(next(&after), next).take(count).map(|at| at.to_string()).collect()
}

#[test]
fn a_fixed_time_that_does_not_exist_comes_at_the_first_instant_after_the_gap() {
    for (rule, zone, day, before, in_gap, after) in [
        (
            "30 2 * * *",
            "Europe/Berlin",
            "2026-03-27T12:00:00Z",
            "2026-03-28T01:30:00Z",
            "2026-03-29T01:00:00Z",
            "2026-03-30T00:30:00Z",
        ),
        (
            "30 2 * * *",
            "America/New_York",
            "2026-03-06T12:00:00Z",
            "2026-03-07T07:30:00Z",
            "2026-03-08T07:00:00Z",
            "2026-03-09T06:30:00Z",
        ),
        // By half an hour.
        (
            "15 2 * * *",
            "Australia/Lord_Howe",
            "2026-10-02T00:00:00Z",
            "2026-10-02T15:45:00Z",
            "2026-10-03T15:30:00Z",
            "2026-10-04T15:15:00Z",
        ),
        // The winter is its daylight saving time, by law.
        (
            "30 1 * * *",
            "Europe/Dublin",
            "2026-03-27T12:00:00Z",
            "2026-03-28T01:30:00Z",
            "2026-03-29T01:00:00Z",
            "2026-03-30T00:30:00Z",
        ),
        // By two hours.
        (
            "30 1 * * *",
            "Antarctica/Troll",
            "2026-03-27T12:00:00Z",
            "2026-03-28T01:30:00Z",
            "2026-03-29T01:00:00Z",
            "2026-03-29T23:30:00Z",
        ),
        // At midnight: the day is not skipped.
        (
            "0 0 * * *",
            "Africa/Cairo",
            "2026-04-22T12:00:00Z",
            "2026-04-22T22:00:00Z",
            "2026-04-23T22:00:00Z",
            "2026-04-24T21:00:00Z",
        ),
        // A whole day, 2011-12-30, did not exist.
        (
            "0 9 * * *",
            "Pacific/Apia",
            "2011-12-29T12:00:00Z",
            "2011-12-29T19:00:00Z",
            "2011-12-30T10:00:00Z",
            "2011-12-30T19:00:00Z",
        ),
    ] {
        assert_eq!(instants(rule, zone, day, 3), [before, in_gap, after], "{zone}");
    }
    // Several times in one gap have one instant.
    assert_eq!(
        instants("0,15,30,45 2 * * *", "Europe/Berlin", "2026-03-29T00:00:00Z", 2),
        ["2026-03-29T01:00:00Z", "2026-03-30T00:00:00Z"]
    );
}

#[test]
fn a_fixed_time_that_exists_twice_comes_once_at_the_first() {
    for (rule, zone, after, expected) in [
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z", ["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]),
        ("30 1 * * *", "America/New_York", "2026-10-31T12:00:00Z", ["2026-11-01T05:30:00Z", "2026-11-02T06:30:00Z"]),
        ("45 1 * * *", "Australia/Lord_Howe", "2026-04-04T00:00:00Z", ["2026-04-04T14:45:00Z", "2026-04-05T15:15:00Z"]),
        ("30 1 * * *", "Europe/Dublin", "2026-10-24T12:00:00Z", ["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]),
        ("30 1 * * *", "Antarctica/Troll", "2026-10-24T12:00:00Z", ["2026-10-24T23:30:00Z", "2026-10-26T01:30:00Z"]),
        // Also if it is asked for between the two.
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T01:10:00Z", ["2026-10-26T01:30:00Z", "2026-10-27T01:30:00Z"]),
    ] {
        assert_eq!(instants(rule, zone, after, 2), expected, "{zone}");
    }
}

#[test]
fn a_rule_with_an_asterisk_or_a_step_keeps_its_distance_in_real_time() {
    for (zone, after) in [
        ("Europe/Berlin", "2026-03-29T00:00:00Z"),
        ("Europe/Berlin", "2026-10-24T23:00:00Z"),
        ("Antarctica/Troll", "2026-10-24T23:00:00Z"),
        ("Africa/Cairo", "2026-04-23T20:00:00Z"),
        ("Australia/Lord_Howe", "2026-04-04T13:00:00Z"),
        ("Australia/Lord_Howe", "2026-10-03T14:00:00Z"),
    ] {
        let begin: Timestamp = after.parse().expect("an instant");
        let expected: Vec<String> =
            (1..12).map(|half_hours| (begin + SignedDuration::from_mins(30 * half_hours)).to_string()).collect();
        assert_eq!(instants("*/30 * * * *", zone, after, 11), expected, "{zone}");
    }
    // The clocks of Lord Howe go back from 02:00 to 01:30: the whole hours are an hour and a half apart.
    assert_eq!(
        instants("0 * * * *", "Australia/Lord_Howe", "2026-04-04T13:30:00Z", 2),
        ["2026-04-04T14:00:00Z", "2026-04-04T15:30:00Z"]
    );
}

#[test]
fn leap_days_month_ends_and_days_of_the_week_are_those_of_crontab() {
    let days = |rule: &str, count| {
        let instants = instants(rule, "UTC", "2026-01-01T00:00:00Z", count);
        instants.iter().map(|at| at[..10].to_owned()).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(days("0 0 29 2 *", 2), "2028-02-29 2032-02-29");
    assert_eq!(days("0 0 L * *", 3), "2026-01-31 2026-02-28 2026-03-31");
    assert_eq!(days("0 0 31 * *", 3), "2026-01-31 2026-03-31 2026-05-31");
    assert_eq!(days("0 0 15W * *", 2), "2026-01-15 2026-02-16");
    assert_eq!(days("0 0 LW * *", 2), "2026-01-30 2026-02-27");
    assert_eq!(days("0 0 * * 5L", 2), "2026-01-30 2026-02-27");
    assert_eq!(days("0 0 * * mon#2", 2), "2026-01-12 2026-02-09");
    // 0 and 7 are Sunday.
    assert_eq!(days("0 0 * * 0", 2), days("0 0 * * 7", 2));
    assert_eq!(days("0 0 * * sat-sun", 3), "2026-01-03 2026-01-04 2026-01-10");
    // Two restricted fields of days: either one. An asterisk with a step does not restrict.
    assert_eq!(days("0 0 13 * 5", 3), "2026-01-02 2026-01-09 2026-01-13");
    assert_eq!(days("0 0 */2 * 1", 3), "2026-01-05 2026-01-19 2026-02-09");
    // 29 February on a Monday comes every 28 years.
    assert_eq!(days("0 0 */28 2 mon#5", 1), "2044-02-29");
    assert_eq!(days("0 0 0 1 1 * 2030,4999", 2), "2030-01-01 4999-01-01");
}

#[test]
fn every_counts_elapsed_time_from_its_anchor_and_no_instant_is_before_the_start() {
    assert_eq!(
        instants("every 90 minutes", "Europe/Berlin", "2026-03-29T00:00:00Z", 2),
        ["2026-03-29T01:30:00Z", "2026-03-29T03:00:00Z"]
    );
    let at = |text: &str| text.parse::<Timestamp>().expect("an instant");
    let (rule, zone) = (Rule::parse("every 1 hour").expect("a rule"), Zone::named("UTC").expect("a zone"));
    let instants = Instants::new(rule, zone.clone(), at("2026-01-01T00:10:00Z"), Some(at("2026-01-01T00:10:00Z")));
    assert_eq!(instants.after(at("2020-01-01T00:00:00Z")), Ok(Some(at("2026-01-01T00:10:00Z"))));
    assert_eq!(instants.after(at("2026-01-01T00:10:00Z")), Ok(Some(at("2026-01-01T01:10:00Z"))));
    // Without a start, the anchor says no more than from where to count.
    let (rule, zone) = (instants.rule().clone(), instants.zone().clone());
    let endless = Instants::new(rule, zone.clone(), at("2026-01-01T00:10:00Z"), None);
    assert_eq!(endless.after(at("2020-01-01T00:00:00Z")), Ok(Some(at("2020-01-01T00:10:00Z"))));
    assert_eq!(instants.after(at("9998-12-31T23:59:59Z")).map(|next| next.is_some()), Ok(true));
    assert_eq!(instants.after(Timestamp::MAX), Ok(None));
    let cron = Instants::new(
        Rule::parse("0 0 * * *").expect("a rule"),
        zone,
        Timestamp::MIN,
        Some(at("2026-01-01T00:00:00Z")),
    );
    assert_eq!(cron.after(at("2020-01-01T00:00:00Z")), Ok(Some(at("2026-01-01T00:00:00Z"))), "the start is an instant");
}

#[test]
fn a_rule_that_never_comes_is_told_from_one_that_is_past() {
    let after = |rule: &str| {
        let zone = Zone::named("UTC").expect("a zone");
        let now = "2026-01-01T00:00:00Z".parse().expect("an instant");
        Instants::new(Rule::parse(rule).expect("a rule"), zone, now, None).after(now)
    };
    assert!(matches!(after("0 0 30 2 *"), Err(RuleError::Never(_))));
    assert!(matches!(after("0 0 31 4,6,9,11 *"), Err(RuleError::Never(_))));
    assert_eq!(after("0 0 0 1 1 * 2020"), Ok(None));
    assert!(matches!(Zone::named("Mars/Olympus"), Err(RuleError::Zone(_))));
}

#[test]
fn the_last_instant_before_another_is_found_however_far_it_is() {
    let zone = Zone::named("UTC").expect("a zone");
    let at = |text: &str| text.parse::<Timestamp>().expect("an instant");
    for (rule, from, until, last) in [
        ("* * * * * *", "2026-01-01T00:00:00Z", "2026-01-08T00:00:00.5Z", "2026-01-08T00:00:00Z"),
        ("0 0 * * *", "2026-01-01T00:00:00Z", "2026-01-08T12:00:00Z", "2026-01-08T00:00:00Z"),
        ("0 0 29 2 *", "2020-02-29T00:00:00Z", "2027-01-01T00:00:00Z", "2024-02-29T00:00:00Z"),
        ("0 0 1 1 *", "2026-01-01T00:00:00Z", "2026-06-01T00:00:00Z", "2026-01-01T00:00:00Z"),
        // It need not be an instant of the rule itself.
        ("0 0 1 1 *", "2026-03-01T00:00:00Z", "2026-06-01T00:00:00Z", "2026-03-01T00:00:00Z"),
    ] {
        let instants = Instants::new(Rule::parse(rule).expect("a rule"), zone.clone(), at(from), None);
        assert_eq!(instants.last(at(from), at(until)), Ok(at(last)), "{rule}");
    }
}
