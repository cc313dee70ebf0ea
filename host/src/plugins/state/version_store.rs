//! The versions of plugins that the daemon remembers across restarts: those to roll back to, and those that are
//! quarantined.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use ring::digest::{SHA256, digest};

use crate::model::event::hex;
use crate::plugins::loading::source::{Identity, Source};
use crate::plugins::state::StateDir;

/// The versions of one plugin directory to roll back to, and the quarantined versions of the whole state directory.
#[derive(Debug)]
pub(in crate::plugins) struct VersionStore {
    state: StateDir,
    good: PathBuf,
    /// Versions that are quarantined although the file that says so could not be written: identities and reasons.
    unwritten_quarantines: Mutex<BTreeMap<String, String>>,
}

impl VersionStore {
    /// The store of the plugins in `plugin_dir`. Several daemons with different plugin directories may share one state
    /// directory.
    pub(in crate::plugins) fn for_plugin_dir(state: StateDir, plugin_dir: &Path) -> Self {
        let real = plugin_dir.canonicalize().unwrap_or_else(|_| plugin_dir.to_owned());
        let dir8 = hex(&digest(&SHA256, real.as_os_str().as_encoded_bytes()).as_ref()[..4]);
        let good = state.dir.join("good").join(dir8);
        Self { state, good, unwritten_quarantines: Mutex::default() }
    }

    /// Why the state directory cannot be written, as a sentence; `None` = as far as the daemon knows, it can.
    pub(in crate::plugins) fn write_failure(&self) -> Option<String> {
        self.state.write_failure()
    }

    /// If a write has failed, tries again. The quarantines that could not be written are then written.
    pub(in crate::plugins) fn retry_writes(&self) {
        self.state.retry_writes();
        if self.write_failure().is_some() {
            return;
        }
        let unwritten = std::mem::take(&mut *self.lock_unwritten());
        for (identity, reason) in unwritten {
            self.write_quarantine(identity, &reason);
        }
    }

    /// Why a version is quarantined, if it is.
    pub(in crate::plugins) fn quarantine_reason(&self, identity: &Identity) -> Option<String> {
        let identity = identity.to_string();
        let unwritten = self.lock_unwritten().get(&identity).cloned();
        unwritten.or_else(|| std::fs::read_to_string(self.state.dir.join("quarantined").join(identity)).ok())
    }

    /// Quarantines a version: from now on it does not serve, from whichever file it comes.
    pub(in crate::plugins) fn quarantine(&self, identity: &Identity, reason: &str) {
        self.write_quarantine(identity.to_string(), reason);
    }

    fn write_quarantine(&self, identity: String, reason: &str) {
        if !self.record_write(write_atomically(&self.state.dir.join("quarantined").join(&identity), reason.as_bytes()))
        {
            self.lock_unwritten().insert(identity, reason.to_owned());
        }
    }

    /// Keeps `source`, which has built rows of `kind`, as the version to roll back to for the kind. Returns whether it
    /// could be written.
    pub(in crate::plugins) fn keep_good_version(&self, kind: &str, file: &str, source: &Source) -> bool {
        self.record_write(self.try_to_keep(kind, file, source))
    }

    fn try_to_keep(&self, kind: &str, file: &str, source: &Source) -> io::Result<()> {
        let identity = source.identity().to_string();
        let bytes = self.good.join("bytes");
        std::fs::create_dir_all(&bytes)?;
        std::fs::create_dir_all(self.good.join("kinds"))?;
        if let Some(settings) = &source.settings {
            write_atomically(&bytes.join(format!("{identity}.toml")), settings.as_bytes())?;
        }
        write_atomically(&bytes.join(format!("{identity}.wasm")), &source.wasm)?;
        write_atomically(&self.good.join("kinds").join(kind), format!("{identity}\n{file}\n").as_bytes())?;
        self.remove_unused_bytes()
    }

    /// The version from `file` that was kept for `kind`.
    pub(in crate::plugins) fn good_version(&self, kind: &str, file: &str) -> Option<Source> {
        let (identity, from) = self.read_pointer(kind)?;
        if from == file { self.read_version(&identity) } else { None }
    }

    /// The version from `file` that was kept most recently, for whichever kind.
    pub(in crate::plugins) fn last_good_version(&self, file: &str) -> Option<Source> {
        let mut kinds: Vec<_> = std::fs::read_dir(self.good.join("kinds")).ok()?.filter_map(Result::ok).collect();
        kinds.sort_by_key(|entry| std::cmp::Reverse(entry.metadata().and_then(|metadata| metadata.modified()).ok()));
        kinds.iter().find_map(|entry| self.good_version(entry.file_name().to_str()?, file))
    }

    /// Forgets the versions that were kept from `file`, which is gone.
    pub(in crate::plugins) fn forget_file(&self, file: &str) {
        self.record_write(self.try_to_forget_file(file));
    }

    fn try_to_forget_file(&self, file: &str) -> io::Result<()> {
        for kind in self.kinds_with_version() {
            if self.read_pointer(&kind).is_some_and(|(_, from)| from == file) {
                std::fs::remove_file(self.good.join("kinds").join(kind))?;
            }
        }
        self.remove_unused_bytes()
    }

    /// Forgets the version that was kept for `kind`.
    pub(in crate::plugins) fn forget_kind(&self, kind: &str) {
        let removed = match std::fs::remove_file(self.good.join("kinds").join(kind)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => self.remove_unused_bytes(),
        };
        self.record_write(removed);
    }

    /// Records the error of a write, if it failed. Returns whether it succeeded.
    fn record_write(&self, outcome: io::Result<()>) -> bool {
        outcome.inspect_err(|error| self.state.record_write_failure(error, 0)).is_ok()
    }

    fn lock_unwritten(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.unwritten_quarantines.lock().expect("no thread panics with this lock")
    }

    fn kinds_with_version(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.good.join("kinds")).into_iter().flatten();
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
    }

    fn read_pointer(&self, kind: &str) -> Option<(String, String)> {
        let text = std::fs::read_to_string(self.good.join("kinds").join(kind)).ok()?;
        let mut lines = text.lines();
        Some((lines.next()?.to_owned(), lines.next()?.to_owned()))
    }

    fn read_version(&self, identity: &str) -> Option<Source> {
        let bytes = self.good.join("bytes");
        let wasm = std::fs::read(bytes.join(format!("{identity}.wasm"))).ok()?;
        let settings = std::fs::read_to_string(bytes.join(format!("{identity}.toml"))).ok();
        let source = Source::new(wasm, settings);
        // A file that was changed or cut off is not the version that has built rows.
        (source.identity().to_string() == identity).then_some(source)
    }

    /// Removes the bytes of versions that no kind refers to any more.
    fn remove_unused_bytes(&self) -> io::Result<()> {
        let used: BTreeSet<String> =
            self.kinds_with_version().iter().filter_map(|kind| Some(self.read_pointer(kind)?.0)).collect();
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

/// Writes a file so that it is there either whole or not at all.
fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let aside = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = std::fs::write(&aside, bytes).and_then(|()| std::fs::rename(&aside, path));
    if written.is_err() {
        // The part that was written would take up room that other files need.
        let _ = std::fs::remove_file(&aside);
    }
    written
}
