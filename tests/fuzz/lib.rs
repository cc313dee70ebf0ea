//! What the fuzz targets have in common. A target takes any bytes and panics if an answer breaks a promise.
//!
//! `cargo fuzz run --fuzz-dir tests/fuzz --sanitizer none --dev letter` looks for such bytes, on stable Rust as well; without
//! `--dev` it is built as a release is, with thin LTO, which takes long. Without `cargo fuzz` a target is a plain program
//! that is given the files to try, those that were found for instance:
//! `cargo run -p tidings-fuzz --bin letter -- tests/fuzz/artifacts/letter/crash-…`.

/// Makes a function that takes any bytes a target of libFuzzer's, or a program that tries files.
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

/// Tries each file that is named on the command line.
///
/// # Panics
///
/// When one cannot be read, or breaks a promise.
pub fn try_files(target: fn(&[u8])) {
    for file in std::env::args_os().skip(1) {
        target(&std::fs::read(&file).expect("a file that can be read"));
        println!("{}: well", file.display());
    }
}
