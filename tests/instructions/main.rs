//! `cargo instructions` counts the instructions of the daemon's hot pure parts under valgrind, and fails if one of them needs over
//! 5 % more than `counts.txt` says. Counts hardly differ from run to run or from machine to machine, as times do.
//! `cargo instructions -- --write` writes the counts of this build into the file.
//!
//! A part runs in two processes, with few and with many repetitions. The difference of their counts, divided by the difference
//! of the repetitions, is what one repetition needs. What both processes do besides is not in the difference.
//!
//! The build is that of the tests, which is not optimized, so the counts are higher than those of a release. They show that
//! something is done that was not done before. How long it takes is measured by `cargo measure`.

mod parts;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail, ensure};
use harness::{build, repository, setup};

use parts::PARTS;

/// A part may need this much more than is written, in percent.
const MAX_RISE: f64 = 5.0;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("instructions: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<bool> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        // What this program starts under valgrind.
        ["repeat", part, repetitions] => {
            let part = PARTS.iter().find(|known| known.name == part).context("no such part")?;
            (part.repeat)(repetitions.parse()?);
            Ok(true)
        }
        [] => compare(),
        ["--write"] => write(),
        _ => bail!("say cargo instructions, or cargo instructions -- --write"),
    }
}

/// Counts all parts, and compares them with what is written. Returns whether none needs much more.
fn compare() -> anyhow::Result<bool> {
    let written = read_counts()?;
    let mut passed = true;
    println!("{:<44} {:>12} {:>12}", "instructions for", "written", "now");
    for (name, now) in count_all()? {
        let (_, before) =
            written.iter().find(|(known, _)| *known == name).with_context(|| format!("{name} is not in the file"))?;
        let change = (f64::from(now) / f64::from(*before) - 1.0) * 100.0;
        let verdict = if change > MAX_RISE {
            passed = false;
            "MORE than may be"
        } else if change < -MAX_RISE {
            "less: write it with cargo instructions -- --write"
        } else {
            ""
        };
        println!("{name:<44} {before:>12} {now:>12} {change:>+6.1} %  {verdict}");
    }
    if !passed {
        println!(
            "A part needs over {MAX_RISE} % more instructions. Find out why. If that is worth it, write the new count with `cargo instructions -- --write`, and say why in the commit."
        );
    }
    Ok(passed)
}

fn write() -> anyhow::Result<bool> {
    let mut lines = String::from(
        "# Instructions of the parts in tests/instructions/parts.rs, written by `cargo instructions -- --write`.\n",
    );
    for (name, count) in count_all()? {
        writeln!(lines, "{count} {name}")?;
    }
    print!("{lines}");
    std::fs::write(counts_file(), lines).context("could not write the counts")?;
    Ok(true)
}

fn counts_file() -> PathBuf {
    repository().join("tests/instructions/counts.txt")
}

fn read_counts() -> anyhow::Result<Vec<(String, u32)>> {
    let text = std::fs::read_to_string(counts_file()).context("could not read tests/instructions/counts.txt")?;
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (count, name) = line.split_once(' ').context("a line of counts.txt has no name")?;
            Ok((name.to_owned(), count.parse()?))
        })
        .collect()
}

fn count_all() -> anyhow::Result<Vec<(String, u32)>> {
    let valgrind = setup::find_valgrind()?;
    build::plugins()?;
    PARTS
        .iter()
        .map(|part| {
            let mut totals = [0; 2];
            for (total, repetitions) in totals.iter_mut().zip([part.few, part.many]) {
                *total = count(&valgrind, part.name, repetitions)?;
            }
            let each = totals[1].saturating_sub(totals[0]) / (part.many - part.few);
            Ok((part.name.to_owned(), u32::try_from(each)?))
        })
        .collect()
}

/// How many instructions a process needs for this many repetitions of a part.
fn count(valgrind: &std::path::Path, part: &str, repetitions: u64) -> anyhow::Result<u64> {
    let output = Command::new(valgrind)
        .args(["--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"])
        .arg(std::env::current_exe()?)
        .args(["repeat", part, &repetitions.to_string()])
        .output()
        .context("could not run valgrind")?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{part} failed under valgrind:\n{text}");
    // ==1234== I   refs:      1,234,567
    let line = text.lines().find(|line| line.contains("refs:")).context("valgrind printed no count")?;
    let digits: String = line.rsplit(':').next().unwrap_or_default().chars().filter(char::is_ascii_digit).collect();
    digits.parse().context("valgrind printed no count")
}
