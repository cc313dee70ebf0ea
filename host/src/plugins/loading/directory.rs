//! What lies in the plugin directory, and whether it is still being written. Nothing is read here but names and numbers.
//!
//! A file counts when two looks in a row, a moment apart, saw the same of it: a copy in progress grows between them, and
//! an editor that removes a file and writes it anew has done so.

use std::collections::BTreeMap;
use std::path::Path;

use crate::plugins::loading::allowlist;
use crate::plugins::loading::source::{Stat, settings_file};

/// Looks after which a file that keeps changing is read all the same: whole files may be replaced all the time.
const PATIENCE: u32 = 50;

/// What is seen of one plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::plugins) struct Seen {
    /// The file is listed, whatever it leads to.
    pub(in crate::plugins) listed: bool,
    wasm: Option<Stat>,
    settings: Option<Stat>,
    /// The list of what may serve: with another one, each plugin is another matter.
    allowed: Option<Stat>,
}

impl Seen {
    const NOTHING: Self = Self { listed: false, wasm: None, settings: None, allowed: None };
}

/// Looks at the plugins in `dir`, by the names of their files: `.wasm` files directly in it whose names do not begin
/// with a dot.
pub(in crate::plugins) fn look(dir: &Path) -> std::io::Result<BTreeMap<String, Seen>> {
    let mut seen = BTreeMap::new();
    let allowed = Stat::of(&dir.join(allowlist::FILE));
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if !name.starts_with('.') && path.extension().is_some_and(|extension| extension == "wasm") {
            let (wasm, settings) = (Stat::of(&path), Stat::of(&settings_file(&path)));
            seen.insert(name.to_owned(), Seen { listed: true, wasm, settings, allowed });
        }
    }
    Ok(seen)
}

/// Remembers the last look.
#[derive(Debug, Default)]
pub(in crate::plugins) struct Settling {
    last: BTreeMap<String, (Seen, u32)>,
}

impl Settling {
    /// Those files of the look `now` that were the same in the look before, what is gone among them; and whether some
    /// were not, so that another look should follow in a moment.
    pub(in crate::plugins) fn settled(&mut self, now: &BTreeMap<String, Seen>) -> (BTreeMap<String, Seen>, bool) {
        let mut settled = BTreeMap::new();
        let mut next = BTreeMap::new();
        let gone = self.last.keys().filter(|name| !now.contains_key(*name));
        let all = now.iter().map(|(name, seen)| (name, *seen)).chain(gone.map(|name| (name, Seen::NOTHING)));
        let mut changing = false;
        for (name, seen) in all {
            let looks = match self.last.get(name) {
                Some((last, _)) if *last == seen => 0,
                Some((_, looks)) => looks + 1,
                None => 1,
            };
            if looks == 0 || looks > PATIENCE {
                settled.insert(name.clone(), seen);
            } else {
                changing = true;
            }
            // What is gone and has been told so is forgotten.
            if looks > 0 || seen.listed {
                next.insert(name.clone(), (seen, if looks > PATIENCE { 0 } else { looks }));
            }
        }
        self.last = next;
        (settled, changing)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    /// Looked at once: whoever writes into that directory changes it.
    static STAT: LazyLock<Stat> = LazyLock::new(|| Stat::of(&std::env::temp_dir()).expect("there is one"));

    /// A file as it would be seen with this content.
    fn file(content: u64) -> Seen {
        let mut stat = *STAT;
        stat.set_len(content);
        Seen { listed: true, wasm: Some(stat), settings: None, allowed: None }
    }

    fn dir(files: &[(&str, u64)]) -> BTreeMap<String, Seen> {
        files.iter().map(|(name, content)| ((*name).to_owned(), file(*content))).collect()
    }

    fn names(settled: &BTreeMap<String, Seen>) -> BTreeSet<&str> {
        settled.keys().map(String::as_str).collect()
    }

    #[test]
    fn a_file_counts_when_two_looks_saw_the_same() {
        let mut settling = Settling::default();
        let (settled, again) = settling.settled(&dir(&[("a", 1)]));
        assert!(settled.is_empty() && again);
        let (settled, again) = settling.settled(&dir(&[("a", 2)]));
        assert!(settled.is_empty() && again, "it grows");
        let (settled, again) = settling.settled(&dir(&[("a", 2)]));
        assert!(names(&settled).contains("a") && !again);
    }

    #[test]
    fn a_file_that_is_replaced_between_two_looks_is_never_seen_as_gone() {
        let mut settling = Settling::default();
        settling.settled(&dir(&[("a", 1)]));
        settling.settled(&dir(&[("a", 1)]));
        let (settled, again) = settling.settled(&dir(&[]));
        assert!(settled.is_empty() && again);
        let (settled, again) = settling.settled(&dir(&[("a", 2)]));
        assert!(settled.is_empty() && again);
        let (settled, _) = settling.settled(&dir(&[("a", 2)]));
        assert!(settled["a"].listed);
    }

    #[test]
    fn a_file_that_stays_away_is_gone_and_told_once() {
        let mut settling = Settling::default();
        settling.settled(&dir(&[("a", 1)]));
        settling.settled(&dir(&[]));
        let (settled, again) = settling.settled(&dir(&[]));
        assert!(!settled["a"].listed && !again);
        assert_eq!(settling.settled(&dir(&[])), (BTreeMap::new(), false));
    }

    #[test]
    fn a_file_that_is_replaced_all_the_time_is_read_in_the_end() {
        let mut settling = Settling::default();
        let read = (0..1_000).filter(|content| !settling.settled(&dir(&[("a", *content)])).0.is_empty()).count();
        assert_eq!(read, 1_000 / (PATIENCE as usize + 1));
    }

    proptest! {
        #[test]
        fn after_two_quiet_looks_what_was_told_is_what_is_there(
            looks in proptest::collection::vec(proptest::collection::btree_map("[a-d]", 0..4_u64, 0..4), 1..60)
        ) {
            let mut settling = Settling::default();
            let mut told: BTreeMap<String, Seen> = BTreeMap::new();
            let last = looks.last().expect("at least one").clone();
            for look in looks.into_iter().chain([last.clone(), last.clone()]) {
                let look = look.iter().map(|(name, content)| (name.clone(), file(*content))).collect();
                for (name, seen) in settling.settled(&look).0 {
                    if seen.listed { told.insert(name, seen); } else { told.remove(&name); }
                }
            }
            let there: BTreeMap<String, Seen> = last.iter().map(|(name, content)| (name.clone(), file(*content))).collect();
            prop_assert_eq!(told, there);
        }
    }
}
