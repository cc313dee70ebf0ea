//! The reasons why a file does not serve, as sentences for the plugin's author.

use std::path::PathBuf;

use thiserror::Error;

/// The version of the WIT package that the daemon serves, without the last number, which does not matter for
/// compatibility.
pub(in crate::plugins) const SERVED_VERSION: &str = "0.1";
/// The interface that a plugin must export.
pub(in crate::plugins) const BUILDER_INTERFACE: &str = "tidings:plugin/builder@0.1.0";

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
    #[error("it is damaged, perhaps cut off, or uses a feature of WebAssembly that this daemon does not support: {0}")]
    Damaged(String),
    #[error("it is too costly to compile: it has or needs {0}")]
    TooCostly(String),
    #[error("the process that compiles it could not be run: {0}")]
    Process(std::io::Error),
    #[error(
        "it speaks tidings:plugin {0}; this daemon serves {SERVED_VERSION}: build it with the wit/plugin.wit of this daemon"
    )]
    Version(String),
    #[error("it imports {0}")]
    Imports(String),
    #[error("it does not export {BUILDER_INTERFACE}{0}; build it for the world plugin of wit/plugin.wit")]
    NoBuilder(String),
    #[error("it does not fit wit/plugin.wit: {0}")]
    Link(String),
    #[error("its describe() failed: {0}")]
    Describe(String),
    #[error("its describe() names {0}")]
    Description(String),
    #[error("its digest is not in {}; if you trust it, add the line: {line}", .list.display())]
    NotAllowed { list: PathBuf, line: String },
    #[error("the list {} cannot be used: {reason}; write it with sha256sum, or remove it to let every plugin serve", .file.display())]
    List { file: PathBuf, reason: String },
    #[error("the kind {kind:?} is served by {} already", .by.display())]
    KindTaken { kind: String, by: PathBuf },
    #[error(
        "this version was rolled back and is quarantined ({0}); build a new one, or remove its file below quarantined/ in the state directory"
    )]
    Quarantined(String),
}

impl LoadError {
    /// Whether the allowlist is the reason. If the list changes, the same bytes may serve.
    pub(in crate::plugins) fn is_from_allowlist(&self) -> bool {
        matches!(self, Self::NotAllowed { .. } | Self::List { .. })
    }

    /// Whether the file does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Read(error) if error.kind() == std::io::ErrorKind::NotFound)
    }
}

/// The first 120 characters of a text that may be of any length, for an error.
pub(in crate::plugins) fn first_chars(text: &str) -> String {
    text.chars().take(120).collect()
}
