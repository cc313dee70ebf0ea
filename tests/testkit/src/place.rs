//! Sets up and starts the servers: their settings, files and users. The ports are chosen by the caller.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::Context as _;

use crate::image;
use crate::setup::Programs;

/// The `PATH` of the servers. The last directory is that of Erlang in the image of RabbitMQ.
const PATH: &str = "/usr/bin:/bin:/usr/sbin:/sbin:/opt/erlang/bin";

/// The certificate of a server and its private key, both in PEM.
#[derive(Debug)]
pub struct Identity {
    /// The certificate.
    pub certificate: String,
    /// The private key.
    pub key: String,
}

/// What a private RabbitMQ is set to beside the usual.
#[derive(Clone, Copy, Debug, Default)]
pub struct RabbitMqSettings {
    /// Lines of `rabbitmq.conf`.
    pub lines: &'static str,
    /// Arguments of Erlang, for what has no name in `rabbitmq.conf`.
    pub erlang_arguments: &'static str,
}

/// Everything that is needed to start the servers, and to start them again: programs, directory and ports.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) programs: Programs,
    pub(crate) dir: PathBuf,
    pub(crate) postgres_port: u16,
    pub(crate) rabbitmq_port: u16,
    pub(crate) distribution_port: u16,
    pub(crate) epmd_port: u16,
    pub(crate) management_port: u16,
    pub(crate) rabbitmq: RabbitMqSettings,
}

/// A command that runs `program` as `user` if the current user is root (PostgreSQL refuses to run as root, and RabbitMQ
/// should not). It inherits no environment variables.
#[must_use]
pub fn as_user(user: &str, program: &Path) -> Command {
    let mut command = if nix::unistd::geteuid().is_root() && !image::contains(program) {
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={user}"), &format!("--regid={user}"), "--clear-groups", "--"]).arg(program);
        command
    } else {
        image::command(Some(user), program)
    };
    command.env_clear().env("PATH", PATH).env("LANG", "C.UTF-8").stdin(Stdio::null());
    // A process group of its own, so that Ctrl-C in the terminal does not reach the servers: the reaper stops them in
    // order.
    command.process_group(0);
    command
}

/// Makes the user as which [`as_user`] runs `program` the owner of `dir`.
///
/// # Errors
///
/// When `chown` fails.
pub fn change_owner(user: &str, program: &Path, dir: &Path) -> anyhow::Result<()> {
    if nix::unistd::geteuid().is_root() {
        let owner = image::owner(user, program).unwrap_or_else(|| format!("{user}:"));
        let status = Command::new("chown").arg("-R").arg(owner).arg(dir).status()?;
        anyhow::ensure!(status.success(), "could not give {} to {user}", dir.display());
    }
    Ok(())
}

impl Layout {
    pub(crate) fn prepare_postgres(&self, further: &str) -> anyhow::Result<()> {
        let Self { programs, dir, postgres_port: port, .. } = self;
        let home = dir.join("postgres");
        let data = home.join("data");
        fs::create_dir_all(&home)?;
        change_owner("postgres", &programs.postgres, &home)?;
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
            "listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = ''\nmax_connections = 300\nmax_prepared_transactions = 10\nfsync = off\ntrack_commit_timestamp = on\n{further}"
        )?;
        Ok(())
    }

    /// If this file exists, PostgreSQL sees the offset from the real time in it.
    pub(crate) fn clock_file(&self) -> PathBuf {
        self.dir.join("clock")
    }

    pub(crate) fn start_postgres(&self) -> anyhow::Result<Child> {
        let home = self.dir.join("postgres");
        let log = fs::OpenOptions::new().append(true).create(true).open(self.dir.join("postgres.log"))?;
        let program = self.programs.postgres.join("postgres");
        let clock = self.clock_file();
        let library = crate::setup::find_libfaketime().filter(|_| clock.exists());
        let mut postgres = match library {
            // Through env, so that it concerns PostgreSQL alone and not what changes the user.
            Some(library) => {
                let mut postgres = as_user("postgres", Path::new("/usr/bin/env"));
                postgres.arg(format!("LD_PRELOAD={}", library.display()));
                postgres.arg(format!("FAKETIME_TIMESTAMP_FILE={}", clock.display()));
                // Only what the clock on the wall shows: timeouts go by the time that passes.
                postgres.args(["FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1"]).arg(program);
                postgres
            }
            None => as_user("postgres", &program),
        };
        postgres
            .current_dir(&home)
            .arg("-D")
            .arg(home.join("data"))
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("could not start postgres")
    }

    /// Makes a standby of the PostgreSQL that runs on `primary_port`.
    pub(crate) fn prepare_standby(&self, primary_port: u16) -> anyhow::Result<()> {
        let Self { programs, dir, postgres_port: port, .. } = self;
        let home = dir.join("postgres");
        let data = home.join("data");
        fs::create_dir_all(&home)?;
        change_owner("postgres", &programs.postgres, &home)?;
        let log = fs::File::create(dir.join("postgres.log"))?;
        let status = as_user("postgres", &programs.postgres.join("pg_basebackup"))
            .current_dir(&home)
            .args(["--host=127.0.0.1", &format!("--port={primary_port}"), "--username=postgres"])
            .args(["--write-recovery-conf", "--checkpoint=fast", "--no-sync", "--pgdata"])
            .arg(&data)
            .stdout(log.try_clone()?)
            .stderr(log)
            .status()
            .context("could not run pg_basebackup")?;
        anyhow::ensure!(status.success(), "pg_basebackup failed: {}", logs(dir));
        let mut settings = fs::OpenOptions::new().append(true).open(data.join("postgresql.conf"))?;
        writeln!(settings, "port = {port}")?;
        Ok(())
    }

    /// Removes the data of PostgreSQL, which must have ended.
    pub(crate) fn remove_postgres(&self) -> anyhow::Result<()> {
        Ok(fs::remove_dir_all(self.dir.join("postgres/data"))?)
    }

    pub(crate) fn prepare_rabbitmq(&self) -> anyhow::Result<()> {
        let Self { programs, dir, management_port, rabbitmq: RabbitMqSettings { lines, .. }, .. } = self;
        let home = dir.join("rabbitmq");
        for part in ["home", "mnesia", "log", "schema", "config"] {
            fs::create_dir_all(home.join(part))?;
        }
        fs::write(home.join("enabled_plugins"), "[rabbitmq_management].")?;
        // The default of max_message_size is 16 MiB from RabbitMQ 4.0 on.
        fs::write(
            home.join("rabbitmq.conf"),
            format!(
                "loopback_users = none\nmanagement.tcp.port = {management_port}\nmanagement.tcp.ip = 127.0.0.1\n\
             disk_free_limit.absolute = 50MB\nmax_message_size = 134217728\n{lines}\n"
            ),
        )?;
        change_owner("rabbitmq", &programs.rabbitmq, &home)
    }

    /// Writes a certificate and its key to the paths from which both servers read theirs.
    pub(crate) fn write_identity(&self, identity: &Identity) -> anyhow::Result<()> {
        let Programs { postgres, rabbitmq, .. } = &self.programs;
        for (user, programs, certificate, key) in [
            ("postgres", postgres, "postgres/data/server.crt", "postgres/data/server.key"),
            ("rabbitmq", rabbitmq, "rabbitmq/config/server.crt", "rabbitmq/config/server.key"),
        ] {
            for (path, pem) in [(certificate, &identity.certificate), (key, &identity.key)] {
                let path = self.dir.join(path);
                fs::write(&path, pem)?;
                fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
                change_owner(user, programs, &path)?;
            }
        }
        Ok(())
    }

    /// Adds the settings for TLS to both servers' configuration. They take effect when the servers read it again.
    pub(crate) fn offer_tls(&self, amqps_port: u16) -> anyhow::Result<()> {
        let settings = |path| fs::OpenOptions::new().append(true).open(self.dir.join(path));
        writeln!(settings("postgres/data/postgresql.conf")?, "ssl = on")?;
        let config = self.dir.join("rabbitmq/config");
        writeln!(
            settings("rabbitmq/rabbitmq.conf")?,
            "listeners.ssl.1 = 127.0.0.1:{amqps_port}\nssl_options.certfile = {0}/server.crt\n\
             ssl_options.keyfile = {0}/server.key\nssl_options.verify = verify_none",
            config.display()
        )?;
        Ok(())
    }

    pub(crate) fn start_rabbitmq(&self) -> anyhow::Result<Child> {
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
            // With this, the script replaces itself by the server, so that the pid of the child is that of the server.
            .env("RABBITMQ_ALLOW_INPUT", "1")
            .env(
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", // The port of Erlang's distribution would be open to the network.
                format!(
                    "+S 2:2 +sbwt none -kernel inet_dist_use_interface {{127,0,0,1}} {}",
                    self.rabbitmq.erlang_arguments
                ),
            )
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("could not start rabbitmq-server")
    }
}

impl Layout {
    /// `rabbitmqctl` for this node.
    pub(crate) fn rabbitmqctl(&self) -> Command {
        let mut command = as_user("rabbitmq", &self.programs.rabbitmq.join("rabbitmqctl"));
        command.args(["--node", &format!("t{}@localhost", self.rabbitmq_port)]);
        command.env("HOME", self.dir.join("rabbitmq/home")).env("ERL_EPMD_PORT", self.epmd_port.to_string());
        command
    }
}

pub(crate) fn start_epmd(programs: &Programs, dir: &Path, port: u16) -> anyhow::Result<Child> {
    // RabbitMQ would start an epmd that outlives it. An epmd in the foreground is a child that can be stopped.
    let log = fs::File::create(dir.join("epmd.log"))?;
    let epmd = programs.epmd.as_deref().context("epmd, a part of Erlang, is in none of the usual places")?;
    as_user("rabbitmq", epmd)
        .args(["-port", &port.to_string(), "-address", "127.0.0.1"])
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("could not start epmd")
}

/// The last 15 lines of each server's log.
pub(crate) fn logs(dir: &Path) -> String {
    let mut text = String::from("the servers did not start");
    for name in ["postgres.log", "epmd.log", "rabbitmq.log"] {
        let log = fs::read_to_string(dir.join(name)).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        text.extend(["\n--- ", name, "\n", &lines[lines.len().saturating_sub(15)..].join("\n")]);
    }
    text
}
