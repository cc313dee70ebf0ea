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
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

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

/// One of the two, and where it is among the children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// PostgreSQL.
    Postgres = 0,
    /// RabbitMQ.
    RabbitMq = 1,
}

#[derive(Debug)]
struct Running {
    children: Vec<Child>,
    reaper: Child,
    place: Place,
}

/// How the servers are started, and started again.
#[derive(Debug)]
struct Place {
    programs: Programs,
    dir: PathBuf,
    postgres_port: u16,
    rabbitmq_port: u16,
    distribution_port: u16,
    epmd_port: u16,
    management_port: u16,
}

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
        let place = Place {
            programs,
            dir: dir.clone(),
            postgres_port,
            rabbitmq_port,
            distribution_port,
            epmd_port,
            management_port,
        };
        place.prepare_postgres()?;
        place.prepare_rabbitmq()?;
        let children = vec![place.start_postgres()?, place.start_rabbitmq()?, epmd];
        let reaper = start_reaper(&dir, &children)?;
        let running = Some(Running { children, reaper, place });
        let servers = Self { postgres_port, rabbitmq_port, management_port, running };
        servers.wait().with_context(|| logs(&dir))?;
        Ok(servers)
    }

    /// What [`Servers::start`] of a child process needs in its environment to use these servers.
    #[must_use]
    pub fn environment(&self) -> (&'static str, String) {
        (PORTS, format!("{} {} {}", self.postgres_port, self.rabbitmq_port, self.management_port))
    }

    /// Sends a signal to a server and its children: SIGSTOP and SIGCONT for instance.
    ///
    /// # Errors
    ///
    /// When it does not run, or belongs to others.
    pub fn signal(&self, server: Server, signal: Signal) -> anyhow::Result<()> {
        let Running { children, .. } = self.running.as_ref().context("only servers of our own")?;
        let pid = children[server as usize].id();
        for pid in children_of(pid).into_iter().chain([pid]) {
            // A child may end at any time.
            let _ = kill(Pid::from_raw(i32::try_from(pid)?), signal);
        }
        Ok(())
    }

    /// Ends a server with `signal` (SIGKILL takes its children along), waits for its end, and starts it again, on the same ports
    /// with the same data. Blocks for as long as that takes.
    ///
    /// # Errors
    ///
    /// When it does not stop or start, or belongs to others.
    pub fn restart(&mut self, server: Server, signal: Signal) -> anyhow::Result<()> {
        let pid = self.running.as_ref().context("only servers of our own")?.children[server as usize].id();
        if signal == Signal::SIGKILL {
            self.signal(server, signal)?;
        } else {
            kill(Pid::from_raw(i32::try_from(pid)?), signal)?;
        }
        let Running { children, reaper, place } = self.running.as_mut().context("only servers of our own")?;
        children[server as usize].wait()?;
        children[server as usize] = match server {
            Server::Postgres => place.start_postgres()?,
            Server::RabbitMq => place.start_rabbitmq()?,
        };
        // The old one knows a pid that is nobody's now.
        let mut old = std::mem::replace(reaper, start_reaper(&place.dir, children)?);
        let (killed, ended) = (old.kill(), old.wait());
        killed.and(ended)?;
        self.wait()
    }

    /// Lets RabbitMQ believe that its memory is used up, or that it is not.
    ///
    /// # Errors
    ///
    /// When it cannot be told.
    pub fn memory_alarm(&self, on: bool) -> anyhow::Result<()> {
        let Running { place, .. } = self.running.as_ref().context("only servers of our own")?;
        let status = as_user("rabbitmq", &place.programs.rabbitmq.join("rabbitmqctl"))
            .args(["--node", &format!("t{}@localhost", place.rabbitmq_port), "set_vm_memory_high_watermark"])
            .args(if on { ["absolute", "1MB"] } else { ["absolute", "8GB"] })
            .env("HOME", place.dir.join("rabbitmq/home"))
            .env("ERL_EPMD_PORT", place.epmd_port.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        anyhow::ensure!(status.success(), "rabbitmqctl failed");
        Ok(())
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

/// The processes that `parent` has started.
fn children_of(parent: u32) -> Vec<u32> {
    let pids =
        fs::read_dir("/proc").into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name, in brackets, may hold anything; after it come the state and the parent.
        let of = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
        of == Some(parent)
    })
    .collect()
}

impl Place {
    fn prepare_postgres(&self) -> anyhow::Result<()> {
        let Self { programs, dir, postgres_port: port, .. } = self;
        let home = dir.join("postgres");
        let data = home.join("data");
        fs::create_dir_all(&home)?;
        own("postgres", &home)?;
        let log = fs::File::create(dir.join("postgres.log"))?;
        let initdb = as_user("postgres", &programs.postgres.join("initdb"))
            .current_dir(&home)
            .args([
                "--auth=trust",
                "--username=postgres",
                "--no-sync",
                "--encoding=UTF8",
                "--locale=C.UTF-8",
                "--pgdata",
            ])
            .arg(&data)
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?)
            .status()
            .context("could not run initdb")?;
        anyhow::ensure!(initdb.success(), "initdb failed: {}", logs(dir));
        let mut settings = fs::OpenOptions::new().append(true).open(data.join("postgresql.conf"))?;
        writeln!(
            settings,
            "listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = ''\nmax_connections = 300\nmax_prepared_transactions = 10\nfsync = off\ntrack_commit_timestamp = on"
        )?;
        Ok(())
    }

    fn start_postgres(&self) -> anyhow::Result<Child> {
        let home = self.dir.join("postgres");
        let log = fs::OpenOptions::new().append(true).create(true).open(self.dir.join("postgres.log"))?;
        as_user("postgres", &self.programs.postgres.join("postgres"))
            .current_dir(&home)
            .arg("-D")
            .arg(home.join("data"))
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("could not start postgres")
    }

    fn prepare_rabbitmq(&self) -> anyhow::Result<()> {
        let Self { dir, management_port, .. } = self;
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
        own("rabbitmq", &home)
    }

    fn start_rabbitmq(&self) -> anyhow::Result<Child> {
        let Self { programs, dir, rabbitmq_port: port, distribution_port, epmd_port, .. } = self;
        let home = dir.join("rabbitmq");
        let log = fs::OpenOptions::new().append(true).create(true).open(dir.join("rabbitmq.log"))?;
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
