//! The binary. All of its code is in the library.

/// The daemon allocates messages on one thread and frees them on another. glibc's allocator is slow at that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    tidings::cli::main()
}
