//! Checks of a component's imports and exports, before it is compiled, and of its description, after `describe` was
//! called. The errors are sentences for the plugin's author; those of wasmtime's linker would be about types.

use std::collections::{BTreeMap, HashSet};

use crate::model::relay;
use crate::plugins::loading::inspect::World;
use crate::plugins::loading::load_error::{LoadError, SERVED_VERSION, first_chars};
use crate::plugins::runtime::engine::LINKED_INTERFACES;

/// The WIT package that defines the world of plugins.
const PLUGIN_PACKAGE: &str = "tidings:plugin/";
/// What the name of the interface `builder` begins with in every compatible version.
const BUILDER_PREFIX: &str = "tidings:plugin/builder@0.1.";
/// The most kinds that one plugin may serve.
const MAX_KINDS: usize = 1_000;

/// Checks the imports and exports of a component by name.
///
/// # Errors
///
/// When it imports an interface that the daemon does not link, or does not export the interface `builder`.
pub fn check_world(world: &World) -> Result<(), LoadError> {
    let World { imports, exports } = world;
    if let Some(version) = imports.iter().chain(exports).find_map(|name| unsupported_version(name)) {
        return Err(LoadError::Version(version.to_owned()));
    }
    // Imports that are missing for the same reason are named together, in front of the reason.
    let mut missing: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for import in imports.iter().filter(|name| !is_linked(name)) {
        missing.entry(explain_missing_import(import)).or_default().push(import);
    }
    if !missing.is_empty() {
        let missing: Vec<String> =
            missing.into_iter().map(|(reason, imports)| format!("{}: {reason}", imports.join(", "))).collect();
        return Err(LoadError::Imports(missing.join("; ")));
    }
    if !exports.iter().any(|name| name.starts_with(BUILDER_PREFIX)) {
        let exported = if exports.is_empty() {
            ", nor anything else".to_owned()
        } else {
            format!(", only {}", exports.join(", "))
        };
        return Err(LoadError::NoBuilder(exported));
    }
    Ok(())
}

/// If `name` is an interface of [`PLUGIN_PACKAGE`] in a version that is not compatible with the served one: that
/// version, without its last number.
fn unsupported_version(name: &str) -> Option<&str> {
    let (_, version) = name.strip_prefix(PLUGIN_PACKAGE)?.split_once('@')?;
    // A pre-release version is compatible only with itself, so it is compared whole.
    let end = if version.contains('-') { None } else { version.rfind('.') };
    let track = &version[..end.unwrap_or(version.len())];
    (track != SERVED_VERSION).then_some(track)
}

fn is_linked(import: &str) -> bool {
    let (interface, version) = import.split_once('@').unwrap_or((import, ""));
    LINKED_INTERFACES.iter().any(|(linked, track)| interface == *linked && version.starts_with(track))
}

/// Why an import is not linked, and what the author can do.
fn explain_missing_import(import: &str) -> &'static str {
    let interface = import.split('@').next().unwrap_or(import);
    if interface.starts_with("wasi:sockets") || interface.starts_with("wasi:http") {
        "the network, which no plugin has; leave out what needs it (in JavaScript `--disable http fetch-event`, in Python `--stub-wasi`)"
    } else if LINKED_INTERFACES.iter().any(|(linked, _)| interface == *linked) {
        "of a version that is not served"
    } else if interface.starts_with("wasi:") {
        "a part of WASI that plugins are not given"
    } else {
        "not known to this daemon; a plugin may import tidings:plugin/host and the inert parts of WASI 0.2"
    }
}

/// Checks the answer of a plugin's `describe`: its name, its version, and the kinds that it serves.
///
/// # Errors
///
/// When the name or the version could not be part of the plugin's label, or a kind is malformed or named twice.
pub fn check_description(name: &str, version: &str, kinds: &[&str]) -> Result<(), LoadError> {
    for (field, text) in [("name", name), ("version", version)] {
        if !(1..=100).contains(&text.len())
            || text.chars().any(|char| char.is_control() || char == '@' || char == '+' && field == "name")
        {
            return Err(LoadError::Description(format!(
                "the {field} {:?}, which is not 1 to 100 printable bytes",
                first_chars(text)
            )));
        }
    }
    if kinds.is_empty() || kinds.len() > MAX_KINDS {
        return Err(LoadError::Description(format!("{} kinds, not 1 to {MAX_KINDS}", kinds.len())));
    }
    let mut named = HashSet::with_capacity(kinds.len());
    for kind in kinds {
        if !is_valid_kind(kind) {
            return Err(LoadError::Description(format!(
                "the kind {:?}, which does not match [a-z0-9][a-z0-9._-]{{0,99}}",
                first_chars(kind)
            )));
        }
        if *kind == relay::KIND {
            return Err(LoadError::Description(format!("the kind {kind:?}, which is built into the daemon")));
        }
        if !named.insert(kind) {
            return Err(LoadError::Description(format!("the kind {kind:?} twice")));
        }
    }
    Ok(())
}

fn is_valid_kind(kind: &str) -> bool {
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
    fn only_inert_interfaces_in_known_versions_are_linked() {
        for name in ["tidings:plugin/host@0.1.0", "wasi:cli/stderr@0.2.12", "wasi:random/random@0.2.0"] {
            assert!(is_linked(name), "{name}");
        }
        for name in [
            "wasi:sockets/tcp@0.2.0",
            "wasi:http/types@0.2.0",
            "wasi:cli/stderr@0.3.0",
            "tidings:plugin/host@0.9.0",
            "env",
        ] {
            assert!(!is_linked(name), "{name}");
        }
    }

    #[test]
    fn an_incompatible_version_of_the_plugin_package_is_found_and_a_compatible_one_is_accepted() {
        assert_eq!(unsupported_version("tidings:plugin/builder@0.1.0"), None);
        assert_eq!(unsupported_version("tidings:plugin/host@0.1.7"), None);
        assert_eq!(unsupported_version("tidings:plugin/builder@0.9.3"), Some("0.9"));
        assert_eq!(unsupported_version("tidings:plugin/types@1.0.0"), Some("1.0"));
        assert_eq!(unsupported_version("tidings:plugin/types@0.1.0-rc.1"), Some("0.1.0-rc.1"));
        assert_eq!(unsupported_version("wasi:cli/stderr@0.2.0"), None);
    }

    #[test]
    fn a_kind_is_valid_if_the_table_of_schedules_accepts_it() {
        for kind in ["a", "0", "game-reminder", "a.b_c-d", &"k".repeat(100)] {
            assert!(is_valid_kind(kind), "{kind}");
        }
        for kind in ["", "-a", "A", "a b", "a/b", "é", &"k".repeat(101)] {
            assert!(!is_valid_kind(kind), "{kind}");
        }
    }

    #[test]
    fn a_kind_that_is_named_twice_is_refused() {
        let error = check_description("a", "1", &["b", "c", "b"]).expect_err("b is named twice");
        assert_eq!(error.to_string(), "its describe() names the kind \"b\" twice");
    }

    /// The name of an interface: of the plugin package, of WASI, or arbitrary.
    fn interface() -> impl Strategy<Value = String> {
        let known = "(tidings:plugin/(builder|host|types)|wasi:(cli/stderr|sockets/tcp|random/random))@0\\.[12]\\.[0-9](-rc\\.1)?";
        prop_oneof![3 => known, 1 => ".{0,40}"]
    }

    proptest! {
        #[test]
        fn an_accepted_description_makes_a_label_that_can_be_split_and_a_refused_one_names_its_mistake(
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
                    // The label can be split into name and version again, and is one line of a header.
                    let label = format!("{name}@{version}+00000000");
                    prop_assert_eq!(label.split_once('@'), Some((&*name, &*format!("{version}+00000000"))));
                    prop_assert!(label.len() <= 210 && !label.contains(char::is_control));
                    prop_assert!(kinds.iter().all(|kind| is_valid_kind(kind)));
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
        fn a_world_is_accepted_or_the_imports_and_exports_that_do_not_fit_are_named(
            imports in proptest::collection::vec(interface(), 0..5),
            exports in proptest::collection::vec(interface(), 0..5),
        ) {
            let world = World { imports, exports };
            match check_world(&world) {
                Ok(()) => {
                    prop_assert!(world.imports.iter().all(|name| is_linked(name)));
                    prop_assert!(world.exports.iter().any(|name| name.starts_with(BUILDER_PREFIX)));
                }
                Err(LoadError::Version(version)) => prop_assert!(version != SERVED_VERSION),
                Err(LoadError::Imports(names)) => {
                    let missing = world.imports.iter().filter(|name| !is_linked(name));
                    prop_assert!(missing.clone().count() > 0 && missing.clone().all(|name| names.contains(name.as_str())));
                }
                Err(LoadError::NoBuilder(exported)) => {
                    prop_assert!(world.exports.iter().all(|name| exported.contains(name.as_str())));
                }
                Err(other) => prop_assert!(false, "{}", other),
            }
        }
    }
}
