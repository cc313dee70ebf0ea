//! Builds the daemon of another commit, to compare this checkout's daemon with it. It must never change a file of this
//! checkout: the other commit gets a worktree and a target directory of its own under `target/compare`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::{build_daemon, run};
use crate::{repository, target};

/// Builds `tidings` of a commit in release mode, and returns the path of the binary. The features of its dependencies
/// are resolved as for this checkout's, so that the builds differ in nothing else. `commit` is a short hash, which names
/// the directories.
///
/// # Errors
///
/// When git or cargo fails, which has then printed the reason.
pub fn daemon_of(commit: &str) -> anyhow::Result<PathBuf> {
    let dir = target().join("compare");
    let (worktree, built) = (dir.join(commit), dir.join(format!("build-{commit}")));
    let binary = built.join("release/tidings");
    if !worktree.join(".git").exists() {
        // Git still knows a worktree whose directory was removed. It takes it again only when forced, and recognises it
        // only if the directory above it exists.
        fs::create_dir_all(&dir)?;
        let mut git = Command::new("git");
        git.args(["worktree", "add", "--quiet", "--force", "--detach"]).arg(&worktree).arg(commit);
        git.current_dir(repository());
        run(git)?;
    }
    if !binary.exists() {
        eprintln!("building {commit} in {}; this takes a quarter of an hour the first time ...", worktree.display());
    }
    let mut cargo = build_daemon();
    cargo.arg("--release").current_dir(&worktree).env("CARGO_TARGET_DIR", &built);
    run(cargo)?;
    Ok(binary)
}
