//! Decides whether this daemon may deliver: not if its database is a copy and other daemons serve the origin.
//!
//! Must never do I/O or read a clock. The current moment is an argument.

use std::collections::BTreeMap;
use std::time::Duration;

use uuid::Uuid;

use crate::model::installation::{Identity, Server};

/// A moment, as the time since the daemon began.
pub(super) type Moment = Duration;

/// How long the other daemons have to answer, when it is not clear that the database is where it was.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
/// A daemon announces itself this often. One that was not heard for three times as long is gone.
pub(super) const INTERVAL: Duration = Duration::from_mins(1);
const GONE_AFTER: Duration = INTERVAL.saturating_mul(3);

/// What another daemon works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Relation {
    /// Our database.
    Ours,
    /// A database with our installation's id that is not ours: one of the two is a copy.
    Copy,
    /// Another installation.
    Stranger,
}

/// Whether this daemon delivers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It is not known yet: wait for answers until this moment, or until the others were asked.
    Unknown(Option<Moment>),
    /// It does.
    Delivers,
    /// It does not, since its database is a copy: this is where daemons serve the origin.
    IsCopy(Server),
}

/// What is known of the daemons of the exchange.
#[derive(Clone, Debug)]
pub(super) struct Fleet {
    /// This daemon has delivered, or may begin at once. It goes on when its database moves.
    trusted: bool,
    /// When the others were asked who they are; `None` = not yet.
    asked_at: Option<Moment>,
    others: BTreeMap<Uuid, Other>,
}

#[derive(Clone, Debug)]
struct Other {
    relation: Relation,
    server: Server,
    heard_at: Moment,
}

impl Fleet {
    /// `adopt`: a person said that this database is the one to deliver from.
    pub(super) fn new(identity: &Identity, adopt: bool) -> Self {
        let is_home = identity.recorded.is_empty() || identity.recorded.contains(&identity.here);
        Self { trusted: is_home || adopt, asked_at: None, others: BTreeMap::new() }
    }

    /// The others were asked who they are, or cannot be asked.
    pub(super) fn note_asked(&mut self, now: Moment) {
        self.asked_at.get_or_insert(now);
    }

    /// Another daemon was heard.
    pub(super) fn note_heard(&mut self, now: Moment, daemon: Uuid, relation: Relation, server: Server) {
        self.others.insert(daemon, Other { relation, server, heard_at: now });
    }

    /// Whether this daemon delivers now. Once it does, it always will.
    pub(super) fn decide(&mut self, now: Moment) -> Standing {
        self.others.retain(|_, other| other.heard_at + GONE_AFTER > now);
        if self.trusted {
            return Standing::Delivers;
        }
        if let Some(server) = self.server_of(Relation::Copy) {
            return Standing::IsCopy(server.clone());
        }
        match self.asked_at.map(|asked_at| asked_at + PATIENCE) {
            Some(until) if until <= now => {
                self.trusted = true;
                Standing::Delivers
            }
            until => Standing::Unknown(until),
        }
    }

    /// Where a daemon that was heard lately has its database.
    pub(super) fn server_of(&self, relation: Relation) -> Option<&Server> {
        self.others.values().find(|other| other.relation == relation).map(|other| &other.server)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn server(database: &str) -> Server {
        Server { system: Some("7".into()), timeline: Some(1), database: database.into(), address: None }
    }

    fn fleet(recorded: Option<&str>, adopt: bool) -> Fleet {
        let recorded = recorded.map(server).into_iter().collect();
        let identity = Identity { installation: Uuid::nil(), recorded, here: server("here") };
        Fleet::new(&identity, adopt)
    }

    #[test]
    fn a_daemon_whose_database_is_where_it_was_delivers_at_once_whoever_is_heard() {
        for mut fleet in [fleet(None, false), fleet(Some("here"), false), fleet(Some("there"), true)] {
            fleet.note_heard(Duration::ZERO, Uuid::max(), Relation::Copy, server("there"));
            assert_eq!(fleet.decide(Duration::ZERO), Standing::Delivers);
        }
    }

    #[test]
    fn a_daemon_whose_database_has_moved_delivers_when_nobody_answers_within_a_second() {
        let mut fleet = fleet(Some("there"), false);
        assert_eq!(fleet.decide(10 * SECOND), Standing::Unknown(None), "nobody was asked yet");
        fleet.note_asked(10 * SECOND);
        assert_eq!(fleet.decide(10 * SECOND), Standing::Unknown(Some(11 * SECOND)));
        assert_eq!(fleet.decide(11 * SECOND), Standing::Delivers);
        fleet.note_heard(12 * SECOND, Uuid::max(), Relation::Copy, server("there"));
        assert_eq!(fleet.decide(12 * SECOND), Standing::Delivers, "it has begun");
    }

    #[test]
    fn a_copy_delivers_nothing_until_the_daemons_of_its_origin_are_silent_for_three_minutes() {
        let mut fleet = fleet(Some("there"), false);
        fleet.note_asked(Duration::ZERO);
        fleet.note_heard(SECOND / 2, Uuid::max(), Relation::Copy, server("there"));
        assert_eq!(fleet.decide(SECOND), Standing::IsCopy(server("there")));
        fleet.note_heard(60 * SECOND, Uuid::max(), Relation::Copy, server("there"));
        assert_eq!(fleet.decide(239 * SECOND), Standing::IsCopy(server("there")));
        assert_eq!(fleet.decide(240 * SECOND), Standing::Delivers);
    }

    #[test]
    fn daemons_of_our_database_and_of_other_installations_stop_nothing() {
        let mut fleet = fleet(Some("there"), false);
        fleet.note_asked(Duration::ZERO);
        fleet.note_heard(Duration::ZERO, Uuid::nil(), Relation::Ours, server("here"));
        fleet.note_heard(Duration::ZERO, Uuid::max(), Relation::Stranger, server("shop"));
        assert_eq!(fleet.decide(SECOND), Standing::Delivers);
        assert_eq!(fleet.server_of(Relation::Stranger), Some(&server("shop")));
    }

    #[test]
    fn a_daemon_that_seemed_to_work_on_a_copy_and_is_found_in_our_database_stops_nothing() {
        let mut fleet = fleet(Some("there"), false);
        fleet.note_asked(Duration::ZERO);
        fleet.note_heard(Duration::ZERO, Uuid::max(), Relation::Copy, server("here"));
        assert_eq!(fleet.decide(2 * SECOND), Standing::IsCopy(server("here")));
        fleet.note_heard(3 * SECOND, Uuid::max(), Relation::Ours, server("here"));
        assert_eq!(fleet.decide(3 * SECOND), Standing::Delivers);
    }

    proptest! {
        #[test]
        fn it_never_delivers_before_a_second_has_passed_unless_its_database_is_where_it_was_and_never_stops_afterwards(
            recorded in prop::option::of(prop::sample::select(vec!["here", "there"])),
            steps in prop::collection::vec((0..100_000_u64, 0..4_u8, 0..3_u128), 0..40),
        ) {
            let is_home = recorded != Some("there");
            let mut fleet = fleet(recorded, false);
            let (mut now, mut asked, mut delivers) = (Duration::ZERO, None, false);
            for (pause_ms, what, daemon) in steps {
                now += Duration::from_millis(pause_ms);
                match what {
                    0 => {
                        fleet.note_asked(now);
                        asked = asked.or(Some(now));
                    }
                    1 => fleet.note_heard(now, Uuid::from_u128(daemon), Relation::Copy, server("there")),
                    2 => fleet.note_heard(now, Uuid::from_u128(daemon), Relation::Ours, server("here")),
                    _ => fleet.note_heard(now, Uuid::from_u128(daemon), Relation::Stranger, server("shop")),
                }
                let standing = fleet.decide(now);
                prop_assert!(!delivers || standing == Standing::Delivers);
                delivers = standing == Standing::Delivers;
                let has_waited = asked.is_some_and(|asked| asked + PATIENCE <= now);
                prop_assert!(!delivers || is_home || has_waited);
            }
        }
    }
}
