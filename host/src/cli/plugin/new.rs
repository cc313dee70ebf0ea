//! `tidings plugin new`: writes a plugin that builds without changes. It has no dependencies, so cargo needs no
//! registry: its bindings to wit/plugin.wit are part of the template.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use serde::Serialize;

use crate::cli::output::Output;

/// The files of the template, each with its text, in which the name is still to be filled in.
const FILES: [(&str, &str); 9] = [
    ("Cargo.toml", include_str!("../../../template/Cargo.toml.template")),
    ("README.md", include_str!("../../../template/README.md")),
    (".gitignore", include_str!("../../../template/gitignore")),
    ("src/lib.rs", include_str!("../../../template/src/lib.rs")),
    ("src/tidings.rs", include_str!("../../../template/src/tidings.rs")),
    ("wit/plugin.wit", include_str!("../../../../wit/plugin.wit")),
    ("fixtures/event.json", include_str!("../../../template/fixtures/event.json")),
    ("fixtures/late.json", include_str!("../../../template/fixtures/late.json")),
    ("fixtures/null.json", include_str!("../../../template/fixtures/null.json")),
];
/// The placeholder for the name of the plugin.
const NAME: &str = "__NAME__";
/// The placeholder for the kind, which has the same name as the plugin.
const KIND: &str = "__KIND__";

/// The name of the new plugin, and where to write it.
#[derive(Args, Debug)]
pub(crate) struct NewArgs {
    /// The name of the plugin, and of its kind: lower-case letters, digits and hyphens
    name: String,
    /// Where to write it [default: a directory of that name, here]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// What `tidings plugin new` answers.
#[derive(Debug, Serialize)]
struct Written<'a> {
    name: &'a str,
    dir: &'a Path,
}

pub(super) fn new(args: &NewArgs, output: Output) -> anyhow::Result<ExitCode> {
    let name = &args.name;
    ensure!(
        is_valid_name(name),
        "{name:?} cannot be the name of a plugin: 1 to 64 lower-case letters, digits and single hyphens, beginning with a letter"
    );
    let dir = args.dir.clone().unwrap_or_else(|| Path::new(name).to_owned());
    if dir.exists() {
        bail!("{} exists already; choose another name, or another directory with --dir", dir.display());
    }
    for (path, text) in FILES {
        let path = dir.join(path);
        let write = || {
            fs::create_dir_all(path.parent().expect("it lies in a directory"))?;
            fs::write(&path, text.replace(NAME, name).replace(KIND, name))
        };
        write().with_context(|| format!("could not write {}", path.display()))?;
    }
    output.line(format_args!("wrote the plugin {name} into {}; its README.md says how to go on", dir.display()));
    output.json(&Written { name, dir: &dir });
    Ok(ExitCode::SUCCESS)
}

/// Whether a name can be that of a cargo package, of a file and of a kind.
fn is_valid_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.starts_with(|char: char| char.is_ascii_lowercase())
        && !name.ends_with('-')
        && !name.contains("--")
        && name.chars().all(|char| char.is_ascii_lowercase() || char.is_ascii_digit() || char == '-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_valid_name_can_be_that_of_a_package_a_file_and_a_kind() {
        for name in ["a", "game-reminder", "x2"] {
            assert!(is_valid_name(name), "{name}");
        }
        for name in ["", "A", "2x", "-a", "a-", "a--b", "a_b", "a.b", "a/b", "é", &"a".repeat(65)] {
            assert!(!is_valid_name(name), "{name}");
        }
    }
}
