//! Whether the daemon is well: each loop leaves a sign of life on its way, and says what it has and what it lacks. No I/O,
//! and nobody waits for it.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A loop that has not been seen for this long beyond its longest wait hangs.
const GRACE: Duration = Duration::from_mins(1);

/// How often a sentence that stands for long is worth a line of the log.
const SAID_AGAIN: Duration = Duration::from_mins(1);

/// Notices about the state of something, each under the name of what it is about.
#[derive(Debug, Default)]
pub struct Notices(Mutex<BTreeMap<&'static str, Sentence>>);

#[derive(Debug)]
struct Sentence {
    says: String,
    logged: Instant,
}

impl Notices {
    /// Puts `sentence` in the place of what was said `about` this before; `None` = there is nothing to say any more. Returns
    /// whether it is worth a line of the log: nothing was said before, or no line was written for a minute.
    pub fn say(&self, about: &'static str, sentence: Option<String>) -> bool {
        let mut sentences = self.0.lock().expect("nobody panics with it");
        let before = sentences.remove(about);
        let Some(says) = sentence else { return before.is_some() };
        let logged = before.map(|before| before.logged).filter(|logged| logged.elapsed() < SAID_AGAIN);
        sentences.insert(about, Sentence { says, logged: logged.unwrap_or_else(Instant::now) });
        logged.is_none()
    }

    /// All of them, in the order of what they are about.
    #[must_use]
    pub fn all(&self) -> Vec<String> {
        self.0.lock().expect("nobody panics with it").values().map(|sentence| sentence.says.clone()).collect()
    }
}

/// A loop's sign of life.
#[derive(Debug)]
pub struct Heartbeat {
    name: &'static str,
    began: Instant,
    /// In ms since `began`.
    last: AtomicU64,
    longest_wait: Duration,
}

impl Heartbeat {
    fn new(name: &'static str, longest_wait: Duration) -> Self {
        Self { name, began: Instant::now(), last: AtomicU64::new(0), longest_wait }
    }

    /// The loop is alive.
    pub fn beat(&self) {
        self.last.store(self.now_ms(), Ordering::Relaxed);
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Why it is taken for dead at `now_ms`, if it is.
    fn complaint(&self, now_ms: u64) -> Option<String> {
        let silent = Duration::from_millis(now_ms.saturating_sub(self.last.load(Ordering::Relaxed)));
        let name = self.name;
        (silent > self.longest_wait + GRACE)
            .then(|| format!("the loop of the {name} has made no progress for {} s", silent.as_secs()))
    }
}

/// What the loops say of themselves.
#[derive(Debug)]
pub struct Health {
    /// Of the dispatcher.
    pub dispatcher: Heartbeat,
    /// Of the listener.
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
    /// Nothing has started yet. `sweep` is the longest time that the dispatcher sleeps.
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

    /// Notes a reason why rows are not delivered, or that it is over. Returns whether that is worth a line of the log, as
    /// [`Notices::say`].
    pub fn trouble(&self, about: &'static str, sentence: Option<String>) -> bool {
        self.troubles.say(about, sentence)
    }

    /// Notes what a person ought to know although rows are delivered, or that it is over. Returns as [`Health::trouble`].
    pub fn note(&self, about: &'static str, sentence: Option<String>) -> bool {
        self.notes.say(about, sentence)
    }

    /// What a person ought to know although rows are delivered.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        self.notes.all()
    }

    /// Notes whether the last canary was lost. Returns whether the one before was.
    pub fn canary_is_lost(&self, lost: bool) -> bool {
        self.canary_lost.swap(lost, Ordering::Relaxed)
    }

    /// Why rows that fall due now are not delivered now, as far as the loops know. `notify`: whether notifications are wanted.
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

    /// Why the process ought to be started anew: a loop hangs. Empty = it is alive. A server that is away is no reason.
    #[must_use]
    pub fn hanging_loops(&self) -> Vec<String> {
        if !self.started.load(Ordering::Relaxed) {
            return Vec::new();
        }
        [&self.dispatcher, &self.listener].into_iter().filter_map(|heart| heart.complaint(heart.now_ms())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_is_silent_for_longer_than_it_ever_waits_is_named() {
        let heart = Heartbeat::new("dispatcher", Duration::from_secs(5));
        assert_eq!(heart.complaint(64_999), None);
        let complaint = heart.complaint(65_001).expect("it is dead");
        assert!(complaint.contains("dispatcher") && complaint.contains("65 s"), "{complaint}");
    }

    #[test]
    fn a_sentence_stands_until_it_is_over_and_is_logged_once() {
        let sentences = Notices::default();
        assert!(sentences.say("disk", Some("it is full".into())));
        assert!(!sentences.say("disk", Some("it is still full".into())));
        assert_eq!(sentences.all(), ["it is still full"]);
        assert!(sentences.say("disk", None));
        assert!(!sentences.say("disk", None));
        assert!(sentences.all().is_empty());
    }

    #[test]
    fn a_trouble_is_a_reason_until_it_is_over_and_a_note_never_is() {
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
    fn nothing_hangs_before_it_has_started() {
        let health = Health::new(Duration::from_secs(5));
        assert!(health.hanging_loops().is_empty());
        health.started.store(true, Ordering::Relaxed);
        assert!(health.hanging_loops().is_empty());
    }
}
