//! A PostgreSQL and a RabbitMQ in Docker containers, for the demo on a machine that has neither their programs nor apt. They
//! listen on free ports of 127.0.0.1, and end with the program that started them, however it ends.

use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use sqlx::{Connection as _, PgConnection};

use crate::eventually_within;
use crate::servers::{amqp_url, database_url, free_ports};

/// The images, as docker-compose.yml has them.
const POSTGRES: &str = "postgres:17";
const RABBITMQ: &str = "rabbitmq:4-management";
/// A busy machine may take a minute to start RabbitMQ.
const START_DEADLINE: Duration = Duration::from_mins(3);

/// The two containers; removed when dropped.
#[derive(Debug)]
pub struct Containers {
    /// Where PostgreSQL listens; the superuser is `postgres`, without a password.
    pub postgres_port: u16,
    /// Where RabbitMQ listens; the user is `guest` with the password `guest`.
    pub rabbitmq_port: u16,
    reaper: Child,
}

/// Whether there is a Docker that answers.
#[must_use]
pub fn has_docker() -> bool {
    let version = Command::new("docker").arg("version").stdin(Stdio::null()).output();
    version.is_ok_and(|output| output.status.success())
}

impl Containers {
    /// Starts both, and waits until they answer. Docker fetches an image that is not there.
    ///
    /// # Errors
    ///
    /// When Docker does not start one of them; it has said why.
    ///
    /// # Panics
    ///
    /// When one does not answer in time.
    pub async fn start() -> anyhow::Result<Self> {
        let [postgres_port, rabbitmq_port] = free_ports()?;
        let names = [format!("tidings-postgres-{postgres_port}"), format!("tidings-rabbitmq-{rabbitmq_port}")];
        // Before the containers, so that one that starts alone is removed as well.
        let reaper = start_reaper(&names)?;
        let started = Self { postgres_port, rabbitmq_port, reaper };
        run(&names[0], postgres_port, 5432, "POSTGRES_HOST_AUTH_METHOD=trust", POSTGRES)?;
        // Without this, the user guest may only come from within the container.
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
        // The reaper acts at the end of its input.
        drop(self.reaper.stdin.take());
        let _ = self.reaper.wait();
    }
}

/// Starts a container of `image` whose port `inside` is `port` of 127.0.0.1.
fn run(name: &str, port: u16, inside: u16, environment: &str, image: &str) -> anyhow::Result<()> {
    let mut command = Command::new("docker");
    command.args(["run", "--detach", "--name", name, "--publish", &format!("127.0.0.1:{port}:{inside}")]);
    let status = command.args(["--env", environment, image]).stdin(Stdio::null()).stdout(Stdio::null()).status();
    ensure!(status.context("could not run docker")?.success(), "docker did not start {image}");
    Ok(())
}

/// Waits for the end of its input, that is of this program, and then removes the containers.
fn start_reaper(names: &[String]) -> anyhow::Result<Child> {
    let mut command = Command::new("sh");
    command.args(["-c", r#"cat >/dev/null; docker rm --force --volumes "$@""#, "sh"]).args(names);
    command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().context("could not start the shell that removes the containers")
}
