//! What is checked of a component before it may serve: that it is of our world. The words are for the plugin's author;
//! the linker's own are about types.

use std::collections::BTreeMap;
use std::path::PathBuf;

use thiserror::Error;

use super::engine::OFFERED;
use super::inspect::World;

/// The package whose world plugins are of.
const PACKAGE: &str = "tidings:plugin/";
/// The version of the package that is served, without the last number, which tells nothing about compatibility.
const SERVED: &str = "0.1";
/// The interface that a plugin must export.
const BUILDER: &str = "tidings:plugin/builder@0.1.0";
/// What its name begins with in every compatible version.
const BUILDER_TRACK: &str = "tidings:plugin/builder@0.1.";

/// Why a file does not serve.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum LoadError {
    #[error("it cannot be read: {0}")]
    Read(std::io::Error),
    #[error("it is not a regular file")]
    NotAFile,
    #[error("it has {bytes} bytes, more than {limit}")]
    TooLarge { bytes: u64, limit: u64 },
    #[error("it keeps changing while it is read; copy it aside and rename it, as `tidings plugin install` does")]
    Changing,
    #[error(
        "it is {0}, not a WebAssembly component; build it with `cargo build --target wasm32-wasip2` or `cargo component build`"
    )]
    NotAComponent(&'static str),
    #[error("{} cannot be used: {reason}", .file.display())]
    Settings { file: PathBuf, reason: String },
    #[error("it is damaged, cut off perhaps, or uses what this daemon does not know: {0}")]
    Damaged(String),
    #[error("it is too costly to compile: it has or needs {0}")]
    TooCostly(String),
    #[error("the process that compiles it could not be run: {0}")]
    Process(std::io::Error),
    #[error("what was compiled of it could not be written to {}; is the disk full?", .0.display())]
    NotKept(PathBuf),
    #[error(
        "it speaks tidings:plugin {0}; this daemon serves {SERVED}: build it with the wit/plugin.wit of this daemon"
    )]
    Version(String),
    #[error("it imports {0}")]
    Imports(String),
    #[error("it does not export {BUILDER}{0}; build it for the world plugin of wit/plugin.wit")]
    NoBuilder(String),
    #[error("it does not fit wit/plugin.wit: {0}")]
    Link(String),
    #[error("its describe() failed: {0}")]
    Describe(String),
    #[error("its describe() names {0}")]
    Description(String),
    #[error("the kind {kind:?} is served by {} already", .by.display())]
    KindTaken { kind: String, by: PathBuf },
    #[error(
        "this version was rolled back and is quarantined ({0}); build a new one, or remove its file below quarantined/ in the state directory"
    )]
    Quarantined(String),
}

impl LoadError {
    /// There is no such file.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Read(error) if error.kind() == std::io::ErrorKind::NotFound)
    }
}

/// Checks by name what is imported and exported.
pub(super) fn check_world(world: &World) -> Result<(), LoadError> {
    let World { imports, exports } = world;
    if let Some(version) = imports.iter().chain(exports).find_map(|name| foreign_version(name)) {
        return Err(LoadError::Version(version.to_owned()));
    }
    // Each reason once, behind all that it is the reason for.
    let mut missing: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for import in imports.iter().filter(|name| !is_offered(name)) {
        missing.entry(why_not(import)).or_default().push(import);
    }
    if !missing.is_empty() {
        let missing: Vec<String> =
            missing.into_iter().map(|(why, imports)| format!("{}: {why}", imports.join(", "))).collect();
        return Err(LoadError::Imports(missing.join("; ")));
    }
    if !exports.iter().any(|name| name.starts_with(BUILDER_TRACK)) {
        let exported = if exports.is_empty() {
            ", nor anything else".to_owned()
        } else {
            format!(", only {}", exports.join(", "))
        };
        return Err(LoadError::NoBuilder(exported));
    }
    Ok(())
}

/// The version of our package in a name, without its last number, if it is another than the one that is served.
fn foreign_version(name: &str) -> Option<&str> {
    let (_, version) = name.strip_prefix(PACKAGE)?.split_once('@')?;
    // A version before a release is compatible with itself only.
    let end = if version.contains('-') { None } else { version.rfind('.') };
    let track = &version[..end.unwrap_or(version.len())];
    (track != SERVED).then_some(track)
}

fn is_offered(import: &str) -> bool {
    let (interface, version) = import.split_once('@').unwrap_or((import, ""));
    OFFERED.iter().any(|(offered, track)| interface == *offered && version.starts_with(track))
}

/// Why an import is not there, and what an author can do.
fn why_not(import: &str) -> &'static str {
    let interface = import.split('@').next().unwrap_or(import);
    if interface.starts_with("wasi:sockets") || interface.starts_with("wasi:http") {
        "the network, which no plugin has; leave out what needs it (in JavaScript `--disable http fetch-event`, in Python `--stub-wasi`)"
    } else if OFFERED.iter().any(|(offered, _)| interface == *offered) {
        "of a version that is not served"
    } else if interface.starts_with("wasi:") {
        "a part of WASI that plugins are not given"
    } else {
        "not known to this daemon; a plugin may import tidings:plugin/host and the inert parts of WASI 0.2"
    }
}

pub(super) fn is_kind(kind: &str) -> bool {
    let mut bytes = kind.bytes();
    let first = bytes.next().is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    first
        && kind.len() <= 100
        && bytes.all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_inert_interfaces_of_the_known_versions_are_offered() {
        for name in ["tidings:plugin/host@0.1.0", "wasi:cli/stderr@0.2.12", "wasi:random/random@0.2.0"] {
            assert!(is_offered(name), "{name}");
        }
        for name in [
            "wasi:sockets/tcp@0.2.0",
            "wasi:http/types@0.2.0",
            "wasi:cli/stderr@0.3.0",
            "tidings:plugin/host@0.9.0",
            "env",
        ] {
            assert!(!is_offered(name), "{name}");
        }
    }

    #[test]
    fn another_version_of_our_package_is_told_from_a_compatible_one() {
        assert_eq!(foreign_version("tidings:plugin/builder@0.1.0"), None);
        assert_eq!(foreign_version("tidings:plugin/host@0.1.7"), None);
        assert_eq!(foreign_version("tidings:plugin/builder@0.9.3"), Some("0.9"));
        assert_eq!(foreign_version("tidings:plugin/types@1.0.0"), Some("1.0"));
        assert_eq!(foreign_version("tidings:plugin/types@0.1.0-rc.1"), Some("0.1.0-rc.1"));
        assert_eq!(foreign_version("wasi:cli/stderr@0.2.0"), None);
    }

    #[test]
    fn a_kind_is_what_the_table_takes() {
        for kind in ["a", "0", "game-reminder", "a.b_c-d", &"k".repeat(100)] {
            assert!(is_kind(kind), "{kind}");
        }
        for kind in ["", "-a", "A", "a b", "a/b", "é", &"k".repeat(101)] {
            assert!(!is_kind(kind), "{kind}");
        }
    }
}
