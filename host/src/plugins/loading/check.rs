//! What is checked of a component before it may serve: that it is of our world. The words are for the plugin's author;
//! the linker's own are about types.

use std::collections::{BTreeMap, HashSet};

use crate::plugins::loading::inspect::World;
use crate::plugins::loading::load_error::{LoadError, SERVED, start};
use crate::plugins::runtime::engine::OFFERED;

/// The package whose world plugins are of.
const PACKAGE: &str = "tidings:plugin/";
/// What its name begins with in every compatible version.
const BUILDER_TRACK: &str = "tidings:plugin/builder@0.1.";
/// Kinds of one plugin.
const KINDS: usize = 1_000;

/// Checks by name what is imported and exported.
///
/// # Errors
///
/// When something is imported that there is not, or what makes a plugin is not exported.
pub fn check_world(world: &World) -> Result<(), LoadError> {
    let World { imports, exports } = world;
    if let Some(version) = imports.iter().chain(exports).find_map(|name| foreign_version(name)) {
        return Err(LoadError::Version(version.to_owned()));
    }
    // Each reason once, behind all that it is the reason for.
    let mut missing: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for import in imports.iter().filter(|name| !is_offered(name)) {
        missing.entry(why_not(import)).or_default().push(import);
    }
    if !missing.is_empty() {
        let missing: Vec<String> =
            missing.into_iter().map(|(why, imports)| format!("{}: {why}", imports.join(", "))).collect();
        return Err(LoadError::Imports(missing.join("; ")));
    }
    if !exports.iter().any(|name| name.starts_with(BUILDER_TRACK)) {
        let exported = if exports.is_empty() {
            ", nor anything else".to_owned()
        } else {
            format!(", only {}", exports.join(", "))
        };
        return Err(LoadError::NoBuilder(exported));
    }
    Ok(())
}

/// The version of our package in a name, without its last number, if it is another than the one that is served.
fn foreign_version(name: &str) -> Option<&str> {
    let (_, version) = name.strip_prefix(PACKAGE)?.split_once('@')?;
    // A version before a release is compatible with itself only.
    let end = if version.contains('-') { None } else { version.rfind('.') };
    let track = &version[..end.unwrap_or(version.len())];
    (track != SERVED).then_some(track)
}

fn is_offered(import: &str) -> bool {
    let (interface, version) = import.split_once('@').unwrap_or((import, ""));
    OFFERED.iter().any(|(offered, track)| interface == *offered && version.starts_with(track))
}

/// Why an import is not there, and what an author can do.
fn why_not(import: &str) -> &'static str {
    let interface = import.split('@').next().unwrap_or(import);
    if interface.starts_with("wasi:sockets") || interface.starts_with("wasi:http") {
        "the network, which no plugin has; leave out what needs it (in JavaScript `--disable http fetch-event`, in Python `--stub-wasi`)"
    } else if OFFERED.iter().any(|(offered, _)| interface == *offered) {
        "of a version that is not served"
    } else if interface.starts_with("wasi:") {
        "a part of WASI that plugins are not given"
    } else {
        "not known to this daemon; a plugin may import tidings:plugin/host and the inert parts of WASI 0.2"
    }
}

/// Checks what a plugin's `describe` says: its name, its version, and the kinds that it serves.
///
/// # Errors
///
/// When it could not be known by them.
pub fn check_description(name: &str, version: &str, kinds: &[&str]) -> Result<(), LoadError> {
    for (what, text) in [("name", name), ("version", version)] {
        if !(1..=100).contains(&text.len())
            || text.chars().any(|char| char.is_control() || char == '@' || char == '+' && what == "name")
        {
            return Err(LoadError::Description(format!(
                "the {what} {:?}, which is not 1 to 100 printable bytes",
                start(text)
            )));
        }
    }
    if kinds.is_empty() || kinds.len() > KINDS {
        return Err(LoadError::Description(format!("{} kinds, not 1 to {KINDS}", kinds.len())));
    }
    let mut named = HashSet::with_capacity(kinds.len());
    for kind in kinds {
        if !is_kind(kind) {
            return Err(LoadError::Description(format!(
                "the kind {:?}, which does not match [a-z0-9][a-z0-9._-]{{0,99}}",
                start(kind)
            )));
        }
        if !named.insert(kind) {
            return Err(LoadError::Description(format!("the kind {kind:?} twice")));
        }
    }
    Ok(())
}

fn is_kind(kind: &str) -> bool {
    let mut bytes = kind.bytes();
    let first = bytes.next().is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    first
        && kind.len() <= 100
        && bytes.all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
    fn another_version_of_our_package_is_told_from_a_compatible_one() {
        assert_eq!(foreign_version("tidings:plugin/builder@0.1.0"), None);
        assert_eq!(foreign_version("tidings:plugin/host@0.1.7"), None);
        assert_eq!(foreign_version("tidings:plugin/builder@0.9.3"), Some("0.9"));
        assert_eq!(foreign_version("tidings:plugin/types@1.0.0"), Some("1.0"));
        assert_eq!(foreign_version("tidings:plugin/types@0.1.0-rc.1"), Some("0.1.0-rc.1"));
        assert_eq!(foreign_version("wasi:cli/stderr@0.2.0"), None);
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

    #[test]
    fn a_kind_that_is_described_twice_is_refused() {
        let error = check_description("a", "1", &["b", "c", "b"]).expect_err("twice");
        assert_eq!(error.to_string(), "its describe() names the kind \"b\" twice");
    }

    /// The name of an interface, ours, of WASI, or of nobody.
    fn interface() -> impl Strategy<Value = String> {
        let ours = "(tidings:plugin/(builder|host|types)|wasi:(cli/stderr|sockets/tcp|random/random))@0\\.[12]\\.[0-9](-rc\\.1)?";
        prop_oneof![3 => ours, 1 => ".{0,40}"]
    }

    proptest! {
        #[test]
        fn what_describes_itself_well_can_be_known_by_it_and_what_does_not_is_told_what_is_wrong(
            name in prop_oneof![4 => "[a-z]{1,9}", 1 => "[a-z+@]{0,9}|.{0,120}"],
            version in prop_oneof![4 => "[0-9.+]{1,9}", 1 => "[0-9@]{0,9}|.{0,120}"],
            kinds in proptest::collection::vec(
                prop_oneof![8 => "[ab]{1,2}", 1 => "[a-z0-9._-]{0,3}|[a-z]{98,102}|.{0,130}"],
                0..6,
            ),
        ) {
            let kinds: Vec<&str> = kinds.iter().map(String::as_str).collect();
            match check_description(&name, &version, &kinds) {
                Ok(()) => {
                    // The label can be taken apart again, and is one line of a header.
                    let label = format!("{name}@{version}+00000000");
                    prop_assert_eq!(label.split_once('@'), Some((&*name, &*format!("{version}+00000000"))));
                    prop_assert!(label.len() <= 210 && !label.contains(char::is_control));
                    prop_assert!(kinds.iter().all(|kind| is_kind(kind)));
                    prop_assert_eq!(kinds.iter().collect::<HashSet<_>>().len(), kinds.len());
                }
                Err(error) => {
                    let sentence = error.to_string();
                    prop_assert!(sentence.starts_with("its describe() names "), "{}", sentence);
                    prop_assert!(["the name", "the version", "kind"].iter().any(|part| sentence.contains(part)));
                    prop_assert!(sentence.len() < 2_000 && !sentence.contains(char::is_control), "{}", sentence);
                }
            }
        }

        #[test]
        fn any_imports_and_exports_are_of_our_world_or_it_is_said_which_are_not(
            imports in proptest::collection::vec(interface(), 0..5),
            exports in proptest::collection::vec(interface(), 0..5),
        ) {
            let world = World { imports, exports };
            match check_world(&world) {
                Ok(()) => {
                    prop_assert!(world.imports.iter().all(|name| is_offered(name)));
                    prop_assert!(world.exports.iter().any(|name| name.starts_with(BUILDER_TRACK)));
                }
                Err(LoadError::Version(version)) => prop_assert!(version != SERVED),
                Err(LoadError::Imports(names)) => {
                    let missing = world.imports.iter().filter(|name| !is_offered(name));
                    prop_assert!(missing.clone().count() > 0 && missing.clone().all(|name| names.contains(name.as_str())));
                }
                Err(LoadError::NoBuilder(said)) => {
                    prop_assert!(world.exports.iter().all(|name| said.contains(name.as_str())));
                }
                Err(other) => prop_assert!(false, "{}", other),
            }
        }
    }
}
