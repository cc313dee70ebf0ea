//! What happens to the nodes of RabbitMQ: they are killed, frozen, cut off from each other and restarted.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::cluster::{Cluster, Machines};
use crate::{consumer, intake};

/// How long the nodes may take to become whole again.
const WHOLE_WITHIN: Duration = Duration::from_mins(3);

impl Cluster {
    /// Breaks the node with this number, which leads all queues at that moment, or several nodes.
    pub(super) async fn break_nodes(
        &self,
        name: &str,
        number: usize,
        duration: Duration,
        vhost: &str,
    ) -> anyhow::Result<()> {
        let others = [(number + 1) % 3, (number + 2) % 3];
        if name.starts_with("node ") {
            self.lead(number, vhost).await?;
        }
        match name {
            "node killed" => {
                self.run(move |machines| machines.signal_node(number, Signal::SIGKILL)).await?;
                tokio::time::sleep(duration).await;
                self.run(move |machines| machines.restart_node(number, Signal::SIGKILL)).await
            }
            // Shorter than the 60 s after which the nodes would take each other for gone.
            "node frozen" => self.freeze_nodes(vec![number], 4 * duration).await,
            // Without a majority nothing is confirmed.
            "two nodes frozen" => self.freeze_nodes(others.to_vec(), 2 * duration).await,
            "node cut off" => {
                let list = self.list(&others);
                let cut = format!("[begin erlang:set_cookie(N, wrong), erlang:disconnect_node(N) end || N <- {list}].");
                self.run(move |machines| machines.ask_node(number, &cut)).await?;
                tokio::time::sleep(Duration::from_secs(5) + 2 * duration).await;
                let heal = format!("[erlang:set_cookie(N, erlang:get_cookie()) || N <- {list}].");
                self.run(move |machines| machines.ask_node(number, &heal)).await.map(drop)
            }
            "nodes restarted one by one" => {
                for number in 0..3 {
                    self.run(move |machines| machines.restart_node(number, Signal::SIGTERM)).await?;
                    self.wait_for_nodes().await?;
                }
                Ok(())
            }
            "memory alarm of a node" => {
                let alarm = format!(
                    "Limit = fun(Bytes) -> vm_memory_monitor:set_vm_memory_high_watermark({{absolute, Bytes}}) end,
                    Limit(1000000), timer:sleep({}), Limit(8000000000).",
                    duration.as_millis()
                );
                self.run(move |machines| machines.ask_node(number, &alarm)).await.map(drop)
            }
            other => anyhow::bail!("there is no fault {other}"),
        }
    }

    async fn freeze_nodes(&self, numbers: Vec<usize>, duration: Duration) -> anyhow::Result<()> {
        for signal in [Signal::SIGSTOP, Signal::SIGCONT] {
            let numbers = numbers.clone();
            self.run(move |machines| numbers.into_iter().try_for_each(|number| machines.signal_node(number, signal)))
                .await?;
            if signal == Signal::SIGSTOP {
                tokio::time::sleep(duration).await;
            }
        }
        Ok(())
    }

    /// The names of nodes as a list of Erlang.
    fn list(&self, numbers: &[usize]) -> String {
        let names: Vec<String> = numbers.iter().map(|number| format!("'{}'", self.names[*number])).collect();
        format!("[{}]", names.join(", "))
    }

    /// Makes a node the leader of the queues of the consumers and of the daemons. A queue that is missing is declared later.
    async fn lead(&self, number: usize, vhost: &str) -> anyhow::Result<()> {
        let queues = [consumer::QUEUE, intake::QUEUE, "tidings.dead", "tidings.parking"];
        let queues = queues.map(|queue| format!("<<\"{queue}\">>")).join(", ");
        let transfer = format!(
            "[case rabbit_amqqueue:lookup(rabbit_misc:r(<<\"{vhost}\">>, queue, Name)) of
                {{ok, Q}} -> rabbit_quorum_queue:transfer_leadership(Q, '{}');
                _ -> missing
            end || Name <- [{queues}]].",
            self.names[number]
        );
        self.run(move |machines| machines.ask_node(0, &transfer)).await.map(drop)
    }

    /// Waits until all nodes run and see each other, and every quorum queue has a leader, and a member on each of them.
    pub(super) async fn wait_for_nodes(&self) -> anyhow::Result<()> {
        // The node waits by itself for a while, since rabbitmqctl takes seconds to start on a busy machine.
        let begun = Instant::now();
        loop {
            let names = self.names.clone();
            let are_whole = move |machines: &mut Machines| {
                Ok(machines.servers.lock().expect("no holder of the lock panics").are_nodes_whole(&names))
            };
            if self.run(are_whole).await? {
                return Ok(());
            }
            anyhow::ensure!(begun.elapsed() < WHOLE_WITHIN, "the nodes of RabbitMQ are not whole again");
        }
    }
}
