//! Random events in random order.

use proptest::prelude::*;

use super::super::*;
use super::scene::{START, SWEEP, Scene, ms};

/// An event, and how long after the last it happens.
fn random_event() -> impl Strategy<Value = (u64, u8, bool, bool, Option<u64>)> {
    (0..3_000_u64, 0..10_u8, any::<bool>(), any::<bool>(), proptest::option::of(0..20_000_u64))
}

proptest! {
    #[test]
    fn the_loop_never_spins_and_never_sleeps_for_longer_than_a_sweep_interval(
        rate in proptest::option::of(1..5_000_u32), events in prop::collection::vec(random_event(), 1..60),
    ) {
        let mut scene = Scene { core: Core::new(SWEEP, rate), now: START };
        let (mut lanes, mut hold, mut release, mut sweep) = (0, false, false, false);
        for (pass, event, first, second, next_in) in events {
            let (mut actions, begun) = (0, scene.now);
            let until = loop {
                actions += 1;
                let passed = scene.now.saturating_sub(begun);
                prop_assert!(actions < 12 || passed > actions * SHORTEST_SLEEP / 3, "it spins: {:?}", scene.core);
                let next_in = next_in.filter(|_| actions < 30).map(ms);
                match scene.next() {
                    Action::Look => scene.looked(first && lanes == 0, next_in),
                    Action::Claim(_) => {
                        // The due rows can be claimed, or others have locked them.
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
            prop_assert!(scene.core.backing_off.is_some() || until.saturating_sub(scene.now) <= SWEEP, "{:?}", scene.core);
            scene.now = (scene.now + ms(pass)).min(until);
            match event {
                0 => scene.woken(Reason::Notification),
                1 => scene.woken(Reason::Broker),
                2 | 3 if lanes > 0 => {
                    lanes -= 1;
                    scene.ended(DeliveryEnd::Settled { some_left: first, some_stay: second });
                }
                4 if lanes > 0 => {
                    lanes -= 1;
                    scene.ended(if first { DeliveryEnd::Unsettled } else { DeliveryEnd::Failed });
                }
                5 if std::mem::take(&mut hold) => scene.handle(Event::Held(first)),
                6 if std::mem::take(&mut release) => scene.handle(Event::Released),
                7 if std::mem::take(&mut sweep) => scene.swept(None),
                8 => scene.handle(Event::Failed(Operation::LookOrClaim)),
                _ => {}
            }
        }
    }
}
