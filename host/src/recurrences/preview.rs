//! The coming instants of a rule, for people, with every change of the clocks among them. No I/O, and no clock.

use jiff::civil::{DateTime, Time};
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::recurrences::instants::Instants;
use crate::recurrences::rule::{Rule, RuleError};
use crate::recurrences::zone::{Change, Zone, release};

/// The coming instants of a rule.
#[derive(Clone, Debug, Serialize)]
pub struct Preview {
    /// The rule.
    pub rule: String,
    /// The rule in words.
    pub words: String,
    /// The name of the time zone.
    pub zone: String,
    /// The release of the time zone database.
    pub time_zone_database: &'static str,
    /// The instants, earliest first, and the changes of the clocks among them.
    pub instants: Vec<Line>,
}

/// An instant of a rule, or a change of the clocks.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// The instant, in UTC.
    pub at: String,
    /// What clocks of the zone show then, with their distance from UTC.
    pub local: String,
    /// Whether the clocks change then, and the rule does not come.
    pub only_change: bool,
    /// What is special about it.
    pub note: Option<String>,
}

/// The next `count` instants of a rule after `from`. `every` counts from there.
///
/// # Errors
///
/// When the rule cannot be read or never comes, or the zone is unknown.
pub fn preview(rule: &str, zone_name: &str, from: Timestamp, count: usize) -> Result<Preview, RuleError> {
    let zone = Zone::named(zone_name)?;
    let instants = Instants::new(Rule::parse(rule)?, zone.clone(), from, None);
    let mut lines = Vec::new();
    let mut last = from;
    for _ in 0..count {
        let Some(at) = instants.after(last)? else { break };
        let changes = zone.changes_after(last).take_while(|change| change.at < at);
        // Years apart, no change is of interest.
        let changes: Vec<Change> =
            if at.duration_since(last) > SignedDuration::from_hours(24 * 200) { Vec::new() } else { changes.collect() };
        lines.extend(changes.iter().map(|change| line(&zone, change.at, true, Some(describe_change(change)))));
        lines.push(line(&zone, at, false, describe_instant(&instants, at)));
        last = at;
    }
    if lines.is_empty() {
        return Err(RuleError::Past(rule.to_owned()));
    }
    Ok(Preview {
        rule: rule.to_owned(),
        words: instants.rule().describe(),
        zone: zone_name.to_owned(),
        time_zone_database: release(),
        instants: lines,
    })
}

fn line(zone: &Zone, at: Timestamp, only_change: bool, note: Option<String>) -> Line {
    Line { at: at.to_string(), local: zone.show(at), only_change, note }
}

/// What is special about an instant of a rule.
fn describe_instant(instants: &Instants, at: Timestamp) -> Option<String> {
    let zone = instants.zone();
    let change = zone.changes_after(at - SignedDuration::from_nanos(1)).next().filter(|change| change.at == at);
    let Rule::Cron(rule) = instants.rule() else { return change.as_ref().map(describe_change) };
    if !rule.is_fixed() {
        let twice = zone.shows_twice(zone.wall(at)).then(|| {
            let wall = show_time(zone.wall(at));
            let first = zone.first_instant(zone.wall(at)) == Some(at);
            format!("{wall} comes twice on this day: for the {} time", if first { "first" } else { "second" })
        });
        return change.as_ref().map(describe_change).or(twice);
    }
    if let Some(change) = change.filter(|change| change.to > change.from) {
        let skipped = rule.next(change.from).ok().flatten().filter(|wall| *wall < change.to);
        return Some(match skipped {
            Some(wall) if wall.date() == change.to.date() => {
                format!("{} does not exist on this day: {}", show_time(wall), show_time(change.to))
            }
            Some(wall) => format!("{} {} does not exist: {}", wall.date(), show_time(wall), show_time(change.to)),
            None => describe_change(&change),
        });
    }
    let wall = zone.wall(at);
    zone.shows_twice(wall).then(|| format!("{} comes twice on this day: the first counts", show_time(wall)))
}

fn describe_change(change: &Change) -> String {
    let how = if change.to > change.from { "forward" } else { "back" };
    format!("clocks are set {how} from {} to {}", show_time(change.from), show_time(change.to))
}

/// Hours and minutes, and seconds if there are any.
fn show_time(at: DateTime) -> String {
    let time: Time = at.time();
    let (hour, minute, second) = (time.hour(), time.minute(), time.second());
    if second == 0 { format!("{hour:02}:{minute:02}") } else { format!("{hour:02}:{minute:02}:{second:02}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notes(rule: &str, zone: &str, from: &str, count: usize) -> Vec<(String, String)> {
        let preview = preview(rule, zone, from.parse().expect("an instant"), count).expect("a preview");
        preview.instants.into_iter().filter_map(|line| Some((line.local, line.note?))).collect()
    }

    #[test]
    fn a_time_that_does_not_exist_or_comes_twice_is_marked() {
        assert_eq!(
            notes("30 2 * * *", "Europe/Berlin", "2026-03-27T12:00:00Z", 3),
            [("2026-03-29T03:00:00+02:00".into(), "02:30 does not exist on this day: 03:00".into())]
        );
        assert_eq!(
            notes("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z", 2),
            [
                ("2026-10-25T02:30:00+02:00".into(), "02:30 comes twice on this day: the first counts".into()),
                ("2026-10-25T02:00:00+01:00".into(), "clocks are set back from 03:00 to 02:00".into()),
            ]
        );
        assert_eq!(
            notes("0 9 * * *", "Pacific/Apia", "2011-12-29T20:00:00Z", 1),
            [("2011-12-31T00:00:00+14:00".into(), "2011-12-30 09:00 does not exist: 00:00".into())]
        );
    }

    #[test]
    fn a_change_between_two_instants_is_shown_and_both_hours_that_come_twice_are_marked() {
        assert_eq!(
            notes("0 12 * * *", "America/New_York", "2026-03-07T18:00:00Z", 1),
            [("2026-03-08T03:00:00-04:00".into(), "clocks are set forward from 02:00 to 03:00".into())]
        );
        let twice = notes("30 * * * *", "Europe/Berlin", "2026-10-25T00:00:00Z", 2);
        assert_eq!(twice[0].1, "02:30 comes twice on this day: for the first time");
        assert_eq!(twice.last().expect("two").1, "02:30 comes twice on this day: for the second time");
    }
}
