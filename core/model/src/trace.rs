//! One row's life, as the core sees it.

use std::fmt::Write as _;

use tidings_core::{Action, End, Event, Moment};

use super::step::Step;
use super::world::{START, World};

/// What a daemon did, line by line, from a row's commit to its end.
pub(super) fn of_one_row() -> String {
    let mut world = World::new(1, &[&[0]]);
    let rested = world.come_to_rest().and_then(|()| world.run_all());
    world.daemons[0].keep_diary();
    let live = |world: &mut World| {
        for step in [
            Step::Pass(800),
            Step::Write { writer: 0, kind: 0, large: false, due_in: 1_200 },
            Step::Commit(0),
            Step::Notify(0),
        ] {
            world.step(step)?;
        }
        world.run_all()?;
        world.step(Step::Pass(1_200))?;
        while world.daemons[0].loads().next().is_none() {
            world.step(Step::Run(0))?;
        }
        while world.daemons[0].is_busy(world.now) {
            world.step(Step::Run(0))?;
        }
        world.step(Step::Pass(3))?;
        world.run_all()
    };
    let lived = rested.and_then(|()| live(&mut world));
    assert!(lived.is_ok(), "{lived:?}");
    let mut lines =
        " +800.0 ms  a transaction writes a row that is due in 1.2 s, and commits: PostgreSQL notifies\n".to_owned();
    for (moment, entry) in world.daemons[0].diary() {
        writeln!(lines, "{:>10}  {entry}", since(*moment)).expect("a string");
    }
    lines
}

fn since(moment: Moment) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_life_of_a_row_is_as_the_page_has_it() {
        let trace = of_one_row();
        println!("{trace}");
        let page = include_str!("../../README.md");
        assert!(page.contains(&trace), "core/README.md does not have this:\n{trace}");
    }
}
