//! What the fuzz targets share. A fuzz target is a function that takes arbitrary bytes and panics if the code under
//! test breaks a promise.
//!
//! `cargo fuzz run --fuzz-dir tests/fuzz --sanitizer none --dev dead_letter` searches for such bytes, also on stable
//! Rust. Without `--dev` the target is built like a release, with thin LTO, which takes long. Without `cargo fuzz` a
//! target is an ordinary program that tries the files on its command line, for example those that `cargo fuzz` found:
//! `cargo run -p tidings-fuzz --bin dead_letter -- tests/fuzz/artifacts/dead_letter/crash-…`.

/// Makes a libFuzzer target of the function, or, without `cargo fuzz`, a program that tries files.
#[macro_export]
macro_rules! target {
    ($function:ident) => {
        #[cfg(fuzzing)]
        libfuzzer_sys::fuzz_target!(|bytes: &[u8]| $function(bytes));

        #[cfg(not(fuzzing))]
        fn main() {
            $crate::try_files($function);
        }
    };
}

/// Calls `target` with the bytes of each file on the command line.
///
/// # Panics
///
/// When a file cannot be read, or `target` panics.
pub fn try_files(target: fn(&[u8])) {
    for file in std::env::args_os().skip(1) {
        target(&std::fs::read(&file).expect("a file that can be read"));
        println!("{}: no panic", file.display());
    }
}
