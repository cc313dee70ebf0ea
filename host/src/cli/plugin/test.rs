//! `tidings plugin test`: rows in, events out, with the daemon's engine and limits.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use clap::Args;

use super::fixture::{Fixture, difference, meets, normal, outcome};
use super::{PluginArgs, engine, open};
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

pub(super) async fn test(args: &TestArgs) -> anyhow::Result<ExitCode> {
    let files = files(&args.fixtures)?;
    let plugin = args.plugin.open(Metering::Time).await?;
    // Instructions are counted by code of its own: the time is that of the daemon's.
    let counting = engine(&args.plugin.state, Metering::Fuel)?;
    let counting = open(&counting, &args.plugin.file, args.plugin.settings.as_deref()).await?;
    println!("{} with {} fixtures", plugin.label(), files.len());
    let mut failed = 0;
    for file in &files {
        match one(file, &plugin, &counting, args.update).await {
            Ok(None) => {}
            Ok(Some(difference)) => {
                failed += 1;
                println!("{difference}");
            }
            Err(error) => {
                failed += 1;
                println!("FAIL    {}: {error:#}", name(file));
            }
        }
    }
    println!("{} passed, {failed} failed", files.len() - failed);
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn files(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
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

/// Passes one fixture. The answer is what to show if it does not pass.
async fn one(
    file: &Path,
    plugin: &Arc<Plugin>,
    counting: &Arc<Plugin>,
    update: bool,
) -> anyhow::Result<Option<String>> {
    let text = fs::read_to_string(file).context("it cannot be read")?;
    let fixture = Fixture::parse(&text)?;
    let (schedule, now_ms) = fixture.schedule()?;
    if !plugin.kinds().contains_key(&schedule.kind) {
        let kinds: Vec<&str> = plugin.kinds().keys().map(String::as_str).collect();
        bail!("the plugin does not serve the kind {:?}, only {}", schedule.kind, kinds.join(", "));
    }
    let trial = plugin.try_row(schedule.clone(), now_ms).await;
    let counted = counting.try_row(schedule, now_ms).await;
    let became = outcome(&trial.outcome, now_ms);
    let figures = format!(
        "{:>8.2} ms {:>12} instructions {:>7} KiB",
        trial.took.as_secs_f64() * 1000.0,
        counted.fuel.map_or_else(|| "?".to_owned(), |fuel| fuel.to_string()),
        trial.memory_bytes.div_ceil(1024)
    );
    if fixture.expect.as_ref().is_some_and(|expect| meets(&became, expect)) {
        println!("ok      {:<40} {figures}", name(file));
        return Ok(None);
    }
    if update {
        fs::write(file, fixture.text(&became)).context("it cannot be written")?;
        println!("updated {:<40} {figures}", name(file));
        return Ok(None);
    }
    let expect = fixture.expect.as_ref().map(normal).unwrap_or_default();
    let difference = difference(&expect, &became);
    Ok(Some(format!(
        "FAIL    {:<40} {figures}\n{difference}    expected (-) and got (+); accept with --update",
        name(file)
    )))
}

fn name(file: &Path) -> String {
    file.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
