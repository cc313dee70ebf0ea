//! Why the scheduler wakes. The names are labels of a metric and stand in the trace of the model.

/// Why the scheduler wakes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// A notification arrived from PostgreSQL.
    Notification,
    /// A notification may have been lost.
    Doubt,
    /// The set of plugins that serve has changed, or a plugin has feedback for the registry.
    Plugins,
    /// Messages can be published again.
    Broker,
    /// Held rows were released.
    Released,
    /// A delivery has ended.
    Lane,
    /// Rows that cannot be claimed were held.
    Held,
    /// The next row is due.
    Due,
    /// A line has its turn.
    Turn,
    /// Late rows may be claimed again.
    Drain,
    /// Triggers are silent, so the queue is polled.
    Polling,
    /// Due rows were locked by other sessions, or a server failed: it is time to try again.
    Again,
    /// There was no look for as long as a sweep interval.
    Sweep,
}

impl Reason {
    /// All reasons, each at the index of its number.
    pub const ALL: [Self; 13] = [
        Self::Notification,
        Self::Doubt,
        Self::Plugins,
        Self::Broker,
        Self::Released,
        Self::Lane,
        Self::Held,
        Self::Due,
        Self::Turn,
        Self::Drain,
        Self::Polling,
        Self::Again,
        Self::Sweep,
    ];

    /// Whether another part of the daemon reports a change that may concern the queue. The other reasons are the scheduler's
    /// own timers and work.
    #[must_use]
    pub fn is_from_others(self) -> bool {
        matches!(self, Self::Notification | Self::Doubt | Self::Plugins | Self::Broker | Self::Released)
    }

    /// The name of the reason, in one word.
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
            Self::Turn => "turn",
            Self::Drain => "drain",
            Self::Polling => "polling",
            Self::Again => "again",
            Self::Sweep => "sweep",
        }
    }
}

/// A set of reasons: several wakes may become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Reasons(u16);

impl From<Reason> for Reasons {
    fn from(reason: Reason) -> Self {
        Self(1 << reason as u16)
    }
}

impl Reasons {
    /// The reasons of both sets.
    #[must_use]
    pub fn and(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    /// The set as a number, to be kept in an atomic.
    #[must_use]
    pub fn bits(self) -> u16 {
        self.0
    }

    /// The set that [`Reasons::bits`] turned into this number.
    #[must_use]
    pub fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// Each reason once.
    pub fn iter(self) -> impl Iterator<Item = Reason> {
        Reason::ALL.into_iter().filter(move |reason| self.0 & Self::from(*reason).0 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_of_reasons_keeps_each_reason_also_as_a_number() {
        let some = [Reason::Notification, Reason::Due, Reason::Sweep];
        let together =
            some.into_iter().fold(Reasons::default(), |all, reason| all.and(reason.into()).and(reason.into()));
        assert_eq!(Reasons::from_bits(together.bits()).iter().collect::<Vec<_>>(), some);
        assert_eq!(Reasons::default().iter().count(), 0);
    }

    #[test]
    fn each_reason_has_its_own_label() {
        let labels: std::collections::BTreeSet<&str> = Reason::ALL.into_iter().map(Reason::label).collect();
        assert_eq!(labels.len(), Reason::ALL.len());
        assert!(labels.contains("notification"));
    }
}
