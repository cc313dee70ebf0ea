//! Small worlds, every order of what can happen in them: two daemons, three rows, two writers, one fault.

use std::time::Instant;

use stateright::{Checker as _, Model, Property};

use super::invariant::Wrong;
use super::step::{Ends, Step};
use super::world::World;

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
    wrong: Option<Wrong>,
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

/// Two rows of one writer, one of the other: due at once and in a second, of a kind that both serve and of one that the second
/// daemon serves alone.
const WRITERS: [Script; 2] = [
    &[
        Step::Write { writer: 0, kind: 0, large: false, due_in: 0 },
        Step::Write { writer: 0, kind: 2, large: false, due_in: 1_000 },
        Step::Commit(0),
    ],
    &[Step::Write { writer: 1, kind: 2, large: false, due_in: 0 }, Step::Commit(1)],
];

/// The worlds, by their fault.
fn worlds() -> Vec<(&'static str, Vec<Step>)> {
    vec![
        ("none", vec![]),
        ("a daemon is killed", vec![Step::Kill(0)]),
        ("the listener's session is lost", vec![Step::Deafen(1)]),
        ("the other sessions are lost", vec![Step::Fail(1)]),
        ("the broker is away", vec![Step::Close(1)]),
        ("the broker does not confirm", vec![Step::RunBeside(1, 0, Ends::Unsettled)]),
        ("PostgreSQL refuses to finish rows", vec![Step::RunBeside(1, 0, Ends::Refused)]),
        ("rows are to be tried again", vec![Step::RunBeside(1, 0, Ends::Again(500))]),
        ("a writer rolls back", vec![Step::RollBack(0)]),
        ("a kind is paused", vec![Step::Pause(2)]),
        ("somebody promises that all look", vec![Step::Promise]),
        ("the clock is set back", vec![Step::SetClock(-3_000)]),
        ("the clock is set forward", vec![Step::SetClock(3_000)]),
        ("a standby takes over", vec![Step::FailOver(500)]),
    ]
}

/// Goes through all of them. Whether nothing was wrong.
pub(super) fn check_all() -> bool {
    worlds().into_iter().all(|(fault, faults)| {
        let began = Instant::now();
        let checker =
            Small { writers: WRITERS, kinds: [&[0, 1], &[0, 2]], faults }.checker().threads(2).spawn_dfs().join();
        println!(
            "small world, fault: {fault}: {} states, {} of them different, {:.1} s",
            checker.state_count(),
            checker.unique_state_count(),
            began.elapsed().as_secs_f64()
        );
        for (property, path) in checker.discoveries() {
            let end = path.last_state();
            let wrong = end.wrong.clone().or_else(|| end.world.clone().come_to_rest().err());
            if let Some(wrong) = wrong {
                println!("wrong: {}\n{}", wrong.invariant, wrong.what);
            }
            println!("{property}: no, after");
            for step in path.into_actions() {
                println!("  {step:?}");
            }
        }
        checker.discoveries().is_empty()
    })
}
