//! Provides the newest servers from Docker images: the file system of each image is unpacked under the target
//! directory, and its programs run in that file system with `chroot`. They are ordinary processes of this machine, with
//! its ports, signals and files, so tests treat them like installed servers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};
use nix::unistd::{geteuid, getgid, getuid};

/// With this environment variable, a program and the programs that it starts use the servers of the images.
pub const NEWEST_VARIABLE: &str = "HARNESS_NEWEST";

/// The images that docker-compose.yml uses, each with the name of its server's user in the image's `/etc/passwd`.
const IMAGES: [(&str, &str); 2] = [("postgres:17", "postgres"), ("rabbitmq:4-management", "rabbitmq")];

/// Mounts the target directory, `/proc` and `/dev` at the same paths in the image, in a private mount namespace, and
/// runs the program there. Every step uses `exec`, so that the pid stays. The current directory is kept if it is under
/// the target directory.
const ENTER: &str = r#"
    set -e
    target=$1 root=$2 user=$3; shift 3
    mkdir -p "$root$target"
    mount --rbind "$target" "$root$target"
    mount --rbind /proc "$root/proc"
    mount --rbind /dev "$root/dev"
    exec chroot $user "$root" sh -c 'cd "$0" 2>/dev/null; exec "$@"' "$PWD" "$@"
"#;

fn images_dir() -> PathBuf {
    crate::target().join("images")
}

/// The directory with the file system of the image whose user is `user`, if [`NEWEST_VARIABLE`] is set.
pub(crate) fn image_root(user: &str) -> Option<PathBuf> {
    std::env::var_os(NEWEST_VARIABLE).map(|_| images_dir().join(user))
}

/// Unpacks the images that are not unpacked yet, or have changed since they were unpacked.
///
/// # Errors
///
/// When Docker or the image is missing; the message says how to get it.
pub fn unpack() -> anyhow::Result<()> {
    fs::create_dir_all(images_dir())?;
    for (image, user) in IMAGES {
        let id = docker(&["image", "inspect", "--format", "{{.Id}}", image])
            .with_context(|| format!("the newest servers come out of Docker images, and {image} cannot be had: install and start Docker if it is not there, and run: docker pull {image}"))?;
        let (root, unpacked) = (images_dir().join(user), images_dir().join(format!("{user}.id")));
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
        let exported = export_container(&container, &root);
        docker(&["rm", "--volumes", &container])?;
        exported?;
        // Docker writes this file when it starts a container; here no container is started.
        fs::write(root.join("etc/hosts"), "127.0.0.1 localhost\n")?;
        if !geteuid().is_root() {
            // The image's programs run as the current user, and initdb looks up that user's name.
            let passwd = root.join("etc/passwd");
            let others = fs::read_to_string(&passwd)?;
            fs::write(&passwd, format!("{others}us:x:{}:{}::/:/bin/sh\n", getuid(), getgid()))?;
        }
        fs::write(&unpacked, id)?;
    }
    Ok(())
}

fn export_container(container: &str, root: &Path) -> anyhow::Result<()> {
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

/// The root directory of the image that contains `program`, and the program's path inside it. `None` if the program
/// belongs to this machine's own file system.
fn find_image_of(program: &Path) -> Option<(PathBuf, PathBuf)> {
    let path = program.strip_prefix(images_dir()).ok()?;
    let root: PathBuf = path.components().take(1).collect();
    let inside = Path::new("/").join(path.strip_prefix(&root).ok()?);
    Some((images_dir().join(root), inside))
}

/// Whether `program` is inside an unpacked image.
pub(crate) fn contains(program: &Path) -> bool {
    find_image_of(program).is_some()
}

/// The numeric user and group of `user` in the image that contains `program`, in the form that `chown` takes.
pub(crate) fn owner(user: &str, program: &Path) -> Option<String> {
    let (root, _) = find_image_of(program)?;
    let users = fs::read_to_string(root.join("etc/passwd")).ok()?;
    let mut fields = users.lines().find_map(|line| line.strip_prefix(user)?.strip_prefix(':'))?.split(':').skip(1);
    Some(format!("{}:{}", fields.next()?, fields.next()?))
}

/// A command that runs `program` in the image that contains it, or directly if none does. Inside an image it runs as
/// `user` if the current user is root, and as the current user otherwise.
#[must_use]
pub fn command(user: Option<&str>, program: &Path) -> Command {
    let Some((root, inside)) = find_image_of(program) else { return Command::new(program) };
    let mut command = Command::new("unshare");
    if !geteuid().is_root() {
        command.args(["--user", "--map-current-user", "--keep-caps"]);
    }
    let owner = user.filter(|_| geteuid().is_root()).and_then(|user| owner(user, program));
    let user = owner.map(|owner| format!("--userspec={owner} --groups=")).unwrap_or_default();
    command.args(["--mount", "--", "sh", "-c", ENTER, "sh"]).arg(crate::target()).arg(root).arg(user).arg(inside);
    command
}
