//! The trace of one row: the events and actions of the core from the row's commit to its delivery.

use std::fmt::Write as _;

use super::diary::since;
use super::step::Step;
use super::world::World;

/// The trace, line by line.
pub(super) fn trace_one_row() -> String {
    let mut world = World::new(1, &[&[0]]);
    let recovered = world.recover().and_then(|()| world.run_until_asleep());
    world.daemons[0].start_diary();
    let deliver = |world: &mut World| {
        for step in [
            Step::Pass(800),
            Step::Write { writer: 0, kind: 0, large: false, due_in: 1_200 },
            Step::Commit(0),
            Step::Notify(0),
        ] {
            world.step(step)?;
        }
        world.run_until_asleep()?;
        world.step(Step::Pass(1_200))?;
        while world.daemons[0].lanes().next().is_none() {
            world.step(Step::Run(0))?;
        }
        while world.daemons[0].can_continue(world.now) {
            world.step(Step::Run(0))?;
        }
        world.step(Step::Pass(3))?;
        world.run_until_asleep()
    };
    let delivered = recovered.and_then(|()| deliver(&mut world));
    assert!(delivered.is_ok(), "{delivered:?}");
    let mut lines =
        " +800.0 ms  a transaction writes a row that is due in 1.2 s, and commits: PostgreSQL notifies\n".to_owned();
    for (moment, entry) in world.daemons[0].diary() {
        writeln!(lines, "{:>10}  {entry}", since(*moment)).expect("a string");
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_has_the_trace_as_the_model_prints_it() {
        let trace = trace_one_row();
        println!("{trace}");
        let page = include_str!("../../../host/core/README.md");
        assert!(page.contains(&trace), "host/core/README.md does not have this:\n{trace}");
    }
}
