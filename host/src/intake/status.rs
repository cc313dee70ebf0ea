//! What an intake does, for the page, the commands and `/readyz`. No I/O.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::model::health::Health;
use crate::model::intake::Intake;
use crate::telemetry;

/// The subject of the daemon's health under which intakes that take no messages are reported.
const ABOUT: &str = "intake";
/// Over which time the rate is measured.
const RATE_OVER: Duration = Duration::from_mins(1);
/// A refusal is logged if none was for so long.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// The statuses of all intakes of this daemon.
#[derive(Debug)]
pub struct IntakeStatuses(Vec<Arc<IntakeStatus>>);

/// The status of one intake.
#[derive(Debug)]
pub struct IntakeStatus {
    intake: Arc<Intake>,
    taken: AtomicU64,
    refused: AtomicU64,
    changing: Mutex<Changing>,
    health: Arc<Health>,
    all: Arc<Problems>,
}

/// The intakes that take no messages, each with a sentence.
type Problems = Mutex<std::collections::BTreeMap<String, String>>;

#[derive(Debug, Default)]
struct Changing {
    /// How many messages were taken, by the second, the newest last.
    seconds: VecDeque<(Instant, u64)>,
    /// Why the last refused message was refused, and when a refusal was last logged.
    last_refusal: Option<String>,
    logged_at: Option<Instant>,
}

/// What the status says.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The intake.
    pub intake: Arc<Intake>,
    /// How many messages it has carried out since the daemon started.
    pub taken: u64,
    /// How many it has refused.
    pub refused: u64,
    /// Messages a second, over the last minute.
    pub rate: f64,
    /// Why the last refused message was refused.
    pub last_refusal: Option<String>,
    /// Why it takes no messages; `None` = it does.
    pub problem: Option<String>,
}

impl IntakeStatuses {
    /// The statuses of these intakes, whose metrics begin at zero. `health` gets a trouble while one of them takes no messages.
    #[must_use]
    pub fn new(intakes: &[Arc<Intake>], health: &Arc<Health>) -> Self {
        let all = Arc::new(Problems::default());
        let status = |intake: &Arc<Intake>| {
            telemetry::serve_intake(&intake.from);
            Arc::new(IntakeStatus {
                intake: Arc::clone(intake),
                taken: AtomicU64::new(0),
                refused: AtomicU64::new(0),
                changing: Mutex::default(),
                health: Arc::clone(health),
                all: Arc::clone(&all),
            })
        };
        Self(intakes.iter().map(status).collect())
    }

    /// The status of each intake.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<IntakeStatus>> {
        self.0.iter()
    }
}

impl IntakeStatus {
    /// The intake.
    #[must_use]
    pub fn intake(&self) -> &Arc<Intake> {
        &self.intake
    }

    /// Notes why the intake takes no messages; `None` = it does. Returns whether to log that.
    pub(super) fn set_problem(&self, problem: Option<String>) -> bool {
        let mut all = self.all.lock().expect("no thread panics while it holds the lock");
        let had = match problem {
            Some(problem) => all.insert(self.intake.from.clone(), problem).is_some(),
            None => all.remove(&self.intake.from).is_some(),
        };
        let sentence = |(from, problem): (&String, &String)| {
            format!("the intake {from} takes no messages, and they wait in its queue: {problem}")
        };
        let sentences: Vec<String> = all.iter().map(sentence).collect();
        let log = self.health.trouble(ABOUT, (!sentences.is_empty()).then(|| sentences.join("; ")));
        log || (had != all.contains_key(&self.intake.from))
    }

    /// Counts messages that were carried out.
    pub(super) fn count(&self, messages: usize) {
        let count = messages as u64;
        self.taken.fetch_add(count, Ordering::Relaxed);
        let now = Instant::now();
        let mut changing = self.changing();
        match changing.seconds.back_mut() {
            Some((begun, counted)) if now - *begun < Duration::from_secs(1) => *counted += count,
            _ => changing.seconds.push_back((now, count)),
        }
        while changing.seconds.front().is_some_and(|(begun, _)| now - *begun > RATE_OVER) {
            changing.seconds.pop_front();
        }
    }

    /// Counts a refused message. Returns whether to log it.
    pub(super) fn refuse(&self, reason: &str) -> bool {
        self.refused.fetch_add(1, Ordering::Relaxed);
        let mut changing = self.changing();
        changing.last_refusal = Some(reason.to_owned());
        let log = changing.logged_at.is_none_or(|at| at.elapsed() > LOG_INTERVAL);
        if log {
            changing.logged_at = Some(Instant::now());
        }
        log
    }

    /// What it says now.
    ///
    /// # Panics
    ///
    /// Never: no thread panics while it holds the lock.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let changing = self.changing();
        let in_time = changing.seconds.iter().filter(|(begun, _)| begun.elapsed() <= RATE_OVER);
        let counted: u64 = in_time.map(|(_, count)| count).sum();
        let problem =
            self.all.lock().expect("no thread panics while it holds the lock").get(&self.intake.from).cloned();
        Snapshot {
            intake: Arc::clone(&self.intake),
            taken: self.taken.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            rate: f64::from(u32::try_from(counted).unwrap_or(u32::MAX)) / RATE_OVER.as_secs_f64(),
            last_refusal: changing.last_refusal.clone(),
            problem,
        }
    }

    fn changing(&self) -> MutexGuard<'_, Changing> {
        self.changing.lock().expect("no thread panics while it holds the lock")
    }
}
