//! `tidings plugin replay`: builds delivered rows again with another version of their plugin, and shows how the events
//! would differ. It publishes nothing and writes nothing.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use clap::Args;
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use crate::cli::output::Output;
use crate::cli::plugin::fixture::{diff, outcome_to_json};
use crate::cli::plugin::{PluginArgs, create_engine, open};
use crate::cli::{fail_usage, printable};
use crate::config::DatabaseArgs;
use crate::model::event::{BuildError, BuiltEvent};
use crate::plugins::{Engine, Metering, Plugin};
use crate::store::{Delivered, Store};

/// Which rows to build again, and with which version.
#[derive(Args, Debug)]
pub(crate) struct ReplayArgs {
    #[command(flatten)]
    plugin: PluginArgs,
    /// How many rows: the last that were delivered of the kinds that the plugin serves
    #[arg(long, value_name = "N", default_value_t = 100)]
    last: u32,
    /// The version to compare with, if it is not the one in the plugin directory
    #[arg(long, value_name = "WASM")]
    against: Option<PathBuf>,
    /// The daemon's plugin directory
    #[arg(long, env = "TIDINGS_PLUGIN_DIR", value_name = "DIR")]
    plugin_dir: Option<PathBuf>,
    #[command(flatten)]
    database: DatabaseArgs,
}

/// How the new event of one row compares with the one that was sent.
enum Comparison {
    /// They are the same, to the byte.
    Same,
    /// They differ: the old one and the new one.
    Differs(Value, Value),
    /// The digest shows that they differ, but no plugin here can build the one that was sent.
    Unknown(Value),
}

/// What `tidings plugin replay` answers.
#[derive(Debug, Default, Serialize)]
struct Compared {
    same: usize,
    differ: usize,
    /// How many rows the new version would not turn into an event.
    broken: usize,
    /// The rows whose events differ.
    rows: Vec<Differing>,
}

/// A row whose event would be different.
#[derive(Debug, Serialize)]
struct Differing {
    id: Uuid,
    kind: String,
    key: Option<String>,
    /// What was sent; null = it cannot be built here.
    old: Option<Value>,
    new: Value,
}

pub(super) async fn replay(args: ReplayArgs, output: Output) -> anyhow::Result<ExitCode> {
    let url = match args.database.check() {
        Ok(url) => url,
        Err(errors) => return Ok(fail_usage(&errors)),
    };
    let engine = create_engine(&args.plugin.state, Metering::Time)?;
    let new = open(&engine, &args.plugin.file, args.plugin.settings.as_deref()).await?;
    let old = match &args.against {
        Some(file) => vec![open(&engine, file, None).await?],
        None => open_serving(&engine, args.plugin_dir.as_deref(), &new).await?,
    };
    let kinds: Vec<String> = new.kinds().keys().cloned().collect();
    let rows = Store::new(&url, 1).last_delivered(&kinds, args.last).await?;
    ensure!(!rows.is_empty(), "no row of the kinds {} is in the history", kinds.join(", "));

    let mut compared = Compared::default();
    for row in rows {
        let (id, kind, key) = (row.schedule.id, row.schedule.kind.clone(), row.schedule.key.clone());
        let title = printable(&format!("{id}  {kind}  {}", key.as_deref().unwrap_or("-")));
        let now_ms = row.now_ms();
        let built = new.try_row(row.schedule.clone(), now_ms).await.outcome;
        compared.broken += usize::from(built.is_err());
        let (old, new) = match compare(&row, built, &old).await {
            Comparison::Same => {
                compared.same += 1;
                output.line(format_args!("same    {title}"));
                continue;
            }
            Comparison::Differs(old, new) => {
                output.line(format_args!("differs {title}\n{}", diff(&old, &new).trim_end()));
                (Some(old), new)
            }
            Comparison::Unknown(new) => {
                let by = row.plugin.as_deref().unwrap_or("a plugin that is not known");
                output.line(format_args!(
                    "differs {title}\n    from what {by} sent, which cannot be built here any more; now it would be\n{}",
                    diff(&Value::Null, &new).trim_end()
                ));
                (None, new)
            }
        };
        compared.differ += 1;
        compared.rows.push(Differing { id, kind, key, old, new });
    }
    let Compared { same, differ, broken, .. } = compared;
    output.line(format_args!("{same} same, {differ} differ; {broken} would not become an event any more"));
    output.json(&compared);
    Ok(if broken == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Loads the plugins of the directory that serve kinds of `new`.
async fn open_serving(
    engine: &Arc<Engine>,
    dir: Option<&std::path::Path>,
    new: &Plugin,
) -> anyhow::Result<Vec<Arc<Plugin>>> {
    let Some(dir) = dir else { return Ok(Vec::new()) };
    let mut plugins = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("could not read {}", dir.display()))? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if hidden || path.extension().is_none_or(|extension| extension != "wasm") {
            continue;
        }
        if let Ok(plugin) = open(engine, &path, None).await
            && plugin.kinds().keys().any(|kind| new.kinds().contains_key(kind))
        {
            plugins.push(plugin);
        }
    }
    Ok(plugins)
}

/// Compares the outcome of the new version with the event that was sent. An old version that serves the kind builds the
/// row again at the same time; without one, the digest in the history tells only whether the events are the same.
async fn compare(row: &Delivered, built: Result<BuiltEvent, BuildError>, old: &[Arc<Plugin>]) -> Comparison {
    let now_ms = row.now_ms();
    let new = outcome_to_json(&built, now_ms);
    let Some(plugin) = old.iter().find(|plugin| plugin.kinds().contains_key(&row.schedule.kind)) else {
        let digest = built.ok().map(|built| built.event.digest());
        return if digest.is_some() && digest == row.event_digest {
            Comparison::Same
        } else {
            Comparison::Unknown(new)
        };
    };
    let before = plugin.try_row(row.schedule.clone(), now_ms).await.outcome;
    let ttl = |outcome: &Result<BuiltEvent, BuildError>| outcome.as_ref().ok().map(|built| built.expires_ms);
    let digest = |outcome: &Result<BuiltEvent, BuildError>| outcome.as_ref().ok().map(|built| built.event.digest());
    if digest(&built).is_some() && digest(&built) == digest(&before) && ttl(&built) == ttl(&before) {
        return Comparison::Same;
    }
    let old = outcome_to_json(&before, now_ms);
    if old == new && built.is_ok() {
        // Equal as JSON, but different bytes.
        return Comparison::Differs(body_text(&before), body_text(&built));
    }
    Comparison::Differs(old, new)
}

fn body_text(outcome: &Result<BuiltEvent, BuildError>) -> Value {
    let body = outcome.as_ref().map(|built| String::from_utf8_lossy(built.event.body()).into_owned());
    Value::String(body.unwrap_or_default())
}
