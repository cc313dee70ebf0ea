//! Which rows the next claim takes, and which lanes are busy. No I/O.
//!
//! As a rule a claim takes the rows that have been due for longest. During a backlog, such as a spike of one kind, the kinds take
//! turns, and every now and then a claim takes only the rows that have just become due, or these would wait until the backlog is gone.
//!
//! A spike: 50,000 rows of one kind are due in the same millisecond, and rows of other kinds go on becoming due behind them.
//! Once full claims are 50 ms late, each of them is followed by a claim of the rows that became due after the spike, in a
//! fourth lane. The spike takes no longer by that, and the other rows do not wait for its end.

use std::time::Duration;

use time::OffsetDateTime;

use super::drain::LATE;

/// Rows of a claim as long as there is no backlog. Few, since the messages in flight are sent again if the daemon is killed.
const SMALL_CLAIM: i64 = 200;
/// Rows of a claim after a full one: PostgreSQL and RabbitMQ do more in the same time.
const LARGE_CLAIM: i64 = 500;
/// If the oldest row of a full claim has been due for longer than this, the newest rows get claims of their own.
const BEHIND: Duration = Duration::from_millis(50);
/// Rows that became due within this time of the oldest row belong to the same spike.
const SPIKE: Duration = Duration::from_millis(1);
/// A backlog that is older than this is more than one spike: of its rows, only those of this last time count as new.
const RECENT: Duration = LATE;

/// Which of the due rows a claim takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClaimRange {
    /// The rows that have been due for longest.
    Oldest,
    /// Equally many rows of each kind: of each the rows that have been due for longest, a step of priority counting like a minute.
    ByKind,
    /// Only rows that became due at this time or later.
    Newest(OffsetDateTime),
    /// Rows of limited kinds whose turn has come.
    Turns,
}

impl ClaimRange {
    /// The largest number of rows for a claim.
    pub(super) fn limit(self) -> i64 {
        match self {
            Self::ByKind | Self::Turns => LARGE_CLAIM,
            Self::Oldest | Self::Newest(_) => SMALL_CLAIM,
        }
    }
}

/// A busy lane, by the batch that it delivers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lane {
    /// What the claim asked for.
    pub range: ClaimRange,
    /// The batch is a single row that is larger than a claim of several rows may be.
    pub large: bool,
}

/// Due rows that were not claimed yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Backlog {
    /// The last claim took all due rows that were not locked by others.
    #[default]
    None,
    /// The last claim was full.
    More,
    /// Rows have been due for so long that the newest rows get claims of their own. Rows that became due before `since` were
    /// claimed, or belong to the backlog. `newest_next`: the newest rows have had no claim since the last claim of the
    /// oldest.
    Long { since: OffsetDateTime, newest_next: bool },
}

/// What the claims so far mean for the next one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct ClaimPolicy {
    busy_lanes: Vec<Lane>,
    backlog: Backlog,
    /// The first row of the queue is due, and no claim may take it. There may be a million such rows, which are moved out of the queue
    /// within a minute. Meanwhile the claims go by kind, which does not step over them.
    is_head_blocked: bool,
}

impl ClaimPolicy {
    /// Which rows the next claim takes. `pausing`: rows that are late may not be claimed yet.
    pub(super) fn next_range(&self, pausing: bool) -> ClaimRange {
        match self.backlog {
            Backlog::Long { since, .. } if pausing => ClaimRange::Newest(since),
            Backlog::Long { since, newest_next: true } if !self.is_newest_lane_busy() => ClaimRange::Newest(since),
            Backlog::None if !self.is_head_blocked => ClaimRange::Oldest,
            _ => ClaimRange::ByKind,
        }
    }

    /// Notes that by a look at `at` late rows wait, which are paced.
    pub(super) fn begin_backlog(&mut self, at: OffsetDateTime) {
        if let Backlog::None | Backlog::More = self.backlog {
            self.backlog = Backlog::Long { since: at - RECENT, newest_next: true };
        }
    }

    /// Notes whether the first row of the queue is due and may be taken by no claim.
    pub(super) fn note_head(&mut self, is_blocked: bool) {
        self.is_head_blocked = is_blocked;
    }

    /// How many lanes are busy.
    pub(super) fn busy_lanes(&self) -> usize {
        self.busy_lanes.len()
    }

    /// Whether the lane for the newest rows is busy. There is one such lane.
    pub(super) fn is_newest_lane_busy(&self) -> bool {
        self.busy_lanes.iter().any(|lane| matches!(lane.range, ClaimRange::Newest(_)))
    }

    /// Whether the lane for rows whose turn has come is busy. There is one such lane: while it is, nobody knows what its lines allow
    /// next.
    pub(super) fn is_turns_lane_busy(&self) -> bool {
        self.busy_lanes.iter().any(|lane| lane.range == ClaimRange::Turns)
    }

    /// Whether a large row is being delivered. There is memory for one, so the other lanes take only rows that are not large.
    pub(super) fn is_large_row_in_delivery(&self) -> bool {
        self.busy_lanes.iter().any(|lane| lane.large)
    }

    /// Notes that a lane is busy.
    pub(super) fn start_lane(&mut self, lane: Lane) {
        self.busy_lanes.push(lane);
    }

    /// Notes that a lane is free again.
    pub(super) fn end_lane(&mut self, lane: Lane) {
        if let Some(place) = self.busy_lanes.iter().position(|other| *other == lane) {
            self.busy_lanes.remove(place);
        }
    }

    /// Notes a claim at `at`, by the database's clock. `behind`: for how long the first row had been due; `None` = no more
    /// rows are due. `paced`: late rows wait, which are paced.
    pub(super) fn note_claim(&mut self, range: ClaimRange, at: OffsetDateTime, behind: Option<Duration>, paced: bool) {
        self.backlog = match (range, behind, self.backlog) {
            // A row that was written before `at` may be committed a little later, so `since` is earlier than `at`. If the
            // claim was full, the rest of the newest rows belongs to the backlog from now on.
            (ClaimRange::Turns, _, backlog) => backlog,
            (ClaimRange::Newest(_), ..) => {
                // A row that is on time may wait for its commit. If it were counted among those of a paced backlog, it would wait
                // for long.
                Backlog::Long { since: at - if paced { RECENT } else { BEHIND }, newest_next: false }
            }
            (ClaimRange::Oldest | ClaimRange::ByKind, None, _) => Backlog::None,
            (_, Some(_), Backlog::Long { since, .. }) => Backlog::Long { since, newest_next: true },
            (_, Some(behind), _) if behind > BEHIND => {
                Backlog::Long { since: at - behind.min(RECENT) + SPIKE, newest_next: true }
            }
            (_, Some(_), _) => Backlog::More,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: i64) -> OffsetDateTime {
        OffsetDateTime::UNIX_EPOCH + time::Duration::milliseconds(ms)
    }

    fn lane(range: ClaimRange) -> Lane {
        Lane { range, large: false }
    }

    fn claim(claim_policy: &mut ClaimPolicy, range: ClaimRange, ms: i64, full: bool, behind_ms: u64) {
        claim_policy.note_claim(range, at(ms), full.then_some(Duration::from_millis(behind_ms)), false);
    }

    #[test]
    fn without_a_backlog_claims_are_small_and_take_the_oldest_rows() {
        let mut claim_policy = ClaimPolicy::default();
        for ms in 0..100 {
            assert_eq!(claim_policy.next_range(false), ClaimRange::Oldest);
            assert_eq!(ClaimRange::Oldest.limit(), SMALL_CLAIM);
            claim(&mut claim_policy, ClaimRange::Oldest, ms, false, 3);
        }
    }

    #[test]
    fn after_a_full_claim_the_next_is_larger_and_the_kinds_take_turns() {
        let mut claim_policy = ClaimPolicy::default();
        claim(&mut claim_policy, ClaimRange::Oldest, 1_000, true, 50);
        assert_eq!(claim_policy.next_range(false), ClaimRange::ByKind);
        assert_eq!(ClaimRange::ByKind.limit(), LARGE_CLAIM);
        claim(&mut claim_policy, ClaimRange::ByKind, 1_010, false, 60);
        assert_eq!(claim_policy.next_range(false), ClaimRange::Oldest, "the backlog is gone");
    }

    #[test]
    fn while_no_claim_may_take_the_first_row_claims_go_by_kind_which_does_not_step_over_it() {
        let mut claim_policy = ClaimPolicy::default();
        claim_policy.note_head(true);
        for full in [false, true, false] {
            assert_eq!(claim_policy.next_range(false), ClaimRange::ByKind);
            claim(&mut claim_policy, ClaimRange::ByKind, 1_000, full, 3);
        }
        claim_policy.note_head(false);
        assert_eq!(claim_policy.next_range(false), ClaimRange::Oldest);
    }

    #[test]
    fn in_a_long_backlog_claims_of_the_newest_rows_alternate_with_claims_by_kind() {
        let mut claim_policy = ClaimPolicy::default();
        claim(&mut claim_policy, ClaimRange::Oldest, 1_000, true, 70);
        claim_policy.start_lane(lane(ClaimRange::Newest(at(0))));
        claim_policy.start_lane(lane(ClaimRange::ByKind));
        assert_eq!(claim_policy.next_range(false), ClaimRange::ByKind, "the lane of the newest rows is busy");
        claim_policy.end_lane(lane(ClaimRange::ByKind));
        assert_eq!(claim_policy.next_range(false), ClaimRange::ByKind);
        claim_policy.end_lane(lane(ClaimRange::Newest(at(0))));
        let newest = claim_policy.next_range(false);
        assert_eq!((newest, newest.limit()), (ClaimRange::Newest(at(931)), SMALL_CLAIM), "1 ms after the spike");
        claim(&mut claim_policy, newest, 1_010, false, 20);
        assert_eq!(claim_policy.next_range(false), ClaimRange::ByKind);
        claim(&mut claim_policy, ClaimRange::ByKind, 1_020, true, 90);
        assert_eq!(claim_policy.next_range(false), ClaimRange::Newest(at(960)));
        claim(&mut claim_policy, ClaimRange::Newest(at(960)), 1_030, true, 40);
        claim(&mut claim_policy, ClaimRange::ByKind, 1_040, true, 110);
        assert_eq!(
            claim_policy.next_range(false),
            ClaimRange::Newest(at(980)),
            "the last claim was full, and its remaining rows belong to the backlog now"
        );
        claim(&mut claim_policy, ClaimRange::ByKind, 1_050, false, 0);
        assert_eq!(claim_policy.next_range(false), ClaimRange::Oldest, "the backlog is gone");
    }

    #[test]
    fn in_a_backlog_that_is_hours_old_the_rows_of_the_last_second_are_new() {
        let mut claim_policy = ClaimPolicy::default();
        claim(&mut claim_policy, ClaimRange::Oldest, 9_000_000, true, 7_200_000);
        assert_eq!(claim_policy.next_range(false), ClaimRange::Newest(at(8_999_001)));
    }

    #[test]
    fn a_large_row_is_in_delivery_until_its_own_lane_ends() {
        let large = Lane { range: ClaimRange::Oldest, large: true };
        let mut claim_policy = ClaimPolicy::default();
        claim_policy.start_lane(large);
        claim_policy.start_lane(lane(ClaimRange::Oldest));
        claim_policy.end_lane(lane(ClaimRange::Oldest));
        assert!(claim_policy.is_large_row_in_delivery());
        claim_policy.end_lane(large);
        assert!(!claim_policy.is_large_row_in_delivery());
    }
}
