//! What is checked of a file before anything is compiled: that it is a component, whole, and not built to be expensive.
//! Wasmtime's own limits are those of the format, a thousand times what a plugin needs.

use wasmparser::{Parser, Payload};

use crate::plugins::loading::load_error::{LoadError, start};

/// The code of one function. The largest of the interpreters of other languages has some 420 KiB.
const FUNCTION_BYTES: usize = 1024 * 1024;
/// The local variables of one function. An interpreter's has some 300.
const LOCALS: u32 = 10_000;
/// Functions of one file. An interpreter has some 13,000.
const FUNCTIONS: u32 = 100_000;
/// Modules and components inside one file. An interpreter has some 40.
const PARTS: u32 = 200;
/// How deep they may be nested.
const DEPTH: usize = 8;
/// Instances that one file makes of them.
const INSTANCES: u32 = 1_000;
/// The names of all imports and exports of one file, in bytes. An interpreter that asks for all of WASI has some 2 KiB.
const NAMES: usize = 64 * 1024;
/// What a name costs besides its bytes.
const NAME_OVERHEAD: usize = 24;

/// What the bytes are, if they are not a component.
fn other_than_component(bytes: &[u8]) -> Option<&'static str> {
    match bytes {
        [] => Some("empty"),
        // The magic number, the version of the component format, and its layer.
        [0, b'a', b's', b'm', _, _, 1, 0, ..] => None,
        [0, b'a', b's', b'm', _, _, 0, 0, ..] => Some("a core module"),
        [0x7f, b'E', b'L', b'F', ..] => Some("native or precompiled code"),
        [b'M', b'Z', ..] => Some("a program for Windows"),
        [0x1f, 0x8b, ..] => Some("a gzip archive"),
        [b'(' | b';' | b' ' | b'\t' | b'\n' | b'\r', ..] if is_text_format(bytes) => Some("WebAssembly text"),
        [0, b'a', b's', b'm', ..] => Some("cut off"),
        _ => Some("something else"),
    }
}

/// The names of what a component asks for and offers.
#[derive(Debug, Default)]
pub struct World {
    /// What it asks for.
    pub imports: Vec<String>,
    /// What it offers.
    pub exports: Vec<String>,
}

/// Whether the first thing that is no comment opens a parenthesis.
fn is_text_format(bytes: &[u8]) -> bool {
    let lines = bytes.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii_start);
    lines.filter(|line| !line.is_empty() && !line.starts_with(b";;")).map(|line| line[0]).next() == Some(b'(')
}

/// Reads the sections of a component and counts what is in them. Nothing is compiled, and little is allocated but a
/// stack of few parsers, and the names.
///
/// # Errors
///
/// When it is not a component, damaged, or would be too costly to compile.
pub fn inspect(bytes: &[u8]) -> Result<World, LoadError> {
    if let Some(what) = other_than_component(bytes) {
        return Err(LoadError::NotAComponent(what));
    }
    let too_much = |what: String| Err(LoadError::TooCostly(what));
    let damaged = |error: wasmparser::BinaryReaderError| LoadError::Damaged(error.message().to_owned());
    let mut world = World::default();
    let (mut functions, mut parts, mut instances, mut depth, mut names) = (0_u32, 0_u32, 0_u32, 0_usize, 0_usize);
    let mut noted = |name: &str| {
        names += name.len() + NAME_OVERHEAD;
        if names > NAMES {
            return Err(LoadError::TooCostly(format!("imports and exports with names of more than {NAMES} bytes")));
        }
        // No interface has such a name, and a terminal that shows it would obey it.
        if name.contains(char::is_control) {
            return Err(LoadError::Damaged(format!("the name {:?} has control characters", start(name))));
        }
        Ok(name.to_owned())
    };
    for payload in Parser::new(0).parse_all(bytes) {
        match payload.map_err(damaged)? {
            Payload::ComponentImportSection(section) if depth == 0 => {
                for import in section {
                    world.imports.push(noted(import.map_err(damaged)?.name.name)?);
                }
            }
            Payload::ComponentExportSection(section) if depth == 0 => {
                for export in section {
                    world.exports.push(noted(export.map_err(damaged)?.name.name)?);
                }
            }
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => {
                parts += 1;
                depth += 1;
                if depth > DEPTH {
                    return too_much(format!("modules and components that are nested more than {DEPTH} deep"));
                }
                if parts > PARTS {
                    return too_much(format!("more than {PARTS} modules and components"));
                }
            }
            Payload::End(_) => depth = depth.saturating_sub(1),
            Payload::InstanceSection(section) => instances = instances.saturating_add(section.count()),
            Payload::ComponentInstanceSection(section) => instances = instances.saturating_add(section.count()),
            Payload::CodeSectionStart { count, .. } => functions = functions.saturating_add(count),
            Payload::CodeSectionEntry(body) => {
                let bytes = body.range().len();
                if bytes > FUNCTION_BYTES {
                    return too_much(format!("a function of {bytes} bytes, more than {FUNCTION_BYTES}"));
                }
                let mut locals = 0_u32;
                for local in body.get_locals_reader().map_err(damaged)? {
                    locals = locals.saturating_add(local.map_err(damaged)?.0);
                }
                if locals > LOCALS {
                    return too_much(format!("a function with {locals} locals, more than {LOCALS}"));
                }
            }
            _ => {}
        }
        if functions > FUNCTIONS {
            return too_much(format!("{functions} functions, more than {FUNCTIONS}"));
        }
        if instances > INSTANCES {
            return too_much(format!("{instances} instances, more than {INSTANCES}"));
        }
    }
    Ok(world)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_component_is_named() {
        assert_eq!(other_than_component(b""), Some("empty"));
        assert_eq!(other_than_component(b"\0asm\x01\0\0\0"), Some("a core module"));
        assert_eq!(other_than_component(b"\0asm\x0d\0\x01\0"), None);
        assert_eq!(other_than_component(b"\0asm\x0d"), Some("cut off"));
        assert_eq!(other_than_component(b"(component)"), Some("WebAssembly text"));
        assert_eq!(other_than_component(b"\x7fELF"), Some("native or precompiled code"));
        assert_eq!(other_than_component(b"MZ"), Some("a program for Windows"));
        assert_eq!(other_than_component(b"\x1f\x8b\x08"), Some("a gzip archive"));
        assert_eq!(other_than_component(b"hello"), Some("something else"));
    }

    /// A component with something of everything that is counted.
    fn component() -> Vec<u8> {
        let text = r#"(component
            (import "tidings:plugin/host@0.1.0" (instance))
            (import "wasi:cli/stderr@0.2.0" (instance))
            (core module $module
                (memory 1)
                (func (export "f") (param i32) (result i32) (local i64 f32) local.get 0))
            (core instance (instantiate $module))
            (component $inner (core module))
            (instance $builder)
            (export "tidings:plugin/builder@0.1.0" (instance $builder)))"#;
        wat::parse_str(text).expect("a component")
    }

    /// A component that imports `count` functions.
    fn importing(count: usize, name: &str) -> Vec<u8> {
        let imports: Vec<String> = (0..count).map(|number| format!("(import \"{name}{number}\" (func))")).collect();
        wat::parse_str(format!("(component {})", imports.concat())).expect("a component")
    }

    #[test]
    fn the_names_of_a_component_are_found() {
        let World { imports, exports } = inspect(&component()).expect("a component");
        assert_eq!(imports, ["tidings:plugin/host@0.1.0", "wasi:cli/stderr@0.2.0"]);
        assert_eq!(exports, ["tidings:plugin/builder@0.1.0"]);
    }

    #[test]
    fn names_without_end_are_too_costly() {
        assert_eq!(inspect(&importing(500, "f")).expect("not many").imports.len(), 500);
        let error = inspect(&importing(3_000, "f")).expect_err("many");
        assert!(matches!(&error, LoadError::TooCostly(what) if what.contains("names")), "{error}");
    }

    #[test]
    fn a_name_that_a_terminal_would_obey_is_damage() {
        let mut bytes = importing(1, "plain");
        let at = bytes.windows(5).position(|window| window == b"plain").expect("its name");
        bytes[at] = 0x1b;
        let error = inspect(&bytes).expect_err("an escape");
        assert!(error.to_string().ends_with(r#"the name "\u{1b}lain0" has control characters"#), "{error}");
    }

    proptest! {
        #[test]
        fn any_bytes_get_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let component = [b"\0asm\x0d\0\x01\0".as_slice(), &bytes].concat();
            let _ = inspect(&component);
            let _ = inspect(&bytes);
        }

        #[test]
        fn a_damaged_component_is_refused_in_words_or_has_names_within_their_limit(
            damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..6),
            cut in any::<proptest::sample::Index>(),
            is_cut in any::<bool>(),
        ) {
            let mut bytes = component();
            for (at, byte) in damage {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if is_cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            match inspect(&bytes) {
                Ok(World { imports, exports }) => {
                    let names: Vec<String> = [imports, exports].concat();
                    prop_assert!(names.concat().len() <= NAMES && !names.concat().contains(char::is_control));
                }
                Err(LoadError::NotAComponent(what)) => prop_assert!(!what.is_empty()),
                Err(LoadError::TooCostly(what) | LoadError::Damaged(what)) => prop_assert!(!what.is_empty()),
                Err(other) => prop_assert!(false, "{}", other),
            }
        }
    }
}
