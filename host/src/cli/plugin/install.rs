//! `tidings plugin install`: checks a plugin, copies it to a hidden file in the plugin directory, syncs it to disk, and
//! renames it. A daemon therefore never sees half a file.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use serde::Serialize;

use crate::cli::output::Output;
use crate::cli::plugin::check::Checked;
use crate::cli::plugin::{PluginArgs, create_engine, open};
use crate::plugins::{Allowlist, Metering};

/// What to install, and where.
#[derive(Args, Debug)]
pub(crate) struct InstallArgs {
    #[command(flatten)]
    plugin: PluginArgs,
    /// The daemon's plugin directory
    #[arg(long, env = "TIDINGS_PLUGIN_DIR", value_name = "DIR")]
    plugin_dir: PathBuf,
    /// The name there, without .wasm [default: the name that the plugin gives itself]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

/// What `tidings plugin install` answers.
#[derive(Debug, Serialize)]
struct Installed {
    #[serde(flatten)]
    checked: Checked,
    installed_as: PathBuf,
    /// Why the daemon does not serve it yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

pub(super) async fn install(args: &InstallArgs, output: Output) -> anyhow::Result<ExitCode> {
    let dir = &args.plugin_dir;
    ensure!(dir.is_dir(), "{} is not a directory; give the daemon's plugin directory with --plugin-dir", dir.display());
    let engine = create_engine(&args.plugin.state, Metering::Time)?;
    let plugin = open(&engine, &args.plugin.file, args.plugin.settings.as_deref()).await?;
    let stem = args.name.as_deref().unwrap_or(plugin.name());
    ensure!(
        !stem.starts_with('.') && !stem.contains('/'),
        "{stem:?} cannot be the name of a file; give one with --name"
    );
    let target = dir.join(format!("{stem}.wasm"));

    for entry in fs::read_dir(dir)? {
        let other = entry?.path();
        let hidden = other.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if hidden || other == target || other.extension().is_none_or(|extension| extension != "wasm") {
            continue;
        }
        // A file that the daemon refuses occupies no kind.
        let Ok(other) = open(&engine, &other, None).await else { continue };
        if let Some(kind) = plugin.kinds().keys().find(|kind| other.kinds().contains_key(*kind)) {
            bail!(
                "the kind {kind:?} is served by {} already; remove that file, or replace it by giving its name with --name",
                other.file().display()
            );
        }
    }

    let beside = args.plugin.file.with_extension("toml");
    let settings = args.plugin.settings.clone().or_else(|| beside.exists().then_some(beside));
    // The settings before the plugin: only the old plugin can be loaded with the new settings, and only for a moment.
    if let Some(settings) = settings {
        copy_atomically(&settings, &target.with_extension("toml"))?;
    }
    copy_atomically(&args.plugin.file, &target)?;
    let allowed = Allowlist::read(dir).and_then(|allowed| allowed.check(plugin.digest(), &format!("{stem}.wasm")));
    let problem = allowed.err().map(|error| error.to_string());
    let installed = Installed { checked: Checked::of(&plugin), installed_as: target, problem };
    output.line(format_args!("{}\ninstalled as {}", installed.checked, installed.installed_as.display()));
    if let Some(problem) = &installed.problem {
        output.line(format_args!("it does not serve yet: {problem}"));
    }
    output.json(&installed);
    Ok(ExitCode::SUCCESS)
}

/// Copies `from` to `to`. A reader of `to` sees the whole file or none of it.
fn copy_atomically(from: &Path, to: &Path) -> anyhow::Result<()> {
    let name = to.file_name().expect("it has one").to_string_lossy();
    let temporary = to.with_file_name(format!(".{name}.{}", std::process::id()));
    let copy = || {
        let bytes = fs::read(from)?;
        let mut file = File::create(&temporary)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, to)?;
        File::open(to.parent().expect("it lies in a directory"))?.sync_all()
    };
    copy().with_context(|| {
        let _ = fs::remove_file(&temporary);
        format!("could not write {}", to.display())
    })
}
