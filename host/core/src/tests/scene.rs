//! A core in the hands of a test.

use super::super::*;
use crate::queue::{Below, Look, Outlook, Promise};

pub(super) const SWEEP: Duration = Duration::from_secs(5);
pub(super) const OPEN: Environment = Environment { broker_open: true, connections: 10, doubt: 0, knows_kinds: true };
/// Late enough that nothing is ever before the beginning.
pub(super) const START: Moment = Duration::from_hours(1);

pub(super) fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// The database's time at a moment.
pub(super) fn at(moment: Moment) -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH + moment
}

pub(super) fn look(now: Moment, due: bool, next_in: Option<Duration>) -> Look {
    Look {
        at: at(now),
        from: at(now) - Duration::from_mins(1),
        first: None,
        oldest_xid: 100,
        outlook: Outlook { due, next_in },
        held_for_us: Vec::new(),
        paused_first: false,
        promise: Promise { until: at(Moment::ZERO), next_xid: 100 },
        below: None,
    }
}

/// A core, and the moment.
#[derive(Clone)]
pub(super) struct Scene {
    pub(super) core: Core,
    pub(super) now: Moment,
}

impl Scene {
    /// A daemon that has looked and swept, and found nothing.
    pub(super) fn quiet() -> Self {
        let mut scene = Self { core: Core::new(SWEEP), now: START };
        assert_eq!(scene.next(), Action::Look);
        scene.looked(false, None);
        assert_eq!(scene.next(), Action::Sweep);
        scene.swept(None);
        scene
    }

    /// The same daemon, which was then notified, and sees rows that are due.
    pub(super) fn with_due_rows() -> Self {
        let mut scene = Self::quiet();
        scene.woken(Reason::Notification);
        scene.looked(true, None);
        scene
    }

    pub(super) fn next(&mut self) -> Action {
        self.core.next(self.now, OPEN)
    }

    pub(super) fn happens(&mut self, event: Event) {
        self.core.handle(self.now, event);
    }

    pub(super) fn woken(&mut self, reason: Reason) {
        self.happens(Event::Woken(reason.into()));
    }

    pub(super) fn looked(&mut self, due: bool, next_in: Option<Duration>) {
        self.happens(Event::Looked(self.now, look(self.now, due, next_in)));
    }

    pub(super) fn swept(&mut self, below: Option<Below>) {
        self.happens(Event::Swept(Some((self.now, Look { below, ..look(self.now, false, None) }))));
    }

    /// A claim of the oldest came to this.
    pub(super) fn claimed(&mut self, rows: bool, more: bool, next_in: Option<Duration>) {
        let rows = rows.then_some(Batch { xid: 1, large: false });
        self.happens(Event::Claimed(Claimed {
            turn: Turn::Oldest,
            asked_at: self.now,
            begin: Duration::ZERO,
            at: at(self.now),
            outlook: Outlook { due: more, next_in },
            behind: Duration::ZERO,
            rows,
        }));
    }

    pub(super) fn ended(&mut self, end: End) {
        self.happens(Event::DeliveryEnded(Load { turn: Turn::Oldest, large: false }, end));
    }

    /// How long it sleeps now, and why it wakes then.
    pub(super) fn sleeps(&mut self) -> (Duration, Reason) {
        match self.next() {
            Action::Sleep(until, why) => (until.saturating_sub(self.now), why),
            other => panic!("{other:?} {:?}", self.core),
        }
    }

    /// Whether it claims now, and from when on.
    pub(super) fn claims(&mut self) -> Moment {
        match self.next() {
            Action::Claim(wanted) => wanted.not_before,
            other => panic!("{other:?}"),
        }
    }

    /// It claims, and gets nothing.
    pub(super) fn claims_nothing(&mut self) {
        self.claims();
        self.claimed(false, false, None);
    }

    /// Until it claims, with care if PostgreSQL refuses.
    pub(super) fn claims_or_looks(&mut self) {
        loop {
            match self.next() {
                Action::Look => self.looked(true, None),
                Action::Sweep => self.happens(Event::Swept(Some((self.now, look(self.now, true, None))))),
                Action::Claim(wanted) => {
                    assert_eq!(wanted.careful, self.core.refusal().is_some());
                    return;
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
