//! Decisions one by one: what the core does next, after what has happened.

mod at_random;
mod claims;
mod scene;

use super::*;
use crate::queue::{Below, Promise};
use scene::{OPEN, START, SWEEP, Scene, at, look, ms};

const ALL_LEFT: End = End::Settled { some_left: true, some_stay: false };

#[test]
fn an_empty_queue_waits_for_the_sweep_which_is_the_look_as_well() {
    let mut scene = Scene::quiet();
    for _ in 0..10 {
        assert_eq!(scene.sleeps(), (SWEEP, Reason::Sweep));
        scene.now += SWEEP;
        assert_eq!(scene.next(), Action::Sweep);
        scene.woken(Reason::Sweep);
        assert_eq!(scene.sleeps(), (SWEEP, Reason::Sweep), "no look meanwhile");
        scene.swept(None);
    }
}

#[test]
fn a_sweep_that_is_dear_is_no_look() {
    let mut scene = Scene::quiet();
    scene.now += SWEEP;
    assert_eq!(scene.next(), Action::Sweep);
    scene.now += ms(600);
    scene.swept(None);
    scene.now += SWEEP;
    assert_eq!(scene.next(), Action::Look);
    scene.now += Duration::from_mins(1);
    assert_eq!(scene.next(), Action::Sweep);
    assert_eq!(scene.next(), Action::Look, "it may take long again");
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
    assert_eq!(scene.sleeps(), (ms(50), Reason::Again), "while it is under way");
    scene.happens(Event::Swept(Some((scene.now, look(scene.now, true, None)))));
    assert_eq!(scene.sleeps(), (ms(50), Reason::Again), "when it has ended");
}

#[test]
fn a_sleep_is_never_so_short_that_the_loop_would_turn_as_fast_as_it_can() {
    let mut scene = Scene::quiet();
    scene.woken(Reason::Notification);
    scene.looked(false, Some(HEAD_START + Duration::from_micros(10)));
    assert_eq!(scene.sleeps(), (SHORTEST, Reason::Due));
}

#[test]
fn in_a_backlog_there_is_one_lane_more_for_the_newest() {
    let mut scene = Scene::with_due_rows();
    let mut claim_policy = Vec::new();
    while let Action::Claim(wanted) = scene.next() {
        claim_policy.push(wanted.turn != Turn::Oldest);
        scene.happens(Event::Claimed(Claimed {
            turn: wanted.turn,
            asked_at: scene.now,
            begin: Duration::ZERO,
            at: at(scene.now),
            outlook: Outlook { due: true, next_in: None },
            behind: ms(100),
            rows: Some(Batch { xid: 1, large: false }),
        }));
    }
    assert_eq!(claim_policy, [false, true, false, false]);
}

#[test]
fn while_all_lanes_are_busy_it_looks_every_now_and_then() {
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
fn a_row_is_claimed_at_its_moment_without_a_look_and_the_transaction_is_begun_before() {
    let mut scene = Scene::quiet();
    scene.woken(Reason::Notification);
    assert_eq!(scene.next(), Action::Look);
    scene.looked(false, Some(ms(1_200)));
    let due = scene.now + ms(1_200);
    let (sleep, why) = scene.sleeps();
    assert_eq!((sleep, why), (ms(1_200).saturating_sub(HEAD_START), Reason::Due));
    scene.now += sleep;
    assert_eq!(scene.claims(), due);
}

#[test]
fn a_row_that_became_due_while_the_look_was_on_its_way_is_claimed_at_once() {
    let mut scene = Scene::quiet();
    scene.woken(Reason::Notification);
    let asked_at = scene.now;
    scene.now += ms(25);
    scene.happens(Event::Looked(asked_at, look(asked_at, false, Some(ms(10)))));
    assert_eq!(scene.claims(), asked_at + ms(10));
}

#[test]
fn a_row_far_away_costs_nothing_before_the_sweep() {
    let mut scene = Scene::quiet();
    scene.woken(Reason::Notification);
    scene.looked(false, Some(Duration::MAX));
    assert_eq!(scene.sleeps().1, Reason::Sweep);
}

#[test]
fn due_rows_that_others_hold_are_asked_for_ever_less_often_until_something_happens() {
    let mut scene = Scene::quiet();
    scene.woken(Reason::Notification);
    let mut waits = Vec::new();
    for _ in 0..6 {
        assert_eq!(scene.next(), Action::Look);
        scene.looked(true, None);
        scene.claims();
        scene.claimed(false, false, None);
        if scene.next() == Action::Hold {
            scene.happens(Event::Held(false));
        }
        let (sleep, why) = scene.sleeps();
        assert_eq!(why, Reason::Again);
        waits.push(sleep.as_millis());
        scene.now += sleep;
    }
    assert_eq!(waits, [100, 200, 400, 800, 1_000, 1_000]);
    scene.woken(Reason::Notification);
    scene.looked(true, None);
    scene.claims_nothing();
    assert_eq!(scene.next(), Action::Hold);
    assert_eq!(scene.sleeps().0, ms(100), "it begins anew");
}

#[test]
fn rows_that_others_hold_do_not_hide_the_next_one() {
    let mut scene = Scene::quiet();
    scene.woken(Reason::Notification);
    scene.looked(true, Some(ms(7)));
    scene.claims_nothing();
    assert_eq!(scene.next(), Action::Hold);
    assert_eq!(scene.sleeps(), (ms(7).saturating_sub(HEAD_START), Reason::Due));
}

#[test]
fn the_head_start_is_what_transactions_take_to_begin_but_for_one_that_was_slow_by_chance() {
    let mut core = Core::new(SWEEP);
    let mut took = |begin| {
        core.began = [begin, core.began[0]];
        core.head_start()
    };
    let link = ms(30);
    took(link);
    assert_eq!(took(link), HEAD_START + link);
    assert_eq!(took(10 * link), HEAD_START + link);
    assert_eq!(took(link), HEAD_START + link);
    assert_eq!(took(Duration::ZERO), HEAD_START, "the link is near again");
    took(Duration::from_secs(20));
    assert_eq!(took(Duration::from_secs(20)), HEAD_START + timers::LONGEST_HEAD_START);
}

#[test]
fn where_notifications_were_about_due_rows_the_next_is_followed_by_a_claim_and_not_by_a_look() {
    let mut scene = Scene::with_due_rows();
    scene.claims();
    scene.claimed(true, false, None);
    scene.now += ms(60);
    scene.ended(ALL_LEFT);
    assert_eq!(scene.sleeps(), (ms(40), Reason::Again), "no look is in the way of the next");
    scene.woken(Reason::Notification);
    assert_eq!(scene.claims(), scene.now);
    scene.claimed(false, false, None);
    assert_eq!(scene.next(), Action::Look, "it was not about a due row");
    scene.looked(false, None);
    scene.woken(Reason::Notification);
    assert_eq!(scene.next(), Action::Look);
}

#[test]
fn while_there_is_more_it_claims_for_every_lane_and_again_at_the_end_of_each() {
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
fn while_the_broker_is_away_nothing_is_claimed_and_at_its_return_it_looks() {
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
fn held_rows_of_a_kind_that_is_served_are_released_once_at_a_time() {
    let mut scene = Scene::quiet();
    let held = Look { held_for_us: vec!["k".into()], ..look(scene.now, false, None) };
    scene.happens(Event::Looked(scene.now, held.clone()));
    assert_eq!(scene.next(), Action::Release(vec!["k".into()]));
    scene.happens(Event::Looked(scene.now, held));
    assert!(matches!(scene.next(), Action::Sleep(..)));
    scene.happens(Event::Released);
    assert_eq!(scene.next(), Action::Look);
}

#[test]
fn a_server_that_fails_is_left_alone_ever_longer_whatever_happens_and_then_tried_with_one_lane() {
    let mut scene = Scene::quiet();
    for expected in [100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000] {
        scene.woken(Reason::Notification);
        scene.happens(Event::Failed(Work::Asking));
        scene.woken(Reason::Notification);
        let (sleep, why) = scene.sleeps();
        assert_eq!((sleep, why), (ms(expected), Reason::Again));
        scene.now += sleep;
    }
    // What the last sweep took says nothing.
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
fn while_postgresql_refuses_to_finish_rows_one_is_tried_ever_less_often() {
    let mut scene = Scene::quiet();
    for expected in [100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 30_000] {
        scene.woken(Reason::Notification);
        scene.claims_or_looks();
        scene.claimed(true, true, None);
        scene.ended(End::Refused { why: "disk full".to_owned(), rest: true });
        assert_eq!(scene.core.refusal(), Some("disk full"));
        let (sleep, why) = scene.sleeps();
        assert_eq!((sleep, why), (ms(expected), Reason::Again));
        scene.now += sleep;
    }
    scene.claims_or_looks();
    scene.claimed(true, true, None);
    scene.ended(ALL_LEFT);
    assert_eq!(scene.core.refusal(), None);
}

#[test]
fn a_refusal_is_forgotten_when_nothing_was_due_for_a_minute_whether_a_look_says_so_or_a_sweep() {
    for look in [true, false] {
        let mut scene = Scene::quiet();
        scene.ended(End::Refused { why: "disk full".to_owned(), rest: false });
        for seconds in if look { [1, 59, 1] } else { [1, 58, 2] } {
            scene.now += Duration::from_secs(seconds);
            assert_eq!(scene.core.refusal(), Some("disk full"));
            // What was refused may be due later: a look is wanted.
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
fn after_a_doubt_about_the_connections_the_mark_is_given_up_and_a_sweep_is_due_within_a_second() {
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
fn while_triggers_are_silent_it_looks_again_within_milliseconds() {
    let mut scene = Scene::quiet();
    let promise = Promise { until: at(scene.now + ms(500)), next_xid: 100 };
    scene.happens(Event::Looked(scene.now, Look { promise, ..look(scene.now, false, None) }));
    assert_eq!(scene.sleeps(), (ms(5), Reason::Polling));
    scene.now += ms(5);
    assert_eq!(scene.next(), Action::Look);
}

#[test]
fn rows_that_a_delivery_let_go_of_before_the_look_that_follows_a_claim_are_claimed_again() {
    let mut scene = Scene::with_due_rows();
    scene.now += ms(50);
    scene.claims();
    scene.claimed(true, false, None);
    scene.ended(End::Unsettled);
    let (sleep, why) = scene.sleeps();
    assert_eq!(why, Reason::Again);
    scene.now += sleep;
    assert_eq!(scene.next(), Action::Look);
    scene.looked(true, None);
    scene.claims();
}

#[test]
fn what_a_sweep_finds_below_the_mark_is_claimed_from_there_on() {
    let mut scene = Scene::quiet();
    scene.now += SWEEP;
    assert_eq!(scene.next(), Action::Sweep);
    let first = at(START) - Duration::from_hours(2);
    scene.swept(Some(Below { first, rows: 1, go_back: true }));
    let Action::Claim(wanted) = scene.next() else { panic!("it does not claim") };
    assert_eq!(wanted.since, Some(first));
}
