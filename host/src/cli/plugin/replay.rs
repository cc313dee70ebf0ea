//! `tidings plugin replay`: rows that were delivered, built again with another version of their plugin, and how their
//! events would differ. Nothing is published, and nothing is written.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use clap::Args;
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use crate::cli::output::Output;
use crate::cli::plugin::fixture::{difference, outcome};
use crate::cli::plugin::{PluginArgs, engine, open};
use crate::cli::{printable, usage};
use crate::config::DatabaseArgs;
use crate::model::event::{BuildError, BuiltEvent};
use crate::plugins::{Engine, Metering, Plugin};
use crate::store::{Delivered, Store};

/// What to build again, and with what.
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

/// How the events of one row compare.
enum Comparison {
    /// They are the same, to the byte.
    Same,
    /// They differ.
    Differs(Value, Value),
    /// What was sent is not known any more, only that this is something else.
    Unknown(Value),
}

/// How the events of the rows compare.
#[derive(Debug, Default, Serialize)]
struct Compared {
    same: usize,
    differ: usize,
    /// How many would not become an event any more.
    broken: usize,
    /// Those that differ.
    rows: Vec<Differing>,
}

/// A row whose event would be another.
#[derive(Debug, Serialize)]
struct Differing {
    id: Uuid,
    kind: String,
    key: Option<String>,
    /// What was sent; null = that is not known any more.
    old: Option<Value>,
    new: Value,
}

pub(super) async fn replay(args: ReplayArgs, output: Output) -> anyhow::Result<ExitCode> {
    let url = match args.database.check() {
        Ok(url) => url,
        Err(mistakes) => return Ok(usage(&mistakes)),
    };
    let engine = engine(&args.plugin.state, Metering::Time)?;
    let new = open(&engine, &args.plugin.file, args.plugin.settings.as_deref()).await?;
    let old = match &args.against {
        Some(file) => vec![open(&engine, file, None).await?],
        None => serving(&engine, args.plugin_dir.as_deref(), &new).await?,
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
                output.line(format_args!("differs {title}\n{}", difference(&old, &new).trim_end()));
                (Some(old), new)
            }
            Comparison::Unknown(new) => {
                let by = row.plugin.as_deref().unwrap_or("a plugin that is not known");
                output.line(format_args!(
                    "differs {title}\n    from what {by} sent, which cannot be built here any more; now it would be\n{}",
                    difference(&Value::Null, &new).trim_end()
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

/// The plugins in the directory that serve kinds of `new`.
async fn serving(
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

/// Compares what the new version made of a row with what was sent: by the digest of the history if they are the same, else
/// with what the old version makes of the row at the same time.
async fn compare(row: &Delivered, built: Result<BuiltEvent, BuildError>, old: &[Arc<Plugin>]) -> Comparison {
    let now_ms = row.now_ms();
    let new = outcome(&built, now_ms);
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
    let old = outcome(&before, now_ms);
    if old == new && built.is_ok() {
        // The same to a reader of JSON, and other bytes.
        return Comparison::Differs(bytes_of(&before), bytes_of(&built));
    }
    Comparison::Differs(old, new)
}

fn bytes_of(outcome: &Result<BuiltEvent, BuildError>) -> Value {
    let body = outcome.as_ref().map(|built| String::from_utf8_lossy(built.event.body()).into_owned());
    Value::String(body.unwrap_or_default())
}
