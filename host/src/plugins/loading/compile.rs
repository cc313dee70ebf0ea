//! Compiles a component, in a child process that can be killed. Compiling cannot be interrupted, and a malicious file
//! of a few kilobytes can take hours and gigabytes. The child is the daemon's own binary. It leaves the code in
//! wasmtime's cache, where the daemon finds it. Source: wasmtime treats cost while compiling as an ordinary bug, not a
//! vulnerability.
//!
//! Must never compile in the daemon what a child has not compiled within the limits. If the child could not store the
//! code, for instance because the disk is full, the daemon compiles it again, which costs about the same once more.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use wasmtime::component::Component;

use crate::plugins::loading::load_error::LoadError;
use crate::plugins::runtime::engine;
use crate::plugins::runtime::engine::Engine;
use crate::plugins::runtime::instance::error_chain;
use crate::plugins::state::probe_write;

/// How long compiling one file may take. The interpreter of another language takes a fraction of that.
const COMPILE_DEADLINE: Duration = Duration::from_mins(2);
/// The address space of the child process.
const MAX_ADDRESS_SPACE_BYTES: u64 = 6 << 30;
/// A file of more bytes is compiled while no other file is.
const LARGE_FILE_BYTES: usize = 1024 * 1024;
/// How much of the child's standard error is read.
const MAX_STDERR_BYTES: u64 = 4 * 1024;

/// The child's exit code when it has compiled the component but could not store the code; its standard error has the
/// reason.
pub const CODE_NOT_CACHED: u8 = 3;

/// The arguments that make the binary compile.
const SUBCOMMAND: [&str; 2] = ["plugin", "compile"];

/// Compiles `bytes`, which were inspected before, without blocking the daemon's threads. Not cancel-safe, but harmless
/// to cancel: the child is killed.
pub(in crate::plugins) async fn compile(engine: &Arc<Engine>, bytes: Arc<[u8]>) -> Result<Component, LoadError> {
    // Compiling a large file may take most of the machine's memory, so no other file is compiled meanwhile.
    let share = if bytes.len() > LARGE_FILE_BYTES { engine.max_compilers } else { 1 };
    let permits = engine.compile_permits.acquire_many(share).await.expect("the semaphore is never closed");
    let not_cached_reason = match &engine.state {
        Some(state) => compile_in_child(&state.cache(), engine.metering, &bytes).await?,
        None => None,
    };
    if let (Some(state), Some(reason)) = (&engine.state, &not_cached_reason) {
        state.record_write_failure(reason, bytes.len());
    }
    let compiling = Arc::clone(engine);
    // If the code is in the cache, this takes milliseconds.
    let compiled = tokio::task::spawn_blocking(move || Component::from_binary(&compiling.wasmtime, &bytes)).await;
    if let (Some(state), Some(_)) = (&engine.state, not_cached_reason) {
        remove_unfinished_files(&state.cache());
    }
    drop(permits);
    let compiled = compiled.map_err(|panic| LoadError::Damaged(panic.to_string()))?;
    compiled.map_err(|error| LoadError::Damaged(error_chain(&error)))
}

/// Compiles `bytes` into the cache with a child process. Returns why the code could not be stored, if the child could
/// not store it.
async fn compile_in_child(cache: &Path, metering: engine::Metering, bytes: &[u8]) -> Result<Option<String>, LoadError> {
    let process_error = |error: std::io::Error| LoadError::Process(error);
    // On Linux this leads to the binary that runs, even if another version was installed over it.
    let running = Path::new("/proc/self/exe");
    let binary = if running.exists() { running.to_owned() } else { std::env::current_exe().map_err(process_error)? };
    let mut child = Command::new(binary)
        .args(SUBCOMMAND)
        .arg(metering.name())
        .arg(cache)
        .env_clear()
        // A signal from the terminal, such as Ctrl-C, must reach only the daemon: it may go on until its work is done.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(process_error)?;
    let mut stdin = child.stdin.take().expect("piped");
    let stderr = child.stderr.take().expect("piped");
    let work = async {
        // If this fails, the child has ended early, and its standard error says why.
        let _ = stdin.write_all(bytes).await;
        drop(stdin);
        let mut error_text = String::new();
        let _ = stderr.take(MAX_STDERR_BYTES).read_to_string(&mut error_text).await;
        child.wait().await.map(|status| (status, error_text))
    };
    match tokio::time::timeout(COMPILE_DEADLINE, work).await {
        Ok(Ok((status, _))) if status.success() => Ok(None),
        Ok(Ok((status, error_text))) if status.code() == Some(CODE_NOT_CACHED.into()) => {
            Ok(Some(error_text.trim().to_owned()))
        }
        Ok(Ok((status, error_text))) if status.code() == Some(1) => {
            Err(LoadError::Damaged(error_text.trim().to_owned()))
        }
        // The child was killed, or aborted because it got no more memory.
        Ok(Ok((status, _))) => Err(LoadError::TooCostly(format!(
            "more than {} GiB of memory or {} s to compile it ({status})",
            MAX_ADDRESS_SPACE_BYTES >> 30,
            COMPILE_DEADLINE.as_secs()
        ))),
        Ok(Err(error)) => Err(LoadError::Process(error)),
        Err(_) => Err(LoadError::TooCostly(format!("more than {} s to compile it", COMPILE_DEADLINE.as_secs()))),
    }
}

/// The work of the child process: compiles `bytes` and stores the code in `cache`, within limits and at a low priority.
/// Returns why the code could not be stored, if it could not.
///
/// # Errors
///
/// When the bytes cannot be compiled, with the reason.
pub fn compile_in_this_process(metering: &str, cache: &Path, bytes: &[u8]) -> Result<Option<String>, String> {
    use rustix::process::{Resource, Rlimit, nice, setrlimit};
    let limits =
        [(Resource::As, MAX_ADDRESS_SPACE_BYTES), (Resource::Cpu, COMPILE_DEADLINE.as_secs() * 2), (Resource::Core, 0)];
    for (resource, limit) in limits {
        // If a limit cannot be set, the parent's deadline still holds.
        let _ = setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) });
    }
    let _ = nice(10);
    let metering = engine::Metering::from_name(metering).ok_or("no such metering")?;
    let (dir, cache) = (cache, engine::open_cache(cache));
    let engine = engine::wasmtime_engine(cache.clone().ok(), metering)?;
    let component = Component::from_binary(&engine, bytes).map_err(|error| error_chain(&error))?;
    let cache = match cache {
        Ok(cache) => cache,
        Err(reason) => return Ok(Some(reason)),
    };
    // Wasmtime does not report that it could not write to the cache. But it counts hits, and misses whose code it has
    // written.
    let is_cached = || cache.cache_hits() + cache.cache_misses() > 0;
    if is_cached() {
        return Ok(None);
    }
    // Wasmtime leaves the part of the file that could be written, and would not write a file of that name again.
    remove_unfinished_files(dir);
    let code = component.serialize().map_err(|error| error_chain(&error))?;
    if let Err(error) = probe_write(dir, &code) {
        return Ok(Some(error.to_string()));
    }
    Component::from_binary(&engine, bytes).map_err(|error| error_chain(&error))?;
    Ok((!is_cached()).then(|| "wasmtime gave no reason".to_owned()))
}

/// Removes the temporary files in the cache that wasmtime did not finish writing.
fn remove_unfinished_files(cache: &Path) {
    let list = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    for file in list(&cache.join("modules")).flat_map(|dir| list(&dir.path())) {
        if file.file_name().to_string_lossy().contains(".wip-atomic-write-") {
            let _ = std::fs::remove_file(file.path());
        }
    }
}
