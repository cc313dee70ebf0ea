//! A PostgreSQL and a RabbitMQ of our own, on free ports of 127.0.0.1, with their data under the target directory. They
//! end with the program that started them, however it ends: a small shell waits for the end of a pipe that only this
//! program holds, stops them by pid, and removes their data.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use crate::place::{Identity, Place, as_user, logs, start_epmd};
use crate::{command_line, eventually, setup};

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
        Self::with("")
    }

    /// [`Self::private`], for a test.
    ///
    /// # Panics
    ///
    /// When they cannot be installed or started.
    pub async fn alone() -> Self {
        tokio::task::spawn_blocking(Self::private).await.expect("no panic").expect("servers")
    }

    /// [`Self::private`], with further lines in the settings of PostgreSQL, where the last one wins.
    ///
    /// # Errors
    ///
    /// As [`Servers::private`].
    pub fn with(settings: &str) -> anyhow::Result<Self> {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let programs = setup::servers()?;
        let dir = crate::target().join(format!("servers-{}-{number}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir)?;
        let [postgres_port, rabbitmq_port, distribution_port, epmd_port, management_port] = free_ports()?;

        let epmd = start_epmd(&programs, &dir, epmd_port)?;
        let place = Place {
            programs,
            dir: dir.clone(),
            postgres_port,
            rabbitmq_port,
            distribution_port,
            epmd_port,
            management_port,
        };
        place.prepare_postgres(settings)?;
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
        let parent = Pid::from_raw(i32::try_from(pid)?);
        if signal == Signal::SIGKILL {
            // So that no child is born after we have looked for them.
            kill(parent, Signal::SIGSTOP)?;
            self.signal(server, signal)?;
        } else {
            kill(parent, signal)?;
        }
        let Running { children, reaper, place } = self.running.as_mut().context("only servers of our own")?;
        children[server as usize].wait()?;
        let port = match server {
            Server::Postgres => place.postgres_port,
            Server::RabbitMq => place.rabbitmq_port,
        };
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            children[server as usize] = match server {
                Server::Postgres => place.start_postgres()?,
                Server::RabbitMq => place.start_rabbitmq()?,
            };
            // One that was killed may leave something behind for a moment, over which the next one stumbles.
            while TcpStream::connect(("127.0.0.1", port)).is_err() && children[server as usize].try_wait()?.is_none() {
                anyhow::ensure!(Instant::now() < deadline, "{server:?} did not start again:\n{}", logs(&place.dir));
                std::thread::sleep(Duration::from_millis(50));
            }
            if children[server as usize].try_wait()?.is_none() {
                break;
            }
            anyhow::ensure!(Instant::now() < deadline, "{server:?} ends at its start:\n{}", logs(&place.dir));
            std::thread::sleep(Duration::from_millis(200));
        }
        // The old one knows a pid that is nobody's now.
        let mut old = std::mem::replace(reaper, start_reaper(&place.dir, children)?);
        let (killed, ended) = (old.kill(), old.wait());
        killed.and(ended)?;
        self.wait()
    }

    /// Has both servers speak TLS as well: PostgreSQL on its port, RabbitMQ on another, which is returned, after a restart.
    ///
    /// # Errors
    ///
    /// When they do not, or belong to others.
    pub fn offer_tls(&mut self, identity: &Identity) -> anyhow::Result<u16> {
        let [port] = free_ports()?;
        let Running { place, .. } = self.running.as_ref().context("only servers of our own")?;
        place.write_identity(identity)?;
        place.offer_tls(port)?;
        kill(self.pid(Server::Postgres)?, Signal::SIGHUP)?;
        self.restart(Server::RabbitMq, Signal::SIGTERM)?;
        wait_for("RabbitMQ's TLS", port, Instant::now() + START_DEADLINE)?;
        Ok(port)
    }

    /// Has both servers show another certificate, in a moment.
    ///
    /// # Errors
    ///
    /// When they cannot be told.
    pub fn show(&self, identity: &Identity) -> anyhow::Result<()> {
        let Running { place, .. } = self.running.as_ref().context("only servers of our own")?;
        place.write_identity(identity)?;
        kill(self.pid(Server::Postgres)?, Signal::SIGHUP)?;
        self.rabbitmqctl(&["eval", "ssl:clear_pem_cache()."])
    }

    fn pid(&self, server: Server) -> anyhow::Result<Pid> {
        let Running { children, .. } = self.running.as_ref().context("only servers of our own")?;
        Ok(Pid::from_raw(i32::try_from(children[server as usize].id())?))
    }

    /// Starts a standby that follows this PostgreSQL. It ends with what is returned.
    ///
    /// # Errors
    ///
    /// When it cannot be made, or the servers belong to others.
    pub fn standby(&self) -> anyhow::Result<Standby> {
        let Running { place, .. } = self.running.as_ref().context("only servers of our own")?;
        let [port] = free_ports()?;
        let dir = place.dir.join("standby");
        let place = Place { dir: dir.clone(), postgres_port: port, programs: setup::servers()?, ..*place };
        place.prepare_standby(self.postgres_port)?;
        let standby = Standby { port, child: place.start_postgres()? };
        wait_for("the standby", port, Instant::now() + START_DEADLINE).with_context(|| logs(&dir))?;
        Ok(standby)
    }

    /// Lets RabbitMQ believe that its memory is used up, or that it is not.
    ///
    /// # Errors
    ///
    /// When it cannot be told.
    pub fn memory_alarm(&self, on: bool) -> anyhow::Result<()> {
        self.rabbitmqctl(&["set_vm_memory_high_watermark", "absolute", if on { "1MB" } else { "8GB" }])
    }

    /// Has RabbitMQ close channels, from the next one on, over messages of more bytes than this.
    ///
    /// # Errors
    ///
    /// When it cannot be told.
    pub fn largest_message(&self, bytes: usize) -> anyhow::Result<()> {
        // RabbitMQ 3 reads the one, and 4 the other.
        let set = format!(
            "application:set_env(rabbit, max_message_size, {bytes}), persistent_term:put(max_message_size, {bytes})."
        );
        self.rabbitmqctl(&["eval", &set])
    }

    /// A script that is `rabbitmqctl` of this RabbitMQ.
    ///
    /// # Errors
    ///
    /// When it belongs to others.
    pub fn rabbitmqctl_script(&self) -> anyhow::Result<String> {
        Ok(format!("#!/bin/sh\nexec {} \"$@\"\n", command_line(&self.rabbitmqctl_command()?)))
    }

    fn rabbitmqctl(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let mut command = self.rabbitmqctl_command()?;
        let status = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        anyhow::ensure!(status.success(), "rabbitmqctl failed");
        Ok(())
    }

    fn rabbitmqctl_command(&self) -> anyhow::Result<Command> {
        let Running { place, .. } = self.running.as_ref().context("only servers of our own")?;
        let mut command = as_user("rabbitmq", &place.programs.rabbitmq.join("rabbitmqctl"));
        command.args(["--node", &format!("t{}@localhost", place.rabbitmq_port)]);
        command.env("HOME", place.dir.join("rabbitmq/home")).env("ERL_EPMD_PORT", place.epmd_port.to_string());
        Ok(command)
    }

    fn wait(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_DEADLINE;
        for (what, port) in [
            ("PostgreSQL", self.postgres_port),
            ("RabbitMQ", self.rabbitmq_port),
            ("RabbitMQ's management", self.management_port),
        ] {
            wait_for(what, port, deadline)?;
        }
        Ok(())
    }
}

fn wait_for(what: &str, port: u16, deadline: Instant) -> anyhow::Result<()> {
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        if Instant::now() > deadline {
            bail!("{what} did not listen on port {port} within {} s", START_DEADLINE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// A PostgreSQL that follows another; killed when dropped.
#[derive(Debug)]
pub struct Standby {
    /// Where it listens.
    pub port: u16,
    child: Child,
}

impl Drop for Standby {
    fn drop(&mut self) {
        // At once, with its children.
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGQUIT);
        }
        let _ = self.child.wait();
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

pub(crate) fn free_ports<const N: usize>() -> anyhow::Result<[u16; N]> {
    // Held together, so that they differ.
    let listeners: Vec<TcpListener> =
        (0..N).map(|_| TcpListener::bind(("127.0.0.1", 0))).collect::<Result<_, _>>().context("no free ports")?;
    let ports: Vec<u16> =
        listeners.iter().map(|listener| listener.local_addr().map(|at| at.port())).collect::<Result<_, _>>()?;
    ports.try_into().map_err(|_| anyhow::anyhow!("as many ports as asked for"))
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

/// The URL of a database, as its superuser.
#[must_use]
pub fn database_url(port: u16, database: &str) -> String {
    format!("postgres://postgres@127.0.0.1:{port}/{database}")
}

/// Runs a statement in the server's own database.
///
/// # Panics
///
/// When it fails within a few tries: two tests that create databases at once wait for each other.
pub async fn execute(port: u16, sql: &str) {
    let mut connection = PgConnection::connect(&database_url(port, "postgres")).await.expect("PostgreSQL is there");
    eventually(sql, async || match sqlx::query(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await {
        Ok(_) => Some(()),
        Err(error) if error.to_string().contains("being accessed by other users") => None,
        Err(error) => panic!("{sql}: {error}"),
    })
    .await;
}

/// The URL of the virtual host `/`, as the user `guest`.
#[must_use]
pub fn amqp_url(port: u16) -> String {
    format!("amqp://guest:guest@127.0.0.1:{port}/%2f")
}
