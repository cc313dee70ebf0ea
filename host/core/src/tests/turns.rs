//! When rows of limited kinds are claimed, and what they do not delay.

use super::super::*;
use super::ALL_LEFT;
use super::scene::{Scene, at, look, ms};
use crate::queue::{Look, Outlook};

const TURNS: Lane = Lane { range: ClaimRange::Turns, large: false };

/// Reports a look that saw no due row, and when a line has its next turn.
fn looked(scene: &mut Scene, turn_in: Option<Duration>) {
    let look = Look { turn_in, has_limits: true, ..look(scene.now, false, None) };
    scene.handle(Event::Looked(scene.now, look));
}

/// The core claims turns, and gets this.
fn claims_turns(scene: &mut Scene, rows: bool, next_in: Option<Duration>) {
    let action = scene.next();
    let is_turns = matches!(action, Action::Claim(ClaimRequest { range: ClaimRange::Turns, .. }));
    assert!(is_turns, "{action:?}");
    claimed(scene, ClaimRange::Turns, rows, false, next_in);
}

fn claimed(scene: &mut Scene, range: ClaimRange, rows: bool, more: bool, next_in: Option<Duration>) {
    scene.handle(Event::Claimed(ClaimResult {
        range,
        asked_at: scene.now,
        at: at(scene.now),
        outlook: Outlook { due: more, next_in },
        behind: Duration::ZERO,
        batch: rows.then_some(Batch { xid: 1, large: false, rows: 1 }),
    }));
}

#[test]
fn turns_are_claimed_when_a_line_has_its_turn_and_again_as_soon_as_they_are_delivered() {
    let mut scene = Scene::quiet();
    scene.woken(Reason::Notification);
    looked(&mut scene, Some(ms(30)));
    assert_eq!(scene.sleeps(), (ms(30), Reason::Turn));
    scene.now += ms(30);
    claims_turns(&mut scene, true, None);
    assert!(matches!(scene.next(), Action::Sleep(..)), "nobody knows what its lines allow next");
    scene.now += ms(4);
    scene.handle(Event::DeliveryEnded(TURNS, ALL_LEFT));
    claims_turns(&mut scene, false, Some(ms(16)));
    assert_eq!(scene.sleeps(), (ms(16), Reason::Turn));
    scene.now += ms(16);
    claims_turns(&mut scene, false, None);
    let (sleep, reason) = scene.sleeps();
    assert!(sleep > ms(50) && reason != Reason::Turn, "no row waits for its turn any more");
}

#[test]
fn turns_that_another_daemon_takes_are_tried_ever_less_often() {
    let mut scene = Scene::quiet();
    scene.woken(Reason::Notification);
    looked(&mut scene, Some(Duration::ZERO));
    for expected in [100, 200, 400, 800, 1_000, 1_000] {
        claims_turns(&mut scene, false, Some(Duration::ZERO));
        looked(&mut scene, Some(Duration::ZERO));
        assert_eq!(scene.sleeps(), (ms(expected), Reason::Turn));
        scene.now += ms(expected);
        if scene.next() == Action::Sweep {
            scene.handle(Event::Swept(None));
        }
        if scene.next() == Action::Look {
            looked(&mut scene, Some(Duration::ZERO));
        }
    }
}

#[test]
fn rows_that_are_due_are_claimed_while_turns_are_delivered() {
    let mut scene = Scene::quiet();
    scene.woken(Reason::Notification);
    let due = Look { turn_in: Some(Duration::ZERO), has_limits: true, ..look(scene.now, true, None) };
    scene.handle(Event::Looked(scene.now, due));
    claims_turns(&mut scene, true, None);
    let Action::Claim(request) = scene.next() else { panic!("it claims") };
    assert!(request.range == ClaimRange::Oldest && request.bounded, "{request:?}");
    claimed(&mut scene, request.range, true, true, None);
    for _ in 1..LANES {
        let Action::Claim(request) = scene.next() else { panic!("it claims") };
        assert_eq!(request.range, ClaimRange::ByKind, "more rows are due");
        claimed(&mut scene, request.range, true, true, None);
    }
    assert!(matches!(scene.next(), Action::Sleep(..)));
}

#[test]
fn while_rows_that_no_claim_may_take_stand_at_the_head_claims_go_by_kind() {
    let mut scene = Scene::quiet();
    scene.woken(Reason::Notification);
    let blocked = Look { first: Some(at(scene.now)), not_claimable_first: true, ..look(scene.now, true, None) };
    scene.handle(Event::Looked(scene.now, blocked));
    assert_eq!(scene.next(), Action::Hold);
    for _ in 0..2 {
        scene.woken(Reason::Notification);
        let action = scene.next();
        assert!(matches!(action, Action::Claim(ClaimRequest { range: ClaimRange::ByKind, .. })), "{action:?}");
        claimed(&mut scene, ClaimRange::ByKind, true, false, None);
        scene.handle(Event::DeliveryEnded(Lane { range: ClaimRange::ByKind, large: false }, ALL_LEFT));
    }

    scene.handle(Event::Held(true));
    assert_eq!(scene.next(), Action::Look);
    scene.looked(true, None);
    let action = scene.next();
    assert!(matches!(action, Action::Claim(ClaimRequest { range: ClaimRange::Oldest, .. })), "{action:?}");
}
