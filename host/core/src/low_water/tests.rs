//! That nothing waits below the mark, rule by rule.

use super::*;
use crate::queue::{Outlook, Promise};

fn at(ms: i64) -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH + Duration::milliseconds(ms)
}

/// A mark, and the moment: each step is a millisecond later.
#[derive(Default)]
struct Scene {
    state: LowWater,
    now: Moment,
}

impl Scene {
    fn later(&mut self) -> Moment {
        self.now += std::time::Duration::from_millis(1);
        self.now
    }

    /// What a look would say.
    fn asks(&mut self, ms: i64, oldest_xid: i64, first: Option<i64>) -> (Moment, Look) {
        let look = Look {
            at: at(ms),
            from: self.state.mark.unwrap_or(at(ms) - PATIENCE),
            first: first.map(at),
            oldest_xid,
            outlook: Outlook::default(),
            held_for_us: Vec::new(),
            paused_first: false,
            promise: Promise { until: at(0), next_xid: 0 },
            below: None,
        };
        (self.later(), look)
    }

    fn looks(&mut self, ms: i64, oldest_xid: i64, first: Option<i64>) {
        let (_, look) = self.asks(ms, oldest_xid, first);
        let now = self.later();
        self.state.looked(now, &look);
    }

    fn claims(&mut self, ms: i64, xid: i64) {
        let now = self.later();
        self.state.claimed(now, Sample { at: at(ms), xid });
    }

    fn sweeps(&mut self, ms: i64, back_to: Option<i64>) {
        let swept = self.asks(ms, 0, None);
        self.sweep_ends(swept, back_to);
    }

    fn sweep_ends(&mut self, (asked_at, look): (Moment, Look), back_to: Option<i64>) {
        let below = back_to.map(|ms| Below { first: at(ms), rows: 1, go_back: true });
        self.later();
        self.state.swept(asked_at, &Look { below, ..look });
    }
}

#[test]
fn the_mark_is_the_time_of_a_claim_before_whatever_may_still_appear() {
    let mut scene = Scene::default();
    scene.claims(1_000, 10);
    scene.claims(2_000, 20);

    scene.looks(3_000, 20, None);
    assert_eq!(scene.state.mark, Some(at(1_000)), "20 itself may still be running");
    scene.looks(4_000, 21, None);
    assert_eq!(scene.state.mark, Some(at(2_000)));
}

#[test]
fn a_claim_whose_own_number_may_still_be_running_proves_nothing() {
    let mut scene = Scene::default();
    scene.claims(100_000, 10);
    scene.looks(101_000, 10, None);
    assert_eq!(scene.state.mark, Some(at(41_000)));
}

#[test]
fn a_row_that_waits_is_never_below_the_mark() {
    let mut scene = Scene::default();
    scene.claims(5_000, 10);
    scene.looks(6_000, 11, Some(3_000));
    assert_eq!(scene.state.mark, Some(at(3_000)));
}

#[test]
fn an_open_transaction_holds_the_mark_back_for_a_minute() {
    let mut scene = Scene::default();
    for second in 0..200 {
        scene.claims(second * 1_000, 10 + second);
        scene.looks(second * 1_000 + 500, 12, None);
    }
    assert_eq!(scene.state.mark, Some(at(199_500 - 60_000)));
    assert!(scene.state.samples.len() < 70, "what is older than a minute is forgotten");
}

#[test]
fn a_sweep_lowers_the_mark_to_what_it_finds_and_a_look_does_not() {
    let mut scene = Scene::default();
    scene.claims(5_000, 10);
    scene.looks(6_000, 11, None);
    scene.looks(6_001, 11, Some(5_500));
    assert_eq!(scene.state.mark, Some(at(5_000)));
    scene.sweeps(6_002, None);
    assert_eq!(scene.state.mark, Some(at(5_000)));
    scene.sweeps(6_003, Some(100));
    assert_eq!(scene.state.mark, Some(at(100)));
}

#[test]
fn without_a_mark_looks_begin_a_minute_ago_until_a_sweep_has_found_what_is_older() {
    let mut scene = Scene::default();
    assert!(!scene.state.swept);
    scene.looks(1_000_000, 11, None);
    assert_eq!(scene.state.mark, Some(at(940_000)));
    scene.sweeps(1_000_001, Some(3));
    assert_eq!((scene.state.mark, scene.state.swept), (Some(at(3)), true));
}

#[test]
fn a_sweep_that_took_long_is_no_clock_that_was_set_back() {
    let mut scene = Scene::default();
    scene.looks(499_000, 10, None);
    let swept = scene.asks(500_000, 11, None);
    scene.claims(503_000, 12);
    scene.looks(504_000, 13, None);
    let mark = scene.state.mark;
    scene.sweep_ends(swept, None);
    assert_eq!((scene.state.mark, scene.state.swept), (mark, true));
}

#[test]
fn a_clock_that_was_set_back_ends_the_mark() {
    for claim in [false, true] {
        let mut scene = Scene::default();
        scene.claims(500_000, 10);
        scene.looks(500_001, 11, None);
        scene.sweeps(500_002, None);
        if claim {
            scene.claims(100_000, 12);
            assert_eq!((scene.state.mark, scene.state.swept, scene.state.samples.len()), (None, false, 1));
        } else {
            scene.looks(100_000, 12, None);
            assert_eq!((scene.state.mark, scene.state.swept), (Some(at(40_000)), false), "as if it were the first");
        }
    }
}

#[test]
fn a_clock_that_is_a_little_behind_does_not() {
    let mut scene = Scene::default();
    scene.claims(500_000, 10);
    scene.looks(500_001, 11, None);
    scene.sweeps(500_002, None);
    scene.looks(499_000, 12, None);
    assert_eq!((scene.state.mark, scene.state.swept), (Some(at(500_000)), true));
}

#[test]
fn a_sweep_that_began_before_the_mark_was_given_up_says_nothing_about_the_next() {
    let mut scene = Scene::default();
    scene.claims(500_000, 10);
    scene.looks(500_001, 11, None);
    let swept = scene.asks(500_002, 11, None);
    let now = scene.later();
    scene.state.give_up(now);
    assert_eq!((scene.state.mark, scene.state.samples.len()), (None, 0));
    scene.sweep_ends(swept, None);
    assert_eq!((scene.state.mark, scene.state.swept), (None, false));
}

#[test]
fn samples_are_apart_and_ascend() {
    let mut scene = Scene::default();
    for (ms, xid) in [(1_000, 10), (1_049, 11), (1_050, 12), (1_100, 12), (1_200, 11), (1_200, 13)] {
        scene.claims(ms, xid);
    }
    let kept: Vec<i64> = scene.state.samples.iter().map(|sample| sample.xid).collect();
    assert_eq!(kept, [10, 12, 13]);
}
