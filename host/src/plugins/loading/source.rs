//! Reads the bytes of one plugin and of its settings file, and notices if a file is still being written.

use std::fmt;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use ring::digest::{SHA256, digest};

use crate::model::event::hex;
use crate::plugins::loading::load_error::LoadError;

/// A larger plugin is not read. Plugins that contain the interpreter of another language have 10 to 40 MiB.
pub(in crate::plugins) const MAX_WASM_BYTES: u64 = 64 * 1024 * 1024;
/// A larger settings file is not read. Settings are usually less than a page of text.
const MAX_SETTINGS_BYTES: u64 = 64 * 1024;

/// The bytes of one version of a plugin.
#[derive(Clone)]
pub(in crate::plugins) struct Source {
    /// The component.
    pub(in crate::plugins) wasm: Vec<u8>,
    /// The text of NAME.toml, if there is one.
    pub(in crate::plugins) settings: Option<String>,
    digest: String,
}

impl fmt::Debug for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Source").field("digest", &self.digest).finish_non_exhaustive()
    }
}

/// Identifies a version: the SHA-256 of the component and, if it has settings, the beginning of theirs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::plugins) struct Identity(String);

impl fmt::Display for Identity {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// The `stat` data of a file. If any of them differs, the file has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::plugins) struct Stat {
    device: u64,
    inode: u64,
    len: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    regular: bool,
}

impl Stat {
    /// Reads the `stat` data of the file that `path` leads to; `None` = there is none, or they cannot be read.
    pub(in crate::plugins) fn of(path: &Path) -> Option<Self> {
        std::fs::metadata(path).ok().as_ref().map(Self::from)
    }
}

#[cfg(test)]
impl Stat {
    /// Makes them those of a file with another length.
    pub(in crate::plugins) fn set_len(&mut self, len: u64) {
        self.len = len;
    }
}

impl From<&std::fs::Metadata> for Stat {
    fn from(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            len: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            regular: metadata.is_file(),
        }
    }
}

impl Source {
    pub(in crate::plugins) fn new(wasm: Vec<u8>, settings: Option<String>) -> Self {
        let digest = hex(digest(&SHA256, &wasm).as_ref());
        Self { wasm, settings, digest }
    }

    /// Reads `file`, and the settings from the file `settings`. If `settings` is `None`, reads NAME.toml beside `file`
    /// if it exists.
    pub(in crate::plugins) fn read(file: &Path, settings: Option<&Path>) -> Result<Self, LoadError> {
        let default_path = settings_path(file);
        let text = match read_stable_file(settings.unwrap_or(&default_path), MAX_SETTINGS_BYTES) {
            Ok(bytes) => Some(String::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())),
            Err(LoadError::Read(error)) if error.kind() == std::io::ErrorKind::NotFound && settings.is_none() => None,
            Err(error) => Some(Err(error.to_string())),
        };
        let text = text.transpose().map_err(|reason| LoadError::Settings { file: default_path, reason })?;
        Ok(Self::new(read_stable_file(file, MAX_WASM_BYTES)?, text))
    }

    /// The SHA-256 of the component, in hexadecimal.
    pub(in crate::plugins) fn digest(&self) -> &str {
        &self.digest
    }

    pub(in crate::plugins) fn identity(&self) -> Identity {
        Identity(match &self.settings {
            None => self.digest.clone(),
            Some(text) => format!("{}-{}", self.digest, hex(&digest(&SHA256, text.as_ref()).as_ref()[..8])),
        })
    }
}

/// The path of `NAME.toml` beside `NAME.wasm`.
pub(in crate::plugins) fn settings_path(wasm: &Path) -> PathBuf {
    wasm.with_extension("toml")
}

/// Reads a regular file of at most `limit` bytes. Fails if the file changes meanwhile.
pub(in crate::plugins) fn read_stable_file(path: &Path, limit: u64) -> Result<Vec<u8>, LoadError> {
    // The type is checked before the file is opened, since opening a pipe would wait for a writer. It is checked again
    // after a non-blocking open, in case the file was replaced in between.
    if !std::fs::metadata(path).map_err(LoadError::Read)?.is_file() {
        return Err(LoadError::NotAFile);
    }
    let nonblocking = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).expect("O_NONBLOCK is one of the lower bits");
    let mut file =
        std::fs::OpenOptions::new().read(true).custom_flags(nonblocking).open(path).map_err(LoadError::Read)?;
    let before = file.metadata().map_err(LoadError::Read)?;
    if !before.is_file() {
        return Err(LoadError::NotAFile);
    }
    if before.len() > limit {
        return Err(LoadError::TooLarge { bytes: before.len(), limit });
    }
    let mut bytes = Vec::with_capacity(usize::try_from(before.len()).unwrap_or(0));
    (&mut file).take(limit + 1).read_to_end(&mut bytes).map_err(LoadError::Read)?;
    let after = file.metadata().map_err(LoadError::Read)?;
    if Stat::from(&before) != Stat::from(&after) || bytes.len() as u64 != after.len() {
        return Err(LoadError::Changing);
    }
    Ok(bytes)
}
