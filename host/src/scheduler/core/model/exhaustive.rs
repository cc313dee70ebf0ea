//! Small worlds, every interleaving.

use stateright::{Checker as _, Model, Property};

use super::{Ends, Step, World};

/// What a writer does, one step after the other.
type Script = &'static [Step];

/// A small world: what writers do, and which faults may happen, one in all.
#[derive(Clone)]
struct Small {
    writers: [Script; 2],
    kinds: [&'static [usize]; 2],
    faults: Vec<Step>,
}

/// The world, and what is left to happen.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    world: World,
    written: [usize; 2],
    faulty: bool,
    wrong: Option<String>,
}

impl Model for Small {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let mut world = World::new(self.writers.len(), &self.kinds);
        // They have looked and swept, and sleep.
        let wrong = world.come_to_rest().and_then(|()| world.run_all()).err();
        vec![State { world, written: [0; 2], faulty: false, wrong }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Step>) {
        let State { world, written, faulty, wrong } = state;
        if wrong.is_some() {
            return;
        }
        for (number, daemon) in world.daemons.iter().enumerate() {
            if daemon.is_busy(world.now) {
                actions.push(Step::Run(number));
            }
            if daemon.has_notifications() {
                actions.push(Step::Notify(number));
            }
            for work in 0..daemon.beside() {
                actions.push(Step::RunBeside(number, work, Ends::Settled));
            }
        }
        for (script, written) in self.writers.iter().zip(written) {
            actions.extend(script.get(*written));
        }
        if !faulty {
            actions.extend(&self.faults);
        }
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        let mut next = state.clone();
        if let Some(writer) =
            self.writers.iter().zip(&state.written).position(|(script, at)| script.get(*at) == Some(&step))
        {
            next.written[writer] += 1;
        } else if self.faults.contains(&step) {
            next.faulty = true;
        }
        next.wrong = next.world.step(step).and_then(|()| next.world.run_by_themselves()).err();
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing is wrong", |_: &Self, state: &State| state.wrong.is_none()),
            Property::always("from every state all come to rest once faults end", |_: &Self, state: &State| {
                state.wrong.is_some() || state.world.clone().come_to_rest().is_ok()
            }),
        ]
    }
}

/// Every state, and how many they were.
fn check(name: &str, small: Small) {
    let checker = small.checker().threads(2).spawn_dfs().join();
    println!("{name}: {} states, {} of them different", checker.state_count(), checker.unique_state_count());
    checker.assert_properties();
}

const TWO: [&[usize]; 2] = [&[0, 1], &[0, 2]];

/// One row of each writer, and the second's is of a kind that one daemon serves alone.
const WRITERS: [Script; 2] = [
    &[Step::Write { writer: 0, kind: 0, due_in: 0 }, Step::Commit(0)],
    &[Step::Write { writer: 1, kind: 2, due_in: 0 }, Step::Commit(1)],
];

#[test]
fn two_daemons_two_rows_two_writers_and_a_daemon_that_is_killed() {
    check("a daemon is killed", Small { writers: WRITERS, kinds: TWO, faults: vec![Step::Kill(0)] });
}
