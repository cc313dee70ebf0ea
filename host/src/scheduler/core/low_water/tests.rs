//! That nothing waits below the mark: rule by rule, and on a model of a server.

use proptest::prelude::*;

use super::*;
use crate::queue::{Outlook, Promise};

fn at(ms: i64) -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH + Duration::milliseconds(ms)
}

impl LowWater {
    /// Where a look would begin.
    fn from(&self, now: i64) -> OffsetDateTime {
        self.mark.unwrap_or(at(now) - PATIENCE)
    }

    /// What a look would say.
    fn asks(&self, ms: i64, oldest_xid: i64, first: Option<i64>) -> (Look, Known) {
        let look = Look {
            at: at(ms),
            from: self.from(ms),
            first: first.map(at),
            oldest_xid,
            outlook: Outlook::default(),
            held_for_us: Vec::new(),
            paused_first: false,
            promise: Promise { until: at(0), next_xid: 0 },
            below: None,
        };
        (look, self.known())
    }

    fn answered(&mut self, (look, known): &(Look, Known)) {
        self.seen(look, *known);
    }

    fn looks(&mut self, ms: i64, oldest_xid: i64, first: Option<i64>) {
        let seen = self.asks(ms, oldest_xid, first);
        self.answered(&seen);
    }

    /// A claim told this at once.
    fn claims(&mut self, ms: i64, xid: i64) {
        self.sample(Sample { at: at(ms), xid }, self.known());
    }

    /// A sweep that took no time.
    fn sweeps(&mut self, back_to: Option<i64>) {
        self.swept(back_to.map(at), self.known());
    }
}

#[test]
fn the_mark_is_the_time_of_a_claim_before_whatever_may_still_appear() {
    let mut state = LowWater::default();
    state.claims(1_000, 10);
    state.claims(2_000, 20);

    state.looks(3_000, 20, None);
    assert_eq!(state.mark, Some(at(1_000)), "20 itself may still be running");
    state.looks(4_000, 21, None);
    assert_eq!(state.mark, Some(at(2_000)));
}

#[test]
fn a_row_that_waits_is_never_below_the_mark() {
    let mut state = LowWater::default();
    state.claims(5_000, 10);
    state.looks(6_000, 11, Some(3_000));
    assert_eq!(state.mark, Some(at(3_000)));
}

#[test]
fn an_open_transaction_holds_the_mark_back_for_a_minute() {
    let mut state = LowWater::default();
    for second in 0..200 {
        state.claims(second * 1_000, 10 + second);
        state.looks(second * 1_000 + 500, 12, None);
    }
    assert_eq!(state.mark, Some(at(199_500 - 60_000)));
    assert!(state.samples.len() < 70, "what is older than a minute is forgotten");
}

#[test]
fn a_sweep_lowers_the_mark_to_what_it_finds_and_a_look_does_not() {
    let mut state = LowWater::default();
    state.claims(5_000, 10);
    state.looks(6_000, 11, None);
    state.looks(6_001, 11, Some(5_500));
    assert_eq!(state.mark, Some(at(5_000)));
    state.sweeps(None);
    assert_eq!(state.mark, Some(at(5_000)));
    state.sweeps(Some(100));
    assert_eq!(state.mark, Some(at(100)));
}

#[test]
fn a_look_that_began_before_the_mark_went_back_does_not_move_it_on() {
    let mut state = LowWater::default();
    state.looks(100_000, 11, None);
    let seen = state.asks(101_000, 11, None);
    state.sweeps(Some(100));
    state.answered(&seen);
    assert_eq!(state.mark, Some(at(100)));
    state.looks(102_000, 11, Some(100));
    assert_eq!(state.mark, Some(at(100)));
    state.looks(103_000, 11, None);
    assert_eq!(state.mark, Some(at(43_000)));
}

#[test]
fn without_a_mark_looks_begin_a_minute_ago_until_a_sweep_has_found_what_is_older() {
    let mut state = LowWater::default();
    assert!(!state.swept);
    state.looks(1_000_000, 11, None);
    assert_eq!(state.mark, Some(at(940_000)));
    state.sweeps(Some(3));
    assert_eq!((state.mark, state.swept), (Some(at(3)), true));
}

#[test]
fn a_sweep_that_took_long_is_no_clock_that_was_set_back() {
    let mut state = LowWater::default();
    let seen = state.asks(500_000, 11, None);
    state.claims(503_000, 12);
    state.looks(504_000, 13, None);
    let mark = state.mark;
    state.answered(&seen);
    assert_eq!(state.mark, mark);
}

#[test]
fn a_clock_that_was_set_back_ends_the_mark() {
    let mut state = LowWater::default();
    state.claims(500_000, 10);
    state.sweeps(None);
    state.looks(500_001, 11, None);
    state.looks(100_000, 12, None);
    assert_eq!((state.mark, state.swept), (None, false));
}

#[test]
fn a_claim_and_a_look_that_took_long_are_no_clock_that_was_set_back() {
    let mut state = LowWater::default();
    state.claims(499_000, 10);
    let (known, seen) = (state.known(), state.asks(500_000, 11, None));
    state.claims(503_000, 12);
    state.sweeps(None);
    state.sample(Sample { at: at(500_500), xid: 11 }, known);
    state.answered(&seen);
    assert_eq!((state.mark, state.swept), (Some(at(499_000)), true));
}

#[test]
fn what_began_before_the_mark_was_given_up_says_nothing_about_the_next() {
    let mut state = LowWater::default();
    state.claims(500_000, 10);
    state.looks(500_001, 11, None);
    let (known, seen) = (state.known(), state.asks(500_002, 11, None));
    state.looks(400_000, 11, None);
    assert_eq!(state.mark, None);
    state.answered(&seen);
    state.sample(Sample { at: at(500_003), xid: 12 }, known);
    state.swept(None, known);
    assert_eq!((state.mark, state.swept, state.samples.len()), (None, false, 0));
}

/// What may happen on a server, one after the other.
#[derive(Clone, Debug)]
enum Event {
    /// Time goes by, in ms.
    Pass(i64),
    /// A writer of these, few and long, writes a row, due so many ms from now; its first takes its number.
    Write(usize, i64),
    Commit(usize),
    RollBack(usize),
    /// A transaction that has nothing to do with us takes a number, and is over at once.
    Other,
    /// A claim of up to so many rows; its number is taken so many ms after its clock was read.
    Claim(usize, i64),
    Settle,
    GiveUp,
    /// A look is told a time that is long ago, by a clock that was set right at once: the mark is given up.
    Flap,
    /// A look or a sweep begins; of each there is one at a time.
    Ask {
        sweep: bool,
    },
    /// It ends.
    Answer {
        sweep: bool,
    },
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0..120_i64).prop_map(Event::Pass),
        4 => (0..3_usize, -5_000..3_000_i64).prop_map(|(writer, due)| Event::Write(writer, due)),
        1 => (0..3_usize).prop_map(Event::Commit),
        1 => (0..3_usize).prop_map(Event::RollBack),
        1 => Just(Event::Other),
        2 => (1..4_usize, 0..80_i64).prop_map(|(rows, ms)| Event::Claim(rows, ms)),
        2 => Just(Event::Settle),
        1 => Just(Event::GiveUp),
        1 => Just(Event::Flap),
        4 => Just(Event::Ask { sweep: false }),
        4 => Just(Event::Answer { sweep: false }),
        1 => Just(Event::Ask { sweep: true }),
        1 => Just(Event::Answer { sweep: true }),
    ]
}

/// A look that has not ended: what it saw, what was known, and what was below the mark.
type Asked = ((Look, Known), Option<i64>);

/// A server, as far as it matters here.
#[derive(Default)]
struct Model {
    now: i64,
    last_xid: i64,
    /// Open writers: the number, and the slots of the rows that nobody sees yet.
    writers: [Option<(i64, Vec<i64>)>; 3],
    /// Slots of rows that everybody sees.
    visible: Vec<i64>,
    /// The number of the open claim, and what it has locked.
    claim: Option<(i64, Vec<i64>)>,
    /// What a look that has not ended saw, and a sweep; and what was below the mark.
    asked: [Option<Asked>; 2],
}

impl Model {
    fn number(&mut self) -> i64 {
        self.last_xid += 1;
        self.last_xid
    }

    fn happen(&mut self, event: &Event, state: &mut LowWater) {
        match *event {
            Event::Pass(ms) => self.now += ms,
            Event::Write(writer, due) => {
                let xid = match &self.writers[writer] {
                    Some((xid, _)) => *xid,
                    None => self.number(),
                };
                let slot = self.now.max(self.now + due);
                self.writers[writer].get_or_insert((xid, Vec::new())).1.push(slot);
            }
            Event::Commit(writer) => {
                self.visible.extend(self.writers[writer].take().into_iter().flat_map(|open| open.1));
            }
            Event::RollBack(writer) => self.writers[writer] = None,
            Event::Other => drop(self.number()),
            Event::Claim(rows, ms) if self.claim.is_none() => {
                let (read, from) = (self.now, state.from(self.now));
                self.now += ms;
                let xid = self.number();
                self.visible.sort_unstable();
                let due = self.visible.iter().copied().filter(|slot| *slot <= read && at(*slot) >= from);
                let locked: Vec<i64> = due.take(rows).collect();
                if !locked.is_empty() {
                    state.claims(read, xid);
                    self.claim = Some((xid, locked));
                }
            }
            Event::Claim(..) => {}
            Event::Settle => {
                for slot in self.claim.take().into_iter().flat_map(|claim| claim.1) {
                    let at =
                        self.visible.iter().position(|visible| *visible == slot).expect("only the claim removes it");
                    self.visible.swap_remove(at);
                }
            }
            Event::GiveUp => self.claim = None,
            Event::Flap => {
                self.now -= 5_000;
                self.happen(&Event::Ask { sweep: false }, state);
                self.happen(&Event::Answer { sweep: false }, state);
                self.now += 5_000;
            }
            Event::Ask { sweep } => {
                if sweep && state.mark.is_none() {
                    // It looks first.
                    self.happen(&Event::Ask { sweep: false }, state);
                    self.happen(&Event::Answer { sweep: false }, state);
                }
                let running = self.writers.iter().flatten().map(|open| open.0);
                let running = running.chain(self.claim.iter().map(|open| open.0));
                let oldest_xid = running.min().unwrap_or(self.last_xid + 1);
                let from = state.from(self.now);
                let (above, below): (Vec<i64>, Vec<i64>) = self.visible.iter().partition(|slot| at(**slot) >= from);
                let seen = state.asks(self.now, oldest_xid, above.into_iter().min());
                self.asked[usize::from(sweep)].get_or_insert((seen, below.into_iter().min()));
            }
            Event::Answer { sweep } => {
                if let Some((seen, below)) = self.asked[usize::from(sweep)].take() {
                    state.answered(&seen);
                    if sweep {
                        state.swept(below.map(at), seen.1);
                    }
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// For less than a minute, which is as long as it is proved. What was due long before we came is below the mark until
    /// the first sweep has ended.
    #[test]
    fn nothing_that_waits_or_will_appear_is_below_the_mark(
        before in prop::collection::vec(-900_000..0_i64, 0..3),
        events in prop::collection::vec(event(), 1..300),
    ) {
        let began = 1_000_000;
        let (mut model, mut state) = (Model { now: began, ..Model::default() }, LowWater::default());
        model.visible.extend(before.iter().map(|ms| began + ms));
        for event in &events {
            model.happen(event, &mut state);
            let from = state.from(model.now);
            let unseen = model.writers.iter().flatten().flat_map(|writer| &writer.1);
            for slot in model.visible.iter().chain(unseen) {
                let is_found = at(*slot) >= from || !state.swept && *slot < began;
                prop_assert!(is_found, "{slot} is below {from}, which is {:?}", state.mark);
            }
        }
    }
}
