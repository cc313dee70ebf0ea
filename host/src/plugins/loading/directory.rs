//! Finds the plugin files in the directory, and tells which of them are still being written.
//!
//! Must never open a file: only names and `stat` data are read here.
//!
//! A file has settled when two looks in a row, a moment apart, have seen the same of it. A copy in progress grows
//! between the looks, and an editor that replaces a file by removing and rewriting it has finished by then.

use std::collections::BTreeMap;
use std::path::Path;

use crate::plugins::loading::allowlist;
use crate::plugins::loading::source::{Stat, settings_path};

/// A file that has changed in more looks in a row than this is read all the same: it may be a whole file that is
/// replaced again and again.
const MAX_CHANGING_LOOKS: u32 = 50;

/// What one look sees of one plugin: the `stat` data of its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::plugins) struct FileStats {
    /// Whether the directory has an entry of that name. The entry may be a symbolic link that leads nowhere.
    pub(in crate::plugins) is_listed: bool,
    wasm: Option<Stat>,
    settings: Option<Stat>,
    /// The allowlist of the directory: when it changes, each plugin must be checked again.
    allowlist: Option<Stat>,
}

impl FileStats {
    const ABSENT: Self = Self { is_listed: false, wasm: None, settings: None, allowlist: None };
}

/// Looks at the plugins in `dir`, by file name. Plugins are the `.wasm` files directly in `dir` whose names do not
/// begin with a dot.
pub(in crate::plugins) fn look(dir: &Path) -> std::io::Result<BTreeMap<String, FileStats>> {
    let mut stats = BTreeMap::new();
    let allowlist = Stat::of(&dir.join(allowlist::FILE_NAME));
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if !name.starts_with('.') && path.extension().is_some_and(|extension| extension == "wasm") {
            let (wasm, settings) = (Stat::of(&path), Stat::of(&settings_path(&path)));
            stats.insert(name.to_owned(), FileStats { is_listed: true, wasm, settings, allowlist });
        }
    }
    Ok(stats)
}

/// Compares each look at the directory with the look before.
#[derive(Debug, Default)]
pub(in crate::plugins) struct SettleTracker {
    /// What the last look saw of each file, and in how many looks in a row the file had changed.
    previous: BTreeMap<String, (FileStats, u32)>,
}

impl SettleTracker {
    /// Records the look `now`. Returns the files that have settled, including files that are gone, and whether another
    /// file has not settled yet, so that another look should follow in a moment.
    pub(in crate::plugins) fn record_look(
        &mut self,
        now: &BTreeMap<String, FileStats>,
    ) -> (BTreeMap<String, FileStats>, bool) {
        let mut settled = BTreeMap::new();
        let mut next = BTreeMap::new();
        let gone = self.previous.keys().filter(|name| !now.contains_key(*name));
        let all = now.iter().map(|(name, stats)| (name, *stats)).chain(gone.map(|name| (name, FileStats::ABSENT)));
        let mut is_changing = false;
        for (name, stats) in all {
            let looks = match self.previous.get(name) {
                Some((previous, _)) if *previous == stats => 0,
                Some((_, looks)) => looks + 1,
                None => 1,
            };
            if looks == 0 || looks > MAX_CHANGING_LOOKS {
                settled.insert(name.clone(), stats);
            } else {
                is_changing = true;
            }
            // A file that is gone and has been returned as settled is forgotten.
            if looks > 0 || stats.is_listed {
                next.insert(name.clone(), (stats, if looks > MAX_CHANGING_LOOKS { 0 } else { looks }));
            }
        }
        self.previous = next;
        (settled, is_changing)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    /// The `stat` data of some directory, read only once since any program that writes into that directory changes
    /// them.
    static STAT: LazyLock<Stat> =
        LazyLock::new(|| Stat::of(&std::env::temp_dir()).expect("the temporary directory exists"));

    /// What a look would see of a file; another `content` looks different.
    fn file(content: u64) -> FileStats {
        let mut stat = *STAT;
        stat.set_len(content);
        FileStats { is_listed: true, wasm: Some(stat), settings: None, allowlist: None }
    }

    fn dir(files: &[(&str, u64)]) -> BTreeMap<String, FileStats> {
        files.iter().map(|(name, content)| ((*name).to_owned(), file(*content))).collect()
    }

    fn names(settled: &BTreeMap<String, FileStats>) -> BTreeSet<&str> {
        settled.keys().map(String::as_str).collect()
    }

    #[test]
    fn a_file_settles_when_two_looks_in_a_row_see_the_same() {
        let mut tracker = SettleTracker::default();
        let (settled, is_changing) = tracker.record_look(&dir(&[("a", 1)]));
        assert!(settled.is_empty() && is_changing);
        let (settled, is_changing) = tracker.record_look(&dir(&[("a", 2)]));
        assert!(settled.is_empty() && is_changing, "it grows");
        let (settled, is_changing) = tracker.record_look(&dir(&[("a", 2)]));
        assert!(names(&settled).contains("a") && !is_changing);
    }

    #[test]
    fn a_file_that_is_replaced_between_two_looks_is_never_returned_as_gone() {
        let mut tracker = SettleTracker::default();
        tracker.record_look(&dir(&[("a", 1)]));
        tracker.record_look(&dir(&[("a", 1)]));
        let (settled, is_changing) = tracker.record_look(&dir(&[]));
        assert!(settled.is_empty() && is_changing);
        let (settled, is_changing) = tracker.record_look(&dir(&[("a", 2)]));
        assert!(settled.is_empty() && is_changing);
        let (settled, _) = tracker.record_look(&dir(&[("a", 2)]));
        assert!(settled["a"].is_listed);
    }

    #[test]
    fn a_file_that_stays_away_is_returned_as_gone_exactly_once() {
        let mut tracker = SettleTracker::default();
        tracker.record_look(&dir(&[("a", 1)]));
        tracker.record_look(&dir(&[]));
        let (settled, is_changing) = tracker.record_look(&dir(&[]));
        assert!(!settled["a"].is_listed && !is_changing);
        assert_eq!(tracker.record_look(&dir(&[])), (BTreeMap::new(), false));
    }

    #[test]
    fn a_file_that_changes_at_each_look_is_read_after_the_maximum_of_looks() {
        let mut tracker = SettleTracker::default();
        let read = (0..1_000).filter(|content| !tracker.record_look(&dir(&[("a", *content)])).0.is_empty()).count();
        assert_eq!(read, 1_000 / (MAX_CHANGING_LOOKS as usize + 1));
    }

    proptest! {
        #[test]
        fn after_two_looks_without_a_change_the_returned_files_are_those_of_the_directory(
            looks in proptest::collection::vec(proptest::collection::btree_map("[a-d]", 0..4_u64, 0..4), 1..60)
        ) {
            let mut tracker = SettleTracker::default();
            let mut returned: BTreeMap<String, FileStats> = BTreeMap::new();
            let last = looks.last().expect("at least one").clone();
            for look in looks.into_iter().chain([last.clone(), last.clone()]) {
                let look = look.iter().map(|(name, content)| (name.clone(), file(*content))).collect();
                for (name, stats) in tracker.record_look(&look).0 {
                    if stats.is_listed { returned.insert(name, stats); } else { returned.remove(&name); }
                }
            }
            let expected: BTreeMap<String, FileStats> =
                last.iter().map(|(name, content)| (name.clone(), file(*content))).collect();
            prop_assert_eq!(returned, expected);
        }
    }
}
