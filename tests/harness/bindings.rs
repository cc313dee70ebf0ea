//! Generates the bindings that `tidings plugin new` puts into a new plugin as `src/tidings.rs`. They are checked in at
//! `host/template/src/tidings.rs`, so that a new plugin builds without any crate from a registry. A test compares that
//! file with the text that is generated here.

use wit_bindgen_core::wit_parser::Resolve;
use wit_bindgen_core::{Files, WorldGenerator as _};
use wit_bindgen_rust::Opts;

use crate::repository;

/// The text before the generated code: inner attributes, which must come first, and short names for plugin authors.
const HEAD: &str = r#"//! The bindings to the daemon: what a plugin is given, and what it answers.
//!
//! Generated from `wit/plugin.wit`; do not edit. They are written beforehand so that a plugin needs no other crate.
#![allow(warnings, missing_docs, unreachable_pub, unsafe_code, unused_qualifications)]
#![allow(clippy::all, clippy::pedantic, clippy::nursery, clippy::restriction)]

pub use self::exports::tidings::plugin::builder::Guest;
pub use self::tidings::plugin::host;
pub use self::tidings::plugin::types::{BuildError, Built, Event, KindInfo, PluginInfo, Retry, Schedule};

/// Makes a component of the crate: `tidings::export!(Plugin)`, where `Plugin` implements [`Guest`].
macro_rules! export {
    ($plugin:ident) => {
        // Only a component has these exports; a linker for other targets cannot take their names.
        #[cfg(target_family = "wasm")]
        #[allow(unsafe_code, clippy::allow_attributes, clippy::pedantic, reason = "generated")]
        const _: () = {
            crate::tidings::export_component!($plugin with_types_in crate::tidings);
        };
    };
}
pub(crate) use export;

"#;

/// The text after the generated code: those parts of the crate `wit-bindgen` that the generated code calls.
const RUNTIME: &str = r#"
/// What the generated text needs at run time, instead of the crate `wit-bindgen`.
#[rustfmt::skip]
mod runtime {
    use std::alloc::{Layout, alloc, dealloc, handle_alloc_error, realloc};

    /// Gives the daemon memory inside of the plugin for what it passes in. The C library of `wasm32-wasip2` does that.
    #[cfg(all(target_arch = "wasm32", any(target_env = "p1", target_env = "")))]
    #[unsafe(no_mangle)]
    unsafe extern "C" fn cabi_realloc(old: *mut u8, old_size: usize, align: usize, new_size: usize) -> *mut u8 {
        // SAFETY: the component model asks with powers of two, and gives back only what it got here.
        let new = unsafe {
            let layout = |size| Layout::from_size_align_unchecked(size, align);
            match (old_size, new_size) {
                (0, 0) => return align as *mut u8,
                (0, _) => alloc(layout(new_size)),
                (_, 0) => {
                    dealloc(old, layout(old_size));
                    return align as *mut u8;
                }
                _ => realloc(old, layout(old_size), new_size),
            }
        };
        if new.is_null() {
            // Without a message: a component that is being given memory may not call out to print one.
            core::arch::wasm32::unreachable();
        }
        new
    }

    /// `cabi_realloc` is part of this crate: nothing has to be done to link it.
    pub fn maybe_link_cabi_realloc() {}

    /// Runs the constructors of linked C code, once. Without this call the linker has every export run them anew.
    #[cfg(target_arch = "wasm32")]
    pub fn run_ctors_once() {
        use std::sync::atomic::{AtomicBool, Ordering};

        static RUN: AtomicBool = AtomicBool::new(false);
        unsafe extern "C" {
            fn __wasm_call_ctors();
        }
        if !RUN.swap(true, Ordering::Relaxed) {
            // SAFETY: the linker makes this function, to be called once.
            unsafe { __wasm_call_ctors() };
        }
    }

    /// The memory of a list that is passed out. It is freed here, unless the daemon is to say when.
    pub struct Cleanup(*mut u8, Layout);

    impl Cleanup {
        pub fn new(layout: Layout) -> (*mut u8, Option<Self>) {
            if layout.size() == 0 {
                return (std::ptr::null_mut(), None);
            }
            // SAFETY: it is not empty.
            let memory = unsafe { alloc(layout) };
            if memory.is_null() {
                handle_alloc_error(layout);
            }
            (memory, Some(Self(memory, layout)))
        }

        pub fn forget(self) {
            std::mem::forget(self);
        }
    }

    impl Drop for Cleanup {
        fn drop(&mut self) {
            // SAFETY: it was allocated with this layout, and nobody else frees it.
            unsafe { dealloc(self.0, self.1) };
        }
    }
}
"#;

/// Generates the bindings: the text of `host/template/src/tidings.rs`.
///
/// # Panics
///
/// When `wit/plugin.wit` has a mistake.
#[must_use]
pub fn generate() -> String {
    let mut resolve = Resolve::default();
    let (package, _) = resolve.push_path(repository().join("wit")).expect("the WIT of the repository is valid");
    let world = resolve.select_world(&[package], Some("plugin")).expect("it has the world that plugins target");
    let options = Opts {
        format: true,
        runtime_path: Some("crate::tidings::runtime".into()),
        // The macro `export!` is defined in HEAD and calls this one.
        export_macro_name: Some("export_component".into()),
        // With these derives, a plugin's tests can compare results.
        additional_derive_attributes: ["PartialEq", "Eq"].map(String::from).to_vec(),
        ..Opts::default()
    };
    let mut files = Files::default();
    options.build().generate(&mut resolve, world, &mut files).expect("there are Rust bindings for every world");
    let (_, generated) = files.iter().next().expect("the generator writes one file");
    let generated = str::from_utf8(generated).expect("Rust is UTF-8");
    format!("{HEAD}{generated}{RUNTIME}")
}
