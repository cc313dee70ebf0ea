//! The core's decisions one by one: given the events so far, which action is next.

mod at_random;
mod claims;
mod drain;
mod scene;
mod turns;

use super::*;
use crate::queue::{Below, Look, Outlook, Promise};
use scene::{OPEN, START, SWEEP, Scene, at, look, ms};

const ALL_LEFT: DeliveryEnd = DeliveryEnd::Settled { some_left: true, some_stay: false };

#[test]
fn with_an_empty_queue_it_sleeps_until_the_sweep_which_also_serves_as_the_look() {
    let mut scene = Scene::quiet();
    for _ in 0..10 {
        assert_eq!(scene.sleeps(), (SWEEP, Reason::Sweep));
        scene.now += SWEEP;
        assert_eq!(scene.next(), Action::Sweep);
        scene.woken(Reason::Sweep);
        assert_eq!(scene.sleeps(), (SWEEP, Reason::Sweep), "no look while the sweep runs");
        scene.swept(None);
    }
}

#[test]
fn a_slow_sweep_does_not_serve_as_a_look() {
    let mut scene = Scene::quiet();
    scene.now += SWEEP;
    assert_eq!(scene.next(), Action::Sweep);
    scene.now += ms(600);
    scene.swept(None);
    scene.now += SWEEP;
    assert_eq!(scene.next(), Action::Look);
    scene.now += Duration::from_mins(1);
    assert_eq!(scene.next(), Action::Sweep);
    assert_eq!(scene.next(), Action::Look, "the sweep may be slow again");
}

#[test]
fn a_sweep_does_not_postpone_the_look_for_rows_that_are_locked() {
    let mut scene = Scene::quiet();
    scene.now += ms(4_950);
    scene.woken(Reason::Notification);
    scene.looked(true, None);
    scene.claims_nothing();
    assert_eq!(scene.next(), Action::Hold);
    assert_eq!(scene.sleeps().0, ms(50));
    scene.now += ms(50);
    assert_eq!(scene.next(), Action::Sweep);
    assert_eq!(scene.sleeps(), (ms(50), Reason::Again), "while the sweep runs");
    scene.handle(Event::Swept(Some((scene.now, look(scene.now, true, None)))));
    assert_eq!(scene.sleeps(), (ms(50), Reason::Again), "when the sweep has ended");
}

#[test]
fn a_sleep_is_never_so_short_that_the_loop_would_spin() {
    let mut scene = Scene::quiet();
    scene.now += Duration::from_micros(4_999_990);
    assert_eq!(scene.sleeps(), (SHORTEST_SLEEP, Reason::Sweep));
}

#[test]
fn in_a_backlog_there_is_one_more_lane_for_the_newest_rows() {
    let mut scene = Scene::with_due_rows();
    let mut newest = Vec::new();
    while let Action::Claim(request) = scene.next() {
        newest.push(matches!(request.range, ClaimRange::Newest(_)));
        scene.handle(Event::Claimed(ClaimResult {
            range: request.range,
            asked_at: scene.now,
            at: at(scene.now),
            outlook: Outlook { due: true, next_in: None },
            behind: ms(100),
            batch: Some(Batch { xid: 1, large: false, rows: 1 }),
        }));
    }
    assert_eq!(newest, [false, true, false, false]);
}

#[test]
fn it_looks_after_a_while_even_if_all_lanes_stay_busy() {
    let mut scene = Scene::with_due_rows();
    for _ in 0..LANES {
        scene.claims();
        scene.claimed(true, true, None);
    }
    assert!(matches!(scene.next(), Action::Sleep(..)));
    scene.now += ms(100);
    assert_eq!(scene.next(), Action::Look);
    scene.looked(true, None);
    assert!(matches!(scene.next(), Action::Sleep(..)));
}

#[test]
fn a_row_is_claimed_when_it_is_due_without_a_look() {
    let mut scene = Scene::quiet();
    scene.woken(Reason::Notification);
    assert_eq!(scene.next(), Action::Look);
    scene.looked(false, Some(ms(1_200)));
    assert_eq!(scene.sleeps(), (ms(1_200), Reason::Due));
    scene.now += ms(1_200);
    scene.claims();
}

#[test]
fn a_row_that_became_due_during_the_look_is_claimed_at_once() {
    let mut scene = Scene::quiet();
    scene.woken(Reason::Notification);
    let asked_at = scene.now;
    scene.now += ms(25);
    scene.handle(Event::Looked(asked_at, look(asked_at, false, Some(ms(10)))));
    scene.claims();
}

#[test]
fn a_row_due_in_the_far_future_causes_no_look_before_the_sweep() {
    let mut scene = Scene::quiet();
    scene.woken(Reason::Notification);
    scene.looked(false, Some(Duration::MAX));
    assert_eq!(scene.sleeps().1, Reason::Sweep);
}

#[test]
fn due_rows_that_others_have_locked_are_looked_at_ever_less_often_until_something_happens() {
    let mut scene = Scene::quiet();
    scene.woken(Reason::Notification);
    let mut waits = Vec::new();
    for _ in 0..6 {
        assert_eq!(scene.next(), Action::Look);
        scene.looked(true, None);
        scene.claims();
        scene.claimed(false, false, None);
        if scene.next() == Action::Hold {
            scene.handle(Event::Held(false));
        }
        let (sleep, reason) = scene.sleeps();
        assert_eq!(reason, Reason::Again);
        waits.push(sleep.as_millis());
        scene.now += sleep;
    }
    assert_eq!(waits, [100, 200, 400, 800, 1_000, 1_000]);
    scene.woken(Reason::Notification);
    scene.looked(true, None);
    scene.claims_nothing();
    assert_eq!(scene.next(), Action::Hold);
    assert_eq!(scene.sleeps().0, ms(100), "the delays begin anew");
}

#[test]
fn rows_that_others_have_locked_do_not_hide_the_next_row() {
    let mut scene = Scene::quiet();
    scene.woken(Reason::Notification);
    scene.looked(true, Some(ms(7)));
    scene.claims_nothing();
    assert_eq!(scene.next(), Action::Hold);
    assert_eq!(scene.sleeps(), (ms(7), Reason::Due));
}

#[test]
fn a_notification_causes_a_claim_and_not_a_look_if_the_last_one_was_about_a_due_row() {
    let mut scene = Scene::with_due_rows();
    scene.claims();
    scene.claimed(true, false, None);
    scene.now += ms(60);
    scene.ended(ALL_LEFT);
    assert_eq!(scene.sleeps(), (ms(40), Reason::Again), "no look delays the next claim");
    scene.woken(Reason::Notification);
    scene.claims();
    scene.claimed(false, false, None);
    assert_eq!(scene.next(), Action::Look, "the notification was not about a due row");
    scene.looked(false, None);
    scene.woken(Reason::Notification);
    assert_eq!(scene.next(), Action::Look);
}

#[test]
fn in_a_backlog_it_claims_for_every_lane_and_again_whenever_a_delivery_ends() {
    let mut scene = Scene::with_due_rows();
    for _ in 0..LANES {
        scene.claims();
        scene.claimed(true, true, None);
    }
    assert!(matches!(scene.next(), Action::Sleep(..)));
    scene.ended(ALL_LEFT);
    scene.claims();
}

#[test]
fn nothing_is_claimed_while_the_broker_is_away_and_a_look_follows_its_return() {
    let mut scene = Scene::quiet();
    scene.woken(Reason::Notification);
    let away = Environment { broker_open: false, ..OPEN };
    assert!(matches!(scene.core.next(scene.now, away), Action::Sleep(..)));
    scene.woken(Reason::Broker);
    assert_eq!(scene.next(), Action::Look);
}

#[test]
fn no_row_is_held_before_all_kinds_are_known() {
    let mut scene = Scene::with_due_rows();
    scene.claims_nothing();
    let starting = Environment { knows_kinds: false, ..OPEN };
    assert!(matches!(scene.core.next(scene.now, starting), Action::Sleep(..)));
    scene.woken(Reason::Plugins);
    assert_eq!(scene.next(), Action::Hold);
}

#[test]
fn held_rows_of_a_served_kind_are_released_by_one_task_at_a_time() {
    let mut scene = Scene::quiet();
    let held = Look { held_for_us: vec!["k".into()], ..look(scene.now, false, None) };
    scene.handle(Event::Looked(scene.now, held.clone()));
    assert_eq!(scene.next(), Action::Release(vec!["k".into()]));
    scene.handle(Event::Looked(scene.now, held));
    assert!(matches!(scene.next(), Action::Sleep(..)));
    scene.handle(Event::Released);
    assert_eq!(scene.next(), Action::Look);
}

#[test]
fn after_failures_it_waits_ever_longer_whatever_happens_and_then_tries_with_one_lane() {
    let mut scene = Scene::quiet();
    for expected in [100, 200, 400, 800, 1_000, 1_000] {
        scene.woken(Reason::Notification);
        scene.handle(Event::Failed(Operation::LookOrClaim));
        scene.woken(Reason::Notification);
        let (sleep, reason) = scene.sleeps();
        assert_eq!((sleep, reason), (ms(expected), Reason::Again));
        scene.now += sleep;
    }
    // The duration of the last sweep was discarded.
    assert_eq!(scene.next(), Action::Sweep);
    assert_eq!(scene.next(), Action::Look);
    scene.looked(true, None);
    scene.claims();
    scene.claimed(true, true, None);
    assert!(matches!(scene.next(), Action::Sleep(..)));
    scene.ended(ALL_LEFT);
    for _ in 0..LANES {
        scene.claims();
        scene.claimed(true, true, None);
    }
}

#[test]
fn while_postgresql_refuses_to_finish_rows_it_tries_ever_less_often() {
    let mut scene = Scene::quiet();
    for expected in [100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 30_000] {
        scene.woken(Reason::Notification);
        scene.claims_or_looks();
        scene.claimed(true, true, None);
        scene.ended(DeliveryEnd::Refused { error: "disk full".to_owned(), back_off: true });
        assert_eq!(scene.core.refusal(), Some("disk full"));
        let (sleep, reason) = scene.sleeps();
        assert_eq!((sleep, reason), (ms(expected), Reason::Again));
        scene.now += sleep;
    }
    scene.claims_or_looks();
    scene.claimed(true, true, None);
    scene.ended(ALL_LEFT);
    assert_eq!(scene.core.refusal(), None);
}

#[test]
fn a_refusal_is_forgotten_if_a_look_or_a_sweep_finds_nothing_due_after_a_minute() {
    for look in [true, false] {
        let mut scene = Scene::quiet();
        scene.ended(DeliveryEnd::Refused { error: "disk full".to_owned(), back_off: false });
        for seconds in if look { [1, 59, 1] } else { [1, 58, 2] } {
            scene.now += Duration::from_secs(seconds);
            assert_eq!(scene.core.refusal(), Some("disk full"));
            // The refused rows may be due later, so a look was requested.
            scene.looked(false, None);
            if look {
                continue;
            }
            scene.now += ms(1);
            scene.swept(None);
        }
        assert_eq!(scene.core.refusal(), None);
    }
}

#[test]
fn a_doubt_about_the_connections_gives_up_the_mark_and_causes_a_sweep_within_a_second() {
    let mut scene = Scene::quiet();
    assert!(scene.core.mark().is_some() && scene.core.is_swept());
    let doubted = Environment { doubt: 1, ..OPEN };
    assert!(matches!(scene.core.next(scene.now, doubted), Action::Sleep(..)));
    assert!(scene.core.mark().is_none() && !scene.core.is_swept());
    scene.now += Duration::from_secs(1);
    assert_eq!(scene.core.next(scene.now, doubted), Action::Look);
    scene.looked(false, None);
    assert_eq!(scene.core.next(scene.now, doubted), Action::Sweep);
}

#[test]
fn while_triggers_are_silent_it_looks_every_few_milliseconds() {
    let mut scene = Scene::quiet();
    let promise = Promise { until: at(scene.now + ms(500)), next_xid: 100 };
    scene.handle(Event::Looked(scene.now, Look { promise, ..look(scene.now, false, None) }));
    assert_eq!(scene.sleeps(), (ms(5), Reason::Polling));
    scene.now += ms(5);
    assert_eq!(scene.next(), Action::Look);
}

#[test]
fn rows_that_a_delivery_did_not_settle_are_claimed_again() {
    let mut scene = Scene::with_due_rows();
    scene.now += ms(50);
    scene.claims();
    scene.claimed(true, false, None);
    scene.ended(DeliveryEnd::Unsettled);
    let (sleep, reason) = scene.sleeps();
    assert_eq!(reason, Reason::Again);
    scene.now += sleep;
    assert_eq!(scene.next(), Action::Look);
    scene.looked(true, None);
    scene.claims();
}

#[test]
fn rows_that_a_sweep_finds_below_the_mark_are_claimed() {
    let mut scene = Scene::quiet();
    scene.now += SWEEP;
    assert_eq!(scene.next(), Action::Sweep);
    let first = at(START) - Duration::from_hours(2);
    scene.swept(Some(Below { first, rows: 1, go_back: true }));
    let Action::Claim(request) = scene.next() else { panic!("it does not claim") };
    assert_eq!(request.since, Some(first));
}
