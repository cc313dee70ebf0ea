//! Events and actions in a few words, for the trace of a row's life.

use tidings_core::{Action, End, Event, Moment};

use super::times::START;

/// How long after the beginning of the world.
pub(super) fn since(moment: Moment) -> String {
    let begun = Moment::from_millis(START);
    format!("+{:.1} ms", moment.saturating_sub(begun).as_secs_f64() * 1_000.0)
}

/// In a few words.
pub(super) fn event(event: &Event) -> String {
    match event {
        Event::Woken(reasons) => {
            let reasons: Vec<&str> = reasons.iter().map(tidings_core::reason::Reason::label).collect();
            format!("Woken: {}", reasons.join(", "))
        }
        Event::Looked(_, look) => format!("Looked: {}", outlook(look.outlook)),
        Event::Claimed(claimed) => {
            let rows = if claimed.rows.is_some() { "rows, which are delivered from now on" } else { "nothing" };
            let more = if claimed.outlook.due { "more are due" } else { "no more" };
            format!("Claimed: {rows}; {more}")
        }
        Event::DeliveryEnded(_, End::Settled { .. }) => "DeliveryEnded: settled".to_owned(),
        Event::Swept(Some((_, look))) => format!("Swept: {}", outlook(look.outlook)),
        other => format!("{other:?}"),
    }
}

fn outlook(outlook: tidings_core::queue::Outlook) -> String {
    let due = if outlook.due { "rows are due" } else { "nothing is due" };
    outlook.next_in.map_or(due.to_owned(), |next_in| format!("{due}, the next in {next_in:?}"))
}

/// In a few words.
pub(super) fn action(action: &Action) -> String {
    match action {
        Action::Claim(wanted) => {
            format!("  → Claim, at most {} rows, not before {}", wanted.limit, since(wanted.not_before))
        }
        Action::Sleep(until, why) => format!("  → Sleep until {}: {}", since(*until), why.label()),
        other => format!("  → {other:?}"),
    }
}
