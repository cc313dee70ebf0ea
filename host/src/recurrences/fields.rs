//! Checks the fields of a cron rule, as `tidings.check_field` (migration 0018) does in SQL, and with the same sentences. No I/O.

const MONTHS: [&str; 12] = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const WEEKDAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

/// A field of a rule.
struct Field {
    title: &'static str,
    low: u32,
    high: u32,
    /// Words for the numbers from `first` on.
    names: &'static [&'static str],
    first: u32,
}

const fn numbers(title: &'static str, low: u32, high: u32) -> Field {
    Field { title, low, high, names: &[], first: 0 }
}

const FIELDS: [Field; 7] = [
    numbers("second", 0, 59),
    numbers("minute", 0, 59),
    numbers("hour", 0, 23),
    numbers("day of the month", 1, 31),
    Field { title: "month", low: 1, high: 12, names: &MONTHS, first: 1 },
    Field { title: "day of the week", low: 0, high: 7, names: &WEEKDAYS, first: 0 },
    numbers("year", 1970, 4999),
];

/// Checks the seven fields of a rule, in lower case.
///
/// # Errors
///
/// What is wrong with the first field that cannot be read.
pub(super) fn check(fields: &[&str; 7]) -> Result<(), String> {
    for (field, written) in FIELDS.iter().zip(fields) {
        if *written == "?" && field.title.starts_with("day of") {
            continue;
        }
        for part in written.split(',') {
            if part == "*" && *written != "*" {
                let complaint = "an asterisk stands alone, or with a step";
                return Err(format!("{} that cannot be read: {complaint}", field.title));
            }
            field.check_part(part).map_err(|complaint| format!("{} that cannot be read: {complaint}", field.title))?;
        }
    }
    Ok(())
}

impl Field {
    fn check_part(&self, part: &str) -> Result<(), String> {
        let Self { title, high, .. } = self;
        let special = match *title {
            "day of the month" if matches!(part, "l" | "lw") => return Ok(()),
            "day of the month" => part.strip_suffix('w').filter(|day| is_number(day, 2)),
            "day of the week" => part
                .strip_suffix('l')
                .or_else(|| part.strip_suffix(['1', '2', '3', '4', '5']))
                .map(|day| day.strip_suffix('#').unwrap_or(if part.ends_with('l') { day } else { "" }))
                .filter(|day| is_number(day, 1) || is_name(day)),
            _ => None,
        };
        if let Some(value) = special {
            return self.check_range(part, value, None);
        }
        let (range, step) = part.split_once('/').map_or((part, None), |(range, step)| (range, Some(step)));
        let (from, to) = range.split_once('-').map_or((range, None), |(from, to)| (from, Some(to)));
        let is_value = |value: &str| is_number(value, 4) || is_name(value);
        let is_range = if from == "*" { to.is_none() } else { is_value(from) && to.map_or(step.is_none(), is_value) };
        if !is_range || step.is_some_and(|step| !is_number(step, 4)) {
            let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            return Err(match step.filter(|step| digits(range) && digits(step)) {
                Some(step) => format!("write {range}-{high}/{step}"),
                None if part.is_empty() => "a part of it is empty".to_owned(),
                None => format!("'{}' is no number, name, range or step", part.replace('\'', "''")),
            });
        }
        if from != "*" {
            self.check_range(part, from, to)?;
        }
        let step = step.and_then(|step| step.parse::<u32>().ok());
        if step.is_some_and(|step| step == 0 || step > *high) {
            return Err(format!("the step of {part} is not between 1 and {high}"));
        }
        Ok(())
    }

    fn check_range(&self, part: &str, from: &str, to: Option<&str>) -> Result<(), String> {
        let Self { title, low, high, .. } = self;
        let first = self.value(from, false);
        let last = to.map_or(Some(first), |to| Some(self.value(to, true)));
        let (Some(first), Some(Some(last))) = (first, last) else {
            return Err(format!("'{part}' is no name of a {title}"));
        };
        if !(low..=high).contains(&&first) || !(low..=high).contains(&&last) {
            return Err(format!("{part} is not between {low} and {high}"));
        }
        if first > last {
            return Err(format!("{part} begins after its end"));
        }
        Ok(())
    }

    fn value(&self, text: &str, is_last: bool) -> Option<u32> {
        if let Ok(number) = text.parse() {
            return Some(number);
        }
        // The last of a range may be Sunday as the seventh day.
        if text == "sun" && is_last {
            return Some(7);
        }
        let place = self.names.iter().position(|name| *name == text)?;
        u32::try_from(place).ok().map(|place| place + self.first)
    }
}

fn is_number(text: &str, digits: usize) -> bool {
    (1..=digits).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_name(text: &str) -> bool {
    text.len() == 3 && text.bytes().all(|byte| byte.is_ascii_lowercase())
}
