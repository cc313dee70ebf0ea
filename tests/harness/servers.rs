//! A PostgreSQL and a RabbitMQ of our own, on free ports of 127.0.0.1, with their data under the target directory. They
//! end with the program that started them, however it ends: a small shell waits for the end of a pipe that only this
//! program holds, stops them by pid, and removes their data.

use std::fs;
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use crate::setup::{self, Programs};

/// Hands the ports of running servers on to the programs that are started after it.
const PORTS: &str = "HARNESS_PORTS";
/// RabbitMQ takes ten seconds on a busy machine.
const START_DEADLINE: Duration = Duration::from_mins(2);

/// The two servers.
#[derive(Debug)]
pub struct Servers {
    /// Where PostgreSQL listens; the superuser is `postgres`, without a password.
    pub postgres_port: u16,
    /// Where RabbitMQ listens; the user is `guest` with the password `guest`.
    pub rabbitmq_port: u16,
    /// Where RabbitMQ's management interface listens.
    pub management_port: u16,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    children: Vec<Child>,
    reaper: Child,
    rabbitmq: RabbitMq,
}

/// How RabbitMQ is started, and started again.
#[derive(Debug)]
struct RabbitMq {
    programs: Programs,
    dir: PathBuf,
    port: u16,
    distribution_port: u16,
    epmd_port: u16,
    management_port: u16,
}

/// Where RabbitMQ is among the children.
const RABBITMQ: usize = 1;

impl Servers {
    /// Uses the servers that a program before us has started, or starts some.
    ///
    /// # Errors
    ///
    /// When they cannot be installed or started.
    pub fn start() -> anyhow::Result<Self> {
        if let Some([postgres_port, rabbitmq_port, management_port]) = inherited_ports() {
            return Ok(Self { postgres_port, rabbitmq_port, management_port, running: None });
        }
        Self::private()
    }

    /// Servers that nobody else uses, so that they may be stopped and started again.
    ///
    /// # Errors
    ///
    /// When they cannot be installed or started.
    pub fn private() -> anyhow::Result<Self> {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let programs = setup::servers()?;
        let dir = crate::target().join(format!("servers-{}-{number}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir)?;
        let [postgres_port, rabbitmq_port, distribution_port, epmd_port, management_port] = free_ports()?;

        let epmd = start_epmd(&dir, epmd_port)?;
        let postgres = start_postgres(&programs, &dir, postgres_port)?;
        let rabbitmq =
            RabbitMq { programs, dir: dir.clone(), port: rabbitmq_port, distribution_port, epmd_port, management_port };
        let children = vec![postgres, rabbitmq.start()?, epmd];
        let reaper = start_reaper(&dir, &children)?;
        let running = Some(Running { children, reaper, rabbitmq });
        let servers = Self { postgres_port, rabbitmq_port, management_port, running };
        servers.wait().with_context(|| logs(&dir))?;
        Ok(servers)
    }

    /// What [`Servers::start`] of a child process needs in its environment to use these servers.
    #[must_use]
    pub fn environment(&self) -> (&'static str, String) {
        (PORTS, format!("{} {} {}", self.postgres_port, self.rabbitmq_port, self.management_port))
    }

    /// Stops RabbitMQ in order and starts it again, on the same ports with the same data. Blocks for some ten seconds.
    ///
    /// # Errors
    ///
    /// When it does not stop or start, or belongs to others.
    pub fn restart_rabbitmq(&mut self) -> anyhow::Result<()> {
        let Running { children, reaper, rabbitmq } = self.running.as_mut().context("only servers of our own")?;
        let pid = i32::try_from(children[RABBITMQ].id())?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM)?;
        children[RABBITMQ].wait()?;
        children[RABBITMQ] = rabbitmq.start()?;
        // The old one knows a pid that is nobody's now.
        let mut old = std::mem::replace(reaper, start_reaper(&rabbitmq.dir, children)?);
        let (killed, ended) = (old.kill(), old.wait());
        killed.and(ended)?;
        self.wait()
    }

    fn wait(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_DEADLINE;
        for (what, port) in [
            ("PostgreSQL", self.postgres_port),
            ("RabbitMQ", self.rabbitmq_port),
            ("RabbitMQ's management", self.management_port),
        ] {
            while TcpStream::connect(("127.0.0.1", port)).is_err() {
                if Instant::now() > deadline {
                    bail!("{what} did not listen on port {port} within {} s", START_DEADLINE.as_secs());
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        Ok(())
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        let Some(Running { children, mut reaper, .. }) = self.running.take() else { return };
        // The reaper acts at the end of its input. Our children must be collected meanwhile, or it would wait for them.
        drop(reaper.stdin.take());
        for mut child in children {
            let _ = child.wait();
        }
        let _ = reaper.wait();
    }
}

fn inherited_ports() -> Option<[u16; 3]> {
    let ports: Vec<u16> = std::env::var(PORTS).ok()?.split(' ').filter_map(|port| port.parse().ok()).collect();
    ports.try_into().ok()
}

fn free_ports<const N: usize>() -> anyhow::Result<[u16; N]> {
    // Held together, so that they differ.
    let listeners: Vec<TcpListener> =
        (0..N).map(|_| TcpListener::bind(("127.0.0.1", 0))).collect::<Result<_, _>>().context("no free ports")?;
    let ports: Vec<u16> =
        listeners.iter().map(|listener| listener.local_addr().map(|at| at.port())).collect::<Result<_, _>>()?;
    ports.try_into().map_err(|_| anyhow::anyhow!("as many ports as asked for"))
}

/// A command that runs as `user` if we are root (both servers refuse root or should), with nothing inherited.
fn as_user(user: &str, program: &Path) -> Command {
    let mut command = if nix::unistd::geteuid().is_root() {
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={user}"), &format!("--regid={user}"), "--clear-groups", "--"]).arg(program);
        command
    } else {
        Command::new(program)
    };
    command.env_clear().env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin").env("LANG", "C.UTF-8").stdin(Stdio::null());
    // A Ctrl-C in the terminal is for us; they are stopped in order.
    command.process_group(0);
    command
}

fn own(user: &str, dir: &Path) -> anyhow::Result<()> {
    if nix::unistd::geteuid().is_root() {
        let status = Command::new("chown").arg("-R").arg(format!("{user}:")).arg(dir).status()?;
        anyhow::ensure!(status.success(), "could not give {} to {user}", dir.display());
    }
    Ok(())
}

fn start_postgres(programs: &Programs, dir: &Path, port: u16) -> anyhow::Result<Child> {
    let home = dir.join("postgres");
    let data = home.join("data");
    fs::create_dir_all(&home)?;
    own("postgres", &home)?;
    let log = fs::File::create(dir.join("postgres.log"))?;
    let initdb = as_user("postgres", &programs.postgres.join("initdb"))
        .current_dir(&home)
        .args(["--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8", "--pgdata"])
        .arg(&data)
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?)
        .status()
        .context("could not run initdb")?;
    anyhow::ensure!(initdb.success(), "initdb failed: {}", logs(dir));
    let mut settings = fs::OpenOptions::new().append(true).open(data.join("postgresql.conf"))?;
    writeln!(
        settings,
        "listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = ''\nmax_connections = 300\nmax_prepared_transactions = 10\nfsync = off"
    )?;
    as_user("postgres", &programs.postgres.join("postgres"))
        .current_dir(&home)
        .arg("-D")
        .arg(&data)
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("could not start postgres")
}

fn start_epmd(dir: &Path, port: u16) -> anyhow::Result<Child> {
    // RabbitMQ would start one that outlives it. In the foreground it is a child that we can stop.
    let log = fs::File::create(dir.join("epmd.log"))?;
    let epmd = ["/usr/bin/epmd", "/usr/local/bin/epmd", "/opt/homebrew/bin/epmd"].map(PathBuf::from);
    let epmd = epmd
        .into_iter()
        .find(|path| path.exists())
        .context("epmd, a part of Erlang, is in none of the usual places")?;
    as_user("rabbitmq", &epmd)
        .args(["-port", &port.to_string(), "-address", "127.0.0.1"])
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("could not start epmd")
}

impl RabbitMq {
    fn start(&self) -> anyhow::Result<Child> {
        let Self { programs, dir, port, distribution_port, epmd_port, management_port } = self;
        let home = dir.join("rabbitmq");
        for part in ["home", "mnesia", "log", "schema", "config"] {
            fs::create_dir_all(home.join(part))?;
        }
        fs::write(home.join("enabled_plugins"), "[rabbitmq_management].")?;
        fs::write(
            home.join("rabbitmq.conf"),
            format!(
                "loopback_users = none\nmanagement.tcp.port = {management_port}\nmanagement.tcp.ip = 127.0.0.1\n\
             disk_free_limit.absolute = 50MB\n"
            ),
        )?;
        own("rabbitmq", &home)?;
        let log = fs::File::create(dir.join("rabbitmq.log"))?;
        as_user("rabbitmq", &programs.rabbitmq.join("rabbitmq-server"))
            .current_dir(&home)
            .arg("-noinput")
            .env("HOME", home.join("home"))
            .env("RABBITMQ_NODENAME", format!("t{port}@localhost"))
            .env("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_NODE_PORT", port.to_string())
            .env("RABBITMQ_DIST_PORT", distribution_port.to_string())
            .env("ERL_EPMD_PORT", epmd_port.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_MNESIA_BASE", home.join("mnesia"))
            .env("RABBITMQ_LOG_BASE", home.join("log"))
            .env("RABBITMQ_SCHEMA_DIR", home.join("schema"))
            .env("RABBITMQ_GENERATED_CONFIG_DIR", home.join("config"))
            .env("RABBITMQ_CONF_ENV_FILE", "/dev/null")
            .env("RABBITMQ_CONFIG_FILE", home.join("rabbitmq.conf"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", home.join("enabled_plugins"))
            .env("RABBITMQ_PID_FILE", home.join("pid"))
            // The script then becomes the server, and the pid we have is the server's.
            .env("RABBITMQ_ALLOW_INPUT", "1")
            .env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "+S 2:2 +sbwt none")
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("could not start rabbitmq-server")
    }
}

/// Waits for the end of its input, that is of us, and then stops `children` in order.
fn start_reaper(dir: &Path, children: &[Child]) -> anyhow::Result<Child> {
    const SCRIPT: &str = r#"
        cat >/dev/null
        kill -INT "$1" 2>/dev/null; kill -TERM "$2" 2>/dev/null
        for i in $(seq 100); do kill -0 "$1" 2>/dev/null || kill -0 "$2" 2>/dev/null || break; sleep 0.1; done
        kill -KILL "$1" "$2" 2>/dev/null; kill -TERM "$3" 2>/dev/null
        rm -rf "$0"
    "#;
    let mut command = Command::new("sh");
    command.arg("-c").arg(SCRIPT).arg(dir).args(children.iter().map(|child| child.id().to_string()));
    command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().context("could not start the shell that stops the servers")
}

/// The ends of the servers' logs.
fn logs(dir: &Path) -> String {
    let mut text = String::from("the servers did not start");
    for name in ["postgres.log", "epmd.log", "rabbitmq.log"] {
        let log = fs::read_to_string(dir.join(name)).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        text.extend(["\n--- ", name, "\n", &lines[lines.len().saturating_sub(15)..].join("\n")]);
    }
    text
}
