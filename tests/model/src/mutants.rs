//! Mutants: faults that schedulers of this kind have had. Each is put into a copy of the core, and the model must report the
//! invariant that it violates. Must never change the core itself.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use std::{fs, io};

use super::invariant::Invariant;

/// A fault that is put into the copy.
struct Mutant {
    /// The fault in one sentence.
    name: &'static str,
    /// The path from the root of the repository.
    file: &'static str,
    /// The text to replace with `to`. It must occur exactly once in the file.
    from: &'static str,
    to: &'static str,
    /// The model must report one of these.
    caught_by: &'static [Invariant],
}

use Invariant::{BrokerAway, ClaimedEarly, Idle, Lanes, Mark, Oversleeping, Recovery, SettledTwice, Spinning};

/// The crates of the copy.
const CRATES: [&str; 2] = ["host/core", "tests/model"];

const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "a row is waited for 50 ms longer than until it is due",
        file: "host/core/src/timers.rs",
        from: "(next_due_at, Reason::Due)",
        to: "(next_due_at + std::time::Duration::from_millis(50), Reason::Due)",
        caught_by: &[Oversleeping],
    },
    Mutant {
        name: "the subtraction of the time since the last sweep is the wrong way round",
        file: "host/core/src/sweep_schedule.rs",
        from: "apart.saturating_sub(now.saturating_sub(began))",
        to: "now.saturating_sub(began).saturating_sub(apart)",
        caught_by: &[Spinning, Idle],
    },
    Mutant {
        name: "a sleep lasts until the next row is due, or for an hour",
        file: "host/core/src/timers.rs",
        from: "[due, turn, drain, Some(self.next_look), Some(sweep)]",
        to: "[due, turn, drain, Some((now + Moment::from_hours(1), sweep.1))]",
        caught_by: &[Oversleeping, Recovery],
    },
    Mutant {
        name: "a doubt does not wake the scheduler",
        file: "host/core/src/reason.rs",
        from: "Self::Notification | Self::Doubt |",
        to: "Self::Notification |",
        caught_by: &[Oversleeping],
    },
    Mutant {
        name: "a wake that comes while the loop is busy is lost",
        file: "tests/model/src/daemon.rs",
        from: "process.wake(Reason::Notification);",
        to: "if matches!(process.stage, Stage::Sleeping(..)) { process.wake(Reason::Notification) }",
        caught_by: &[Oversleeping],
    },
    Mutant {
        name: "the low-water mark is kept after a reconnect",
        file: "host/core/src/lib.rs",
        from: "if environment.doubt != self.environment.doubt {",
        to: "if false {",
        caught_by: &[Mark],
    },
    Mutant {
        name: "a transaction number that may still be running proves the mark",
        file: "host/core/src/low_water.rs",
        from: ".filter(|sample| sample.xid < look.oldest_xid)",
        to: ".filter(|sample| sample.xid <= look.oldest_xid + 1)",
        caught_by: &[Mark],
    },
    Mutant {
        name: "open transactions do not hold the mark back",
        file: "host/core/src/low_water.rs",
        from: "let oldest_mark = look.at - MAX_AGE;",
        to: "let oldest_mark = look.at;",
        caught_by: &[Mark],
    },
    Mutant {
        name: "the mark moves above the first row of the queue",
        file: "host/core/src/low_water.rs",
        from: "look.first.into_iter().chain(below).min()",
        to: "look.first.max(below)",
        caught_by: &[Mark],
    },
    Mutant {
        name: "the mark does not go back to rows that a sweep found below it",
        file: "host/core/src/low_water.rs",
        from: "self.mark = self.mark.min(Some(first));",
        to: "let _ = first;",
        caught_by: &[Mark, Recovery],
    },
    Mutant {
        name: "no sweep follows a sweep that failed",
        file: "host/core/src/events.rs",
        from: "self.sweep_schedule.end(now, swept.is_some());",
        to: "swept.is_some() && self.sweep_schedule.end(now, true);",
        caught_by: &[Recovery],
    },
    Mutant {
        name: "a promise to poll is not kept",
        file: "host/core/src/polling.rs",
        from: "return (until - at <= LONGEST_PROMISE).then_some(SHORTEST_INTERVAL);",
        to: "return None;",
        caught_by: &[Oversleeping],
    },
    Mutant {
        name: "silent transactions are forgotten when the promise ends",
        file: "host/core/src/polling.rs",
        from: "(oldest_xid < silent_below && interval < LONGEST_INTERVAL).then_some(interval)",
        to: "None",
        caught_by: &[Oversleeping],
    },
    Mutant {
        name: "after a promise, the time between two looks grows with each look instead of with the time",
        file: "host/core/src/polling.rs",
        from: "SHORTEST_INTERVAL.max(Duration::try_from(at - until).unwrap_or(Duration::MAX))",
        to: "SHORTEST_INTERVAL * u32::try_from(self.over.map_or(0, |_| at.millisecond())).unwrap_or(0)",
        caught_by: &[Oversleeping, Idle],
    },
    Mutant {
        name: "a backoff never ends",
        file: "host/core/src/events.rs",
        from: "            self.backing_off = None;\n            self.refusal.take_if",
        to: "            self.refusal.take_if",
        caught_by: &[Idle],
    },
    Mutant {
        name: "rows that others have locked are looked for without a growing delay",
        file: "host/core/src/events.rs",
        from: "self.look_by(now + LOCKED.delay(empty_claims));",
        to: "self.look_by(now + LOCKED.delay(0) / 100);",
        caught_by: &[Spinning],
    },
    Mutant {
        name: "a claim that got nothing is repeated at once",
        file: "host/core/src/events.rs",
        from: "Queue::Waiting { empty_claims: empty_claims.saturating_add(1) }",
        to: "Queue::Due { empty_claims }",
        caught_by: &[Spinning],
    },
    Mutant {
        name: "a full claim is taken to have claimed all due rows",
        file: "host/core/src/events.rs",
        from: "(Some(_), _) if outlook.due => Queue::Expected(now),",
        to: "",
        caught_by: &[Oversleeping],
    },
    Mutant {
        name: "when the next row is due is not taken from claims",
        file: "host/core/src/events.rs",
        from: "if batch.is_some() || is_early {\n            self.note_next_due(asked_at, outlook);",
        to: "if batch.is_some() || is_early {",
        caught_by: &[Oversleeping],
    },
    Mutant {
        name: "held rows are not released when a daemon serves their kind",
        file: "host/core/src/events.rs",
        from: "self.release.request(look.held_for_us.clone());",
        to: "",
        caught_by: &[Recovery],
    },
    Mutant {
        name: "a release that failed is never tried again",
        file: "host/core/src/events.rs",
        from: "Operation::Release => self.release = Background::Idle,",
        to: "Operation::Release => {}",
        caught_by: &[Recovery],
    },
    Mutant {
        name: "rows are claimed while RabbitMQ is away",
        file: "host/core/src/lib.rs",
        from: "if !environment.broker_open || !has_lane && !self.is_look_overdue(now) {",
        to: "if !has_lane && !self.is_look_overdue(now) {",
        caught_by: &[BrokerAway],
    },
    Mutant {
        name: "there are more lanes than connections",
        file: "host/core/src/lib.rs",
        from: "lanes.min(self.environment.connections)",
        to: "lanes",
        caught_by: &[Lanes],
    },
    Mutant {
        name: "while late rows are paced, claims of the newest rows follow each other without an end",
        file: "host/core/src/events.rs",
        from: "ClaimRange::Newest(_) if self.drain.is_pausing(now) => {",
        to: "ClaimRange::Newest(_) if false => {",
        caught_by: &[Spinning],
    },
    Mutant {
        name: "the end of a large row's delivery does not cause a claim of the next large row",
        file: "host/core/src/events.rs",
        from: "if lane.large || self.queue",
        to: "if self.queue",
        caught_by: &[Oversleeping],
    },
    Mutant {
        name: "no look follows a claim that a notification caused and that got nothing",
        file: "host/core/src/events.rs",
        from: "(None, _) => Queue::Unknown { notified: true },",
        to: "(None, _) => Queue::Waiting { empty_claims: 0 },",
        caught_by: &[Oversleeping, Recovery],
    },
    Mutant {
        name: "a claim takes rows that will be due 2 ms later",
        file: "tests/model/src/server.rs",
        from: "row.place == Place::Waiting && row.slot <= self.clock(now)",
        to: "row.place == Place::Waiting && row.slot <= self.clock(now) + 2",
        caught_by: &[ClaimedEarly],
    },
    Mutant {
        name: "a claim takes rows that are settled already",
        file: "tests/model/src/server.rs",
        from: "row.place == Place::Waiting && row.slot <= self.clock(now)",
        to: "matches!(row.place, Place::Waiting | Place::Settled) && row.slot <= self.clock(now)",
        caught_by: &[SettledTwice],
    },
];

/// Puts each mutant into the copy in turn, and runs the large worlds of `seed` there for this many steps. Returns whether the
/// model caught all of them.
///
/// # Errors
///
/// When the copy cannot be made.
pub(super) fn run(seed: u64, steps: u64) -> io::Result<bool> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
    let copy = repository.join("target/mutants");
    let began = Instant::now();
    make_copy(&repository, &copy)?;
    let mut missed = 0;
    for Mutant { name, file, from, to, caught_by } in MUTANTS {
        let path = copy.join(file);
        let source = fs::read_to_string(&path)?;
        if source.matches(from).count() != 1 {
            println!("mutant: {name}: {file} must have this exactly once:\n{from}");
            missed += 1;
            continue;
        }
        fs::write(&path, source.replace(from, to))?;
        let output = run_model(&copy, seed, steps)?;
        fs::write(&path, source)?;
        let expected: Vec<String> = caught_by.iter().map(ToString::to_string).collect();
        match output.lines().find_map(|line| line.strip_prefix("violated: ")) {
            Some(violated) if expected.iter().any(|invariant| invariant == violated) => {
                println!("mutant: {name}: caught: {violated}");
            }
            other => {
                println!("mutant: {name}: NOT caught: expected one of {expected:?}, found {other:?}");
                missed += 1;
            }
        }
    }
    println!("{} of {} mutants caught ({:.0} s)", MUTANTS.len() - missed, MUTANTS.len(), began.elapsed().as_secs_f64());
    Ok(missed == 0)
}

/// Makes a workspace with only the core and the model.
fn make_copy(repository: &Path, copy: &Path) -> io::Result<()> {
    for crate_dir in CRATES {
        let _ = fs::remove_dir_all(copy.join(crate_dir));
    }
    fs::create_dir_all(copy)?;
    let manifest = fs::read_to_string(repository.join("Cargo.toml"))?;
    let lines = manifest.lines().map(|line| {
        if line.starts_with("members = ") {
            "members = [\"host/core\", \"tests/model\"]"
        } else if line.starts_with("default-members = ") {
            ""
        } else {
            line
        }
    });
    fs::write(copy.join("Cargo.toml"), lines.collect::<Vec<_>>().join("\n"))?;
    fs::copy(repository.join("Cargo.lock"), copy.join("Cargo.lock"))?;
    CRATES.iter().try_for_each(|crate_dir| copy_directory(&repository.join(crate_dir), &copy.join(crate_dir)))
}

fn copy_directory(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to: PathBuf = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_directory(&entry.path(), &to)?;
        } else {
            fs::copy(entry.path(), to)?;
        }
    }
    Ok(())
}

/// Runs the model in the copy, and returns its output.
fn run_model(copy: &Path, seed: u64, steps: u64) -> io::Result<String> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["run", "--quiet", "--package", "tidings-model", "--", "--brief"])
        .args(["--seed", &seed.to_string(), "--steps", &steps.to_string()])
        .current_dir(copy)
        .env("CARGO_TARGET_DIR", copy.join("target"))
        // A mutant may leave a variable or a function unused.
        .env("RUSTFLAGS", "--cap-lints allow")
        .output()?;
    Ok(format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_that_each_mutant_replaces_occurs_once() {
        for Mutant { name, file, from, .. } in MUTANTS {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(file);
            let source = fs::read_to_string(path).expect("a file of the core");
            assert_eq!(source.matches(from).count(), 1, "{name}: {from}");
        }
    }
}
