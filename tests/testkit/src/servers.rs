//! Starts a private PostgreSQL and RabbitMQ on free ports of 127.0.0.1, with their data under the target directory.
//! When this program ends, even by SIGKILL, a shell that reads a pipe from it stops the servers by pid and removes
//! their data.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use crate::place::{Identity, Layout, RabbitMqSettings, logs, start_epmd};
use crate::processes::{children_of, replace_reaper, start_reaper};
use crate::{command_line, eventually, setup};

/// The environment variable that passes the ports of running servers on to child programs.
const PORTS: &str = "HARNESS_PORTS";
/// RabbitMQ takes ten seconds on a busy machine.
pub(crate) const START_DEADLINE: Duration = Duration::from_mins(2);

/// The two servers.
#[derive(Debug)]
pub struct Servers {
    /// The port of PostgreSQL. The superuser is `postgres`, without a password.
    pub postgres_port: u16,
    /// The port of RabbitMQ. The user is `guest` with the password `guest`.
    pub rabbitmq_port: u16,
    /// The port of RabbitMQ's management interface.
    pub management_port: u16,
    running: Option<Running>,
}

/// One of the two servers; the number is its index in `Running::children`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// PostgreSQL.
    Postgres = 0,
    /// RabbitMQ.
    RabbitMq = 1,
}

/// What this program has started.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) children: Vec<Child>,
    pub(crate) reaper: Child,
    pub(crate) layout: Layout,
}

impl Servers {
    /// Uses the servers of the parent program if it has passed on their ports, or starts new ones.
    ///
    /// # Errors
    ///
    /// When the servers cannot be installed or started.
    pub fn start() -> anyhow::Result<Self> {
        if let Some([postgres_port, rabbitmq_port, management_port]) = inherited_ports() {
            return Ok(Self { postgres_port, rabbitmq_port, management_port, running: None });
        }
        Self::start_private()
    }

    /// Starts servers that no other program uses, so that they may be stopped and restarted.
    ///
    /// # Errors
    ///
    /// When the servers cannot be installed or started.
    pub fn start_private() -> anyhow::Result<Self> {
        Self::start_private_with("")
    }

    /// [`Self::start_private`] for asynchronous tests.
    ///
    /// # Panics
    ///
    /// When the servers cannot be installed or started.
    pub async fn start_private_async() -> Self {
        tokio::task::spawn_blocking(Self::start_private).await.expect("no panic").expect("servers")
    }

    /// [`Self::start_private`] with additional lines for `postgresql.conf`. A later line overrides an earlier one.
    ///
    /// # Errors
    ///
    /// As [`Servers::start_private`].
    pub fn start_private_with(settings: &str) -> anyhow::Result<Self> {
        Self::start_private_with_settings(settings, RabbitMqSettings::default())
    }

    /// [`Self::start_private_with`] with settings of RabbitMQ as well, which further nodes get too.
    ///
    /// # Errors
    ///
    /// As [`Servers::start_private`].
    pub fn start_private_with_settings(settings: &str, rabbitmq: RabbitMqSettings) -> anyhow::Result<Self> {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let programs = setup::find_servers()?;
        let dir = crate::target().join(format!("servers-{}-{number}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir)?;
        let [postgres_port, rabbitmq_port, distribution_port, epmd_port, management_port] = free_ports()?;
        let epmd = start_epmd(&programs, &dir, epmd_port)?;
        let layout = Layout {
            programs,
            dir: dir.clone(),
            postgres_port,
            rabbitmq_port,
            distribution_port,
            epmd_port,
            management_port,
            rabbitmq,
        };
        layout.prepare_postgres(settings)?;
        layout.prepare_rabbitmq()?;
        let children = vec![layout.start_postgres()?, layout.start_rabbitmq()?, epmd];
        let reaper = start_reaper(&dir, &children)?;
        let running = Some(Running { children, reaper, layout });
        let servers = Self { postgres_port, rabbitmq_port, management_port, running };
        servers.wait_for_both().with_context(|| logs(&dir))?;
        Ok(servers)
    }

    /// [`Self::start_private`], with a PostgreSQL whose clock [`Self::set_clock`] sets.
    ///
    /// # Errors
    ///
    /// When the library that shows another time cannot be installed, and as [`Servers::start_private`].
    pub fn start_private_with_clock() -> anyhow::Result<Self> {
        setup::find_libfaketime().context("libfaketime is needed: cargo verify installs it")?;
        let mut servers = Self::start_private()?;
        servers.set_clock(0)?;
        servers.restart(Server::Postgres, Signal::SIGINT)?;
        Ok(servers)
    }

    /// Sets the clock that PostgreSQL sees this many seconds ahead of the real time.
    ///
    /// # Errors
    ///
    /// When this program did not start the servers.
    pub fn set_clock(&self, ahead: i64) -> anyhow::Result<()> {
        let layout = self.layout()?;
        // Renamed, so that nobody reads half of it.
        let aside = layout.dir.join("clock.new");
        fs::write(&aside, format!("{ahead:+}"))?;
        Ok(fs::rename(aside, layout.clock_file())?)
    }

    /// The environment variable with which [`Servers::start`] of a child process uses these servers.
    #[must_use]
    pub fn environment(&self) -> (&'static str, String) {
        (PORTS, format!("{} {} {}", self.postgres_port, self.rabbitmq_port, self.management_port))
    }

    /// Sends a signal to a server and its child processes, for example SIGSTOP or SIGCONT.
    ///
    /// # Errors
    ///
    /// When this program did not start the server.
    pub fn signal(&self, server: Server, signal: Signal) -> anyhow::Result<()> {
        let pid = self.running.as_ref().context("not this program's servers")?.children[server as usize].id();
        for pid in children_of(pid).into_iter().chain([pid]) {
            // The error is ignored: a child may have ended in the meantime.
            let _ = kill(Pid::from_raw(i32::try_from(pid)?), signal);
        }
        Ok(())
    }

    /// Stops a server with `signal` (SIGKILL goes to its children too) and starts it again, on the same ports with the
    /// same data. Blocks until the server listens again.
    ///
    /// # Errors
    ///
    /// When the server does not stop or start, or this program did not start it.
    pub fn restart(&mut self, server: Server, signal: Signal) -> anyhow::Result<()> {
        let pid = self.running.as_ref().context("not this program's servers")?.children[server as usize].id();
        let parent = Pid::from_raw(i32::try_from(pid)?);
        if signal == Signal::SIGKILL {
            // Stopped first, so that it starts no child after its children have been listed.
            kill(parent, Signal::SIGSTOP)?;
            self.signal(server, signal)?;
        } else {
            kill(parent, signal)?;
        }
        let Running { children, reaper, layout } = self.running_mut()?;
        children[server as usize].wait()?;
        let port = match server {
            Server::Postgres => layout.postgres_port,
            Server::RabbitMq => layout.rabbitmq_port,
        };
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            children[server as usize] = match server {
                Server::Postgres => layout.start_postgres()?,
                Server::RabbitMq => layout.start_rabbitmq()?,
            };
            // While a killed server's locks are still there, the new server ends at once and is started again.
            while TcpStream::connect(("127.0.0.1", port)).is_err() && children[server as usize].try_wait()?.is_none() {
                anyhow::ensure!(Instant::now() < deadline, "{server:?} did not start again:\n{}", logs(&layout.dir));
                std::thread::sleep(Duration::from_millis(50));
            }
            if children[server as usize].try_wait()?.is_none() {
                break;
            }
            anyhow::ensure!(Instant::now() < deadline, "{server:?} ends at its start:\n{}", logs(&layout.dir));
            std::thread::sleep(Duration::from_millis(200));
        }
        replace_reaper(reaper, &layout.dir, children)?;
        self.wait_for_both()
    }

    /// Switches TLS on: for PostgreSQL on its port, for RabbitMQ, which is restarted, on another port, which is
    /// returned.
    ///
    /// # Errors
    ///
    /// When a server does not take the settings, or this program did not start it.
    pub fn offer_tls(&mut self, identity: &Identity) -> anyhow::Result<u16> {
        let [port] = free_ports()?;
        let layout = self.layout()?;
        layout.write_identity(identity)?;
        layout.offer_tls(port)?;
        kill(self.pid(Server::Postgres)?, Signal::SIGHUP)?;
        self.restart(Server::RabbitMq, Signal::SIGTERM)?;
        wait_for_port("RabbitMQ's TLS", port, Instant::now() + START_DEADLINE)?;
        Ok(port)
    }

    /// Makes both servers present another certificate to new connections, within moments.
    ///
    /// # Errors
    ///
    /// When a server cannot be told.
    pub fn replace_certificate(&self, identity: &Identity) -> anyhow::Result<()> {
        self.layout()?.write_identity(identity)?;
        kill(self.pid(Server::Postgres)?, Signal::SIGHUP)?;
        self.rabbitmqctl(&["eval", "ssl:clear_pem_cache()."])
    }

    fn pid(&self, server: Server) -> anyhow::Result<Pid> {
        let Running { children, .. } = self.running.as_ref().context("not this program's servers")?;
        Ok(Pid::from_raw(i32::try_from(children[server as usize].id())?))
    }

    /// Raises or clears RabbitMQ's memory alarm by setting a very low or a high memory limit.
    ///
    /// # Errors
    ///
    /// When `rabbitmqctl` fails.
    pub fn set_memory_alarm(&self, on: bool) -> anyhow::Result<()> {
        self.rabbitmqctl(&["set_vm_memory_high_watermark", "absolute", if on { "1MB" } else { "8GB" }])
    }

    /// Sets RabbitMQ's `max_message_size`: channels opened from now on are closed when a larger message is published.
    ///
    /// # Errors
    ///
    /// When `rabbitmqctl` fails.
    pub fn set_max_message_size(&self, bytes: usize) -> anyhow::Result<()> {
        // RabbitMQ 3 reads the first setting, RabbitMQ 4 the second.
        let set = format!(
            "application:set_env(rabbit, max_message_size, {bytes}), persistent_term:put(max_message_size, {bytes})."
        );
        self.rabbitmqctl(&["eval", &set])
    }

    /// Gives RabbitMQ another type of exchange, which routes as `topic` does. A plugin would bring such a type.
    ///
    /// # Errors
    ///
    /// When `rabbitmqctl` fails.
    pub fn add_exchange_type(&self, name: &str) -> anyhow::Result<()> {
        let module = "rabbit_exchange_type_topic";
        self.rabbitmqctl(&["eval", &format!("rabbit_registry:register(exchange, <<\"{name}\">>, {module}).")])
    }

    /// A shell script that runs `rabbitmqctl` for this RabbitMQ.
    ///
    /// # Errors
    ///
    /// When this program did not start the server.
    pub fn rabbitmqctl_script(&self) -> anyhow::Result<String> {
        Ok(format!("#!/bin/sh\nexec {} \"$@\"\n", command_line(&self.rabbitmqctl_command()?)))
    }

    fn rabbitmqctl(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let mut command = self.rabbitmqctl_command()?;
        let status = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        anyhow::ensure!(status.success(), "rabbitmqctl failed");
        Ok(())
    }

    pub(crate) fn running_mut(&mut self) -> anyhow::Result<&mut Running> {
        self.running.as_mut().context("not this program's servers")
    }

    pub(crate) fn layout(&self) -> anyhow::Result<&Layout> {
        self.running.as_ref().map(|running| &running.layout).context("not this program's servers")
    }

    fn rabbitmqctl_command(&self) -> anyhow::Result<Command> {
        Ok(self.layout()?.rabbitmqctl())
    }

    /// Runs an Erlang expression on the node of RabbitMQ.
    ///
    /// # Errors
    ///
    /// When `rabbitmqctl` fails.
    pub fn eval_on_rabbitmq(&self, expression: &str) -> anyhow::Result<()> {
        self.rabbitmqctl(&["eval", expression])
    }

    fn wait_for_both(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_DEADLINE;
        for (name, port) in [
            ("PostgreSQL", self.postgres_port),
            ("RabbitMQ", self.rabbitmq_port),
            ("RabbitMQ's management", self.management_port),
        ] {
            wait_for_port(name, port, deadline)?;
        }
        Ok(())
    }
}

pub(crate) fn wait_for_port(name: &str, port: u16, deadline: Instant) -> anyhow::Result<()> {
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        if Instant::now() > deadline {
            bail!("{name} did not listen on port {port} within {} s", START_DEADLINE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

impl Drop for Servers {
    fn drop(&mut self) {
        let Some(Running { children, mut reaper, .. }) = self.running.take() else { return };
        // Closing its input makes the reaper stop the servers. It sees each as running until it is waited for here.
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
    // All listeners are open at once, so that the ports differ.
    let listeners: Vec<TcpListener> =
        (0..N).map(|_| TcpListener::bind(("127.0.0.1", 0))).collect::<Result<_, _>>().context("no free ports")?;
    let ports: Vec<u16> =
        listeners.iter().map(|listener| listener.local_addr().map(|at| at.port())).collect::<Result<_, _>>()?;
    ports.try_into().map_err(|_| anyhow::anyhow!("as many ports as asked for"))
}

/// The URL of a database, as its superuser.
#[must_use]
pub fn database_url(port: u16, database: &str) -> String {
    format!("postgres://postgres@127.0.0.1:{port}/{database}")
}

/// Runs a statement in the database `postgres`.
///
/// # Panics
///
/// When the statement fails. While PostgreSQL starts or a template database is in use, it is tried again.
pub async fn execute(port: u16, sql: &str) {
    let url = database_url(port, "postgres");
    let run =
        async || sqlx::query(AssertSqlSafe(sql.to_owned())).execute(&mut PgConnection::connect(&url).await?).await;
    eventually(sql, async || match run().await {
        // cannot_connect_now: after a restart, it accepts connections before it accepts logins; object_in_use.
        Err(sqlx::Error::Database(error)) if matches!(error.code().as_deref(), Some("57P03" | "55006")) => None,
        done => Some(done.unwrap_or_else(|error| panic!("{sql}: {error}"))),
    })
    .await;
}

/// The URL of the virtual host `/`, as the user `guest`.
#[must_use]
pub fn amqp_url(port: u16) -> String {
    format!("amqp://guest:guest@127.0.0.1:{port}/%2f")
}
