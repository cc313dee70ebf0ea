//! Rows that are late, and a rate for them.

use super::super::*;
use super::scene::{OPEN, START, SWEEP, Scene, at, look, ms};
use crate::queue::{Look, Outlook};

const RATE: u32 = 100;

/// A core with a rate that has looked, and seen that the first row has been due for an hour.
fn late() -> Scene {
    let mut scene = Scene { core: Core::new(SWEEP, Some(RATE)), now: START };
    assert_eq!(scene.next(), Action::Look);
    let first = Some(at(scene.now) - Duration::from_hours(1));
    let seen = Look { first, ..look(scene.now, true, None) };
    scene.handle(Event::Looked(scene.now, seen));
    scene.core.sweep_schedule.begin(scene.now);
    scene
}

fn request(scene: &mut Scene) -> ClaimRequest {
    match scene.next() {
        Action::Claim(request) => request,
        other => panic!("{other:?} {:?}", scene.core),
    }
}

fn claimed(scene: &mut Scene, range: ClaimRange, rows: u32, due: bool, behind: Duration) {
    scene.handle(Event::Claimed(ClaimResult {
        range,
        asked_at: scene.now,
        at: at(scene.now),
        outlook: Outlook { due, next_in: None },
        behind,
        batch: (rows > 0).then_some(Batch { xid: 1, large: false, rows }),
    }));
    if rows > 0 {
        let end = DeliveryEnd::Settled { some_left: true, some_stay: false };
        scene.handle(Event::DeliveryEnded(Lane { range, large: false }, end));
    }
}

/// Claims no row that is on time, until it claims rows that are late.
fn claim_late(scene: &mut Scene, rows: u32, due: bool) {
    loop {
        let range = request(scene).range;
        if let ClaimRange::Newest(_) = range {
            claimed(scene, range, 0, false, Duration::ZERO);
        } else {
            return claimed(scene, range, rows, due, Duration::from_hours(1));
        }
    }
}

#[test]
fn late_rows_are_claimed_at_their_rate_and_the_rows_of_the_last_second_in_between() {
    let mut scene = late();
    let begun = scene.now;
    let (mut late_rows, mut claims_of_newest) = (0, 0);
    while scene.now < begun + Duration::from_secs(10) {
        match scene.next() {
            Action::Claim(request) => match request.range {
                ClaimRange::Newest(since) => {
                    assert!(since >= at(scene.now) - ms(1_250), "rows that are on time");
                    claims_of_newest += 1;
                    claimed(&mut scene, request.range, 0, false, Duration::ZERO);
                }
                range => {
                    assert_eq!(request.limit, 10, "as many as in 100 ms");
                    late_rows += 10;
                    claimed(&mut scene, range, 10, true, Duration::from_mins(59));
                }
            },
            Action::Look => {
                let first = Some(at(scene.now) - Duration::from_mins(59));
                let seen = Look { first, ..look(scene.now, true, None) };
                scene.handle(Event::Looked(scene.now, seen));
            }
            Action::Sleep(until, _) => scene.now = until,
            Action::Sweep => scene.swept(None),
            other => panic!("{other:?}"),
        }
    }
    assert!((990..=1_020).contains(&late_rows), "{late_rows} rows in 10 s");
    assert!((100..1_000).contains(&claims_of_newest), "{claims_of_newest}");
}

#[test]
fn a_row_that_is_due_while_late_rows_wait_is_claimed_at_once() {
    let mut scene = late();
    // The second makes up for a delay before.
    claim_late(&mut scene, 10, true);
    claim_late(&mut scene, 10, true);
    for _ in 0..3 {
        while let Action::Claim(request) = scene.next() {
            assert!(matches!(request.range, ClaimRange::Newest(_)), "{request:?}");
            claimed(&mut scene, request.range, 0, false, Duration::ZERO);
        }
        scene.now += ms(5);
        scene.woken(Reason::Notification);
        while scene.next() == Action::Look {
            let seen = Look { first: Some(at(scene.now) - Duration::from_mins(59)), ..look(scene.now, true, None) };
            scene.handle(Event::Looked(scene.now, seen));
        }
        let request = request(&mut scene);
        assert!(matches!(request.range, ClaimRange::Newest(_)), "{request:?}");
        claimed(&mut scene, request.range, 1, false, Duration::ZERO);
    }
}

#[test]
fn without_late_rows_nothing_is_paced() {
    let mut scene = late();
    claim_late(&mut scene, 3, false);
    for _ in 0..5 {
        scene.woken(Reason::Notification);
        while scene.next() == Action::Look {
            scene.looked(true, None);
        }
        let request = request(&mut scene);
        assert_eq!((request.range, request.limit > 10), (ClaimRange::Oldest, true));
        claimed(&mut scene, request.range, 50, false, ms(3));
    }
}

#[test]
fn late_rows_that_others_have_locked_do_not_make_the_loop_spin() {
    let mut scene = late();
    let (begun, mut actions) = (scene.now, 0);
    while scene.now < begun + Duration::from_secs(5) {
        actions += 1;
        match scene.core.next(scene.now, OPEN) {
            Action::Claim(request) => claimed(&mut scene, request.range, 0, false, Duration::ZERO),
            Action::Look => {
                let seen = Look { first: Some(at(scene.now) - Duration::from_mins(59)), ..look(scene.now, true, None) };
                scene.handle(Event::Looked(scene.now, seen));
            }
            Action::Sleep(until, _) => scene.now = until,
            Action::Hold => scene.handle(Event::Held(false)),
            Action::Sweep => scene.swept(None),
            Action::Release(_) => panic!("nothing is held"),
        }
    }
    assert!(actions < 150, "{actions} actions in 5 s");
}
