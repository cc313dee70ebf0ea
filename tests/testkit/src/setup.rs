//! Finds the programs that the tests need. On Debian, as root, missing programs are installed, and that is printed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context as _, bail};

use crate::image;

/// The directories of the programs of PostgreSQL and RabbitMQ.
#[derive(Debug)]
pub struct Programs {
    /// The directory with `initdb` and `postgres`.
    pub postgres: PathBuf,
    /// The directory with RabbitMQ's own script `rabbitmq-server`, not a distribution's wrapper that changes the user.
    pub rabbitmq: PathBuf,
    /// Erlang's `epmd`, if it was found.
    pub epmd: Option<PathBuf>,
}

/// Finds PostgreSQL and RabbitMQ: those of the Docker images if [`image::NEWEST_VARIABLE`] is set, else those of this
/// machine, which are installed if they are missing.
///
/// # Errors
///
/// When a server is missing and cannot be installed; the message says what to install.
pub fn find_servers() -> anyhow::Result<Programs> {
    if let (Some(postgres_root), Some(rabbitmq_root)) = (image::image_root("postgres"), image::image_root("rabbitmq")) {
        let missing = |server| format!("there is no {server} under target/images; begin with cargo verify -- newest");
        return Ok(Programs {
            postgres: find_postgres(&postgres_root, None).with_context(|| missing("PostgreSQL"))?,
            rabbitmq: find_rabbitmq(&rabbitmq_root).with_context(|| missing("RabbitMQ"))?,
            epmd: find_epmd(&rabbitmq_root),
        });
    }
    let root = Path::new("/");
    let postgres = || find_postgres(root, Some(search_path()));
    let rabbitmq = || find_rabbitmq(root);
    let mut missing = Vec::new();
    if postgres().is_none() {
        missing.push("postgresql");
    }
    if rabbitmq().is_none() {
        missing.push("rabbitmq-server");
    }
    if !missing.is_empty() {
        install(&missing)
            .context("PostgreSQL 15 or later and RabbitMQ 3.10 or later are needed; install them and try again (the demo alone takes them from Docker, too)")?;
    }
    Ok(Programs {
        postgres: postgres().context("initdb and postgres are in none of the usual places")?,
        rabbitmq: rabbitmq().context("rabbitmq-server is in none of the usual places")?,
        epmd: find_epmd(root),
    })
}

/// Whether [`find_servers`] finds both servers or may install the missing ones.
#[must_use]
pub fn has_servers() -> bool {
    let root = Path::new("/");
    (find_postgres(root, Some(search_path())).is_some() && find_rabbitmq(root).is_some()) || may_install()
}

/// Finds valgrind, or installs it.
///
/// # Errors
///
/// As [`find_servers`].
pub fn find_valgrind() -> anyhow::Result<PathBuf> {
    let find = || search_path().into_iter().map(|dir| dir.join("valgrind")).find(|path| path.exists());
    if find().is_none() {
        install(&["valgrind"]).context("valgrind is needed; install it and try again")?;
    }
    find().context("valgrind is not on the PATH")
}

/// Installs what some tests need beside the servers, if it is missing. To be called before a server is started: apt may upgrade
/// PostgreSQL on the way, and a server that runs could then not load its own libraries any more.
///
/// # Errors
///
/// When it cannot be installed.
pub fn install_for_tests() -> anyhow::Result<()> {
    let mut missing = Vec::new();
    if find_libfaketime().is_none() {
        missing.push("libfaketime".to_owned());
    }
    let postgres = find_servers()?.postgres;
    // /usr/lib/postgresql/15/bin
    let version = postgres.parent().and_then(Path::file_name).and_then(|name| name.to_str());
    if let Some(version) = version.filter(|_| !postgres.join("pg_repack").exists()) {
        missing.push(format!("postgresql-{version}-repack"));
    }
    let packages: Vec<&str> = missing.iter().map(String::as_str).collect();
    if packages.is_empty() { Ok(()) } else { install(&packages) }
}

/// The library that shows programs another time, if it is installed.
#[must_use]
pub fn find_libfaketime() -> Option<PathBuf> {
    let found = std::fs::read_dir("/usr/lib").ok()?.filter_map(Result::ok);
    let library = |dir: PathBuf| dir.join("faketime/libfaketime.so.1");
    found.map(|dir| library(dir.path())).find(|path| path.exists())
}

/// Finds PgBouncer, or installs it.
///
/// # Errors
///
/// As [`find_servers`].
pub fn find_pgbouncer() -> anyhow::Result<PathBuf> {
    let find = || {
        let usual = ["/usr/sbin", "/usr/local/bin", "/opt/homebrew/bin"].map(PathBuf::from);
        usual.into_iter().chain(search_path()).map(|dir| dir.join("pgbouncer")).find(|path| path.exists())
    };
    if find().is_none() {
        install(&["pgbouncer"]).context("PgBouncer is needed; install it and try again")?;
    }
    find().context("pgbouncer is in none of the usual places")
}

/// A browser and the program that drives it.
#[derive(Debug)]
pub struct Chromium {
    /// The program of Chromium or Chrome.
    pub browser: PathBuf,
    /// The program `chromedriver`.
    pub driver: PathBuf,
}

/// Finds Chromium and its driver, or installs them.
///
/// # Errors
///
/// As [`find_servers`].
pub fn find_chromium() -> anyhow::Result<Chromium> {
    // Several tests may call this at the same time, and apt can run only once.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().expect("no holder of the lock panics");
    let find = |names: &[&str]| {
        names.iter().find_map(|name| search_path().into_iter().map(|dir| dir.join(name)).find(|path| path.exists()))
    };
    let browser = || find(&["chromium", "chromium-browser", "google-chrome"]);
    let driver = || find(&["chromedriver"]);
    if browser().is_none() || driver().is_none() {
        install(&["chromium", "chromium-driver"])
            .context("Chromium and its chromedriver are needed; install them and try again")?;
    }
    Ok(Chromium {
        browser: browser().context("chromium is not in the PATH")?,
        driver: driver().context("chromedriver is not in the PATH")?,
    })
}

fn find_postgres(root: &Path, further_dirs: Option<Vec<PathBuf>>) -> Option<PathBuf> {
    let mut versions: Vec<PathBuf> = std::fs::read_dir(root.join("usr/lib/postgresql"))
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .collect();
    versions.sort();
    versions
        .into_iter()
        .rev()
        .chain(further_dirs.unwrap_or_default())
        .find(|dir| dir.join("initdb").exists() && dir.join("postgres").exists())
}

fn find_rabbitmq(root: &Path) -> Option<PathBuf> {
    ["usr/lib/rabbitmq/bin", "opt/rabbitmq/sbin", "opt/homebrew/sbin", "usr/local/sbin"]
        .map(|dir| root.join(dir))
        .into_iter()
        .find(|dir| dir.join("rabbitmq-server").exists())
}

fn find_epmd(root: &Path) -> Option<PathBuf> {
    ["usr/bin/epmd", "usr/local/bin/epmd", "opt/erlang/bin/epmd", "opt/homebrew/bin/epmd"]
        .map(|path| root.join(path))
        .into_iter()
        // In an image it may be a symbolic link that is valid only inside the image.
        .find(|path| path.symlink_metadata().is_ok())
}

fn search_path() -> Vec<PathBuf> {
    std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default()
}

fn has_apt() -> bool {
    Path::new("/usr/bin/apt-get").exists()
}

fn may_install() -> bool {
    has_apt() && nix::unistd::geteuid().is_root()
}

/// Installs Debian packages, and prints which.
///
/// # Errors
///
/// When there is no apt-get, the current user is not root, or apt-get fails.
pub fn install(packages: &[&str]) -> anyhow::Result<()> {
    let names = packages.join(" ");
    if !has_apt() {
        bail!("{names} cannot be installed from here: there is no apt-get");
    }
    if !may_install() {
        bail!(
            "{names} cannot be installed from here without root; run: apt-get install --no-install-recommends {names}"
        );
    }
    eprintln!("installing Debian packages: {names}");
    apt(&["update"])?;
    let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
    arguments.extend(packages);
    apt(&arguments)
}

fn apt(arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("apt-get")
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        // Keeps the packages from starting their servers: the tests start private ones.
        .env("RUNLEVEL", "1")
        .stdin(Stdio::null())
        .output()
        .context("could not run apt-get")?;
    if !output.status.success() {
        bail!("apt-get {} failed:\n{}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
