//! More nodes for a private RabbitMQ, which then is a cluster: each has a name, ports and a directory of its own, and all use one
//! epmd. A node may be killed or frozen, and started again.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Stdio};
use std::time::Instant;

use anyhow::Context as _;
use nix::sys::signal::Signal;

use crate::place::{Layout, change_owner, logs};
use crate::processes::{replace_reaper, signal_with_children, start_reaper};
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
            for arguments in [&["stop_app"][..], &["reset"], &["join_cluster", &join]] {
                nodes.rabbitmqctl(number, arguments)?;
            }
            // On a busy machine it may give up waiting for the others.
            let mut tries = 0;
            while let Err(error) = nodes.rabbitmqctl(number, &["start_app"]) {
                tries += 1;
                anyhow::ensure!(tries < 3, error);
            }
        }
        Ok(nodes)
    }

    /// Runs an Erlang expression on the first node of RabbitMQ, and returns the value that it prints.
    ///
    /// # Errors
    ///
    /// When the node does not answer or the expression fails.
    pub fn ask_rabbitmq(&self, expression: &str) -> anyhow::Result<String> {
        ask(self.layout()?, expression)
    }

    /// Waits for some seconds until all nodes with these names run and see each other, and every quorum queue has a leader, and a
    /// member on each node. Returns whether it is so.
    #[must_use]
    pub fn are_nodes_whole(&self, names: &[String]) -> bool {
        let names: Vec<String> = names.iter().map(|name| format!("'{name}'")).collect();
        // Asked within the node, since starting rabbitmqctl takes longer than most waits.
        let question = format!(
            "Nodes = [{}],
            Runs = fun(N) -> rpc:call(N, rabbit, is_running, []) =:= true andalso length(rpc:call(N, erlang, nodes, [])) >= 2 end,
            Queues = fun() -> [Q || Q <- rabbit_amqqueue:list(), amqqueue:get_type(Q) =:= rabbit_quorum_queue] end,
            IsWhole = fun(Q) ->
                {{Name, _}} = amqqueue:get_pid(Q),
                lists:all(fun(N) -> is_pid(rpc:call(N, erlang, whereis, [Name])) end, Nodes)
                    andalso element(1, ra:members({{Name, node()}}, 2000)) =:= ok
            end,
            Wait = fun Wait(Times) ->
                Is = lists:all(Runs, Nodes) andalso lists:all(IsWhole, Queues()),
                case Is orelse Times =:= 0 of true -> Is; false -> timer:sleep(200), Wait(Times - 1) end
            end,
            Wait(25).",
            names.join(", ")
        );
        self.ask_rabbitmq(&question).is_ok_and(|told| told == "true")
    }
}

fn ask(layout: &Layout, expression: &str) -> anyhow::Result<String> {
    let asked = layout.rabbitmqctl().args(["eval", expression]).output().context("could not run rabbitmqctl")?;
    let told = String::from_utf8_lossy(&asked.stdout).trim().to_owned();
    anyhow::ensure!(asked.status.success(), "{expression} failed: {told} {}", String::from_utf8_lossy(&asked.stderr));
    Ok(told)
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
        signal_with_children(&self.node(number).child, signal)
    }

    /// Runs an Erlang expression on a node, and returns the value that it prints.
    ///
    /// # Errors
    ///
    /// When the node does not answer or the expression fails.
    pub fn ask(&self, number: usize, expression: &str) -> anyhow::Result<String> {
        ask(&self.node(number).layout, expression)
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
        replace_reaper(&mut node.reaper, &node.layout.dir, std::slice::from_ref(&node.child))?;
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
