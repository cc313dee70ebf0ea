//! Small worlds, checked in every possible order of their steps: two daemons, three rows, two writers, at most one fault.

use std::time::Instant;

use stateright::{Checker as _, Model, Property};

use super::invariant::Violation;
use super::step::{Ending, Step};
use super::world::World;

/// The steps of a writer, in order.
type Script = &'static [Step];

/// A small world: the writers' scripts, the kinds that each daemon serves, and the faults, of which one at most happens.
#[derive(Clone)]
struct SmallWorld {
    writers: [Script; 2],
    kinds: [&'static [usize]; 2],
    faults: Vec<Step>,
}

/// The state of a small world: `written` counts the steps that each writer has taken.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    world: World,
    written: [usize; 2],
    fault_happened: bool,
    violation: Option<Violation>,
}

impl Model for SmallWorld {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        let mut world = World::new(self.writers.len(), &self.kinds);
        // At the start, all daemons have looked and swept, and sleep.
        let violation = world.recover().and_then(|()| world.run_until_asleep()).err();
        vec![State { world, written: [0; 2], fault_happened: false, violation }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Step>) {
        let State { world, written, fault_happened, violation } = state;
        if violation.is_some() {
            return;
        }
        for (number, daemon) in world.daemons.iter().enumerate() {
            if daemon.can_continue(world.now) {
                actions.push(Step::Run(number));
            }
            if daemon.has_notifications() {
                actions.push(Step::Notify(number));
            }
            for task in 0..daemon.background_tasks() {
                actions.push(Step::RunBackground(number, task, Ending::Settled));
            }
        }
        for (script, written) in self.writers.iter().zip(written) {
            actions.extend(script.get(*written));
        }
        if !fault_happened {
            actions.extend(&self.faults);
        }
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        let mut next = state.clone();
        if let Some(writer) =
            self.writers.iter().zip(&state.written).position(|(script, written)| script.get(*written) == Some(&step))
        {
            next.written[writer] += 1;
        } else if self.faults.contains(&step) {
            next.fault_happened = true;
        }
        next.violation = next.world.step(step).and_then(|()| next.world.run_unnoticed()).err();
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no invariant is violated", |_: &Self, state: &State| state.violation.is_none()),
            Property::always("every state recovers once faults end", |_: &Self, state: &State| {
                state.violation.is_some() || state.world.clone().recover().is_ok()
            }),
        ]
    }
}

/// The first writer writes two rows, due at once and in a second; the second writes one. Both daemons serve kind 0, and only
/// the second serves kind 2.
const WRITERS: [Script; 2] = [
    &[
        Step::Write { writer: 0, kind: 0, large: false, due_in: 0 },
        Step::Write { writer: 0, kind: 2, large: false, due_in: 1_000 },
        Step::Commit(0),
    ],
    &[Step::Write { writer: 1, kind: 2, large: false, due_in: 0 }, Step::Commit(1)],
];

/// The faults of each small world, with a name for the world.
fn worlds() -> Vec<(&'static str, Vec<Step>)> {
    vec![
        ("none", vec![]),
        ("a daemon is killed", vec![Step::Kill(0)]),
        ("the listener's session is lost", vec![Step::LoseListener(1)]),
        ("the other sessions are lost", vec![Step::LoseSessions(1)]),
        ("the broker is away", vec![Step::CloseBroker(1)]),
        ("the broker does not confirm", vec![Step::RunBackground(1, 0, Ending::Unsettled)]),
        ("PostgreSQL refuses to finish rows", vec![Step::RunBackground(1, 0, Ending::Refused)]),
        ("rows are to be tried again", vec![Step::RunBackground(1, 0, Ending::Retried(500))]),
        ("a writer rolls back", vec![Step::RollBack(0)]),
        ("a kind is paused", vec![Step::Pause(2)]),
        ("a listener promises that all daemons poll", vec![Step::Promise]),
        ("the clock is set back", vec![Step::SetClock(-3_000)]),
        ("the clock is set forward", vec![Step::SetClock(3_000)]),
        ("a standby takes over", vec![Step::FailOver(500)]),
    ]
}

/// Checks all small worlds. Returns whether no invariant is violated.
pub(super) fn check_all() -> bool {
    worlds().into_iter().all(|(fault, faults)| {
        let began = Instant::now();
        let checker =
            SmallWorld { writers: WRITERS, kinds: [&[0, 1], &[0, 2]], faults }.checker().threads(2).spawn_dfs().join();
        println!(
            "small world, fault: {fault}: {} states, {} of them different, {:.1} s",
            checker.state_count(),
            checker.unique_state_count(),
            began.elapsed().as_secs_f64()
        );
        for (property, path) in checker.discoveries() {
            let end = path.last_state();
            let violation = end.violation.clone().or_else(|| end.world.clone().recover().err());
            if let Some(violation) = violation {
                println!("violated: {}\n{}", violation.invariant, violation.details);
            }
            println!("not so: {property}; after these steps:");
            for step in path.into_actions() {
                println!("  {step:?}");
            }
        }
        checker.discoveries().is_empty()
    })
}
