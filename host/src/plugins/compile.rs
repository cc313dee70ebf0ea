//! Bytes to compiled code. Compiling cannot be interrupted, and a file of a few kilobytes can be made to take hours and
//! gigabytes, so it is done by a process of our own binary, which can be killed: it leaves the code in wasmtime's cache,
//! where the daemon finds it. Source: wasmtime treats cost while compiling as an ordinary bug, not a vulnerability.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use wasmtime::component::Component;

use super::check::LoadError;
use super::engine::{self, Engine};
use super::instance::chain;

/// How long compiling one file may take: several times what the interpreter of another language does.
const DEADLINE: Duration = Duration::from_mins(2);
/// The address space of the process that compiles.
const MEMORY_BYTES: u64 = 6 << 30;
/// What is read of its complaint.
const COMPLAINT_BYTES: u64 = 4 * 1024;

/// What the process says if the code could not be written.
const NOT_KEPT: &str = "the compiled code could not be kept";

/// The subcommand that compiles, as the process is called with it.
const SUBCOMMAND: [&str; 2] = ["plugin", "compile"];

/// Compiles `bytes`, which were inspected, off the threads that others wait for. Not cancel-safe, but harmless to cancel:
/// the process is killed.
pub(super) async fn compile(engine: &Arc<Engine>, bytes: Arc<[u8]>) -> Result<Component, LoadError> {
    if let Some(cache) = &engine.cache {
        compile_into_cache(cache, engine.metering, &bytes).await?;
    }
    let engine = Arc::clone(engine);
    // With the code in the cache this is a matter of milliseconds.
    let compiled = tokio::task::spawn_blocking(move || Component::from_binary(&engine.wasmtime, &bytes));
    let compiled = compiled.await.map_err(|panic| LoadError::Damaged(panic.to_string()))?;
    compiled.map_err(|error| LoadError::Damaged(chain(&error)))
}

/// Has a process of its own compile `bytes` into the cache.
async fn compile_into_cache(cache: &Path, metering: engine::Metering, bytes: &[u8]) -> Result<(), LoadError> {
    let process = |error: std::io::Error| LoadError::Process(error);
    // On Linux this leads to the binary that runs, even if another one was installed over it.
    let ours = Path::new("/proc/self/exe");
    let binary = if ours.exists() { ours.to_owned() } else { std::env::current_exe().map_err(process)? };
    let mut child = Command::new(binary)
        .args(SUBCOMMAND)
        .arg(metering.name())
        .arg(cache)
        .env_clear()
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
        Ok(Ok((status, _))) if status.success() => Ok(()),
        Ok(Ok((_, complaint))) if complaint.trim() == NOT_KEPT => Err(LoadError::NotKept(cache.to_owned())),
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

/// What the process does: compiles `bytes` and leaves the code in `cache`, within limits and behind everybody else.
///
/// # Errors
///
/// What is wrong with the bytes.
pub fn compile_here(metering: &str, cache: &Path, bytes: &[u8]) -> Result<(), String> {
    use rustix::process::{Resource, Rlimit, nice, setrlimit};
    let limits = [(Resource::As, MEMORY_BYTES), (Resource::Cpu, DEADLINE.as_secs() * 2), (Resource::Core, 0)];
    for (resource, limit) in limits {
        // Where a limit cannot be set, the deadline remains.
        let _ = setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) });
    }
    let _ = nice(10);
    let metering = engine::Metering::named(metering).ok_or("no such metering")?;
    let cache = engine::open_cache(cache)?;
    let engine = engine::wasmtime_engine(Some(cache.clone()), metering)?;
    Component::from_binary(&engine, bytes).map_err(|error| chain(&error))?;
    // Wasmtime says nothing when it cannot write: the daemon would compile it once more, without limits.
    let hits = cache.cache_hits();
    Component::from_binary(&engine, bytes).map_err(|error| chain(&error))?;
    if cache.cache_hits() == hits {
        return Err(NOT_KEPT.to_owned());
    }
    Ok(())
}
