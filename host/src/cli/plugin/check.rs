//! `tidings plugin check`: loads a plugin as the daemon does, and shows the result.

use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use crate::cli::output::Output;
use crate::cli::plugin::PluginArgs;
use crate::cli::printable;
use crate::plugins::{Limits, Metering, Plugin};

/// What `tidings plugin check` answers about a plugin that the daemon would accept.
#[derive(Debug, Serialize)]
pub(super) struct Checked {
    file: PathBuf,
    /// `name@version+digest8`.
    plugin: String,
    kinds: Vec<CheckedKind>,
    /// SHA-256 of the file.
    digest: String,
    size_bytes: usize,
    limits: Limits,
    /// The imports from `tidings:plugin`.
    imports: Vec<String>,
    /// The imports from WASI, which give access to nothing.
    inert: Vec<String>,
}

/// A kind that the plugin would serve.
#[derive(Debug, Serialize)]
struct CheckedKind {
    kind: String,
    summary: String,
    payload_schema: Option<String>,
    example: Option<String>,
}

pub(super) async fn check(args: &PluginArgs, output: Output) -> anyhow::Result<ExitCode> {
    let plugin = args.open(Metering::Time).await?;
    output.answer(&Checked::of(&plugin));
    Ok(ExitCode::SUCCESS)
}

impl Checked {
    pub(super) fn of(plugin: &Plugin) -> Self {
        let kinds = plugin.kinds().iter().map(|(name, kind)| CheckedKind {
            kind: name.clone(),
            summary: kind.summary.clone(),
            payload_schema: kind.payload_schema.clone(),
            example: kind.example.clone(),
        });
        let (imports, inert) = plugin.imports().iter().cloned().partition(|name| name.starts_with("tidings:"));
        Self {
            file: plugin.file().to_owned(),
            plugin: plugin.label().to_owned(),
            kinds: kinds.collect(),
            digest: plugin.digest().to_owned(),
            size_bytes: plugin.size(),
            limits: plugin.limits(),
            imports,
            inert,
        }
    }
}

impl fmt::Display for Checked {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(formatter, "{} would serve as {}", self.file.display(), self.plugin)?;
        for CheckedKind { kind, summary, example, .. } in &self.kinds {
            writeln!(formatter, "  kind      {kind}: {}", printable(summary))?;
            if let Some(example) = example {
                writeln!(formatter, "            for example {}", printable(example))?;
            }
        }
        writeln!(formatter, "  sha-256   {}", self.digest)?;
        writeln!(formatter, "  size      {} KiB", self.size_bytes.div_ceil(1024))?;
        let Limits { cpu_ms, wall_ms, memory_mib, output_kib } = self.limits;
        writeln!(
            formatter,
            "  limits    cpu-ms = {cpu_ms}, wall-ms = {wall_ms}, memory-mib = {memory_mib}, output-kib = {output_kib}"
        )?;
        let list = |names: &[String]| if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
        writeln!(formatter, "  imports   {}", list(&self.imports))?;
        write!(formatter, "  inert     {} (these imports from WASI give access to nothing)", list(&self.inert))
    }
}
