//! Starts PostgreSQL and RabbitMQ in Docker containers, for the demo on a machine that has neither their programs nor
//! apt. The containers listen on free ports of 127.0.0.1. They are removed when the program that started them ends,
//! even if it is killed.

use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use sqlx::{Connection as _, PgConnection};

use crate::eventually_within;
use crate::servers::{amqp_url, database_url, free_ports};

/// The images that docker-compose.yml uses.
const POSTGRES: &str = "postgres:17";
const RABBITMQ: &str = "rabbitmq:4-management";
/// A busy machine may take a minute to start RabbitMQ.
const START_DEADLINE: Duration = Duration::from_mins(3);

/// The two containers. Dropping this value removes them.
#[derive(Debug)]
pub struct Containers {
    /// The port of PostgreSQL. The superuser is `postgres`, without a password.
    pub postgres_port: u16,
    /// The port of RabbitMQ. The user is `guest` with the password `guest`.
    pub rabbitmq_port: u16,
    reaper: Child,
}

/// Whether a Docker daemon answers.
#[must_use]
pub fn has_docker() -> bool {
    let version = Command::new("docker").arg("version").stdin(Stdio::null()).output();
    version.is_ok_and(|output| output.status.success())
}

impl Containers {
    /// Starts both containers, and waits until PostgreSQL and RabbitMQ answer. Docker pulls an image that is missing.
    ///
    /// # Errors
    ///
    /// When Docker does not start a container; Docker has then printed the reason.
    ///
    /// # Panics
    ///
    /// When PostgreSQL or RabbitMQ does not answer in time.
    pub async fn start() -> anyhow::Result<Self> {
        let [postgres_port, rabbitmq_port] = free_ports()?;
        let names = [format!("tidings-postgres-{postgres_port}"), format!("tidings-rabbitmq-{rabbitmq_port}")];
        // Started before the containers, so that the first container is removed even if the second does not start.
        let reaper = start_reaper(&names)?;
        let started = Self { postgres_port, rabbitmq_port, reaper };
        run(&names[0], postgres_port, 5432, "POSTGRES_HOST_AUTH_METHOD=trust", POSTGRES)?;
        // By default the user guest may connect only from within the container.
        let everywhere = "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=-rabbit loopback_users []";
        run(&names[1], rabbitmq_port, 5672, everywhere, RABBITMQ)?;
        eventually_within(START_DEADLINE, "an answer of PostgreSQL", async || {
            PgConnection::connect(&database_url(postgres_port, "postgres")).await.ok()
        })
        .await;
        eventually_within(START_DEADLINE, "an answer of RabbitMQ", async || {
            lapin::Connection::connect(&amqp_url(rabbitmq_port), lapin::ConnectionProperties::default()).await.ok()
        })
        .await;
        Ok(started)
    }
}

impl Drop for Containers {
    fn drop(&mut self) {
        // Closing its standard input makes the reaper remove the containers.
        drop(self.reaper.stdin.take());
        let _ = self.reaper.wait();
    }
}

/// Starts a container of `image` and publishes its port `inside` as `port` of 127.0.0.1.
fn run(name: &str, port: u16, inside: u16, environment: &str, image: &str) -> anyhow::Result<()> {
    let mut command = Command::new("docker");
    command.args(["run", "--detach", "--name", name, "--publish", &format!("127.0.0.1:{port}:{inside}")]);
    let status = command.args(["--env", environment, image]).stdin(Stdio::null()).stdout(Stdio::null()).status();
    ensure!(status.context("could not run docker")?.success(), "docker did not start {image}");
    Ok(())
}

/// Starts a shell that removes the containers when its standard input ends, which is when this program closes it or
/// ends.
fn start_reaper(names: &[String]) -> anyhow::Result<Child> {
    let mut command = Command::new("sh");
    command.args(["-c", r#"cat >/dev/null; docker rm --force --volumes "$@""#, "sh"]).args(names);
    command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().context("could not start the shell that removes the containers")
}
