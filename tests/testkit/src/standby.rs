//! Standbys of a private PostgreSQL.

use std::process::Child;
use std::time::Instant;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::place::{Layout, logs};
use crate::servers::{START_DEADLINE, Servers, free_ports, wait_for_port};
use crate::setup;

impl Servers {
    /// Starts a standby that follows this PostgreSQL. Dropping the returned value stops it.
    ///
    /// # Errors
    ///
    /// When the standby cannot be made, or this program did not start the servers.
    pub fn start_standby(&self) -> anyhow::Result<Standby> {
        let [port] = free_ports()?;
        let layout = self.layout()?;
        let dir = layout.dir.join(format!("standby-{port}"));
        let layout = Layout { dir: dir.clone(), postgres_port: port, programs: setup::find_servers()?, ..*layout };
        layout.prepare_standby(self.postgres_port)?;
        let standby = Standby { port, child: layout.start_postgres()? };
        wait_for_port("the standby", port, Instant::now() + START_DEADLINE).with_context(|| logs(&dir))?;
        Ok(standby)
    }
}

/// A standby of another PostgreSQL. Dropping this value stops it.
#[derive(Debug)]
pub struct Standby {
    /// The port on which it listens.
    pub port: u16,
    child: Child,
}

impl Drop for Standby {
    fn drop(&mut self) {
        // SIGQUIT ends PostgreSQL at once, with its children.
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGQUIT);
        }
        let _ = self.child.wait();
    }
}
