//! The processes of private servers: lists their children, and stops them when this program has ended.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::Context as _;

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

/// Starts a shell that stops `children` in order when its input ends: when this program closes the pipe, or ends.
pub(crate) fn start_reaper(dir: &Path, children: &[Child]) -> anyhow::Result<Child> {
    const SCRIPT: &str = r#"
        cat >/dev/null
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
