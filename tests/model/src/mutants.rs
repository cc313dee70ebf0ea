//! Faults that daemons of this kind have had, each put into a copy of the core on purpose: the model must name what it breaks.
//! Never touches the core itself.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use std::{fs, io};

use super::invariant::Invariant;

/// A fault.
struct Mutant {
    /// In the words of an engineer who had it.
    name: &'static str,
    /// Below the repository.
    file: &'static str,
    /// It is there once, and becomes `to`.
    from: &'static str,
    to: &'static str,
    /// One of these is named.
    caught_by: &'static [Invariant],
}

use Invariant::{Asleep, Away, Early, Idle, Lanes, Mark, Rest, Turns, Twice};

/// What the copy consists of.
const CRATES: [&str; 2] = ["host/core", "tests/model"];

const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "the head start is added to a row's moment, and not subtracted",
        file: "host/core/src/timers.rs",
        from: "next_at.saturating_sub(self.head_start())",
        to: "next_at + self.head_start()",
        caught_by: &[Asleep],
    },
    Mutant {
        name: "the time since the last sweep is subtracted the wrong way round",
        file: "host/core/src/sweep_schedule.rs",
        from: "apart.saturating_sub(now.saturating_sub(began))",
        to: "now.saturating_sub(began).saturating_sub(apart)",
        caught_by: &[Turns, Idle],
    },
    Mutant {
        name: "a sleep has no cap",
        file: "host/core/src/timers.rs",
        from: "[due, Some(self.look_at), Some(sweep)]",
        to: "[due, Some((now + Moment::from_hours(1), sweep.1))]",
        caught_by: &[Asleep, Rest],
    },
    Mutant {
        name: "a doubt is no wake",
        file: "host/core/src/reason.rs",
        from: "Self::Notification | Self::Doubt |",
        to: "Self::Notification |",
        caught_by: &[Asleep],
    },
    Mutant {
        name: "a wake that comes while the loop is busy is lost",
        file: "tests/model/src/daemon.rs",
        from: "life.wake(Reason::Notification);",
        to: "if matches!(life.at, At::Sleeps(..)) { life.wake(Reason::Notification) }",
        caught_by: &[Asleep],
    },
    Mutant {
        name: "the mark is kept over a reconnect",
        file: "host/core/src/lib.rs",
        from: "if environment.doubt != self.environment.doubt {",
        to: "if false {",
        caught_by: &[Mark],
    },
    Mutant {
        name: "a number that may still be running proves the mark",
        file: "host/core/src/low_water.rs",
        from: ".filter(|sample| sample.xid < look.oldest_xid)",
        to: ".filter(|sample| sample.xid <= look.oldest_xid + 1)",
        caught_by: &[Mark],
    },
    Mutant {
        name: "the mark waits for no open transaction",
        file: "host/core/src/low_water.rs",
        from: "let long_ago = look.at - PATIENCE;",
        to: "let long_ago = look.at;",
        caught_by: &[Mark],
    },
    Mutant {
        name: "the mark moves over the first row",
        file: "host/core/src/low_water.rs",
        from: "look.first.into_iter().chain(below).min()",
        to: "look.first.max(below)",
        caught_by: &[Mark],
    },
    Mutant {
        name: "what a sweep finds below the mark is left there",
        file: "host/core/src/low_water.rs",
        from: "self.mark = self.mark.min(Some(first));",
        to: "let _ = first;",
        caught_by: &[Mark, Rest],
    },
    Mutant {
        name: "a sweep that failed is the last",
        file: "host/core/src/lib.rs",
        from: "self.sweep_schedule.end(now, swept.is_some());",
        to: "swept.is_some() && self.sweep_schedule.end(now, true);",
        caught_by: &[Rest],
    },
    Mutant {
        name: "a promise to look is not kept",
        file: "host/core/src/polling.rs",
        from: "return (until - at <= FAR).then_some(EVERY);",
        to: "return None;",
        caught_by: &[Asleep],
    },
    Mutant {
        name: "transactions that were silent are forgotten when the promise is over",
        file: "host/core/src/polling.rs",
        from: "(oldest_xid < silent_below && every < PATIENCE).then_some(every)",
        to: "None",
        caught_by: &[Asleep],
    },
    Mutant {
        name: "the time between two looks grows with each look after a promise, and not with the time since",
        file: "host/core/src/polling.rs",
        from: "EVERY.max(Duration::try_from(at - until).unwrap_or(Duration::MAX))",
        to: "EVERY * u32::try_from(self.over.map_or(0, |_| at.millisecond())).unwrap_or(0)",
        caught_by: &[Asleep, Idle],
    },
    Mutant {
        name: "a backoff never resets",
        file: "host/core/src/lib.rs",
        from: "            self.rest = None;\n            self.refused.take_if",
        to: "            self.refused.take_if",
        caught_by: &[Idle],
    },
    Mutant {
        name: "rows that others have locked are asked for as fast as can be",
        file: "host/core/src/lib.rs",
        from: "self.look_again(now + LOCKED.delay(tries));",
        to: "self.look_again(now + LOCKED.delay(0) / 100);",
        caught_by: &[Turns],
    },
    Mutant {
        name: "a claim that came to nothing is repeated",
        file: "host/core/src/lib.rs",
        from: "Queue::Waiting { tries: tries.saturating_add(1) }",
        to: "Queue::Due { tries }",
        caught_by: &[Turns],
    },
    Mutant {
        name: "a full claim is taken for all that is due",
        file: "host/core/src/lib.rs",
        from: "(Some(_), _) if outlook.due => Queue::Expected(now),",
        to: "",
        caught_by: &[Asleep],
    },
    Mutant {
        name: "a claim does not tell when the next row is due",
        file: "host/core/src/lib.rs",
        from: "if rows.is_some() || is_early {\n            self.ahead(asked_at, outlook);",
        to: "if rows.is_some() || is_early {",
        caught_by: &[Asleep],
    },
    Mutant {
        name: "held rows are not released when somebody serves them",
        file: "host/core/src/lib.rs",
        from: "self.release.want(look.held_for_us.clone());",
        to: "",
        caught_by: &[Rest],
    },
    Mutant {
        name: "a release that failed is never tried again",
        file: "host/core/src/lib.rs",
        from: "Work::Releasing => self.release = Background::Idle,",
        to: "Work::Releasing => {}",
        caught_by: &[Rest],
    },
    Mutant {
        name: "rows are claimed while the broker is away",
        file: "host/core/src/lib.rs",
        from: "if !environment.broker_open || !has_lane && !self.goes_on_for_long(now) {",
        to: "if !has_lane && !self.goes_on_for_long(now) {",
        caught_by: &[Away],
    },
    Mutant {
        name: "there are more lanes than connections",
        file: "host/core/src/lib.rs",
        from: "lanes.min(self.environment.connections)",
        to: "lanes",
        caught_by: &[Lanes],
    },
    Mutant {
        name: "the end of a large row is no reason to claim the next",
        file: "host/core/src/lib.rs",
        from: "if load.large || self.queue",
        to: "if self.queue",
        caught_by: &[Asleep],
    },
    Mutant {
        name: "a notification of a row that is not due is taken for one of a row that is",
        file: "host/core/src/lib.rs",
        from: "(None, _) => Queue::Unknown { notified: true },",
        to: "(None, _) => Queue::Waiting { tries: 0 },",
        caught_by: &[Asleep],
    },
    Mutant {
        name: "a claim takes rows that will be due in a moment",
        file: "tests/model/src/server.rs",
        from: "row.place == Place::Waits && row.slot <= self.now(now)",
        to: "row.place == Place::Waits && row.slot <= self.now(now) + 2",
        caught_by: &[Early],
    },
    Mutant {
        name: "a claim takes rows that another has settled since its snapshot",
        file: "tests/model/src/server.rs",
        from: "row.place == Place::Waits && row.slot <= self.now(now)",
        to: "matches!(row.place, Place::Waits | Place::Done) && row.slot <= self.now(now)",
        caught_by: &[Twice],
    },
];

/// Puts each into a copy, and runs the large worlds of `seed` there, for so many steps. Whether all of them were caught.
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
        let whole = fs::read_to_string(&path)?;
        if whole.matches(from).count() != 1 {
            println!("mutant: {name}: {file} does not have this once:\n{from}");
            missed += 1;
            continue;
        }
        fs::write(&path, whole.replace(from, to))?;
        let said = go(&copy, seed, steps)?;
        fs::write(&path, whole)?;
        let names: Vec<String> = caught_by.iter().map(ToString::to_string).collect();
        match said.lines().find_map(|line| line.strip_prefix("wrong: ")) {
            Some(wrong) if names.iter().any(|name| name == wrong) => println!("mutant: {name}: caught: {wrong}"),
            other => {
                println!("mutant: {name}: NOT caught by {names:?}, but {other:?}");
                missed += 1;
            }
        }
    }
    println!("{} of {} mutants caught ({:.0} s)", MUTANTS.len() - missed, MUTANTS.len(), began.elapsed().as_secs_f64());
    Ok(missed == 0)
}

/// A workspace of the core and the model alone.
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

/// What the model says there.
fn go(copy: &Path, seed: u64, steps: u64) -> io::Result<String> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["run", "--quiet", "--package", "tidings-model", "--", "--brief"])
        .args(["--seed", &seed.to_string(), "--steps", &steps.to_string()])
        .current_dir(copy)
        .env("CARGO_TARGET_DIR", copy.join("target"))
        // A fault may leave something unused.
        .env("RUSTFLAGS", "--cap-lints allow")
        .output()?;
    Ok(format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_each_mutant_changes_is_there_once() {
        for Mutant { name, file, from, .. } in MUTANTS {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(file);
            let whole = fs::read_to_string(path).expect("a file of the core");
            assert_eq!(whole.matches(from).count(), 1, "{name}: {from}");
        }
    }
}
