//! Large worlds with random steps: hundreds of steps, several daemons, every fault. If an invariant is violated, proptest
//! shrinks the world to the fewest steps that violate it.

use std::cell::Cell;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use super::invariant::Violation;
use super::step::{Ending, Step};
use super::world::World;

const KINDS: usize = 4;
const WRITERS: usize = 3;
/// The kinds of each daemon. Both serve kind 0, each serves another kind alone, and no daemon serves kind 3.
const DAEMONS: [&[usize]; 2] = [&[0, 1], &[0, 2]];

/// How far a clock is set that was wrong for months, in ms.
const HOUR: i64 = 3_600_000;

/// The steps that are more frequent in a world.
#[derive(Clone, Copy, Debug)]
enum Theme {
    /// None.
    Even,
    /// Promises to poll, and transactions that stay open.
    Promises,
    /// Lost sessions, brokers and daemons, and clocks that are set.
    Faults,
    /// Deliveries that do not succeed.
    Refusals,
}

/// The weight of a step: the usual one, or the one for worlds of its theme.
fn weight(usual: u32, themed: u32, is_theme: bool) -> u32 {
    if is_theme { themed } else { usual }
}

fn ending(theme: Theme) -> impl Strategy<Value = Ending> {
    prop_oneof![
        weight(10, 3, matches!(theme, Theme::Refusals)) => Just(Ending::Settled),
        1 => (1..3_000_u64).prop_map(Ending::Retried),
        1 => Just(Ending::Unsettled),
        1 => Just(Ending::Refused),
        1 => Just(Ending::Panicked),
    ]
}

fn random_step(theme: Theme) -> impl Strategy<Value = Step> {
    let (writer, daemon, kind) = (0..WRITERS, 0..DAEMONS.len(), 0..KINDS);
    let due_in = prop_oneof![4 => Just(0_i64), 2 => -5_000..0_i64, 3 => 0..4_000_i64, 1 => Just(60_000)];
    let pass = prop_oneof![12 => 0..20_u64, 6 => 0..500_u64, 2 => 0..6_000_u64, 1 => 0..40_000_u64];
    let clock_step = prop_oneof![6 => -3_000..3_000_i64, 1 => Just(HOUR), 1 => Just(-HOUR)];
    let is_of_promises = matches!(theme, Theme::Promises);
    prop_oneof![
        weight(8, 16, is_of_promises) => pass.prop_map(Step::Pass),
        1 => writer.clone().prop_map(Step::Begin),
        8 => (writer.clone(), kind.clone(), prop::bool::weighted(0.1), due_in)
            .prop_map(|(writer, kind, large, due_in)| Step::Write { writer, kind, large, due_in }),
        weight(6, 2, is_of_promises) => writer.clone().prop_map(Step::Commit),
        1 => writer.prop_map(Step::RollBack),
        1 => Just(Step::OtherTransaction),
        40 => daemon.clone().prop_map(Step::Run),
        16 => (daemon.clone(), 0..4_usize, ending(theme)).prop_map(|(daemon, task, ending)| Step::RunBackground(daemon, task, ending)),
        8 => daemon.clone().prop_map(Step::Notify),
        weight(1, 2, is_of_promises) => Just(Step::Promise),
        weight(2, 8, matches!(theme, Theme::Faults)) => prop_oneof![
            2 => daemon.clone().prop_map(Step::LoseListener),
            2 => daemon.clone().prop_map(Step::LoseSessions),
            1 => daemon.clone().prop_map(Step::Doubt),
            2 => daemon.clone().prop_map(Step::CloseBroker),
            1 => daemon.clone().prop_map(Step::Kill),
            1 => (daemon.clone(), 1..5_usize).prop_map(|(daemon, connections)| Step::SetConnections(daemon, connections)),
            2 => kind.clone().prop_map(Step::Pause),
            1 => clock_step.prop_map(Step::SetClock),
            1 => (0..3_500_i64).prop_map(Step::FailOver),
        ],
        weight(2, 4, matches!(theme, Theme::Faults)) => prop_oneof![
            daemon.clone().prop_map(Step::RestoreListener),
            daemon.clone().prop_map(Step::OpenBroker),
            daemon.clone().prop_map(Step::Start),
            daemon.prop_map(Step::LoadPlugins),
            kind.prop_map(Step::Resume),
        ],
    ]
}

fn random_steps() -> impl Strategy<Value = Vec<Step>> {
    let theme = prop_oneof![Just(Theme::Even), Just(Theme::Promises), Just(Theme::Faults), Just(Theme::Refusals)];
    theme.prop_flat_map(|theme| prop::collection::vec(random_step(theme), 0..500))
}

/// How much a successful run has checked.
pub(super) struct Run {
    pub(super) steps: u64,
    pub(super) worlds: u64,
}

/// Checks worlds of this seed until they have taken this many steps together.
///
/// # Errors
///
/// The first violated invariant, and the steps that lead there: the fewest, unless the run is `brief`.
pub(super) fn run(seed: u64, steps: u64, brief: bool) -> Result<Run, (Option<Violation>, String)> {
    let old_rows = prop::collection::vec((0..KINDS, 0..900_000_i64), 0..3);
    let random_worlds = (old_rows, random_steps());
    let (steps_taken, worlds_done, last) = (Cell::new(0), Cell::new(0), Cell::new(None));
    for batch in 0_u64.. {
        if steps_taken.get() >= steps {
            break;
        }
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        bytes[8..16].copy_from_slice(&batch.to_le_bytes());
        let config = Config {
            cases: 100,
            max_shrink_iters: if brief { 0 } else { 20_000 },
            failure_persistence: None,
            ..Config::default()
        };
        let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
        let result = runner.run(&random_worlds, |(old_rows, steps)| {
            let count = u64::try_from(steps.len()).expect("few");
            match run_world(old_rows, steps) {
                Ok(()) => {
                    steps_taken.set(steps_taken.get() + count);
                    worlds_done.set(worlds_done.get() + 1);
                    Ok(())
                }
                Err(violation) => {
                    let message = violation.details.clone();
                    last.set(Some(violation));
                    Err(TestCaseError::fail(message))
                }
            }
        });
        if let Err(error) = result {
            let report = match error {
                TestError::Fail(reason, (old_rows, steps)) => {
                    let steps: Vec<String> =
                        steps.iter().filter(|step| **step != Step::Pass(0)).map(|step| format!("  {step:?}")).collect();
                    format!(
                        "{reason}\nrows from before the beginning (kind, ms ago): {old_rows:?}\nsteps:\n{}",
                        steps.join("\n")
                    )
                }
                TestError::Abort(reason) => reason.to_string(),
            };
            return Err((last.take(), report));
        }
    }
    Ok(Run { steps: steps_taken.get(), worlds: worlds_done.get() })
}

fn run_world(old_rows: Vec<(usize, i64)>, steps: Vec<Step>) -> Result<(), Violation> {
    let mut world = World::new(WRITERS, &DAEMONS);
    for (kind, ago) in old_rows {
        world = world.with_old_row(kind, ago);
    }
    for step in steps {
        world.step(step)?;
    }
    world.recover()?;
    world.check_idle()
}

#[cfg(test)]
mod tests {
    /// Fewer steps than `cargo verify -- model` takes, for everyone who changes the core and runs only its tests.
    #[test]
    fn no_invariant_is_violated_in_large_worlds() {
        let run = super::run(18, 200_000, false).unwrap_or_else(|(_, report)| panic!("{report}"));
        assert!(run.steps >= 200_000 && run.worlds > 100);
    }
}
