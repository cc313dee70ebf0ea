//! Which actions follow the results of claims, deliveries and sweeps.

use super::super::*;
use super::ALL_LEFT;
use super::scene::{OPEN, SWEEP, Scene, look, ms};
use crate::events::ALMOST_DUE;

#[test]
fn a_row_that_is_not_quite_due_by_the_clock_of_the_database_is_claimed_again_when_it_is() {
    let mut scene = Scene::quiet();
    for (next_in, again) in [(300, 300), (100, 200)] {
        scene.woken(Reason::Notification);
        scene.looked(true, None);
        scene.claims();
        scene.claimed(false, false, Some(Duration::from_micros(next_in)));
        let again = Duration::from_micros(again);
        assert_eq!(scene.sleeps(), (again, Reason::Due));
        scene.now += again;
        scene.claims();
        scene.claimed(true, false, None);
        scene.ended(ALL_LEFT);
    }
    scene.woken(Reason::Plugins);
    scene.looked(true, None);
    scene.claims();
    scene.claimed(false, false, Some(ALMOST_DUE));
    assert_eq!(scene.next(), Action::Hold, "others may have locked the due rows");
}

#[test]
fn a_claim_tells_when_the_next_row_is_due() {
    let mut scene = Scene::with_due_rows();
    scene.claims();
    scene.claimed(true, false, Some(ms(7)));
    assert_eq!(scene.sleeps(), (ms(7), Reason::Due));
}

#[test]
fn it_backs_off_after_an_unconfirmed_delivery_only_if_the_broker_is_open() {
    for broker_open in [false, true] {
        let mut scene = Scene::quiet();
        scene.woken(Reason::Notification);
        scene.looked(true, None);
        scene.claims();
        scene.claimed(true, false, None);
        assert!(matches!(scene.core.next(scene.now, Environment { broker_open, ..OPEN }), Action::Sleep(..)));
        scene.ended(DeliveryEnd::Unsettled);
        scene.woken(Reason::Broker);
        assert_eq!(scene.next() == Action::Look, !broker_open);
    }
}

#[test]
fn it_looks_after_a_delivery_if_rows_stay_or_if_the_row_was_large() {
    let (large, small) =
        (Lane { range: ClaimRange::Oldest, large: true }, Lane { range: ClaimRange::Oldest, large: false });
    let left = |some_stay| DeliveryEnd::Settled { some_left: true, some_stay };
    for (lane, end, looks) in [(small, left(false), false), (small, left(true), true), (large, left(false), true)] {
        let mut scene = Scene::quiet();
        scene.woken(Reason::Notification);
        scene.looked(true, None);
        scene.claims();
        scene.claimed(true, false, None);
        scene.handle(Event::DeliveryEnded(lane, end));
        assert_eq!(scene.next() == Action::Look, looks, "{lane:?}");
    }
}

#[test]
fn rows_that_a_sweep_finds_due_are_claimed() {
    let mut scene = Scene::quiet();
    scene.now += SWEEP;
    assert_eq!(scene.next(), Action::Sweep);
    scene.handle(Event::Swept(Some((scene.now, look(scene.now, true, None)))));
    scene.claims();
}

#[test]
fn the_result_of_a_sweep_counts_unless_a_look_has_answered_since_it_began() {
    for looked in [false, true] {
        let mut scene = Scene::quiet();
        scene.now += SWEEP;
        assert_eq!(scene.next(), Action::Sweep);
        let asked_at = scene.now;
        if looked {
            scene.woken(Reason::Notification);
            scene.looked(false, Some(ms(700)));
        }
        scene.handle(Event::Swept(Some((asked_at, look(asked_at, false, Some(ms(300)))))));
        let expected = if looked { 700 } else { 300 };
        assert_eq!(scene.sleeps(), (ms(expected), Reason::Due));
    }
}
