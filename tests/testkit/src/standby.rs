//! Standbys of a private PostgreSQL. After a standby was promoted, the primary that it has replaced is made a standby of it, with
//! its data copied anew.

use std::process::Child;
use std::time::Instant;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::place::{Layout, logs};
use crate::processes::{kill_with_children, replace_reaper, signal_with_children, start_reaper};
use crate::servers::{Running, START_DEADLINE, Server, Servers, free_ports, wait_for_port};
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
        let layout = Layout { dir, postgres_port: port, programs: setup::find_servers()?, ..*layout };
        layout.prepare_standby(self.postgres_port)?;
        let child = layout.start_postgres()?;
        let reaper = start_reaper(&layout.dir, std::slice::from_ref(&child))?;
        let standby = Standby { port, layout, child, reaper };
        wait_until_started(&standby.layout)?;
        Ok(standby)
    }

    /// Kills this PostgreSQL, removes its data, and starts it on the same port as a standby of the PostgreSQL on another port.
    ///
    /// # Errors
    ///
    /// When the standby cannot be made, or this program did not start the servers.
    pub fn rebuild_as_standby(&mut self, primary_port: u16) -> anyhow::Result<()> {
        let Running { children, reaper, layout } = self.running_mut()?;
        rebuild(layout, &mut children[Server::Postgres as usize], primary_port)?;
        replace_reaper(reaper, &layout.dir, children)?;
        wait_until_started(layout)
    }
}

/// A standby of another PostgreSQL, or one that was promoted since. Dropping this value stops it.
#[derive(Debug)]
pub struct Standby {
    /// The port on which it listens.
    pub port: u16,
    layout: Layout,
    child: Child,
    reaper: Child,
}

impl Standby {
    /// Sends a signal to it and its child processes, for example SIGSTOP or SIGCONT.
    ///
    /// # Errors
    ///
    /// When it has no process.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        signal_with_children(&self.child, signal)
    }

    /// Kills it and starts it again, with the same data. Blocks until it listens.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        kill_with_children(&mut self.child)?;
        self.child = self.layout.start_postgres()?;
        self.go_on()
    }

    /// Kills it, removes its data, and starts it on the same port as a standby of the PostgreSQL on another port.
    ///
    /// # Errors
    ///
    /// When the standby cannot be made.
    pub fn rebuild(&mut self, primary_port: u16) -> anyhow::Result<()> {
        rebuild(&self.layout, &mut self.child, primary_port)?;
        self.go_on()
    }

    fn go_on(&mut self) -> anyhow::Result<()> {
        replace_reaper(&mut self.reaper, &self.layout.dir, std::slice::from_ref(&self.child))?;
        wait_until_started(&self.layout)
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        // One that is frozen would not end.
        let _ = self.signal(Signal::SIGCONT);
        // SIGQUIT ends PostgreSQL at once, with its children.
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGQUIT);
        }
        drop(self.reaper.stdin.take());
        let _ = (self.child.wait(), self.reaper.wait());
    }
}

/// Kills a PostgreSQL, and starts another one in its place that copies the data of the one on `primary_port` and follows it.
fn rebuild(layout: &Layout, child: &mut Child, primary_port: u16) -> anyhow::Result<()> {
    kill_with_children(child)?;
    layout.remove_postgres()?;
    layout.prepare_standby(primary_port)?;
    *child = layout.start_postgres()?;
    Ok(())
}

fn wait_until_started(layout: &Layout) -> anyhow::Result<()> {
    let deadline = Instant::now() + START_DEADLINE;
    wait_for_port("the standby", layout.postgres_port, deadline).with_context(|| logs(&layout.dir))
}
