//! Why the scheduler looks again.

/// Why the scheduler looks again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// PostgreSQL notified us.
    Notification,
    /// A notification may have been lost.
    Doubt,
    /// Other plugins serve than before, or they have news.
    Plugins,
    /// Messages can be published again.
    Broker,
    /// Held rows were released.
    Released,
    /// A lane has ended.
    Lane,
    /// Rows that cannot be claimed were held.
    Held,
    /// The next row is due.
    Due,
    /// Many notify, and were told that we look by ourselves.
    Polling,
    /// Others held the rows that are due, or a server did not see something through: asked again.
    Again,
    /// It has not looked for a while.
    Sweep,
}

impl Reason {
    /// All of them, each at the place of its number.
    pub const ALL: [Self; 11] = [
        Self::Notification,
        Self::Doubt,
        Self::Plugins,
        Self::Broker,
        Self::Released,
        Self::Lane,
        Self::Held,
        Self::Due,
        Self::Polling,
        Self::Again,
        Self::Sweep,
    ];

    /// Whether somebody else told us that something may have changed. The others are the scheduler's own doing.
    #[must_use]
    pub fn is_from_others(self) -> bool {
        matches!(self, Self::Notification | Self::Doubt | Self::Plugins | Self::Broker | Self::Released)
    }

    /// One word.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Notification => "notification",
            Self::Doubt => "doubt",
            Self::Plugins => "plugins",
            Self::Broker => "broker",
            Self::Released => "released",
            Self::Lane => "lane",
            Self::Held => "held",
            Self::Due => "due",
            Self::Polling => "polling",
            Self::Again => "again",
            Self::Sweep => "sweep",
        }
    }
}

/// The reasons of wakes that became one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Reasons(u16);

impl From<Reason> for Reasons {
    fn from(reason: Reason) -> Self {
        Self(1 << reason as u16)
    }
}

impl Reasons {
    /// These and those.
    #[must_use]
    pub fn and(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    /// To keep them in an atomic number.
    #[must_use]
    pub fn bits(self) -> u16 {
        self.0
    }

    /// What [`Reasons::bits`] gave.
    #[must_use]
    pub fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// Each of them once.
    pub fn iter(self) -> impl Iterator<Item = Reason> {
        Reason::ALL.into_iter().filter(move |reason| self.0 & Self::from(*reason).0 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_that_became_one_can_be_told_apart_however_they_are_kept() {
        let some = [Reason::Notification, Reason::Due, Reason::Sweep];
        let together =
            some.into_iter().fold(Reasons::default(), |all, reason| all.and(reason.into()).and(reason.into()));
        assert_eq!(Reasons::from_bits(together.bits()).iter().collect::<Vec<_>>(), some);
        assert_eq!(Reasons::default().iter().count(), 0);
    }

    #[test]
    fn each_reason_has_a_word_of_its_own() {
        let words: std::collections::BTreeSet<&str> = Reason::ALL.into_iter().map(Reason::label).collect();
        assert_eq!(words.len(), Reason::ALL.len());
        assert!(words.contains("notification"));
    }
}
