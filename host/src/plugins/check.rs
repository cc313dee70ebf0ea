//! What is checked of a file before it may serve: that it can be read, is a component, and is of our world. The words are
//! for the plugin's author; the linker's own are about types.

use std::path::{Path, PathBuf};

use thiserror::Error;
use wasmtime::component::Component;

use super::engine::{Engine, OFFERED};

/// A larger file is not read. Interpreters of other languages are 10 to 40 MiB.
const FILE_BYTES: u64 = 64 * 1024 * 1024;
/// The interface that a plugin must export.
const BUILDER: &str = "tidings:plugin/builder@0.1.0";

/// Why a file does not serve.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum LoadError {
    #[error("it cannot be read: {0}")]
    Read(std::io::Error),
    #[error("it is not a regular file")]
    NotAFile,
    #[error("it has {0} bytes, more than {FILE_BYTES}")]
    TooLarge(u64),
    #[error(
        "it is {0}, not a WebAssembly component; build it with `cargo build --target wasm32-wasip2` or `cargo component build`"
    )]
    NotAComponent(&'static str),
    #[error("{} cannot be used: {reason}", .file.display())]
    Settings { file: PathBuf, reason: String },
    #[error("it is damaged or uses what this daemon does not know: {0}")]
    Compile(String),
    #[error("it imports {0}, which plugins are not given: they have no network, files, environment or clock")]
    Imports(String),
    #[error("it does not export {BUILDER}{0}")]
    NoBuilder(String),
    #[error("it does not fit wit/plugin.wit: {0}")]
    Link(String),
    #[error("its describe() failed: {0}")]
    Describe(String),
    #[error("its describe() names {0}")]
    Description(String),
    #[error("the kind {kind:?} is served by {} already", .by.display())]
    KindTaken { kind: String, by: PathBuf },
}

/// Reads a regular file that is not too large.
pub(super) fn read(file: &Path) -> Result<Vec<u8>, LoadError> {
    let metadata = std::fs::metadata(file).map_err(LoadError::Read)?;
    if !metadata.is_file() {
        return Err(LoadError::NotAFile);
    }
    if metadata.len() > FILE_BYTES {
        return Err(LoadError::TooLarge(metadata.len()));
    }
    std::fs::read(file).map_err(LoadError::Read)
}

/// What the bytes are, if they are not a component.
pub(super) fn other_than_component(bytes: &[u8]) -> Option<&'static str> {
    match bytes {
        [] => Some("empty"),
        // The magic number, the version of the component format, and its layer.
        [0, b'a', b's', b'm', _, _, 1, 0, ..] => None,
        [0, b'a', b's', b'm', _, _, 0, 0, ..] => Some("a core module"),
        [0x7f, b'E', b'L', b'F', ..] => Some("native or precompiled code"),
        [b'(', ..] => Some("WebAssembly text"),
        [0, b'a', b's', b'm', ..] => Some("cut off"),
        _ => Some("something else"),
    }
}

/// Checks by name what is imported and exported, since the linker's own words are about types.
pub(super) fn check_world(engine: &Engine, component: &Component) -> Result<(), LoadError> {
    let component_type = component.component_type();
    let missing: Vec<String> = component_type
        .imports(&engine.wasmtime)
        .map(|(name, _)| name.to_owned())
        .filter(|name| !is_offered(name))
        .collect();
    if !missing.is_empty() {
        return Err(LoadError::Imports(missing.join(", ")));
    }
    if component.get_export_index(None, BUILDER).is_none() {
        let exports: Vec<&str> = component_type.exports(&engine.wasmtime).map(|(name, _)| name).collect();
        let exported = if exports.is_empty() {
            ", nor anything else".to_owned()
        } else {
            format!(", only {}", exports.join(", "))
        };
        return Err(LoadError::NoBuilder(exported));
    }
    Ok(())
}

fn is_offered(import: &str) -> bool {
    let (interface, version) = import.split_once('@').unwrap_or((import, ""));
    OFFERED.iter().any(|(offered, track)| interface == *offered && version.starts_with(track))
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
    fn what_is_no_component_is_named() {
        assert_eq!(other_than_component(b""), Some("empty"));
        assert_eq!(other_than_component(b"\0asm\x01\0\0\0"), Some("a core module"));
        assert_eq!(other_than_component(b"\0asm\x0d\0\x01\0"), None);
        assert_eq!(other_than_component(b"\0asm\x0d"), Some("cut off"));
        assert_eq!(other_than_component(b"(component)"), Some("WebAssembly text"));
        assert_eq!(other_than_component(b"\x7fELF"), Some("native or precompiled code"));
        assert_eq!(other_than_component(b"MZ"), Some("something else"));
    }

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
    fn a_kind_is_what_the_table_takes() {
        for kind in ["a", "0", "game-reminder", "a.b_c-d", &"k".repeat(100)] {
            assert!(is_kind(kind), "{kind}");
        }
        for kind in ["", "-a", "A", "a b", "a/b", "é", &"k".repeat(101)] {
            assert!(!is_kind(kind), "{kind}");
        }
    }
}
