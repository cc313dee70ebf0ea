//! The processes of private servers: lists their children, and stops them when this program has ended.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long the end of killed processes is waited for.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// The processes that `parent` has started and that have not ended.
#[must_use]
pub fn children_of(parent: u32) -> Vec<u32> {
    let pids =
        fs::read_dir("/proc").into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name, in brackets, may contain any characters. After it come the state and the parent's pid.
        stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok()) == Some(parent)
    })
    .collect()
}

/// Sends a signal to a process and to those that it has started, in this order.
pub(crate) fn signal_with_children(child: &Child, signal: Signal) -> anyhow::Result<()> {
    let pid = child.id();
    for pid in std::iter::once(pid).chain(children_of(pid)) {
        // The error is ignored: a process may have ended in the meantime.
        let _ = kill(Pid::from_raw(i32::try_from(pid)?), signal);
    }
    Ok(())
}

/// Kills a process and those that it has started, and waits until all of them have ended: they may share memory that another
/// process in their place would find in use.
pub(crate) fn kill_with_children(child: &mut Child) -> anyhow::Result<()> {
    // Stopped first, so that it starts no process after they have been listed.
    let _ = kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGSTOP);
    let children = children_of(child.id());
    signal_with_children(child, Signal::SIGKILL)?;
    child.wait()?;
    let deadline = Instant::now() + KILL_DEADLINE;
    while children.iter().any(|pid| is_running(*pid)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Whether a process has not ended, even if nobody has waited for its end.
fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).is_some_and(|state| state != "Z")
}

/// Starts another reaper for these children, and ends the old one, which holds the pids of processes that have ended: other
/// processes may get them.
pub(crate) fn replace_reaper(reaper: &mut Child, dir: &Path, children: &[Child]) -> anyhow::Result<()> {
    let mut old = std::mem::replace(reaper, start_reaper(dir, children)?);
    let (killed, ended) = (old.kill(), old.wait());
    killed.and(ended)?;
    Ok(())
}

/// Starts a shell that stops `children` in order when its input ends: when this program closes the pipe, or ends. One that is
/// frozen goes on first, with the processes that it has started: otherwise they would stay.
pub(crate) fn start_reaper(dir: &Path, children: &[Child]) -> anyhow::Result<Child> {
    const SCRIPT: &str = r#"
        cat >/dev/null
        for pid in "$@"; do kill -CONT "$pid" $(cat /proc/"$pid"/task/*/children 2>/dev/null) 2>/dev/null; done
        kill -INT "$1" 2>/dev/null; kill -TERM "${2:-$1}" 2>/dev/null
        for i in $(seq 100); do kill -0 "$1" 2>/dev/null || kill -0 "${2:-$1}" 2>/dev/null || break; sleep 0.1; done
        kill -KILL "$1" ${2:-} 2>/dev/null; kill -TERM ${3:-} 2>/dev/null
        rm -rf "$0"
    "#;
    let mut command = Command::new("sh");
    command.arg("-c").arg(SCRIPT).arg(dir).args(children.iter().map(|child| child.id().to_string()));
    command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().context("could not start the shell that stops the servers")
}
