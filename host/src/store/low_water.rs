//! The low-water mark: a time below which no slot waits, so that looks and claims begin there.
//!
//! What is delivered leaves its entry at the low end of the index, and there it stays until no transaction of the whole
//! server is so old that it might still see it. While one such is open, a dump or a forgotten session, each look from the
//! very beginning would step over everything that was delivered meanwhile.
//!
//! The mark is proved, not guessed. Each claim samples the clock and then, after that, takes a transaction number. Whatever
//! a look cannot see yet has a number that is not below the oldest one that is running; if that is higher than the number
//! of a sample, it was taken after the sample's clock was read. And a row's slot is read from the clock after its
//! transaction took its number ([`tidings.arrival()`](../../../migrations/0002_schedules.sql)), so it is not below the
//! sample's time. What the look can see is not below the first slot that it found.
//!
//! A transaction that has written and stays open holds the mark back; after a minute it goes on without the proof. So does
//! what nobody can prove: rows that were written with the triggers off, a clock that was set back. A row that is missed
//! for such a reason is found by the next sweep, which begins at the very beginning.

use std::collections::VecDeque;
use std::sync::Mutex;

use time::{Duration, OffsetDateTime};

/// The longest time for which an open transaction holds the mark back.
const PATIENCE: Duration = Duration::MINUTE;
/// Samples are at least this far apart: there are many claims in a second.
const APART: Duration = Duration::milliseconds(50);
/// If a clock runs back by more than this, it was set.
const SET_BACK: Duration = Duration::SECOND;

/// The mark, shared by all that look and claim.
#[derive(Debug, Default)]
pub(super) struct LowWater(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Nothing waits below; `None` = who knows.
    mark: Option<OffsetDateTime>,
    /// Oldest first, all of them newer than what the mark stands on; a minute's worth at most.
    samples: VecDeque<Sample>,
    /// Which doubt about the connections was the last when this began.
    doubt: u64,
}

/// What a claim tells.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    /// The database's time, read before the number was taken.
    pub(super) at: OffsetDateTime,
    /// The number of the claim's transaction.
    pub(super) xid: i64,
}

/// What a look tells.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    /// The database's time, before the look.
    pub(super) at: OffsetDateTime,
    /// The lowest number of a transaction that was running.
    pub(super) oldest_xid: i64,
    /// The first slot, from the mark on, or from the beginning if it was a sweep.
    pub(super) first: Option<OffsetDateTime>,
}

impl LowWater {
    /// Where to begin. `doubt` counts the doubts about the connections: after a new one the server may be another.
    pub(super) fn mark(&self, doubt: u64) -> Option<OffsetDateTime> {
        self.state(doubt).mark
    }

    pub(super) fn sample(&self, sample: Sample, doubt: u64) {
        self.state(doubt).sample(sample);
    }

    /// After a look. `sweep` = it began at the very beginning.
    pub(super) fn seen(&self, seen: Seen, sweep: bool, doubt: u64) {
        self.state(doubt).seen(seen, sweep);
    }

    fn state(&self, doubt: u64) -> std::sync::MutexGuard<'_, State> {
        let mut state = self.0.lock().expect("nothing panics that holds it");
        if state.doubt != doubt {
            *state = State { doubt, ..State::default() };
        }
        state
    }
}

impl State {
    fn sample(&mut self, sample: Sample) {
        if let Some(last) = self.samples.back() {
            if sample.at < last.at - SET_BACK {
                return self.forget();
            }
            // Lanes claim side by side; one of them is enough.
            if sample.at < last.at + APART || sample.xid <= last.xid {
                return;
            }
        }
        self.samples.push_back(sample);
    }

    fn seen(&mut self, seen: Seen, sweep: bool) {
        let newest = self.samples.back().map(|sample| sample.at).max(self.mark.filter(|_| !sweep));
        if newest.is_some_and(|newest| seen.at < newest - SET_BACK) {
            return self.forget();
        }
        // The newest that counts, and nothing older, may be asked for again.
        while self.samples.get(1).is_some_and(|next| next.xid < seen.oldest_xid) {
            self.samples.pop_front();
        }
        let long_ago = seen.at - PATIENCE;
        while self.samples.get(1).is_some_and(|next| next.at < long_ago) {
            self.samples.pop_front();
        }
        let proved = self.samples.front().filter(|sample| sample.xid < seen.oldest_xid).map(|sample| sample.at);
        let below = proved.map_or(long_ago, |at| at.max(long_ago));
        let found = seen.first.map_or(below, |first| first.min(below));
        // Only a sweep has seen what lies below the mark.
        self.mark = if sweep { Some(found) } else { self.mark.max(Some(found)) };
    }

    fn forget(&mut self) {
        self.mark = None;
        self.samples.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(ms: i64) -> OffsetDateTime {
        OffsetDateTime::UNIX_EPOCH + Duration::milliseconds(ms)
    }

    fn sample(ms: i64, xid: i64) -> Sample {
        Sample { at: at(ms), xid }
    }

    fn seen(ms: i64, oldest_xid: i64, first: Option<i64>) -> Seen {
        Seen { at: at(ms), oldest_xid, first: first.map(at) }
    }

    #[test]
    fn the_mark_is_the_time_of_a_claim_before_whatever_may_still_appear() {
        let mut state = State::default();
        state.sample(sample(1_000, 10));
        state.sample(sample(2_000, 20));

        state.seen(seen(3_000, 20, None), false);
        assert_eq!(state.mark, Some(at(1_000)), "20 itself may still be running");
        state.seen(seen(4_000, 21, None), false);
        assert_eq!(state.mark, Some(at(2_000)));
    }

    #[test]
    fn a_row_that_waits_is_never_below_the_mark() {
        let mut state = State::default();
        state.sample(sample(5_000, 10));
        state.seen(seen(6_000, 11, Some(3_000)), false);
        assert_eq!(state.mark, Some(at(3_000)));
    }

    #[test]
    fn an_open_transaction_holds_the_mark_back_for_a_minute() {
        let mut state = State::default();
        for second in 0..200 {
            state.sample(sample(second * 1_000, 10 + second));
            state.seen(seen(second * 1_000 + 500, 12, None), false);
        }
        assert_eq!(state.mark, Some(at(199_500 - 60_000)));
        assert!(state.samples.len() < 70, "what is older than a minute is forgotten");
    }

    #[test]
    fn a_sweep_lowers_the_mark_to_what_it_finds_and_a_look_does_not() {
        let mut state = State::default();
        state.sample(sample(5_000, 10));
        state.seen(seen(6_000, 11, None), false);
        state.seen(seen(6_001, 11, Some(5_500)), false);
        assert_eq!(state.mark, Some(at(5_000)));
        state.seen(seen(6_002, 11, Some(100)), true);
        assert_eq!(state.mark, Some(at(100)));
    }

    #[test]
    fn a_clock_that_was_set_back_and_a_doubt_end_the_mark() {
        let mut state = State::default();
        state.sample(sample(500_000, 10));
        state.seen(seen(500_001, 11, None), false);
        state.seen(seen(100_000, 12, None), false);
        assert_eq!(state.mark, None);

        let shared = LowWater::default();
        shared.sample(sample(500_000, 10), 0);
        shared.seen(seen(500_001, 11, None), false, 0);
        assert_eq!(shared.mark(0), Some(at(500_000)));
        assert_eq!(shared.mark(1), None);
        assert_eq!(shared.mark(1), None);
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
        Look,
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
            4 => Just(Event::Look),
        ]
    }

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
    }

    impl Model {
        fn number(&mut self) -> i64 {
            self.last_xid += 1;
            self.last_xid
        }

        fn happen(&mut self, event: &Event, state: &mut State) {
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
                    let read = self.now;
                    self.now += ms;
                    let xid = self.number();
                    let mark = state.mark;
                    self.visible.sort_unstable();
                    let due = self
                        .visible
                        .iter()
                        .copied()
                        .filter(|slot| *slot <= read && mark.is_none_or(|mark| at(*slot) >= mark));
                    let locked: Vec<i64> = due.take(rows).collect();
                    if !locked.is_empty() {
                        state.sample(sample(read, xid));
                        self.claim = Some((xid, locked));
                    }
                }
                Event::Claim(..) => {}
                Event::Settle => {
                    for slot in self.claim.take().into_iter().flat_map(|claim| claim.1) {
                        let at = self
                            .visible
                            .iter()
                            .position(|visible| *visible == slot)
                            .expect("only the claim removes it");
                        self.visible.swap_remove(at);
                    }
                }
                Event::GiveUp => self.claim = None,
                Event::Look => {
                    let running = self.writers.iter().flatten().chain(&self.claim).map(|open| open.0);
                    let oldest_xid = running.min().unwrap_or(self.last_xid + 1);
                    let mark = state.mark;
                    let first =
                        self.visible.iter().copied().filter(|slot| mark.is_none_or(|mark| at(*slot) >= mark)).min();
                    state.seen(seen(self.now, oldest_xid, first), false);
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// For less than a minute, which is as long as it is proved.
        #[test]
        fn nothing_that_waits_or_will_appear_is_below_the_mark(events in prop::collection::vec(event(), 1..300)) {
            let (mut model, mut state) = (Model { now: 1_000_000, ..Model::default() }, State::default());
            for event in &events {
                model.happen(event, &mut state);
                let unseen = model.writers.iter().flatten().flat_map(|writer| &writer.1);
                for slot in model.visible.iter().chain(unseen) {
                    prop_assert!(state.mark.is_none_or(|mark| at(*slot) >= mark), "{slot} is below {:?}", state.mark);
                }
            }
        }
    }
}
