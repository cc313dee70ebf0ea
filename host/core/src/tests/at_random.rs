//! Whatever happens, in any order.

use proptest::prelude::*;

use super::super::*;
use super::scene::{START, SWEEP, Scene, ms};

/// What may happen, and how long after the last.
fn happening() -> impl Strategy<Value = (u64, u8, bool, bool, Option<u64>)> {
    (0..3_000_u64, 0..10_u8, any::<bool>(), any::<bool>(), proptest::option::of(0..20_000_u64))
}

proptest! {
    #[test]
    fn whatever_happens_it_never_turns_without_waiting_and_never_sleeps_longer_than_the_sweep(
        happenings in prop::collection::vec(happening(), 1..60),
    ) {
        let mut scene = Scene { core: Core::new(SWEEP), now: START };
        let (mut lanes, mut hold, mut release, mut sweep) = (0, false, false, false);
        for (pass, what, first, second, next_in) in happenings {
            let (mut claim_policy, begun) = (0, scene.now);
            let until = loop {
                claim_policy += 1;
                let passed = scene.now.saturating_sub(begun);
                prop_assert!(claim_policy < 12 || passed > claim_policy * SHORTEST / 3, "it claim_policy without waiting: {:?}", scene.core);
                let next_in = next_in.filter(|_| claim_policy < 30).map(ms);
                match scene.next() {
                    Action::Look => scene.looked(first && lanes == 0, next_in),
                    Action::Claim(wanted) => {
                        // What is due can be claimed, or others have it.
                        scene.now = scene.now.max(wanted.not_before);
                        lanes += usize::from(second);
                        scene.claimed(second, false, next_in);
                    }
                    Action::Hold => hold = true,
                    Action::Release(_) => release = true,
                    Action::Sweep => sweep = true,
                    Action::Sleep(until, _) => break until,
                }
            };
            prop_assert!(until > scene.now && until.saturating_sub(scene.now) <= Duration::from_secs(30));
            prop_assert!(scene.core.rest.is_some() || until.saturating_sub(scene.now) <= SWEEP, "{:?}", scene.core);
            scene.now = (scene.now + ms(pass)).min(until);
            match what {
                0 => scene.woken(Reason::Notification),
                1 => scene.woken(Reason::Broker),
                2 | 3 if lanes > 0 => {
                    lanes -= 1;
                    scene.ended(End::Settled { some_left: first, some_stay: second });
                }
                4 if lanes > 0 => {
                    lanes -= 1;
                    scene.ended(if first { End::Unsettled } else { End::Failed });
                }
                5 if std::mem::take(&mut hold) => scene.happens(Event::Held(first)),
                6 if std::mem::take(&mut release) => scene.happens(Event::Released),
                7 if std::mem::take(&mut sweep) => scene.swept(None),
                8 => scene.happens(Event::Failed(Work::Asking)),
                _ => {}
            }
        }
    }
}
