//! Events and actions in a few words, for the trace of one row.

use tidings_core::{Action, DeliveryEnd, Event, Moment};

use super::times::START;

/// A moment, as the time since the beginning of the world.
pub(super) fn since(moment: Moment) -> String {
    let start = Moment::from_millis(START);
    format!("+{:.1} ms", moment.saturating_sub(start).as_secs_f64() * 1_000.0)
}

/// An event in a few words.
pub(super) fn event(event: &Event) -> String {
    match event {
        Event::Woken(reasons) => {
            let reasons: Vec<&str> = reasons.iter().map(tidings_core::reason::Reason::label).collect();
            format!("Woken: {}", reasons.join(", "))
        }
        Event::Looked(_, look) => format!("Looked: {}", outlook(look.outlook)),
        Event::Claimed(result) => {
            let rows = if result.batch.is_some() { "rows, whose delivery begins" } else { "no rows" };
            let more = if result.outlook.due { "more are due" } else { "no more are due" };
            format!("Claimed: {rows}; {more}")
        }
        Event::DeliveryEnded(_, DeliveryEnd::Settled { .. }) => "DeliveryEnded: settled".to_owned(),
        Event::Swept(Some((_, look))) => format!("Swept: {}", outlook(look.outlook)),
        other => format!("{other:?}"),
    }
}

fn outlook(outlook: tidings_core::queue::Outlook) -> String {
    let due = if outlook.due { "rows are due" } else { "nothing is due" };
    outlook.next_in.map_or(due.to_owned(), |next_in| format!("{due}, the next in {next_in:?}"))
}

/// An action in a few words.
pub(super) fn action(action: &Action) -> String {
    match action {
        Action::Claim(request) => format!("  → Claim, at most {} rows", request.limit),
        Action::Sleep(until, reason) => format!("  → Sleep until {}: {}", since(*until), reason.label()),
        other => format!("  → {other:?}"),
    }
}
