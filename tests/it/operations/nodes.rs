//! The nodes of RabbitMQ that the daemon's URL names: it goes on with another one when it loses one. Each node is a proxy
//! here, which can be cut off alone.

use harness::consumer::Inbox;
use harness::proxy::{Mode, Proxy};
use harness::world::World;
use uuid::Uuid;

use crate::operations::health::{get_json, wait_until_ready, wait_until_unready};
use crate::operations::process::find_free_port;

/// The statement that schedules a row that is due, and returns its id.
const SCHEDULE_ROW: &str = r#"SELECT tidings.schedule('message', now(), '{"routing_key": "a", "body": 1}')"#;

/// A URL with a node on each of these ports.
fn url_of(world: &World, ports: [u16; 2]) -> String {
    let hosts = ports.map(|port| format!("127.0.0.1:{port}")).join(",");
    format!("amqp://guest:guest@{hosts}/{}", world.name)
}

/// Schedules a row and waits for its message. A second copy of an earlier one may come before it, if its confirm was lost with
/// the connection.
async fn deliver_row(world: &World, inbox: &mut Inbox) {
    let id: Uuid = world.value(SCHEDULE_ROW).await;
    while inbox.next().await.id() != id {}
}

#[tokio::test]
async fn when_a_node_is_lost_the_daemon_goes_on_with_another_one() {
    let world = World::with_plugins(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let nodes = [Proxy::start(0, world.ports().1).await, Proxy::start(0, world.ports().1).await];
    let url = url_of(&world, [nodes[0].port, nodes[1].port]);
    let mut daemon = world.launch().with("TIDINGS_SWEEP_MS", 600_000).with("TIDINGS_AMQP_URL", url).start_ready().await;

    for _ in 0..2 {
        for (lost, other) in [(0, 1), (1, 0)] {
            nodes[lost].set(Mode::Cut);
            deliver_row(&world, &mut inbox).await;
            wait_until_ready(&mut daemon).await;
            nodes[lost].set(Mode::Pass);
            assert_eq!(get_json(&mut daemon, "/readyz").await.0, 200, "it is at the node {other}");
        }
    }
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;

    for node in &nodes {
        node.set(Mode::Cut);
    }
    wait_until_unready(&mut daemon, "none of the nodes of RabbitMQ can be used: ").await;
    nodes[1].set(Mode::Pass);
    deliver_row(&world, &mut inbox).await;
    wait_until_ready(&mut daemon).await;
}

#[tokio::test]
async fn a_command_finds_a_node_that_answers() {
    let world = World::with_plugins(&["message"]).await;
    let _daemon = world.start_daemon().await;
    let url = url_of(&world, [find_free_port(), world.ports().1]);
    // Each begins at a random node.
    for _ in 0..4 {
        let list = world.launch().subcommand("dead").args(["list"]).with("TIDINGS_AMQP_URL", &url);
        let (code, output) = list.run_to_end().await;
        assert_eq!(code, 0, "{output}");
    }
    let both_gone = url_of(&world, [find_free_port(), find_free_port()]);
    let list = world.launch().subcommand("dead").args(["list"]).with("TIDINGS_AMQP_URL", both_gone);
    let (code, output) = list.run_to_end().await;
    assert_eq!(code, 1, "{output}");
    assert!(output.contains("none of the nodes of RabbitMQ can be used: 127.0.0.1:"), "{output}");
}
