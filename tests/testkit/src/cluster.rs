//! More nodes for a private RabbitMQ, which then is a cluster: each has a name, ports and a directory of its own, and all use one
//! epmd. A node may be killed or frozen, and started again.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Stdio};
use std::time::Instant;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::place::{Layout, change_owner, logs};
use crate::processes::{children_of, start_reaper};
use crate::servers::{START_DEADLINE, Servers, free_ports, wait_for_port};
use crate::setup;

/// The nodes beside the first, which belongs to [`Servers`]. Dropping this value stops them.
#[derive(Debug)]
pub struct MoreNodes {
    nodes: Vec<Node>,
}

#[derive(Debug)]
struct Node {
    layout: Layout,
    child: Child,
    reaper: Child,
}

impl Servers {
    /// Starts `count` more nodes, which join this RabbitMQ.
    ///
    /// # Errors
    ///
    /// When a node cannot be started or does not join, or this program did not start the servers.
    pub fn add_nodes(&self, count: usize) -> anyhow::Result<MoreNodes> {
        let first = self.layout()?;
        let cookie = fs::read_to_string(first.dir.join("rabbitmq/home/.erlang.cookie"))?;
        let mut nodes = Vec::new();
        for number in 1..=count {
            let [rabbitmq_port, distribution_port, management_port] = free_ports()?;
            let dir = first.dir.join(format!("node-{number}"));
            let programs = setup::find_servers()?;
            let layout = Layout { programs, dir, rabbitmq_port, distribution_port, management_port, ..*first };
            layout.prepare_rabbitmq()?;
            let file = layout.dir.join("rabbitmq/home/.erlang.cookie");
            fs::write(&file, &cookie)?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o400))?;
            change_owner("rabbitmq", &layout.programs.rabbitmq, &file)?;
            let child = layout.start_rabbitmq()?;
            let reaper = start_reaper(&layout.dir, std::slice::from_ref(&child))?;
            nodes.push(Node { layout, child, reaper });
        }
        let nodes = MoreNodes { nodes };
        for number in 1..=count {
            nodes.wait_for(number)?;
            let join = format!("t{}@localhost", self.rabbitmq_port);
            for arguments in [&["stop_app"][..], &["reset"], &["join_cluster", &join], &["start_app"]] {
                nodes.rabbitmqctl(number, arguments)?;
            }
        }
        Ok(nodes)
    }
}

impl MoreNodes {
    fn node(&self, number: usize) -> &Node {
        &self.nodes[number - 1]
    }

    /// The port of a node, the first of which has the number 1.
    ///
    /// # Panics
    ///
    /// When there is no such node, as for all functions here.
    #[must_use]
    pub fn port(&self, number: usize) -> u16 {
        self.node(number).layout.rabbitmq_port
    }

    /// The name of a node.
    #[must_use]
    pub fn name(&self, number: usize) -> String {
        format!("t{}@localhost", self.port(number))
    }

    fn wait_for(&self, number: usize) -> anyhow::Result<()> {
        let Layout { rabbitmq_port, dir, .. } = &self.node(number).layout;
        wait_for_port("another node of RabbitMQ", *rabbitmq_port, Instant::now() + START_DEADLINE)
            .with_context(|| logs(dir))
    }

    /// Sends a signal to a node and its child processes, for example SIGSTOP or SIGKILL.
    ///
    /// # Errors
    ///
    /// When it has no process.
    pub fn signal(&self, number: usize, signal: Signal) -> anyhow::Result<()> {
        let pid = self.node(number).child.id();
        for pid in std::iter::once(pid).chain(children_of(pid)) {
            // The error is ignored: a child may have ended in the meantime.
            let _ = kill(Pid::from_raw(i32::try_from(pid)?), signal);
        }
        Ok(())
    }

    /// Stops a node with `signal`, and starts it again. Blocks until it listens.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn restart(&mut self, number: usize, signal: Signal) -> anyhow::Result<()> {
        self.signal(number, signal)?;
        let node = &mut self.nodes[number - 1];
        node.child.wait()?;
        node.child = node.layout.start_rabbitmq()?;
        let mut old =
            std::mem::replace(&mut node.reaper, start_reaper(&node.layout.dir, std::slice::from_ref(&node.child))?);
        let (killed, ended) = (old.kill(), old.wait());
        killed.and(ended)?;
        self.wait_for(number)
    }

    fn rabbitmqctl(&self, number: usize, arguments: &[&str]) -> anyhow::Result<()> {
        let mut command = self.node(number).layout.rabbitmqctl();
        let status = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        anyhow::ensure!(status.success(), "rabbitmqctl {arguments:?} failed on the node {number}");
        Ok(())
    }
}

impl Drop for MoreNodes {
    fn drop(&mut self) {
        for Node { child, reaper, .. } in &mut self.nodes {
            // A frozen one would not end.
            let _ = child.kill();
            drop(reaper.stdin.take());
            let _ = (child.wait(), reaper.wait());
        }
    }
}
