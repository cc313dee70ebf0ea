//! One row's life, as the core sees it.

use std::fmt::Write as _;

use super::diary::since;
use super::step::Step;
use super::world::World;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_life_of_a_row_is_as_the_page_has_it() {
        let trace = of_one_row();
        println!("{trace}");
        let page = include_str!("../../../host/core/README.md");
        assert!(page.contains(&trace), "host/core/README.md does not have this:\n{trace}");
    }
}
