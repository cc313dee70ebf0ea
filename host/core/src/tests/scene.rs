//! A core that a test drives, and the moment.

use super::super::*;
use crate::queue::{Below, Look, Outlook, Promise};

pub(super) const SWEEP: Duration = Duration::from_secs(5);
pub(super) const OPEN: Environment = Environment { broker_open: true, connections: 10, doubt: 0, knows_kinds: true };
/// The first moment: late enough that no test goes back before the start of the loop.
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
        not_claimable_first: false,
        turn_in: None,
        has_limits: false,
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
    /// A core that has looked and swept, and found nothing.
    pub(super) fn quiet() -> Self {
        let mut scene = Self { core: Core::new(SWEEP, None), now: START };
        assert_eq!(scene.next(), Action::Look);
        scene.looked(false, None);
        assert_eq!(scene.next(), Action::Sweep);
        scene.swept(None);
        scene
    }

    /// A core that was notified, looked, and saw due rows.
    pub(super) fn with_due_rows() -> Self {
        let mut scene = Self::quiet();
        scene.woken(Reason::Notification);
        scene.looked(true, None);
        scene
    }

    pub(super) fn next(&mut self) -> Action {
        self.core.next(self.now, OPEN)
    }

    pub(super) fn handle(&mut self, event: Event) {
        self.core.handle(self.now, event);
    }

    pub(super) fn woken(&mut self, reason: Reason) {
        self.handle(Event::Woken(reason.into()));
    }

    pub(super) fn looked(&mut self, due: bool, next_in: Option<Duration>) {
        self.handle(Event::Looked(self.now, look(self.now, due, next_in)));
    }

    pub(super) fn swept(&mut self, below: Option<Below>) {
        self.handle(Event::Swept(Some((self.now, Look { below, ..look(self.now, false, None) }))));
    }

    /// Reports the result of a claim of the oldest rows.
    pub(super) fn claimed(&mut self, rows: bool, more: bool, next_in: Option<Duration>) {
        let batch = rows.then_some(Batch { xid: 1, large: false, rows: 1 });
        self.handle(Event::Claimed(ClaimResult {
            range: ClaimRange::Oldest,
            asked_at: self.now,
            at: at(self.now),
            outlook: Outlook { due: more, next_in },
            behind: Duration::ZERO,
            batch,
        }));
    }

    pub(super) fn ended(&mut self, end: DeliveryEnd) {
        self.handle(Event::DeliveryEnded(Lane { range: ClaimRange::Oldest, large: false }, end));
    }

    /// How long the core sleeps now, and the reason to wake then.
    pub(super) fn sleeps(&mut self) -> (Duration, Reason) {
        match self.next() {
            Action::Sleep(until, reason) => (until.saturating_sub(self.now), reason),
            other => panic!("{other:?} {:?}", self.core),
        }
    }

    /// Asserts that the core claims now.
    pub(super) fn claims(&mut self) {
        let action = self.next();
        assert!(matches!(action, Action::Claim(_)), "{action:?}");
    }

    /// The core claims, and gets nothing.
    pub(super) fn claims_nothing(&mut self) {
        self.claims();
        self.claimed(false, false, None);
    }

    /// Answers looks and sweeps with due rows until the core claims; carefully, if PostgreSQL refuses to finish rows.
    pub(super) fn claims_or_looks(&mut self) {
        loop {
            match self.next() {
                Action::Look => self.looked(true, None),
                Action::Sweep => self.handle(Event::Swept(Some((self.now, look(self.now, true, None))))),
                Action::Claim(request) => {
                    assert_eq!(request.careful, self.core.refusal().is_some());
                    return;
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
