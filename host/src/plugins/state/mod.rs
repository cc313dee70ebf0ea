//! The state directory: what the daemon remembers of plugins across restarts. It holds compiled code, the version of
//! each kind to roll back to, and the versions that are quarantined.
//!
//! Must never be writable by another user, who could make the daemon run code of his own. Must never be needed: if
//! files in it are lost, or nothing can be written, plugins are compiled again and no row is lost.
//!
//! ```text
//!   cache/                    compiled code, in the format of wasmtime's cache
//!   quarantined/IDENTITY      why a version was rolled back; removing the file lets the version serve again
//!   good/DIR8/bytes/IDENTITY.wasm, .toml    versions that have built rows
//!   good/DIR8/kinds/KIND      the identity of the version that built rows of the kind last, and the name of its file
//! ```
//!
//! To change it, know that
//!
//! - IDENTITY is the SHA-256 of a component, with the beginning of its settings' SHA-256 if it has any. DIR8 is the
//!   beginning of the SHA-256 of the plugin directory's path, since several daemons may share a state directory;
//! - the version to roll back to is kept for each kind, from when the version has first answered for a row of the kind;
//! - a directory that belongs to another user is an error when the daemon starts. A directory that is full or read-only
//!   is not: it is a warning, and a note in the daemon's health, until it can be written again.

mod version_store;

use std::fmt::Display;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use thiserror::Error;
use tracing::{debug, info, warn};

pub(super) use version_store::VersionStore;

/// The directories inside the state directory.
const SUBDIRECTORIES: [&str; 3] = ["cache", "quarantined", "good"];

/// At least so many bytes must fit into each subdirectory before the state directory counts as writable again.
const MIN_PROBE_BYTES: usize = 64 * 1024;

/// Why a state directory cannot be used.
#[derive(Debug, Error)]
pub enum StateError {
    /// It belongs to another user, who could make the daemon run code.
    #[error("the state directory {} belongs to another user (uid {owner}): give one of its own with TIDINGS_STATE_DIR", .dir.display())]
    Foreign {
        /// The directory.
        dir: PathBuf,
        /// The user id of its owner.
        owner: u32,
    },
    /// It is full or read-only. Plugins serve all the same.
    #[error("{}", explain_write_failure(.dir, .source))]
    NoRoom {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be created, read or written for another reason.
    #[error("the state directory {} cannot be used: give another one with TIDINGS_STATE_DIR", .dir.display())]
    Unusable {
        /// The directory.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The state directory. If it is full or read-only, when the daemon starts or later, writes to it fail and everything
/// else goes on.
#[derive(Clone, Debug)]
pub struct StateDir {
    dir: PathBuf,
    failure: Arc<Mutex<Option<WriteFailure>>>,
}

/// A write that failed, since when the directory counts as not writable.
#[derive(Debug)]
struct WriteFailure {
    /// The error of the last write.
    error: String,
    /// How many bytes must be written without an error before the directory counts as writable again.
    bytes: usize,
}

impl StateDir {
    /// Creates the directory if it does not exist, and makes it readable and writable only for the daemon's user. If it
    /// is full or read-only, it is used as it is, and [`StateDir::write_failure`] says so.
    ///
    /// # Errors
    ///
    /// When the directory belongs to another user, or cannot be used for a reason other than being full or read-only.
    pub fn open(dir: &Path) -> Result<Self, StateError> {
        let absolute = std::path::absolute(dir);
        let dir = absolute.map_err(|source| StateError::Unusable { dir: dir.to_owned(), source })?;
        let state = Self { dir, failure: Arc::default() };
        state.create_directories()?;
        Ok(state)
    }

    fn create_directories(&self) -> Result<(), StateError> {
        let unusable = |source| StateError::Unusable { dir: self.dir.clone(), source };
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        let metadata = match made.and_then(|()| self.dir.metadata()) {
            Ok(metadata) => metadata,
            Err(error) if is_full_or_read_only(&error) => {
                self.record_write_failure(&error, 0);
                return Ok(());
            }
            Err(error) => return Err(unusable(error)),
        };
        if metadata.uid() != rustix::process::geteuid().as_raw() {
            return Err(StateError::Foreign { dir: self.dir.clone(), owner: metadata.uid() });
        }
        if metadata.mode() & 0o077 != 0 {
            std::fs::set_permissions(&self.dir, std::fs::Permissions::from_mode(0o700)).map_err(unusable)?;
        }
        for part in SUBDIRECTORIES {
            match std::fs::create_dir_all(self.dir.join(part)) {
                Err(error) if is_full_or_read_only(&error) => {
                    self.record_write_failure(&error, 0);
                    return Ok(());
                }
                made => made.map_err(unusable)?,
            }
        }
        Ok(())
    }

    /// Records that `bytes` could not be written, and logs the error if it differs from the last one.
    pub(super) fn record_write_failure(&self, error: &impl Display, bytes: usize) {
        let error = error.to_string();
        let mut failure = self.lock_failure();
        let before = failure.take();
        let bytes = bytes.max(before.as_ref().map_or(MIN_PROBE_BYTES, |before| before.bytes));
        if before.is_none_or(|before| before.error != error) {
            warn!("{}", explain_write_failure(&self.dir, &error));
        }
        *failure = Some(WriteFailure { error, bytes });
    }

    /// If a write has failed, tries whether the directory can be written now.
    pub(super) fn retry_writes(&self) {
        let Some(bytes) = self.lock_failure().as_ref().map(|failure| failure.bytes) else { return };
        let room = vec![0; bytes];
        let try_parts = || SUBDIRECTORIES.iter().try_for_each(|part| probe_write(&self.dir.join(part), &room));
        let tried = self.create_directories().map_err(io::Error::other).and_then(|()| try_parts());
        match tried {
            Ok(()) => {
                info!("the state directory {} can be written again", self.dir.display());
                *self.lock_failure() = None;
            }
            Err(error) => debug!(%error, "the state directory {} still cannot be written", self.dir.display()),
        }
    }

    /// Why the directory cannot be written, as a sentence; `None` = as far as the daemon knows, it can.
    #[must_use]
    pub fn write_failure(&self) -> Option<String> {
        let failure = self.lock_failure();
        let WriteFailure { error, .. } = failure.as_ref()?;
        Some(explain_write_failure(&self.dir, error))
    }

    fn lock_failure(&self) -> MutexGuard<'_, Option<WriteFailure>> {
        self.failure.lock().expect("no thread panics with this lock")
    }

    /// Checks whether [`StateDir::open`] could use the directory, and changes nothing; `false` = it does not exist yet.
    ///
    /// # Errors
    ///
    /// When `open` could not use it, or could not write to it.
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
        let missing = |source: io::Error| {
            let dir = dir.to_owned();
            if is_full_or_read_only(&source) {
                StateError::NoRoom { dir, source }
            } else {
                StateError::Unusable { dir, source }
            }
        };
        let parts = SUBDIRECTORIES.map(|part| dir.join(part)).into_iter().filter(|part| part.exists());
        for part in std::iter::once(dir.to_owned()).chain(parts) {
            let access = rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
            rustix::fs::access(&part, access).map_err(|error| missing(error.into()))?;
        }
        // Some file systems do not report their free space. They count as not full.
        if rustix::fs::statvfs(dir).is_ok_and(|fs| fs.f_blocks > 0 && fs.f_bavail == 0) {
            return Err(missing(rustix::io::Errno::NOSPC.into()));
        }
        Ok(true)
    }

    /// The directory of wasmtime's cache.
    pub(super) fn cache(&self) -> PathBuf {
        self.dir.join("cache")
    }
}

/// A sentence about a write that failed and what follows from it, for people.
fn explain_write_failure(dir: &Path, error: &impl Display) -> String {
    format!(
        "the state directory {} cannot be written ({error}): plugins are compiled in memory and serve. After a restart they are compiled again, versions that were rolled back may serve again, and there may be no version to roll back to",
        dir.display()
    )
}

/// Writes `bytes` into a file in `dir` and removes the file, to find out whether `dir` can be written.
pub(super) fn probe_write(dir: &Path, bytes: &[u8]) -> io::Result<()> {
    let probe = dir.join(format!(".{}.probe", std::process::id()));
    let written = std::fs::write(&probe, bytes);
    let _ = std::fs::remove_file(&probe);
    written
}

/// Whether a write failed because the file system is full, over its quota or read-only. These can pass, and are no sign
/// of an attempt to make the daemon run foreign code.
fn is_full_or_read_only(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::ReadOnlyFilesystem
    )
}
