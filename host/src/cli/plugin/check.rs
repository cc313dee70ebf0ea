//! `tidings plugin check`: the loader's own verdict.

use std::process::ExitCode;

use super::super::printable;
use super::PluginArgs;
use crate::plugins::{Metering, Plugin};

pub(super) async fn check(args: &PluginArgs) -> anyhow::Result<ExitCode> {
    let plugin = args.open(Metering::Time).await?;
    report(&plugin);
    Ok(ExitCode::SUCCESS)
}

/// Says what the daemon would serve.
pub(super) fn report(plugin: &Plugin) {
    println!("{} would serve as {}", plugin.file().display(), plugin.label());
    for (name, kind) in plugin.kinds() {
        println!("  kind      {name}: {}", printable(&kind.summary));
        if let Some(example) = &kind.example {
            println!("            for example {}", printable(example));
        }
    }
    println!("  sha-256   {}", plugin.digest());
    println!("  size      {} KiB", plugin.size().div_ceil(1024));
    let limits = plugin.limits();
    println!(
        "  limits    cpu-ms = {}, wall-ms = {}, memory-mib = {}, output-kib = {}",
        limits.cpu_ms, limits.wall_ms, limits.memory_mib, limits.output_kib
    );
    let (ours, inert): (Vec<&String>, Vec<&String>) =
        plugin.imports().iter().partition(|name| name.starts_with("tidings:"));
    let list = |names: Vec<&String>| {
        if names.is_empty() { "nothing".to_owned() } else { names.into_iter().cloned().collect::<Vec<_>>().join(", ") }
    };
    println!("  imports   {}", list(ours));
    println!("  inert     {} (nothing is behind what is offered of WASI)", list(inert));
}
