//! What is remembered of the plugins of one directory: what was rolled back, and what has built rows.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use ring::digest::{SHA256, digest};

use crate::model::event::hex;
use crate::plugins::loading::source::{Identity, Source};
use crate::plugins::state::StateDir;

/// What is remembered of one plugin directory.
#[derive(Debug)]
pub(in crate::plugins) struct Memory {
    state: StateDir,
    good: PathBuf,
    /// What was rolled back and could not be written down.
    quarantined: Mutex<BTreeMap<String, String>>,
}

impl Memory {
    /// What is remembered of the plugins in `plugin_dir`: several daemons of one user may have plugins of their own.
    pub(in crate::plugins) fn of(state: StateDir, plugin_dir: &Path) -> Self {
        let real = plugin_dir.canonicalize().unwrap_or_else(|_| plugin_dir.to_owned());
        let dir8 = hex(&digest(&SHA256, real.as_os_str().as_encoded_bytes()).as_ref()[..4]);
        let good = state.dir.join("good").join(dir8);
        Self { state, good, quarantined: Mutex::default() }
    }

    /// That nothing can be written, in a sentence, if that is so.
    pub(in crate::plugins) fn in_trouble(&self) -> Option<String> {
        self.state.in_trouble()
    }

    /// If something could not be written, tries again: what was rolled back is still known.
    pub(in crate::plugins) fn try_again(&self) {
        self.state.try_again();
        if self.in_trouble().is_some() {
            return;
        }
        let unwritten = std::mem::take(&mut *self.unwritten());
        for (identity, why) in unwritten {
            self.quarantine_as(identity, &why);
        }
    }

    /// Why a version is quarantined, if it is.
    pub(in crate::plugins) fn quarantined(&self, identity: &Identity) -> Option<String> {
        let identity = identity.to_string();
        let unwritten = self.unwritten().get(&identity).cloned();
        unwritten.or_else(|| std::fs::read_to_string(self.state.dir.join("quarantined").join(identity)).ok())
    }

    /// From now on this version does not serve, whoever is asked.
    pub(in crate::plugins) fn quarantine(&self, identity: &Identity, why: &str) {
        self.quarantine_as(identity.to_string(), why);
    }

    fn quarantine_as(&self, identity: String, why: &str) {
        if !self.note(write(&self.state.dir.join("quarantined").join(&identity), why.as_bytes())) {
            self.unwritten().insert(identity, why.to_owned());
        }
    }

    /// Remembers that `source` has built rows of `kind`. Returns whether that could be written.
    pub(in crate::plugins) fn remember(&self, kind: &str, file: &str, source: &Source) -> bool {
        self.note(self.try_to_remember(kind, file, source))
    }

    fn try_to_remember(&self, kind: &str, file: &str, source: &Source) -> io::Result<()> {
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
    pub(in crate::plugins) fn good(&self, kind: &str, file: &str) -> Option<Source> {
        let (identity, from) = self.pointer(kind)?;
        if from == file { self.load(&identity) } else { None }
    }

    /// The version out of the file `file` that built rows last, of whatever kind.
    pub(in crate::plugins) fn good_of_file(&self, file: &str) -> Option<Source> {
        let mut kinds: Vec<_> = std::fs::read_dir(self.good.join("kinds")).ok()?.filter_map(Result::ok).collect();
        kinds.sort_by_key(|entry| std::cmp::Reverse(entry.metadata().and_then(|metadata| metadata.modified()).ok()));
        kinds.iter().find_map(|entry| self.good(entry.file_name().to_str()?, file))
    }

    /// Forgets what `file` built: it is gone.
    pub(in crate::plugins) fn forget(&self, file: &str) {
        self.note(self.try_to_forget(file));
    }

    fn try_to_forget(&self, file: &str) -> io::Result<()> {
        for kind in self.kinds() {
            if self.pointer(&kind).is_some_and(|(_, from)| from == file) {
                std::fs::remove_file(self.good.join("kinds").join(kind))?;
            }
        }
        self.clean()
    }

    /// Forgets what built `kind`: it does not any more.
    pub(in crate::plugins) fn forget_kind(&self, kind: &str) {
        let removed = match std::fs::remove_file(self.good.join("kinds").join(kind)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => self.clean(),
        };
        self.note(removed);
    }

    /// Notes what became of an attempt to write. Returns whether it succeeded.
    fn note(&self, outcome: io::Result<()>) -> bool {
        outcome.inspect_err(|error| self.state.cannot_write(error, 0)).is_ok()
    }

    fn unwritten(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.quarantined.lock().expect("nobody panics with it")
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
    let written = std::fs::write(&aside, bytes).and_then(|()| std::fs::rename(&aside, path));
    if written.is_err() {
        // What there was room for would lie in the way of others.
        let _ = std::fs::remove_file(&aside);
    }
    written
}
