//! Large worlds at random: hundreds of steps, several daemons, every fault. If an invariant fails, proptest shrinks the
//! world to the fewest steps that break it.

use std::cell::Cell;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use super::invariant::Wrong;
use super::step::{Ends, Step};
use super::world::World;

const KINDS: usize = 4;
const WRITERS: usize = 3;
/// The first two serve a kind together, each another alone, and one kind is served by nobody.
const DAEMONS: [&[usize]; 2] = [&[0, 1], &[0, 2]];

/// What happens more often in a world.
#[derive(Clone, Copy, Debug)]
enum Theme {
    /// Nothing.
    Even,
    /// Promises to look without being notified, and transactions that stay open.
    Promises,
    /// Sessions, brokers and daemons that are lost, clocks that are set.
    Faults,
    /// Deliveries that do not end well.
    Refusals,
}

/// So often, or more in a world of this theme.
fn weight(often: u32, more: u32, is_theme: bool) -> u32 {
    if is_theme { more } else { often }
}

fn ends(theme: Theme) -> impl Strategy<Value = Ends> {
    prop_oneof![
        weight(10, 3, matches!(theme, Theme::Refusals)) => Just(Ends::Settled),
        1 => (1..3_000_u64).prop_map(Ends::Again),
        1 => Just(Ends::Unsettled),
        1 => Just(Ends::Refused),
        1 => Just(Ends::Panicked),
    ]
}

fn step(theme: Theme) -> impl Strategy<Value = Step> {
    let (writer, daemon, kind) = (0..WRITERS, 0..DAEMONS.len(), 0..KINDS);
    let due_in = prop_oneof![4 => Just(0_i64), 2 => -5_000..0_i64, 3 => 0..4_000_i64, 1 => Just(60_000)];
    let pass = prop_oneof![12 => 0..20_u64, 6 => 0..500_u64, 2 => 0..6_000_u64, 1 => 0..40_000_u64];
    let is_of_promises = matches!(theme, Theme::Promises);
    prop_oneof![
        weight(8, 16, is_of_promises) => pass.prop_map(Step::Pass),
        1 => writer.clone().prop_map(Step::Begin),
        8 => (writer.clone(), kind.clone(), prop::bool::weighted(0.1), due_in)
            .prop_map(|(writer, kind, large, due_in)| Step::Write { writer, kind, large, due_in }),
        weight(6, 2, is_of_promises) => writer.clone().prop_map(Step::Commit),
        1 => writer.prop_map(Step::RollBack),
        1 => Just(Step::Other),
        40 => daemon.clone().prop_map(Step::Run),
        16 => (daemon.clone(), 0..4_usize, ends(theme)).prop_map(|(daemon, work, ends)| Step::RunBeside(daemon, work, ends)),
        8 => daemon.clone().prop_map(Step::Notify),
        weight(1, 2, is_of_promises) => Just(Step::Promise),
        weight(2, 8, matches!(theme, Theme::Faults)) => prop_oneof![
            2 => daemon.clone().prop_map(Step::Deafen),
            2 => daemon.clone().prop_map(Step::Fail),
            1 => daemon.clone().prop_map(Step::Doubt),
            2 => daemon.clone().prop_map(Step::Close),
            1 => daemon.clone().prop_map(Step::Kill),
            1 => (daemon.clone(), 1..5_usize).prop_map(|(daemon, connections)| Step::Connections(daemon, connections)),
            2 => kind.clone().prop_map(Step::Pause),
            1 => (-3_000..3_000_i64).prop_map(Step::SetClock),
            1 => (0..900_i64).prop_map(Step::FailOver),
        ],
        weight(2, 4, matches!(theme, Theme::Faults)) => prop_oneof![
            daemon.clone().prop_map(Step::Listen),
            daemon.clone().prop_map(Step::Open),
            daemon.clone().prop_map(Step::Start),
            daemon.prop_map(Step::Learn),
            kind.prop_map(Step::Resume),
        ],
    ]
}

fn what_happens() -> impl Strategy<Value = Vec<Step>> {
    let theme = prop_oneof![Just(Theme::Even), Just(Theme::Promises), Just(Theme::Faults), Just(Theme::Refusals)];
    theme.prop_flat_map(|theme| prop::collection::vec(step(theme), 0..500))
}

/// What a run came to.
pub(super) struct Run {
    pub(super) steps: u64,
    pub(super) worlds: u64,
}

/// Goes through worlds of this seed, until they have taken so many steps together.
///
/// # Errors
///
/// What is wrong in the first where something is, and the steps that lead there: the fewest, unless it must be `brief`.
pub(super) fn run(seed: u64, steps: u64, brief: bool) -> Result<Run, (Option<Wrong>, String)> {
    let old = prop::collection::vec((0..KINDS, 0..900_000_i64), 0..3);
    let worlds = (old, what_happens());
    let (taken, entered, last) = (Cell::new(0), Cell::new(0), Cell::new(None));
    for batch in 0_u64.. {
        if taken.get() >= steps {
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
        let tried = runner.run(&worlds, |(old, steps)| {
            let count = u64::try_from(steps.len()).expect("few");
            match go(old, steps) {
                Ok(()) => {
                    taken.set(taken.get() + count);
                    entered.set(entered.get() + 1);
                    Ok(())
                }
                Err(wrong) => {
                    let message = wrong.what.clone();
                    last.set(Some(wrong));
                    Err(TestCaseError::fail(message))
                }
            }
        });
        if let Err(error) = tried {
            let sentence = match error {
                TestError::Fail(reason, (old, steps)) => {
                    let steps: Vec<String> =
                        steps.iter().filter(|step| **step != Step::Pass(0)).map(|step| format!("  {step:?}")).collect();
                    format!("{reason}\nrows of before (kind, ms ago): {old:?}\nsteps:\n{}", steps.join("\n"))
                }
                TestError::Abort(reason) => reason.to_string(),
            };
            return Err((last.take(), sentence));
        }
    }
    Ok(Run { steps: taken.get(), worlds: entered.get() })
}

fn go(old: Vec<(usize, i64)>, steps: Vec<Step>) -> Result<(), Wrong> {
    let mut world = World::new(WRITERS, &DAEMONS);
    for (kind, ago) in old {
        world = world.with_row(kind, ago);
    }
    for step in steps {
        world.step(step)?;
    }
    world.come_to_rest()?;
    world.idle()
}

#[cfg(test)]
mod tests {
    /// A few of them, for those who change the core and run its tests alone.
    #[test]
    fn in_large_worlds_nothing_is_wrong() {
        let run = super::run(18, 200_000, false).unwrap_or_else(|(_, wrong)| panic!("{wrong}"));
        assert!(run.steps >= 200_000 && run.worlds > 100);
    }
}
