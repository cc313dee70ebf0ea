//! Large worlds at random.

use proptest::prelude::*;

use super::{Ends, Step, World};

const KINDS: usize = 3;
const WRITERS: usize = 3;
const DAEMONS: usize = 2;

fn ends() -> impl Strategy<Value = Ends> {
    prop_oneof![
        6 => Just(Ends::Settled),
        1 => (1..3_000_u64).prop_map(Ends::Again),
        1 => Just(Ends::Unsettled),
        1 => Just(Ends::Refused),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let (writer, daemon) = (0..WRITERS, 0..DAEMONS);
    prop_oneof![
        8 => prop_oneof![6 => 0..20_u64, 2 => 0..500_u64, 1 => 0..6_000_u64].prop_map(Step::Pass),
        8 => (writer.clone(), 0..KINDS, prop_oneof![Just(0_i64), -5_000..0_i64, 0..4_000_i64, Just(60_000)])
            .prop_map(|(writer, kind, due_in)| Step::Write { writer, kind, due_in }),
        6 => writer.clone().prop_map(Step::Commit),
        1 => writer.prop_map(Step::RollBack),
        1 => Just(Step::Other),
        40 => daemon.clone().prop_map(Step::Run),
        16 => (daemon.clone(), 0..4_usize, ends()).prop_map(|(daemon, work, ends)| Step::RunBeside(daemon, work, ends)),
        8 => daemon.clone().prop_map(Step::Notify),
        1 => prop_oneof![
            daemon.clone().prop_map(Step::Deafen),
            daemon.clone().prop_map(Step::Fail),
            daemon.clone().prop_map(Step::Close),
            daemon.clone().prop_map(Step::Kill),
            Just(Step::Promise),
            Just(Step::SetClock(-3_000)),
            Just(Step::SetClock(3_000)),
        ],
        2 => prop_oneof![daemon.clone().prop_map(Step::Listen), daemon.clone().prop_map(Step::Open), daemon.prop_map(Step::Start)],
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn in_large_worlds_nothing_is_wrong_in_any_state_and_all_come_to_rest(
        old in prop::collection::vec((0..KINDS, 0..900_000_i64), 0..3),
        steps in prop::collection::vec(step(), 0..500),
    ) {
        // The first serves two kinds, the second one of them and another, and what neither announces is held.
        let mut world = World::new(WRITERS, &[&[0, 1], &[0, 2]]);
        for (kind, ago) in old {
            world = world.with_row(kind, ago);
        }
        for step in steps {
            world.step(step).map_err(TestCaseError::fail)?;
        }
        world.come_to_rest().map_err(TestCaseError::fail)?;
    }
}
