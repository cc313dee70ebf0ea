//! The rule of a recurrence: a cron rule, or a time that passes between two instants. `tidings.check_rule` (migration 0018)
//! says the same about what can be read, in SQL. No I/O.

use std::time::Duration;

use croner::parser::CronParser;
use croner::{CivilDateTime, Cron, CronDateTime, Resolution, Weekday};
use jiff::SignedDuration;
use jiff::civil::{Date, DateTime, Time};
use thiserror::Error;

use crate::recurrences::fields;

/// Why a rule cannot be read, or has no instants.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum RuleError {
    /// It cannot be read.
    #[error("the rule {rule:?} cannot be read: {why}")]
    Unreadable {
        /// The rule.
        rule: String,
        /// What is wrong with it.
        why: String,
    },
    /// No date fits, such as 30 February.
    #[error("the rule {0:?} never comes: no date fits it")]
    Never(String),
    /// All its instants are past.
    #[error("the rule {0:?} does not come any more: its years are past")]
    Past(String),
    /// The time zone database that this daemon carries does not have the zone.
    #[error(
        "the time zone {0:?} is not in the time zone database {release} of this tidings: use another name of it, or a newer release",
        release = crate::recurrences::zone::release()
    )]
    Zone(String),
}

/// A rule.
#[derive(Clone, Debug)]
pub enum Rule {
    /// A cron rule.
    Cron(Box<CronRule>),
    /// The time that passes between two instants, in whole seconds, 1 s to ten years. Clocks on walls make no difference to it.
    Every(Duration),
}

/// A cron rule.
#[derive(Clone, Debug)]
pub struct CronRule {
    /// The rule as it was written.
    written: String,
    cron: Cron,
    /// Its hour, minute and second are all listed: it comes at fixed times of the day. Otherwise it has an asterisk or a
    /// step in one of them, and comes again after some time.
    fixed: bool,
}

/// A wall-clock time: what clocks show, without a zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Wall(DateTime);

const SECONDS: [(&str, u64); 5] =
    [("second", 1), ("minute", 60), ("hour", 3_600), ("day", 86_400), ("week", 7 * 86_400)];
const LONGEST_SECONDS: u64 = 3_660 * 86_400;

impl Rule {
    /// Reads a rule.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn parse(rule: &str) -> Result<Self, RuleError> {
        let unreadable = |why: &str| RuleError::Unreadable { rule: rule.to_owned(), why: why.to_owned() };
        let words: Vec<String> = rule.split_whitespace().map(str::to_lowercase).collect();
        let Some(first) = words.first() else { return Err(unreadable("it is empty")) };
        if first == "every" {
            let seconds = parse_every(&words[1..]).ok_or_else(|| {
                unreadable(
                    "every takes numbers of seconds, minutes, hours, days or weeks, such as \"every 90 minutes\"",
                )
            })?;
            if !(1..=LONGEST_SECONDS).contains(&seconds) {
                return Err(unreadable("it must be between one second and ten years"));
            }
            return Ok(Self::Every(Duration::from_secs(seconds)));
        }
        let nickname = if words.len() == 1 { &**first } else { "" };
        let fields: Vec<&str> = match nickname {
            "@hourly" => "0 * * * *",
            "@daily" | "@midnight" => "0 0 * * *",
            "@weekly" => "0 0 * * 0",
            "@monthly" => "0 0 1 * *",
            "@yearly" | "@annually" => "0 0 1 1 *",
            _ => rule,
        }
        .split_whitespace()
        .collect();
        if !(5..=7).contains(&fields.len()) {
            return Err(unreadable(
                "it has not 5 to 7 fields, and is no @hourly, @daily, @weekly, @monthly or @yearly",
            ));
        }
        let lower: Vec<String> = fields.iter().map(|field| field.to_lowercase()).collect();
        let lower: Vec<&str> = lower.iter().map(String::as_str).collect();
        let all = match lower[..] {
            [minute, hour, day, month, weekday] => ["0", minute, hour, day, month, weekday, "*"],
            [second, minute, hour, day, month, weekday] => [second, minute, hour, day, month, weekday, "*"],
            [second, minute, hour, day, month, weekday, year] => [second, minute, hour, day, month, weekday, year],
            _ => unreachable!("there are 5 to 7"),
        };
        fields::check(&all).map_err(|why| unreadable(&format!("it has a {why}")))?;
        let seconds = usize::from(fields.len() > 5);
        let (times, days) = (&fields[..seconds + 2], [fields[seconds + 2], fields[seconds + 4]]);
        // As in crontab: of two restricted fields of days either one matches, and an asterisk with a step does not restrict.
        let both_days = days.iter().any(|field| field.starts_with('*'));
        let parser = CronParser::builder().dom_and_dow(both_days).build();
        let cron = parser.parse(&fields.join(" ")).map_err(|error| unreadable(&explain(&error)))?;
        let fixed = !times.iter().any(|field| field.contains(['*', '/']));
        Ok(Self::Cron(Box::new(CronRule { written: fields.join(" "), cron, fixed })))
    }

    /// The rule as it can be written.
    #[must_use]
    pub fn written(&self) -> String {
        match self {
            Self::Cron(cron) => cron.written.clone(),
            Self::Every(time) => format!("every {} seconds", time.as_secs()),
        }
    }

    /// The rule in words.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Cron(cron) => {
                let words = cron.cron.describe();
                let words = words.trim_end_matches('.');
                // The library's words leave out that it must be a weekday.
                let of_weekday = cron.written.to_uppercase().split([' ', ',']).any(|part| part == "LW");
                if of_weekday { words.replace("the last day", "the last weekday") } else { words.to_owned() }
            }
            Self::Every(time) => format!("Every {}", humantime::format_duration(*time)),
        }
    }
}

impl CronRule {
    /// Whether it comes at fixed times of the day.
    pub(super) fn is_fixed(&self) -> bool {
        self.fixed
    }

    /// The first wall-clock time at or after this one that matches; `None` = there is none any more.
    ///
    /// # Errors
    ///
    /// [`RuleError::Never`] when no date fits the rule, or none for the next hundred years.
    pub(super) fn next(&self, from: DateTime) -> Result<Option<DateTime>, RuleError> {
        // A rule without a year that has not matched in a hundred years never does: the calendar repeats itself.
        match self.cron.find_next_occurrence(&Wall(from), true) {
            Ok(Wall(at)) => Ok(Some(at)),
            Err(_) if self.cron.find_previous_occurrence(&Wall(from), true).is_ok() => Ok(None),
            Err(_) => Err(RuleError::Never(self.written.clone())),
        }
    }
}

/// The seconds of `90 minutes` or `1 day 12 hours`.
fn parse_every(words: &[String]) -> Option<u64> {
    let (mut total, mut count) = (0_u64, None);
    for word in words {
        if word.bytes().all(|byte| byte.is_ascii_digit()) && word.len() <= 9 && count.is_none() {
            count = word.parse::<u64>().ok();
            continue;
        }
        let unit = word.strip_suffix('s').unwrap_or(word);
        let (_, seconds) = SECONDS.into_iter().find(|(name, _)| *name == unit)?;
        total = total.checked_add(count.take().unwrap_or(1).checked_mul(seconds)?)?;
    }
    (count.is_none() && !words.is_empty()).then_some(total)
}

/// What the library says, without its own headline.
fn explain(error: &croner::errors::CronError) -> String {
    use croner::errors::CronError::{ComponentError, IllegalCharacters, InvalidPattern};
    match error {
        ComponentError(why) | IllegalCharacters(why) | InvalidPattern(why) => why.trim_end_matches('.').to_owned(),
        other => other.to_string(),
    }
}

impl CronDateTime for Wall {
    fn to_civil(&self) -> CivilDateTime {
        let part = |part: i8| u32::try_from(part).expect("no part of a time is negative");
        CivilDateTime::from_ymd_hms_opt(
            self.0.year().into(),
            part(self.0.month()),
            part(self.0.day()),
            part(self.0.hour()),
            part(self.0.minute()),
            part(self.0.second()),
        )
        .expect("it is a time")
    }

    fn civil_weekday(&self) -> Weekday {
        let days = self.0.weekday().to_sunday_zero_offset();
        Weekday::from_days_from_sunday(u32::try_from(days).expect("0 to 6"))
    }

    fn resolve_civil(&self, civil: CivilDateTime) -> Result<Resolution<Self>, croner::errors::CronError> {
        let invalid = |_| croner::errors::CronError::InvalidDate;
        let part = |part: u32| i8::try_from(part).expect("no part of a time is over 59");
        let year = i16::try_from(civil.year()).map_err(|_| croner::errors::CronError::InvalidDate)?;
        let date = Date::new(year, part(civil.month()), part(civil.day())).map_err(invalid)?;
        let time = Time::new(part(civil.hour()), part(civil.minute()), part(civil.second()), 0).map_err(invalid)?;
        Ok(Resolution::Single(Self(DateTime::from_parts(date, time))))
    }

    fn checked_add_seconds(&self, seconds: i64) -> Option<Self> {
        self.0.checked_add(SignedDuration::from_secs(seconds)).ok().map(Self)
    }

    fn cmp_instant(&self, other: &Self) -> std::cmp::Ordering {
        self.cmp(other)
    }
}
