//! Checks a file before it is compiled: it must be a whole component, and must not be made to be expensive to compile.
//! Wasmtime's own limits are those of the format, a thousand times what a plugin needs.

use wasmparser::{Parser, Payload};

use crate::plugins::loading::load_error::{LoadError, first_chars};

/// The code of one function. The largest function in an interpreter of another language has some 420 KiB.
const MAX_FUNCTION_BYTES: usize = 1024 * 1024;
/// The local variables of one function. A function of an interpreter has at most some 300.
const MAX_LOCALS: u32 = 10_000;
/// The functions in one file. An interpreter has some 13,000.
const MAX_FUNCTIONS: u32 = 100_000;
/// The modules and components inside one file. An interpreter has some 40.
const MAX_PARTS: u32 = 200;
/// How deep modules and components may be nested.
const MAX_DEPTH: usize = 8;
/// The instances that one file makes of its modules and components.
const MAX_INSTANCES: u32 = 1_000;
/// The names of all imports and exports of one file, in bytes. An interpreter that imports all of WASI has some 2 KiB.
const MAX_NAME_BYTES: usize = 64 * 1024;
/// How much each name counts besides its bytes.
const NAME_OVERHEAD_BYTES: usize = 24;

/// The format of `bytes`, in words for an error; `None` = they begin like a component.
fn name_wrong_format(bytes: &[u8]) -> Option<&'static str> {
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

/// The names of a component's imports and exports.
#[derive(Debug, Default)]
pub struct World {
    /// The interfaces and functions that it imports.
    pub imports: Vec<String>,
    /// The interfaces and functions that it exports.
    pub exports: Vec<String>,
}

/// Whether the first character that is not in a comment is an opening parenthesis, as in WebAssembly's text format.
fn is_text_format(bytes: &[u8]) -> bool {
    let lines = bytes.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii_start);
    lines.filter(|line| !line.is_empty() && !line.starts_with(b";;")).map(|line| line[0]).next() == Some(b'(')
}

/// Reads the sections of a component and counts what makes compiling expensive. Nothing is compiled, and little memory
/// is allocated besides a small stack of parsers and the names.
///
/// # Errors
///
/// When `bytes` are not a component, are damaged, or would be too costly to compile.
pub fn inspect(bytes: &[u8]) -> Result<World, LoadError> {
    if let Some(format) = name_wrong_format(bytes) {
        return Err(LoadError::NotAComponent(format));
    }
    let too_costly = |reason: String| Err(LoadError::TooCostly(reason));
    let damaged = |error: wasmparser::BinaryReaderError| LoadError::Damaged(error.message().to_owned());
    let mut world = World::default();
    let (mut functions, mut parts, mut instances, mut depth, mut name_bytes) = (0_u32, 0_u32, 0_u32, 0_usize, 0_usize);
    let mut checked_name = |name: &str| {
        name_bytes += name.len() + NAME_OVERHEAD_BYTES;
        if name_bytes > MAX_NAME_BYTES {
            return Err(LoadError::TooCostly(format!(
                "imports and exports with names of more than {MAX_NAME_BYTES} bytes"
            )));
        }
        // No interface has such a name, and a terminal that shows it would execute the control characters.
        if name.contains(char::is_control) {
            return Err(LoadError::Damaged(format!("the name {:?} has control characters", first_chars(name))));
        }
        Ok(name.to_owned())
    };
    for payload in Parser::new(0).parse_all(bytes) {
        match payload.map_err(damaged)? {
            Payload::ComponentImportSection(section) if depth == 0 => {
                for import in section {
                    world.imports.push(checked_name(import.map_err(damaged)?.name.name)?);
                }
            }
            Payload::ComponentExportSection(section) if depth == 0 => {
                for export in section {
                    world.exports.push(checked_name(export.map_err(damaged)?.name.name)?);
                }
            }
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => {
                parts += 1;
                depth += 1;
                if depth > MAX_DEPTH {
                    return too_costly(format!("modules and components that are nested more than {MAX_DEPTH} deep"));
                }
                if parts > MAX_PARTS {
                    return too_costly(format!("more than {MAX_PARTS} modules and components"));
                }
            }
            Payload::End(_) => depth = depth.saturating_sub(1),
            Payload::InstanceSection(section) => instances = instances.saturating_add(section.count()),
            Payload::ComponentInstanceSection(section) => instances = instances.saturating_add(section.count()),
            Payload::CodeSectionStart { count, .. } => functions = functions.saturating_add(count),
            Payload::CodeSectionEntry(body) => {
                let bytes = body.range().len();
                if bytes > MAX_FUNCTION_BYTES {
                    return too_costly(format!("a function of {bytes} bytes, more than {MAX_FUNCTION_BYTES}"));
                }
                let mut locals = 0_u32;
                for local in body.get_locals_reader().map_err(damaged)? {
                    locals = locals.saturating_add(local.map_err(damaged)?.0);
                }
                if locals > MAX_LOCALS {
                    return too_costly(format!("a function with {locals} locals, more than {MAX_LOCALS}"));
                }
            }
            _ => {}
        }
        if functions > MAX_FUNCTIONS {
            return too_costly(format!("{functions} functions, more than {MAX_FUNCTIONS}"));
        }
        if instances > MAX_INSTANCES {
            return too_costly(format!("{instances} instances, more than {MAX_INSTANCES}"));
        }
    }
    Ok(world)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_format_of_a_file_that_is_no_component_is_named() {
        assert_eq!(name_wrong_format(b""), Some("empty"));
        assert_eq!(name_wrong_format(b"\0asm\x01\0\0\0"), Some("a core module"));
        assert_eq!(name_wrong_format(b"\0asm\x0d\0\x01\0"), None);
        assert_eq!(name_wrong_format(b"\0asm\x0d"), Some("cut off"));
        assert_eq!(name_wrong_format(b"(component)"), Some("WebAssembly text"));
        assert_eq!(name_wrong_format(b"\x7fELF"), Some("native or precompiled code"));
        assert_eq!(name_wrong_format(b"MZ"), Some("a program for Windows"));
        assert_eq!(name_wrong_format(b"\x1f\x8b\x08"), Some("a gzip archive"));
        assert_eq!(name_wrong_format(b"hello"), Some("something else"));
    }

    /// A component that has at least one of each part that is counted.
    fn sample_component() -> Vec<u8> {
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
    fn component_with_imports(count: usize, name: &str) -> Vec<u8> {
        let imports: Vec<String> = (0..count).map(|number| format!("(import \"{name}{number}\" (func))")).collect();
        wat::parse_str(format!("(component {})", imports.concat())).expect("a component")
    }

    #[test]
    fn the_imports_and_exports_of_a_component_are_found() {
        let World { imports, exports } = inspect(&sample_component()).expect("a component");
        assert_eq!(imports, ["tidings:plugin/host@0.1.0", "wasi:cli/stderr@0.2.0"]);
        assert_eq!(exports, ["tidings:plugin/builder@0.1.0"]);
    }

    #[test]
    fn too_many_names_are_too_costly() {
        assert_eq!(inspect(&component_with_imports(500, "f")).expect("not many").imports.len(), 500);
        let error = inspect(&component_with_imports(3_000, "f")).expect_err("many");
        assert!(matches!(&error, LoadError::TooCostly(reason) if reason.contains("names")), "{error}");
    }

    #[test]
    fn a_name_with_a_control_character_counts_as_damage() {
        let mut bytes = component_with_imports(1, "plain");
        let at = bytes.windows(5).position(|window| window == b"plain").expect("its name");
        bytes[at] = 0x1b;
        let error = inspect(&bytes).expect_err("an escape");
        assert!(error.to_string().ends_with(r#"the name "\u{1b}lain0" has control characters"#), "{error}");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_cause_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let component = [b"\0asm\x0d\0\x01\0".as_slice(), &bytes].concat();
            let _ = inspect(&component);
            let _ = inspect(&bytes);
        }

        #[test]
        fn a_damaged_component_is_refused_with_a_reason_or_has_names_within_the_limit(
            damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..6),
            cut in any::<proptest::sample::Index>(),
            is_cut in any::<bool>(),
        ) {
            let mut bytes = sample_component();
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
                    prop_assert!(names.concat().len() <= MAX_NAME_BYTES && !names.concat().contains(char::is_control));
                }
                Err(LoadError::NotAComponent(format)) => prop_assert!(!format.is_empty()),
                Err(LoadError::TooCostly(reason) | LoadError::Damaged(reason)) => prop_assert!(!reason.is_empty()),
                Err(other) => prop_assert!(false, "{}", other),
            }
        }
    }
}
