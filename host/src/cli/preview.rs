//! `tidings preview`: the coming instants of a rule, without a server.

use std::fmt;
use std::process::ExitCode;

use clap::Args;
use time::OffsetDateTime;

use crate::cli::output::Output;
use crate::cli::{fail_usage, times};
use crate::recurrences::maker::to_timestamp;
use crate::recurrences::preview::{Preview, preview};

/// The rule to show.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  tidings preview '30 2 * * *' --zone Europe/Berlin --from 2026-03-27T12:00:00Z --count 3"
)]
pub(super) struct PreviewArgs {
    /// A cron rule with 5 fields, 6 (seconds first) or 7 (years last), @hourly to @yearly, or "every 90 minutes"
    rule: String,
    /// The time zone in whose time a cron rule is read
    #[arg(long, value_name = "ZONE", default_value = "UTC")]
    zone: String,
    /// How many instants to show
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,
    /// After which instant, in RFC 3339; without it after now. "every" counts from there
    #[arg(long, value_name = "TIME", value_parser = times::parse_instant)]
    from: Option<OffsetDateTime>,
}

pub(super) fn show(args: &PreviewArgs, output: Output) -> ExitCode {
    // From a whole second, as recurrences count.
    let now = OffsetDateTime::now_utc().truncate_to_second();
    let from = to_timestamp(args.from.unwrap_or(now));
    match preview(&args.rule, &args.zone, from, args.count as usize) {
        Ok(preview) => {
            output.answer(&preview);
            ExitCode::SUCCESS
        }
        Err(error) => fail_usage(&std::iter::once(error.to_string()).collect()),
    }
}

impl fmt::Display for Preview {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}\n{}, by the time zone database {}", self.words, self.zone, self.time_zone_database)?;
        for line in &self.instants {
            let at = if line.only_change { "" } else { &line.at };
            write!(formatter, "\n{at:<24}  {}", line.local)?;
            if let Some(note) = &line.note {
                write!(formatter, "  {note}")?;
            }
        }
        Ok(())
    }
}
