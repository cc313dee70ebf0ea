//! The health of the daemon: heartbeats of the loops, reasons why rows are not delivered, and notes for the operator.
//! `/livez`, `/readyz` and the page read it. No I/O, and no loop may ever wait here.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A loop hangs if it has sent no heartbeat for this long beyond its longest wait.
const GRACE: Duration = Duration::from_mins(1);

/// A notice that stays for long is logged again after this time.
const LOG_INTERVAL: Duration = Duration::from_mins(1);

/// Notices about the state of parts of the daemon, one for each subject.
#[derive(Debug, Default)]
pub struct Notices(Mutex<BTreeMap<&'static str, Notice>>);

#[derive(Debug)]
struct Notice {
    text: String,
    logged_at: Instant,
}

impl Notices {
    /// Replaces the notice about a subject; `None` = removes it. Returns whether to log it: the notice is new, it was
    /// removed, or it was not logged for a minute.
    pub fn say(&self, about: &'static str, sentence: Option<String>) -> bool {
        let mut notices = self.0.lock().expect("no thread panics while it holds the lock");
        let before = notices.remove(about);
        let Some(text) = sentence else { return before.is_some() };
        let logged_at = before.map(|before| before.logged_at).filter(|logged_at| logged_at.elapsed() < LOG_INTERVAL);
        notices.insert(about, Notice { text, logged_at: logged_at.unwrap_or_else(Instant::now) });
        logged_at.is_none()
    }

    /// All notices, in the order of their subjects.
    #[must_use]
    pub fn all(&self) -> Vec<String> {
        let notices = self.0.lock().expect("no thread panics while it holds the lock");
        notices.values().map(|notice| notice.text.clone()).collect()
    }
}

/// The heartbeat of a loop.
#[derive(Debug)]
pub struct Heartbeat {
    name: &'static str,
    began: Instant,
    /// The time of the last heartbeat, in ms since `began`.
    last_ms: AtomicU64,
    longest_wait: Duration,
}

impl Heartbeat {
    fn new(name: &'static str, longest_wait: Duration) -> Self {
        Self { name, began: Instant::now(), last_ms: AtomicU64::new(0), longest_wait }
    }

    /// Records that the loop is alive.
    pub fn beat(&self) {
        self.last_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The sentence that reports a hanging loop, if the loop hangs at `now_ms`.
    fn report_if_hanging(&self, now_ms: u64) -> Option<String> {
        let silent = Duration::from_millis(now_ms.saturating_sub(self.last_ms.load(Ordering::Relaxed)));
        let name = self.name;
        (silent > self.longest_wait + GRACE)
            .then(|| format!("the loop of the {name} has made no progress for {} s", silent.as_secs()))
    }
}

/// What the loops report about themselves.
#[derive(Debug)]
pub struct Health {
    /// The heartbeat of the scheduler's loop.
    pub dispatcher: Heartbeat,
    /// The heartbeat of the listener.
    pub listener: Heartbeat,
    /// Whether the listener has its connection.
    pub listening: AtomicBool,
    /// Whether every part has been ready once.
    pub started: AtomicBool,
    canary_lost: AtomicBool,
    troubles: Notices,
    notes: Notices,
}

impl Health {
    /// The state before anything has started. `sweep` is the longest time that the scheduler sleeps.
    #[must_use]
    pub fn new(sweep: Duration) -> Self {
        Self {
            dispatcher: Heartbeat::new("dispatcher", sweep),
            listener: Heartbeat::new("listener", Duration::from_mins(1)),
            listening: AtomicBool::new(false),
            started: AtomicBool::new(false),
            canary_lost: AtomicBool::new(false),
            troubles: Notices::default(),
            notes: Notices::default(),
        }
    }

    /// Sets or removes a reason why rows are not delivered. Returns whether to log that, as [`Notices::say`] does.
    pub fn trouble(&self, about: &'static str, sentence: Option<String>) -> bool {
        self.troubles.say(about, sentence)
    }

    /// Sets or removes a note for the operator, which is no reason to be unready. Returns whether to log that, as
    /// [`Notices::say`] does.
    pub fn note(&self, about: &'static str, sentence: Option<String>) -> bool {
        self.notes.say(about, sentence)
    }

    /// The notes for the operator.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        self.notes.all()
    }

    /// Records whether the last canary was lost. Returns whether the canary before it was lost.
    pub fn canary_is_lost(&self, lost: bool) -> bool {
        self.canary_lost.swap(lost, Ordering::Relaxed)
    }

    /// Why rows that become due now are not delivered now, as far as the loops know. `notify`: whether notifications are
    /// turned on.
    #[must_use]
    pub fn unready_reasons(&self, notify: bool) -> Vec<String> {
        let mut reasons = self.hanging_loops();
        if !self.started.load(Ordering::Relaxed) {
            reasons.push("starting: not every part has been ready yet".into());
        } else if notify && !self.listening.load(Ordering::Relaxed) {
            reasons.push("not listening for notifications: the connection to PostgreSQL for them is lost".into());
        }
        if self.canary_lost.load(Ordering::Relaxed) {
            reasons.push("the last canary was lost: the log says why".into());
        }
        reasons.extend(self.troubles.all());
        reasons
    }

    /// The loops that hang, so that the process should be restarted; empty = it is alive. A server that is away does not
    /// count.
    #[must_use]
    pub fn hanging_loops(&self) -> Vec<String> {
        if !self.started.load(Ordering::Relaxed) {
            return Vec::new();
        }
        [&self.dispatcher, &self.listener]
            .into_iter()
            .filter_map(|heart| heart.report_if_hanging(heart.now_ms()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_without_a_heartbeat_for_a_minute_beyond_its_longest_wait_is_reported() {
        let heart = Heartbeat::new("dispatcher", Duration::from_secs(5));
        assert_eq!(heart.report_if_hanging(64_999), None);
        let report = heart.report_if_hanging(65_001).expect("it hangs");
        assert!(report.contains("dispatcher") && report.contains("65 s"), "{report}");
    }

    #[test]
    fn a_notice_stays_until_it_is_removed_and_is_logged_once() {
        let notices = Notices::default();
        assert!(notices.say("disk", Some("it is full".into())));
        assert!(!notices.say("disk", Some("it is still full".into())));
        assert_eq!(notices.all(), ["it is still full"]);
        assert!(notices.say("disk", None));
        assert!(!notices.say("disk", None));
        assert!(notices.all().is_empty());
    }

    #[test]
    fn a_trouble_is_a_reason_to_be_unready_and_a_note_is_not() {
        let health = Health::new(Duration::from_secs(5));
        health.started.store(true, Ordering::Relaxed);
        health.note("state", Some("full".into()));
        health.trouble("queue", Some("gone".into()));
        health.trouble("queue", Some("still gone".into()));
        assert_eq!(
            (health.unready_reasons(false), health.notes()),
            (vec!["still gone".to_owned()], vec!["full".to_owned()])
        );
        health.note("state", None);
        health.trouble("queue", None);
        assert_eq!((health.unready_reasons(false), health.notes()), (vec![], vec![]));
    }

    #[test]
    fn no_loop_hangs_before_the_daemon_has_started() {
        let health = Health::new(Duration::from_secs(5));
        assert!(health.hanging_loops().is_empty());
        health.started.store(true, Ordering::Relaxed);
        assert!(health.hanging_loops().is_empty());
    }
}
