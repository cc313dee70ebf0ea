//! Which rows the next claim takes. Those that have been due for longest, as a rule. While there are more than go out at once,
//! a spike of some kind for instance, every now and then those that have just become due, or they would wait until the spike
//! is over. No I/O.

use std::time::Duration;

use time::OffsetDateTime;

/// Rows of a claim: few, as long as that is enough. What is in flight when a daemon is killed comes twice.
const FEW: i64 = 200;
/// Rows of a claim after a full one: PostgreSQL and RabbitMQ do more in the same time.
const MANY: i64 = 500;
/// Rows that have been due for longer have a backlog before them.
const BEHIND: Duration = Duration::from_millis(50);
/// The rows of a spike are due within so much, and what is due later is not part of it.
const SPIKE: Duration = Duration::from_millis(1);
/// A backlog that is older is not one spike: of its rows only those of the last second are new.
const RECENT: Duration = Duration::from_secs(1);

/// Which rows to claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Turn {
    /// Those that have been due for longest.
    Oldest,
    /// Those that have become due since.
    Newest(OffsetDateTime),
}

/// What a lane is busy with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Load {
    /// Whose turn it was.
    pub turn: Turn,
    /// A single row that is larger than a claim of several may be.
    pub large: bool,
}

/// Rows that are due and were not claimed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Backlog {
    /// The last claim took all that nobody else had locked.
    #[default]
    None,
    /// It did not.
    More,
    /// They have been due for so long that the newest have claim_policy of their own: what became due before `since` has been claimed,
    /// or is part of the backlog. `next` = they have not had their turn since the last of the oldest.
    Long { since: OffsetDateTime, next: bool },
}

/// What the claims so far mean for the next one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct ClaimPolicy {
    under_way: Vec<Load>,
    backlog: Backlog,
}

impl ClaimPolicy {
    /// Which rows are next.
    pub(super) fn next(&self) -> Turn {
        match self.backlog {
            Backlog::Long { since, next: true } if !self.newest_under_way() => Turn::Newest(since),
            _ => Turn::Oldest,
        }
    }

    /// How many batches are on their way.
    pub(super) fn lanes(&self) -> usize {
        self.under_way.len()
    }

    /// The lane of the newest, of which there is one, is busy.
    pub(super) fn newest_under_way(&self) -> bool {
        self.under_way.iter().any(|load| load.turn != Turn::Oldest)
    }

    /// A large row is on its way: there is memory for one, and the other lanes are for those that are not.
    pub(super) fn large_under_way(&self) -> bool {
        self.under_way.iter().any(|load| load.large)
    }

    /// Rows are on their way.
    pub(super) fn under_way(&mut self, load: Load) {
        self.under_way.push(load);
    }

    /// They have arrived or not.
    pub(super) fn ended(&mut self, load: Load) {
        if let Some(place) = self.under_way.iter().position(|other| *other == load) {
            self.under_way.remove(place);
        }
    }

    /// At most so many rows.
    pub(super) fn limit(&self, turn: Turn) -> i64 {
        if turn == Turn::Oldest && self.more() { MANY } else { FEW }
    }

    /// More rows are due than were claimed.
    pub(super) fn more(&self) -> bool {
        self.backlog != Backlog::None
    }

    /// Takes note of a claim at `at`, by the database's clock. `behind` = there are more; the first has been due for so long.
    pub(super) fn claimed(&mut self, turn: Turn, at: OffsetDateTime, behind: Option<Duration>) {
        self.backlog = match (turn, behind, self.backlog) {
            // A row that was written before `at` may be committed a little later. What is left of the newest, if they were too
            // many, is part of the backlog from now on.
            (Turn::Newest(_), ..) => Backlog::Long { since: at - BEHIND, next: false },
            (Turn::Oldest, None, _) => Backlog::None,
            (Turn::Oldest, Some(_), Backlog::Long { since, .. }) => Backlog::Long { since, next: true },
            (Turn::Oldest, Some(behind), _) if behind > BEHIND => {
                Backlog::Long { since: at - behind.min(RECENT) + SPIKE, next: true }
            }
            (Turn::Oldest, Some(_), _) => Backlog::More,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: i64) -> OffsetDateTime {
        OffsetDateTime::UNIX_EPOCH + time::Duration::milliseconds(ms)
    }

    fn load(turn: Turn) -> Load {
        Load { turn, large: false }
    }

    fn came(claim_policy: &mut ClaimPolicy, turn: Turn, ms: i64, more: bool, behind_ms: u64) {
        claim_policy.claimed(turn, at(ms), more.then_some(Duration::from_millis(behind_ms)));
    }

    #[test]
    fn without_a_backlog_the_oldest_go_first_and_few_at_a_time() {
        let mut claim_policy = ClaimPolicy::default();
        for ms in 0..100 {
            assert_eq!(claim_policy.next(), Turn::Oldest);
            assert_eq!(claim_policy.limit(Turn::Oldest), FEW);
            came(&mut claim_policy, Turn::Oldest, ms, false, 3);
        }
    }

    #[test]
    fn a_full_claim_makes_the_next_one_larger_and_not_yet_a_backlog() {
        let mut claim_policy = ClaimPolicy::default();
        came(&mut claim_policy, Turn::Oldest, 1_000, true, 50);
        assert_eq!(
            (claim_policy.next(), claim_policy.limit(Turn::Oldest), claim_policy.more()),
            (Turn::Oldest, MANY, true)
        );
    }

    #[test]
    fn in_a_backlog_the_newest_take_turns_with_the_oldest_and_go_on_where_they_were() {
        let mut claim_policy = ClaimPolicy::default();
        came(&mut claim_policy, Turn::Oldest, 1_000, true, 70);
        claim_policy.under_way(load(Turn::Newest(at(0))));
        claim_policy.under_way(load(Turn::Oldest));
        assert_eq!(claim_policy.next(), Turn::Oldest, "their lane is busy");
        claim_policy.ended(load(Turn::Oldest));
        assert_eq!(claim_policy.next(), Turn::Oldest);
        claim_policy.ended(load(Turn::Newest(at(0))));
        let newest = claim_policy.next();
        assert_eq!((newest, claim_policy.limit(newest)), (Turn::Newest(at(931)), FEW), "after the spike's own instant");
        came(&mut claim_policy, newest, 1_010, false, 20);
        assert_eq!(claim_policy.next(), Turn::Oldest);
        came(&mut claim_policy, Turn::Oldest, 1_020, true, 90);
        assert_eq!(claim_policy.next(), Turn::Newest(at(960)));
        came(&mut claim_policy, Turn::Newest(at(960)), 1_030, true, 40);
        came(&mut claim_policy, Turn::Oldest, 1_040, true, 110);
        assert_eq!(claim_policy.next(), Turn::Newest(at(980)), "they were not all of them, and those are old by now");
        came(&mut claim_policy, Turn::Oldest, 1_050, false, 0);
        assert_eq!((claim_policy.next(), claim_policy.limit(Turn::Oldest)), (Turn::Oldest, FEW), "it is over");
    }

    #[test]
    fn of_a_backlog_that_is_hours_old_the_last_second_is_new() {
        let mut claim_policy = ClaimPolicy::default();
        came(&mut claim_policy, Turn::Oldest, 9_000_000, true, 7_200_000);
        assert_eq!(claim_policy.next(), Turn::Newest(at(8_999_001)));
    }

    #[test]
    fn one_large_row_is_on_its_way_at_a_time_until_its_own_lane_ends() {
        let large = Load { turn: Turn::Oldest, large: true };
        let mut claim_policy = ClaimPolicy::default();
        claim_policy.under_way(large);
        claim_policy.under_way(load(Turn::Oldest));
        claim_policy.ended(load(Turn::Oldest));
        assert!(claim_policy.large_under_way());
        claim_policy.ended(large);
        assert!(!claim_policy.large_under_way());
    }
}
