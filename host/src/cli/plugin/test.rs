//! `tidings plugin test`: builds the rows of fixtures with the daemon's engine and limits, and compares the outcomes
//! with the expected ones.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use serde::Serialize;

use crate::cli::output::Output;
use crate::cli::plugin::fixture::{Fixture, diff, is_expected, normalize, outcome_to_json};
use crate::cli::plugin::{PluginArgs, create_engine, open};
use crate::plugins::{Metering, Plugin};

/// What to test.
#[derive(Args, Debug)]
pub(crate) struct TestArgs {
    #[command(flatten)]
    plugin: PluginArgs,
    /// The directory with the fixtures, one .json file each
    #[arg(long, value_name = "DIR", default_value = "fixtures")]
    fixtures: PathBuf,
    /// Writes what becomes of the rows into the fixtures, as what is expected from now on
    #[arg(long)]
    update: bool,
}

/// What `tidings plugin test` answers.
#[derive(Debug, Serialize)]
struct Tested {
    /// `name@version+digest8`.
    plugin: String,
    passed: usize,
    failed: usize,
    fixtures: Vec<FixtureResult>,
}

/// The result of one fixture.
#[derive(Debug, Serialize)]
struct FixtureResult {
    /// The name of its file.
    fixture: String,
    result: Verdict,
    /// How long the call took; null = there was no call.
    took_ms: Option<f64>,
    instructions: Option<u64>,
    memory_bytes: Option<usize>,
    /// The expected (-) and the actual (+) outcome, or why there was no call.
    difference: Option<String>,
}

/// How a fixture ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Passed,
    Updated,
    Failed,
}

pub(super) async fn test(args: &TestArgs, output: Output) -> anyhow::Result<ExitCode> {
    let files = find_fixtures(&args.fixtures)?;
    let plugin = args.plugin.open(Metering::Time).await?;
    // Counting instructions needs code that is compiled differently. The times are measured with the daemon's code.
    let counting = create_engine(&args.plugin.state, Metering::Fuel)?;
    let counting = open(&counting, &args.plugin.file, args.plugin.settings.as_deref()).await?;
    output.line(format_args!("{} with {} fixtures", plugin.label(), files.len()));
    let mut fixtures = Vec::new();
    for file in &files {
        let result = run_fixture(file, &plugin, &counting, args.update).await.unwrap_or_else(|error| FixtureResult {
            fixture: file_name(file),
            result: Verdict::Failed,
            took_ms: None,
            instructions: None,
            memory_bytes: None,
            difference: Some(format!("{error:#}")),
        });
        output.line(&result);
        fixtures.push(result);
    }
    let failed = fixtures.iter().filter(|result| result.result == Verdict::Failed).count();
    let passed = fixtures.len() - failed;
    output.line(format_args!("{passed} passed, {failed} failed"));
    output.json(&Tested { plugin: plugin.label().to_owned(), passed, failed, fixtures });
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn find_fixtures(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| {
        format!("could not read the fixtures in {}; give their directory with --fixtures", dir.display())
    })?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            files.push(path);
        }
    }
    files.sort();
    ensure!(!files.is_empty(), "there is no .json file in {}", dir.display());
    Ok(files)
}

/// Builds the row of one fixture and compares the outcome with the expected one.
async fn run_fixture(
    file: &Path,
    plugin: &Arc<Plugin>,
    counting: &Arc<Plugin>,
    update: bool,
) -> anyhow::Result<FixtureResult> {
    let text = fs::read_to_string(file).context("it cannot be read")?;
    let fixture = Fixture::parse(&text)?;
    let (schedule, now_ms) = fixture.schedule()?;
    if !plugin.kinds().contains_key(&schedule.kind) {
        let kinds: Vec<&str> = plugin.kinds().keys().map(String::as_str).collect();
        bail!("the plugin does not serve the kind {:?}, only {}", schedule.kind, kinds.join(", "));
    }
    let trial = plugin.try_row(schedule.clone(), now_ms).await;
    let counted = counting.try_row(schedule, now_ms).await;
    let actual = outcome_to_json(&trial.outcome, now_ms);
    let (result, difference) = if fixture.expect.as_ref().is_some_and(|expect| is_expected(&actual, expect)) {
        (Verdict::Passed, None)
    } else if update {
        fs::write(file, fixture.to_text(&actual)).context("it cannot be written")?;
        (Verdict::Updated, None)
    } else {
        let expect = fixture.expect.as_ref().map(normalize).unwrap_or_default();
        (Verdict::Failed, Some(diff(&expect, &actual)))
    };
    Ok(FixtureResult {
        fixture: file_name(file),
        result,
        took_ms: Some(trial.took.as_secs_f64() * 1000.0),
        instructions: counted.fuel,
        memory_bytes: Some(trial.memory_bytes),
        difference,
    })
}

impl fmt::Display for FixtureResult {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { fixture, result, took_ms, instructions, memory_bytes, difference } = self;
        let verdict = match result {
            Verdict::Passed => "ok",
            Verdict::Updated => "updated",
            Verdict::Failed => "FAIL",
        };
        let (Some(took_ms), Some(memory_bytes)) = (took_ms, memory_bytes) else {
            return write!(formatter, "{verdict:<7} {fixture}: {}", difference.as_deref().unwrap_or_default());
        };
        let instructions = instructions.map_or_else(|| "?".to_owned(), |fuel| fuel.to_string());
        let kib = memory_bytes.div_ceil(1024);
        write!(formatter, "{verdict:<7} {fixture:<40} {took_ms:>8.2} ms {instructions:>12} instructions {kib:>7} KiB")?;
        match difference {
            Some(difference) => {
                write!(formatter, "\n{difference}    expected (-) and got (+); accept with --update")
            }
            None => Ok(()),
        }
    }
}

fn file_name(file: &Path) -> String {
    file.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
