//! What is made of the instants of a recurrence, by random daemons that come and go.

use proptest::prelude::*;

use super::*;
use crate::recurrences::rule::Rule;
use crate::recurrences::zone::Zone;

fn seconds(seconds: i64) -> SignedDuration {
    SignedDuration::from_secs(seconds)
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).expect("an instant")
}

/// Each ten seconds from 0 on.
fn each_ten_seconds() -> Instants {
    Instants::new(Rule::parse("every 10 seconds").expect("a rule"), Zone::named("UTC").expect("a zone"), at(0), None)
}

fn state(catch_up: CatchUp) -> State {
    State {
        next_at: Some(at(10)),
        passed_at: at(0),
        ends_at: None,
        left: None,
        catch_up,
        within: None,
        offset: SignedDuration::ZERO,
    }
}

/// The instants that are made at a moment, in seconds, the next, and what follows.
fn plan(state: &State, now: i64, room: usize) -> (Vec<i64>, Option<i64>, Then) {
    let plan = state.plan(&each_ten_seconds(), at(now), room).expect("it comes");
    let second = |at: Timestamp| at.as_second() - 1_800_000_000;
    (plan.instants.into_iter().map(second).collect(), plan.next_at.map(second), plan.then)
}

#[test]
fn what_is_due_within_thirty_seconds_is_made_and_no_more() {
    assert_eq!(plan(&state(CatchUp::Latest), 5, 99), (vec![10, 20, 30], Some(40), Then::Continue));
    let spread = State { offset: seconds(7), ..state(CatchUp::Latest) };
    assert_eq!(plan(&spread, 5, 99), (vec![10, 20], Some(30), Then::Continue));
    assert_eq!(plan(&State { next_at: None, ..state(CatchUp::None) }, -25, 99), (vec![], Some(10), Then::Continue));
}

#[test]
fn of_what_was_missed_the_latest_all_or_none_is_made() {
    assert_eq!(plan(&state(CatchUp::Latest), 105, 99), (vec![100, 110, 120, 130], Some(140), Then::Continue));
    assert_eq!(plan(&state(CatchUp::None), 105, 99), (vec![110, 120, 130], Some(140), Then::Continue));
    let (all, next, _) = plan(&state(CatchUp::All), 105, 99);
    assert_eq!((all, next), ((1..=13).map(|tens| tens * 10).collect(), Some(140)));
    // What is due at this very moment was not missed.
    assert_eq!(plan(&state(CatchUp::None), 100, 99).0[0], 100);
}

#[test]
fn what_was_missed_for_too_long_is_not_made() {
    let within = |catch_up, time| State { within: Some(seconds(time)), ..state(catch_up) };
    assert_eq!(plan(&within(CatchUp::All, 25), 105, 99).0, [80, 90, 100, 110, 120, 130]);
    assert_eq!(plan(&within(CatchUp::Latest, 4), 105, 99).0, [110, 120, 130]);
    assert_eq!(plan(&within(CatchUp::Latest, 5), 105, 99).0, [100, 110, 120, 130]);
}

#[test]
fn a_batch_has_room_for_so_many_and_the_rest_follows() {
    assert_eq!(plan(&state(CatchUp::All), 105, 4), (vec![10, 20, 30, 40], Some(50), Then::Backlog));
}

#[test]
fn it_ends_after_its_last_occurrence_or_at_its_end() {
    let left = State { left: Some(2), ..state(CatchUp::All) };
    assert_eq!(plan(&left, 105, 99), (vec![10, 20], None, Then::Ended));
    let ends = |second| State { ends_at: Some(at(second)), ..state(CatchUp::Latest) };
    assert_eq!(plan(&ends(20), 5, 99), (vec![10, 20], None, Then::Ended));
    assert_eq!(plan(&ends(19), 5, 99), (vec![10], None, Then::Ended));
    // It ended while nobody was there: the latest before its end.
    assert_eq!(plan(&ends(35), 105, 99), (vec![30], None, Then::Ended));
}

proptest! {
    #[test]
    fn whatever_daemons_come_and_go_each_instant_is_made_once_and_in_time_or_was_missed(
        catch_up in proptest::sample::select(&[CatchUp::Latest, CatchUp::All, CatchUp::None][..]),
        within in proptest::option::of(1..200_i64),
        offset in 0..40_i64,
        left in proptest::option::of(0..60_u64),
        room in 1..20_usize,
        pauses in proptest::collection::vec(prop_oneof![9 => 0..25_i64, 1 => 0..500_i64], 1..60),
    ) {
        let mut state = State {
            left, within: within.map(seconds), offset: seconds(offset), ..state(catch_up)
        };
        let (mut now, mut made) = (0, Vec::new());
        let first_left = left;
        for pause in pauses {
            now += pause;
            let next = state.next_at.expect("it goes on");
            let planned = state.plan(&each_ten_seconds(), at(now), room).expect("it comes");
            let late = |instant: &Timestamp| at(now).duration_since(*instant + state.offset);
            for instant in &planned.instants {
                prop_assert!(*instant >= next, "nothing is made again");
                prop_assert!(late(instant) >= -AHEAD, "30 s before it is due at most");
                let missed = late(instant) > SignedDuration::ZERO;
                prop_assert!(!missed || catch_up != CatchUp::None);
                prop_assert!(!missed || within.is_none_or(|within| late(instant) <= seconds(within)));
            }
            let missed = planned.instants.iter().filter(|instant| late(instant) > SignedDuration::ZERO).count();
            prop_assert!(catch_up != CatchUp::Latest || missed <= 1);
            prop_assert!(planned.instants.len() <= room);
            made.extend(planned.instants.iter().map(|at| at.as_second()));
            state.left = state.left.map(|left| left - planned.instants.len() as u64);
            if planned.then == Then::Ended {
                prop_assert_eq!(state.left, Some(0));
                break;
            }
            let next = planned.next_at.expect("it goes on");
            // Nothing that is still to come was passed over.
            if planned.then == Then::Continue {
                let ahead = (next + state.offset).duration_since(at(now));
                prop_assert!(ahead > AHEAD);
                prop_assert!(Some(next) == state.next_at || ahead <= AHEAD + seconds(10));
            }
            (state.next_at, state.passed_at) = (Some(next), planned.passed_at);
        }
        prop_assert!(made.windows(2).all(|pair| pair[0] < pair[1]), "in their order, each once");
        if catch_up == CatchUp::All && within.is_none() {
            prop_assert!(made.windows(2).all(|pair| pair[1] - pair[0] == 10), "none is left out");
        }
        prop_assert!(first_left.is_none_or(|left| made.len() as u64 <= left));
    }
}
