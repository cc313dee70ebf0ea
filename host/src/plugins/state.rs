//! What the daemon remembers of plugins across restarts, in a private directory: compiled code, the last good bytes of
//! every kind, and the digests that were rolled back. All of it may be lost without a row being lost.
//!
//! ```text
//!   cache/                    compiled code, wasmtime's own
//!   quarantined/IDENTITY      why a version was rolled back; removing the file lets it serve again
//!   good/DIR8/bytes/IDENTITY.wasm, .toml    versions that have built rows
//!   good/DIR8/kinds/KIND      which of them built the kind last, and its file's name
//! ```
//!
//! Whoever can write here can make the daemon run code of theirs, so nobody else may.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use ring::digest::{SHA256, digest};
use thiserror::Error;

use super::source::{Identity, Source};
use crate::event::hex;

/// What lies in the directory.
const PARTS: [&str; 3] = ["cache", "quarantined", "good"];

/// Why a directory cannot be used.
#[derive(Debug, Error)]
pub enum StateError {
    /// It belongs to another user, who could make us run code.
    #[error("the state directory {} belongs to another user (uid {owner}): give one of its own with TIDINGS_STATE_DIR", .dir.display())]
    Foreign {
        /// The directory.
        dir: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// It cannot be made or written.
    #[error("the state directory {} cannot be used: give another one with TIDINGS_STATE_DIR", .dir.display())]
    Unusable {
        /// The directory.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The directory.
#[derive(Clone, Debug)]
pub struct StateDir(PathBuf);

/// What is remembered of one plugin directory.
#[derive(Debug)]
pub(super) struct Memory {
    state: StateDir,
    good: PathBuf,
}

impl StateDir {
    /// Makes the directory if need be, and sees to it that nobody else can read or write it.
    ///
    /// # Errors
    ///
    /// When that cannot be.
    pub fn open(dir: &Path) -> Result<Self, StateError> {
        let unusable = |source| StateError::Unusable { dir: dir.to_owned(), source };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(unusable)?;
        let dir = dir.canonicalize().map_err(unusable)?;
        let metadata = dir.metadata().map_err(unusable)?;
        if metadata.uid() != rustix::process::geteuid().as_raw() {
            return Err(StateError::Foreign { dir, owner: metadata.uid() });
        }
        if metadata.mode() & 0o077 != 0 {
            std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).map_err(unusable)?;
        }
        for part in PARTS {
            std::fs::create_dir_all(dir.join(part)).map_err(unusable)?;
        }
        Ok(Self(dir))
    }

    /// Whether [`StateDir::open`] could use the directory, without making or changing anything; `false` = it is not there
    /// yet.
    ///
    /// # Errors
    ///
    /// When it could not.
    pub fn check(dir: &Path) -> Result<bool, StateError> {
        let unusable = |source| StateError::Unusable { dir: dir.to_owned(), source };
        let metadata = match dir.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            metadata => metadata.map_err(unusable)?,
        };
        if !metadata.is_dir() {
            return Err(unusable(io::ErrorKind::NotADirectory.into()));
        }
        if metadata.uid() != rustix::process::geteuid().as_raw() {
            return Err(StateError::Foreign { dir: dir.to_owned(), owner: metadata.uid() });
        }
        let parts = PARTS.map(|part| dir.join(part)).into_iter().filter(|part| part.exists());
        for part in std::iter::once(dir.to_owned()).chain(parts) {
            let access = rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
            rustix::fs::access(&part, access).map_err(|error| unusable(error.into()))?;
        }
        Ok(true)
    }

    /// Where compiled code is kept.
    #[must_use]
    pub fn cache(&self) -> PathBuf {
        self.0.join("cache")
    }
}

impl Memory {
    /// What is remembered of the plugins in `plugin_dir`: several daemons of one user may have plugins of their own.
    pub(super) fn of(state: StateDir, plugin_dir: &Path) -> Self {
        let real = plugin_dir.canonicalize().unwrap_or_else(|_| plugin_dir.to_owned());
        let dir8 = hex(&digest(&SHA256, real.as_os_str().as_encoded_bytes()).as_ref()[..4]);
        let good = state.0.join("good").join(dir8);
        Self { state, good }
    }

    /// Why a version is quarantined, if it is.
    pub(super) fn quarantined(&self, identity: &Identity) -> Option<String> {
        std::fs::read_to_string(self.state.0.join("quarantined").join(identity.to_string())).ok()
    }

    /// From now on this version does not serve, whoever is asked.
    pub(super) fn quarantine(&self, identity: &Identity, why: &str) -> io::Result<()> {
        write(&self.state.0.join("quarantined").join(identity.to_string()), why.as_bytes())
    }

    /// Remembers that `source` has built rows of `kind`.
    pub(super) fn remember(&self, kind: &str, file: &str, source: &Source) -> io::Result<()> {
        let identity = source.identity().to_string();
        let bytes = self.good.join("bytes");
        std::fs::create_dir_all(&bytes)?;
        std::fs::create_dir_all(self.good.join("kinds"))?;
        if let Some(settings) = &source.settings {
            write(&bytes.join(format!("{identity}.toml")), settings.as_bytes())?;
        }
        write(&bytes.join(format!("{identity}.wasm")), &source.wasm)?;
        write(&self.good.join("kinds").join(kind), format!("{identity}\n{file}\n").as_bytes())?;
        self.clean()
    }

    /// The version that built rows of `kind` last, out of the file `file`.
    pub(super) fn good(&self, kind: &str, file: &str) -> Option<Source> {
        let (identity, from) = self.pointer(kind)?;
        if from == file { self.load(&identity) } else { None }
    }

    /// The version out of the file `file` that built rows last, of whatever kind.
    pub(super) fn good_of_file(&self, file: &str) -> Option<Source> {
        let mut kinds: Vec<_> = std::fs::read_dir(self.good.join("kinds")).ok()?.filter_map(Result::ok).collect();
        kinds.sort_by_key(|entry| std::cmp::Reverse(entry.metadata().and_then(|metadata| metadata.modified()).ok()));
        kinds.iter().find_map(|entry| self.good(entry.file_name().to_str()?, file))
    }

    /// Forgets what `file` built: it is gone.
    pub(super) fn forget(&self, file: &str) -> io::Result<()> {
        for kind in self.kinds() {
            if self.pointer(&kind).is_some_and(|(_, from)| from == file) {
                std::fs::remove_file(self.good.join("kinds").join(kind))?;
            }
        }
        self.clean()
    }

    /// Forgets what built `kind`: it does not any more.
    pub(super) fn forget_kind(&self, kind: &str) -> io::Result<()> {
        match std::fs::remove_file(self.good.join("kinds").join(kind)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => self.clean(),
        }
    }

    fn kinds(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.good.join("kinds")).into_iter().flatten();
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
    }

    fn pointer(&self, kind: &str) -> Option<(String, String)> {
        let text = std::fs::read_to_string(self.good.join("kinds").join(kind)).ok()?;
        let mut lines = text.lines();
        Some((lines.next()?.to_owned(), lines.next()?.to_owned()))
    }

    fn load(&self, identity: &str) -> Option<Source> {
        let bytes = self.good.join("bytes");
        let wasm = std::fs::read(bytes.join(format!("{identity}.wasm"))).ok()?;
        let settings = std::fs::read_to_string(bytes.join(format!("{identity}.toml"))).ok();
        let source = Source::new(wasm, settings);
        // What was changed or cut off is not what has built rows.
        (source.identity().to_string() == identity).then_some(source)
    }

    /// Removes bytes that no kind refers to any more.
    fn clean(&self) -> io::Result<()> {
        let used: BTreeSet<String> = self.kinds().iter().filter_map(|kind| Some(self.pointer(kind)?.0)).collect();
        for entry in std::fs::read_dir(self.good.join("bytes")).into_iter().flatten() {
            let path = entry?.path();
            let identity = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            if !used.contains(identity) {
                std::fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

/// Writes a file that is there whole or not at all.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let aside = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&aside, bytes)?;
    std::fs::rename(aside, path)
}
