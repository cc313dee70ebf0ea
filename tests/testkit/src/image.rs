//! The newest servers, out of Docker images: the file system of each is unpacked under the target directory, and a program
//! that lies in one runs in it. It is a process of this machine all the same, with its ports, signals and files, so that
//! whatever a test does to an installed server it does to these.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};
use nix::unistd::{geteuid, getgid, getuid};

/// Has the servers of a program, and of those that it starts, be these.
pub const NEWEST: &str = "HARNESS_NEWEST";

/// The images, as docker-compose.yml has them, and the user of each in its own `/etc/passwd`.
const IMAGES: [(&str, &str); 2] = [("postgres:17", "postgres"), ("rabbitmq:4-management", "rabbitmq")];

/// In mounts that nobody else sees: our files where they are, and the kernel's. Each program becomes the next, so that the pid
/// stays. Where we are is there as well, if it is under the target directory.
const ENTER: &str = r#"
    set -e
    target=$1 root=$2 user=$3; shift 3
    mkdir -p "$root$target"
    mount --rbind "$target" "$root$target"
    mount --rbind /proc "$root/proc"
    mount --rbind /dev "$root/dev"
    exec chroot $user "$root" sh -c 'cd "$0" 2>/dev/null; exec "$@"' "$PWD" "$@"
"#;

fn roots() -> PathBuf {
    crate::target().join("images")
}

/// Where the file system of the image with this user is, if the newest servers are wanted.
pub(crate) fn root(user: &str) -> Option<PathBuf> {
    std::env::var_os(NEWEST).map(|_| roots().join(user))
}

/// Unpacks the images that are not unpacked yet, or that have changed since.
///
/// # Errors
///
/// When there is no Docker or no such image; the message says how to get it.
pub fn unpack() -> anyhow::Result<()> {
    fs::create_dir_all(roots())?;
    for (image, user) in IMAGES {
        let id = docker(&["image", "inspect", "--format", "{{.Id}}", image])
            .with_context(|| format!("the newest servers come out of Docker images, and {image} cannot be had: install and start Docker if it is not there, and run: docker pull {image}"))?;
        let (root, unpacked) = (roots().join(user), roots().join(format!("{user}.id")));
        if fs::read_to_string(&unpacked).is_ok_and(|unpacked| unpacked == id) {
            continue;
        }
        eprintln!("unpacking the image {image} ...");
        let _ = fs::remove_file(&unpacked);
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        fs::create_dir_all(&root)?;
        let container = docker(&["create", image])?;
        let exported = export(&container, &root);
        docker(&["rm", "--volumes", &container])?;
        exported?;
        // Docker itself fills this in, when a container starts.
        fs::write(root.join("etc/hosts"), "127.0.0.1 localhost\n")?;
        if !geteuid().is_root() {
            // Its programs run as us, and initdb asks who that is.
            let passwd = root.join("etc/passwd");
            let others = fs::read_to_string(&passwd)?;
            fs::write(&passwd, format!("{others}us:x:{}:{}::/:/bin/sh\n", getuid(), getgid()))?;
        }
        fs::write(&unpacked, id)?;
    }
    Ok(())
}

fn export(container: &str, root: &Path) -> anyhow::Result<()> {
    let mut docker = Command::new("docker").args(["export", container]).stdout(Stdio::piped()).spawn()?;
    let archive = docker.stdout.take().context("it was asked for")?;
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--exclude=dev/*", "--directory"]).arg(root).stdin(archive);
    let (unpacked, exported) = (tar.status().context("could not run tar"), docker.wait());
    ensure!(unpacked?.success() && exported?.success(), "the image could not be unpacked into {}", root.display());
    Ok(())
}

fn docker(arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("docker").args(arguments).stdin(Stdio::null()).output();
    let output = output.context("could not run docker")?;
    if !output.status.success() {
        bail!("docker {} failed: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// The file system that a program lies in, and its path there; `None` if it is the machine's.
fn lies_in(program: &Path) -> Option<(PathBuf, PathBuf)> {
    let path = program.strip_prefix(roots()).ok()?;
    let root: PathBuf = path.components().take(1).collect();
    let inside = Path::new("/").join(path.strip_prefix(&root).ok()?);
    Some((roots().join(root), inside))
}

/// Whether a program lies in an image.
pub(crate) fn holds(program: &Path) -> bool {
    lies_in(program).is_some()
}

/// The numbers of `user`, as `chown` takes them, in the file system that `program` lies in.
pub(crate) fn owner(user: &str, program: &Path) -> Option<String> {
    let (root, _) = lies_in(program)?;
    let users = fs::read_to_string(root.join("etc/passwd")).ok()?;
    let mut fields = users.lines().find_map(|line| line.strip_prefix(user)?.strip_prefix(':'))?.split(':').skip(1);
    Some(format!("{}:{}", fields.next()?, fields.next()?))
}

/// How to run a program where it lies, as whoever we are, or as `user` if we are root.
#[must_use]
pub fn command(user: Option<&str>, program: &Path) -> Command {
    let Some((root, inside)) = lies_in(program) else { return Command::new(program) };
    let mut command = Command::new("unshare");
    if !geteuid().is_root() {
        command.args(["--user", "--map-current-user", "--keep-caps"]);
    }
    let owner = user.filter(|_| geteuid().is_root()).and_then(|user| owner(user, program));
    let user = owner.map(|owner| format!("--userspec={owner} --groups=")).unwrap_or_default();
    command.args(["--mount", "--", "sh", "-c", ENTER, "sh"]).arg(crate::target()).arg(root).arg(user).arg(inside);
    command
}
