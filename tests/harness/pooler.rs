//! Starts a private PgBouncer in front of PostgreSQL.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::place::{as_user, change_owner};
use crate::setup;

/// A running PgBouncer. Dropping this value kills it.
#[derive(Debug)]
pub struct Pooler {
    /// The port on which it listens.
    pub port: u16,
    child: Child,
    dir: PathBuf,
}

impl Pooler {
    /// Starts PgBouncer in front of the PostgreSQL on `postgres_port`, in the pool mode `session` or `transaction`.
    /// With `ignores_settings` it ignores the settings that a client sends at login; otherwise it refuses such a
    /// client.
    ///
    /// # Errors
    ///
    /// When PgBouncer cannot be installed or started.
    pub fn start(postgres_port: u16, mode: &str, ignores_settings: bool) -> anyhow::Result<Self> {
        let program = setup::find_pgbouncer()?;
        let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        let dir = crate::target().join(format!("pooler-{port}"));
        fs::create_dir_all(&dir)?;
        let ignored = if ignores_settings { "extra_float_digits,options" } else { "extra_float_digits" };
        fs::write(
            dir.join("pgbouncer.ini"),
            format!(
                "[databases]\n* = host=127.0.0.1 port={postgres_port} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
                 listen_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = {mode}\nignore_startup_parameters = {ignored}\n"
            ),
        )?;
        change_owner("postgres", &program, &dir)?;
        let log = fs::File::create(dir.join("log"))?;
        let child = as_user("postgres", &program)
            .arg(dir.join("pgbouncer.ini"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("could not start pgbouncer")?;
        let mut pooler = Self { port, child, dir };
        let deadline = Instant::now() + Duration::from_secs(30);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let ended = pooler.child.try_wait()?.is_some();
            let log = fs::read_to_string(pooler.dir.join("log")).unwrap_or_default();
            ensure!(!ended && Instant::now() < deadline, "pgbouncer did not start:\n{log}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(pooler)
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}
