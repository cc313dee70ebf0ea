//! The rules that keep the mark below every row that waits.

use super::*;
use crate::queue::{Outlook, Promise};

fn at(ms: i64) -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH + Duration::milliseconds(ms)
}

/// A mark, and the moment. Each step takes a millisecond.
#[derive(Default)]
struct Scene {
    low_water: LowWater,
    now: Moment,
}

impl Scene {
    fn later(&mut self) -> Moment {
        self.now += std::time::Duration::from_millis(1);
        self.now
    }

    /// The moment at which a look is asked for, and its answer.
    fn asks(&mut self, ms: i64, oldest_xid: i64, first: Option<i64>) -> (Moment, Look) {
        let look = Look {
            at: at(ms),
            from: self.low_water.mark.unwrap_or(at(ms) - MAX_AGE),
            first: first.map(at),
            oldest_xid,
            outlook: Outlook::default(),
            held_for_us: Vec::new(),
            not_claimable_first: false,
            turn_in: None,
            has_limits: false,
            promise: Promise { until: at(0), next_xid: 0 },
            below: None,
        };
        (self.later(), look)
    }

    fn looks(&mut self, ms: i64, oldest_xid: i64, first: Option<i64>) {
        let (_, look) = self.asks(ms, oldest_xid, first);
        let now = self.later();
        self.low_water.note_look(now, &look);
    }

    fn claims(&mut self, ms: i64, xid: i64) {
        let now = self.later();
        self.low_water.note_claim(now, Sample { at: at(ms), xid });
    }

    fn sweeps(&mut self, ms: i64, back_to: Option<i64>) {
        let swept = self.asks(ms, 0, None);
        self.sweep_ends(swept, back_to);
    }

    fn sweep_ends(&mut self, (asked_at, look): (Moment, Look), back_to: Option<i64>) {
        let below = back_to.map(|ms| Below { first: at(ms), rows: 1, go_back: true });
        self.later();
        self.low_water.note_sweep(asked_at, &Look { below, ..look });
    }
}

#[test]
fn the_mark_is_the_time_of_a_claim_whose_number_is_below_all_running_ones() {
    let mut scene = Scene::default();
    scene.claims(1_000, 10);
    scene.claims(2_000, 20);

    scene.looks(3_000, 20, None);
    assert_eq!(scene.low_water.mark, Some(at(1_000)), "transaction 20 may still be running");
    scene.looks(4_000, 21, None);
    assert_eq!(scene.low_water.mark, Some(at(2_000)));
}

#[test]
fn a_claim_proves_nothing_while_its_own_transaction_may_be_running() {
    let mut scene = Scene::default();
    scene.claims(100_000, 10);
    scene.looks(101_000, 10, None);
    assert_eq!(scene.low_water.mark, Some(at(41_000)));
}

#[test]
fn the_mark_is_never_above_the_first_row_that_waits() {
    let mut scene = Scene::default();
    scene.claims(5_000, 10);
    scene.looks(6_000, 11, Some(3_000));
    assert_eq!(scene.low_water.mark, Some(at(3_000)));
}

#[test]
fn an_open_transaction_holds_the_mark_back_for_a_minute() {
    let mut scene = Scene::default();
    for second in 0..200 {
        scene.claims(second * 1_000, 10 + second);
        scene.looks(second * 1_000 + 500, 12, None);
    }
    assert_eq!(scene.low_water.mark, Some(at(199_500 - 60_000)));
    assert!(scene.low_water.samples.len() < 70, "samples older than a minute are forgotten");
}

#[test]
fn a_sweep_lowers_the_mark_to_the_row_that_it_finds_and_a_look_does_not() {
    let mut scene = Scene::default();
    scene.claims(5_000, 10);
    scene.looks(6_000, 11, None);
    scene.looks(6_001, 11, Some(5_500));
    assert_eq!(scene.low_water.mark, Some(at(5_000)));
    scene.sweeps(6_002, None);
    assert_eq!(scene.low_water.mark, Some(at(5_000)));
    scene.sweeps(6_003, Some(100));
    assert_eq!(scene.low_water.mark, Some(at(100)));
}

#[test]
fn without_a_mark_looks_begin_a_minute_ago_until_a_sweep_finds_older_rows() {
    let mut scene = Scene::default();
    assert!(!scene.low_water.swept);
    scene.looks(1_000_000, 11, None);
    assert_eq!(scene.low_water.mark, Some(at(940_000)));
    scene.sweeps(1_000_001, Some(3));
    assert_eq!((scene.low_water.mark, scene.low_water.swept), (Some(at(3)), true));
}

#[test]
fn a_slow_sweep_is_not_taken_for_a_clock_that_was_set_back() {
    let mut scene = Scene::default();
    scene.looks(499_000, 10, None);
    let swept = scene.asks(500_000, 11, None);
    scene.claims(503_000, 12);
    scene.looks(504_000, 13, None);
    let mark = scene.low_water.mark;
    scene.sweep_ends(swept, None);
    assert_eq!((scene.low_water.mark, scene.low_water.swept), (mark, true));
}

#[test]
fn the_mark_is_given_up_if_the_clock_was_set_back() {
    for claim in [false, true] {
        let mut scene = Scene::default();
        scene.claims(500_000, 10);
        scene.looks(500_001, 11, None);
        scene.sweeps(500_002, None);
        if claim {
            scene.claims(100_000, 12);
            assert_eq!((scene.low_water.mark, scene.low_water.swept, scene.low_water.samples.len()), (None, false, 1));
        } else {
            scene.looks(100_000, 12, None);
            assert_eq!(
                (scene.low_water.mark, scene.low_water.swept),
                (Some(at(40_000)), false),
                "as after the first look"
            );
        }
    }
}

#[test]
fn the_mark_is_kept_if_the_clock_is_slightly_behind() {
    let mut scene = Scene::default();
    scene.claims(500_000, 10);
    scene.looks(500_001, 11, None);
    scene.sweeps(500_002, None);
    scene.looks(499_000, 12, None);
    assert_eq!((scene.low_water.mark, scene.low_water.swept), (Some(at(500_000)), true));
}

#[test]
fn a_sweep_that_began_before_the_mark_was_given_up_does_not_count() {
    let mut scene = Scene::default();
    scene.claims(500_000, 10);
    scene.looks(500_001, 11, None);
    let swept = scene.asks(500_002, 11, None);
    let now = scene.later();
    scene.low_water.give_up(now);
    assert_eq!((scene.low_water.mark, scene.low_water.samples.len()), (None, 0));
    scene.sweep_ends(swept, None);
    assert_eq!((scene.low_water.mark, scene.low_water.swept), (None, false));
}

#[test]
fn samples_keep_their_distance_and_their_numbers_ascend() {
    let mut scene = Scene::default();
    for (ms, xid) in [(1_000, 10), (1_049, 11), (1_050, 12), (1_100, 12), (1_200, 11), (1_200, 13)] {
        scene.claims(ms, xid);
    }
    let kept: Vec<i64> = scene.low_water.samples.iter().map(|sample| sample.xid).collect();
    assert_eq!(kept, [10, 12, 13]);
}
