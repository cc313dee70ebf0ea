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

mod memory;

use std::fmt::Display;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use thiserror::Error;
use tracing::{debug, info, warn};

pub(super) use memory::Memory;

/// What lies in the directory.
const PARTS: [&str; 3] = ["cache", "quarantined", "good"];

/// At least so much must fit in before it is said that the directory can be written again.
const LEAST_ROOM: usize = 64 * 1024;

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
    /// There is no room in it, or nothing may be written: plugins serve all the same.
    #[error("{}", no_room(.dir, .source))]
    NoRoom {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
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

/// The directory. It may be full or read-only, now or from the start: then what should be written is lost, and everything
/// else goes on.
#[derive(Clone, Debug)]
pub struct StateDir {
    dir: PathBuf,
    trouble: Arc<Mutex<Option<Trouble>>>,
}

/// What could not be written.
#[derive(Debug)]
struct Trouble {
    /// Why.
    error: String,
    /// How much.
    bytes: usize,
}

impl StateDir {
    /// Makes the directory if need be, and sees to it that nobody else can read or write it. A directory for whose parts
    /// there is no room is used as it is, and [`StateDir::in_trouble`] says so.
    ///
    /// # Errors
    ///
    /// When that cannot be.
    pub fn open(dir: &Path) -> Result<Self, StateError> {
        let absolute = std::path::absolute(dir);
        let dir = absolute.map_err(|source| StateError::Unusable { dir: dir.to_owned(), source })?;
        let state = Self { dir, trouble: Arc::default() };
        state.make()?;
        Ok(state)
    }

    fn make(&self) -> Result<(), StateError> {
        let unusable = |source| StateError::Unusable { dir: self.dir.clone(), source };
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        let metadata = match made.and_then(|()| self.dir.metadata()) {
            Ok(metadata) => metadata,
            Err(error) if is_no_room(&error) => {
                self.cannot_write(&error, 0);
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
        for part in PARTS {
            match std::fs::create_dir_all(self.dir.join(part)) {
                Err(error) if is_no_room(&error) => {
                    self.cannot_write(&error, 0);
                    return Ok(());
                }
                made => made.map_err(unusable)?,
            }
        }
        Ok(())
    }

    /// Notes that `bytes` could not be written, and says so if that is new.
    pub(super) fn cannot_write(&self, error: &impl Display, bytes: usize) {
        let error = error.to_string();
        let mut trouble = self.trouble();
        let before = trouble.take();
        let bytes = bytes.max(before.as_ref().map_or(LEAST_ROOM, |before| before.bytes));
        if before.is_none_or(|before| before.error != error) {
            warn!("{}", no_room(&self.dir, &error));
        }
        *trouble = Some(Trouble { error, bytes });
    }

    /// If something could not be written, finds out whether it can be now.
    pub(super) fn try_again(&self) {
        let Some(bytes) = self.trouble().as_ref().map(|trouble| trouble.bytes) else { return };
        let room = vec![0; bytes];
        let try_parts = || PARTS.iter().try_for_each(|part| try_to_write(&self.dir.join(part), &room));
        let tried = self.make().map_err(io::Error::other).and_then(|()| try_parts());
        match tried {
            Ok(()) => {
                info!("the state directory {} can be written again", self.dir.display());
                *self.trouble() = None;
            }
            Err(error) => debug!(%error, "the state directory {} still cannot be written", self.dir.display()),
        }
    }

    /// That it cannot be written, and why, in a sentence; `None` = as far as is known it can.
    #[must_use]
    pub fn in_trouble(&self) -> Option<String> {
        let trouble = self.trouble();
        let Trouble { error, .. } = trouble.as_ref()?;
        Some(no_room(&self.dir, error))
    }

    fn trouble(&self) -> MutexGuard<'_, Option<Trouble>> {
        self.trouble.lock().expect("nobody panics with it")
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
        let missing = |source: io::Error| {
            let dir = dir.to_owned();
            if is_no_room(&source) { StateError::NoRoom { dir, source } } else { StateError::Unusable { dir, source } }
        };
        let parts = PARTS.map(|part| dir.join(part)).into_iter().filter(|part| part.exists());
        for part in std::iter::once(dir.to_owned()).chain(parts) {
            let access = rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
            rustix::fs::access(&part, access).map_err(|error| missing(error.into()))?;
        }
        // A file system that cannot say how much is left has room as far as we know.
        if rustix::fs::statvfs(dir).is_ok_and(|fs| fs.f_blocks > 0 && fs.f_bavail == 0) {
            return Err(missing(rustix::io::Errno::NOSPC.into()));
        }
        Ok(true)
    }

    /// Where compiled code is kept.
    pub(super) fn cache(&self) -> PathBuf {
        self.dir.join("cache")
    }
}

/// What that means, for people.
fn no_room(dir: &Path, error: &impl Display) -> String {
    format!(
        "the state directory {} cannot be written ({error}): plugins are compiled in memory and serve; after a restart they are compiled again, what was rolled back may serve again, and there may be no version to go back to",
        dir.display()
    )
}

/// Whether `bytes` can be written into `dir`. Nothing of it stays.
pub(super) fn try_to_write(dir: &Path, bytes: &[u8]) -> io::Result<()> {
    let probe = dir.join(format!(".{}.probe", std::process::id()));
    let written = std::fs::write(&probe, bytes);
    let _ = std::fs::remove_file(&probe);
    written
}

/// Whether there is no room for what should be written, or nothing may be written at all: that can change, and is nobody's
/// attempt to have us run code.
fn is_no_room(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::ReadOnlyFilesystem
    )
}
