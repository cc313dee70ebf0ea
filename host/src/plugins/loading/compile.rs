//! Bytes to compiled code. Compiling cannot be interrupted, and a file of a few kilobytes can be made to take hours and
//! gigabytes, so it is done by a process of our own binary, which can be killed: it leaves the code in wasmtime's cache,
//! where the daemon finds it. Source: wasmtime treats cost while compiling as an ordinary bug, not a vulnerability.
//!
//! The cache is no more than that. Where the code cannot be kept, since the disk is full for instance, the daemon compiles
//! by itself what that process has compiled within the limits, which costs about the same again.

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
use crate::plugins::runtime::instance::chain;
use crate::plugins::state::try_to_write;

/// How long compiling one file may take: several times what the interpreter of another language does.
const DEADLINE: Duration = Duration::from_mins(2);
/// The address space of the process that compiles.
const MEMORY_BYTES: u64 = 6 << 30;
/// A file of more bytes is compiled alone.
const LARGE: usize = 1024 * 1024;
/// What is read of its complaint.
const COMPLAINT_BYTES: u64 = 4 * 1024;

/// How the process ends if it has compiled everything and could not keep the code; it says why.
pub const CODE_NOT_CACHED: u8 = 3;

/// The subcommand that compiles, as the process is called with it.
const SUBCOMMAND: [&str; 2] = ["plugin", "compile"];

/// Compiles `bytes`, which were inspected, off the threads that others wait for. Not cancel-safe, but harmless to cancel:
/// the process is killed.
pub(in crate::plugins) async fn compile(engine: &Arc<Engine>, bytes: Arc<[u8]>) -> Result<Component, LoadError> {
    // A large file may take most of the memory there is, so nothing else is compiled meanwhile.
    let share = if bytes.len() > LARGE { engine.compilers.1 } else { 1 };
    let turn = engine.compilers.0.acquire_many(share).await.expect("it is never closed");
    let not_kept = match &engine.state {
        Some(state) => compile_apart(&state.cache(), engine.metering, &bytes).await?,
        None => None,
    };
    if let (Some(state), Some(why)) = (&engine.state, &not_kept) {
        state.cannot_write(why, bytes.len());
    }
    let compiling = Arc::clone(engine);
    // With the code in the cache this is a matter of milliseconds.
    let compiled = tokio::task::spawn_blocking(move || Component::from_binary(&compiling.wasmtime, &bytes)).await;
    if let (Some(state), Some(_)) = (&engine.state, not_kept) {
        remove_leftovers(&state.cache());
    }
    drop(turn);
    let compiled = compiled.map_err(|panic| LoadError::Damaged(panic.to_string()))?;
    compiled.map_err(|error| LoadError::Damaged(chain(&error)))
}

/// Has a process of its own compile `bytes` into the cache. Returns why the code could not be kept there, if so.
async fn compile_apart(cache: &Path, metering: engine::Metering, bytes: &[u8]) -> Result<Option<String>, LoadError> {
    let process = |error: std::io::Error| LoadError::Process(error);
    // On Linux this leads to the binary that runs, even if another one was installed over it.
    let ours = Path::new("/proc/self/exe");
    let binary = if ours.exists() { ours.to_owned() } else { std::env::current_exe().map_err(process)? };
    let mut child = Command::new(binary)
        .args(SUBCOMMAND)
        .arg(metering.name())
        .arg(cache)
        .env_clear()
        // The signals of a terminal, which the daemon may outlive, are for the daemon.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(process)?;
    let mut stdin = child.stdin.take().expect("piped");
    let stderr = child.stderr.take().expect("piped");
    let work = async {
        // If it ends early it says why.
        let _ = stdin.write_all(bytes).await;
        drop(stdin);
        let mut complaint = String::new();
        let _ = stderr.take(COMPLAINT_BYTES).read_to_string(&mut complaint).await;
        child.wait().await.map(|status| (status, complaint))
    };
    match tokio::time::timeout(DEADLINE, work).await {
        Ok(Ok((status, _))) if status.success() => Ok(None),
        Ok(Ok((status, complaint))) if status.code() == Some(CODE_NOT_CACHED.into()) => {
            Ok(Some(complaint.trim().to_owned()))
        }
        Ok(Ok((status, complaint))) if status.code() == Some(1) => Err(LoadError::Damaged(complaint.trim().to_owned())),
        // Killed, or aborted for want of memory.
        Ok(Ok((status, _))) => Err(LoadError::TooCostly(format!(
            "more than {} GiB of memory or {} s to compile it ({status})",
            MEMORY_BYTES >> 30,
            DEADLINE.as_secs()
        ))),
        Ok(Err(error)) => Err(LoadError::Process(error)),
        Err(_) => Err(LoadError::TooCostly(format!("more than {} s to compile it", DEADLINE.as_secs()))),
    }
}

/// What the process does: compiles `bytes` and leaves the code in `cache`, within limits and behind everybody else. Returns
/// why it could not be kept there, if so.
///
/// # Errors
///
/// What is wrong with the bytes.
pub fn compile_here(metering: &str, cache: &Path, bytes: &[u8]) -> Result<Option<String>, String> {
    use rustix::process::{Resource, Rlimit, nice, setrlimit};
    let limits = [(Resource::As, MEMORY_BYTES), (Resource::Cpu, DEADLINE.as_secs() * 2), (Resource::Core, 0)];
    for (resource, limit) in limits {
        // Where a limit cannot be set, the deadline remains.
        let _ = setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) });
    }
    let _ = nice(10);
    let metering = engine::Metering::named(metering).ok_or("no such metering")?;
    let (dir, cache) = (cache, engine::open_cache(cache));
    let engine = engine::wasmtime_engine(cache.clone().ok(), metering)?;
    let component = Component::from_binary(&engine, bytes).map_err(|error| chain(&error))?;
    let cache = match cache {
        Ok(cache) => cache,
        Err(why) => return Ok(Some(why)),
    };
    // Wasmtime says nothing when it cannot write; but it counts what it has found or written.
    let kept = || cache.cache_hits() + cache.cache_misses() > 0;
    if kept() {
        return Ok(None);
    }
    // It leaves what there was room for, and would never write that file again.
    remove_leftovers(dir);
    let code = component.serialize().map_err(|error| chain(&error))?;
    if let Err(error) = try_to_write(dir, &code) {
        return Ok(Some(error.to_string()));
    }
    Component::from_binary(&engine, bytes).map_err(|error| chain(&error))?;
    Ok((!kept()).then(|| "wasmtime does not say why".to_owned()))
}

/// Removes what lies in the cache of files that were never written to their end.
fn remove_leftovers(cache: &Path) {
    let list = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    for file in list(&cache.join("modules")).flat_map(|dir| list(&dir.path())) {
        if file.file_name().to_string_lossy().contains(".wip-atomic-write-") {
            let _ = std::fs::remove_file(file.path());
        }
    }
}
