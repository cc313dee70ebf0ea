//! Nodes of a RabbitMQ cluster that are frozen, cut off from the others, or restarted one after the other: rows are neither lost
//! nor left behind, and the daemon goes on with a node that works.

use std::collections::BTreeSet;
use std::time::Duration;

use harness::eventually_within;
use lapin::options::BasicAckOptions;
use nix::sys::signal::Signal;
use uuid::Uuid;

use crate::dead_letters::replay::schedule_message;
use crate::nothing_lost::cluster::{GOES_ON_WITHIN, MESSAGE, QUEUE, start_trio, start_trio_on};
use crate::operations::health::wait_until_ready;

/// The queues that a node leads.
const QUEUES: [&str; 3] = ["tidings.dead", "tidings.parking", QUEUE];

/// By default the others wait up to 75 s for a frozen node, and may take no message meanwhile. When it is back, it starts anew.
const FROZEN_NODES_ARE_FOUND: &str = "net_ticktime = 8\ncluster_partition_handling = pause_minority";

#[tokio::test]
async fn rows_go_on_while_the_node_that_leads_their_queues_is_frozen_and_dead_letters_stay() {
    let mut trio = start_trio_on(&[0, 1, 2], FROZEN_NODES_ARE_FOUND).await;
    for node in [1, 2] {
        trio.deliver_row().await;
        let dead = trio.reject_rows(10).await;
        trio.lead(node, &QUEUES);
        trio.nodes.signal(node, Signal::SIGSTOP).expect("frozen");
        // As soon as the other two take the node for gone, they go on without it.
        trio.deliver_row().await;
        trio.replay(&dead).await;
        trio.nodes.signal(node, Signal::SIGCONT).expect("thawed");
        trio.wait_for_nodes().await;
        trio.deliver_row().await;
    }
    trio.expect_nothing_left().await;
}

#[tokio::test]
async fn a_daemon_whose_node_is_cut_off_from_the_others_goes_on_with_another_one() {
    let mut trio = start_trio_on(&[1, 2], "").await;
    trio.deliver_row().await;
    let node = trio.node_of_daemon();
    trio.lead(0, &QUEUES);
    // The node goes on (cluster_partition_handling = ignore), takes messages, and cannot confirm one.
    trio.cut_off(node);
    trio.deliver_row().await;
    assert_ne!(trio.node_of_daemon(), node, "{}", trio.daemon.log());
    assert!(trio.daemon.log().contains("takes no message at this node"), "{}", trio.daemon.log());
    trio.deliver_row().await;

    // It finds the others again when it starts anew.
    trio.nodes.restart(node, Signal::SIGKILL).expect("it starts again");
    trio.wait_for_nodes().await;
    trio.deliver_row().await;
    trio.expect_nothing_left().await;
}

#[tokio::test]
async fn a_daemon_stands_still_while_the_queues_have_no_majority_and_goes_on_after_it() {
    let mut trio = start_trio().await;
    trio.deliver_row().await;
    for node in [1, 2] {
        trio.nodes.signal(node, Signal::SIGSTOP).expect("frozen");
    }
    let id = schedule_message(&trio.world, MESSAGE).await;
    // Longer than a confirm may take.
    let early = trio.inbox.next_within(Duration::from_secs(15)).await;
    assert!(early.is_none(), "nothing can be confirmed, but {early:?} is here, and the row is {id}");
    assert_eq!(trio.world.value::<i64>("SELECT count(*) FROM tidings.schedules").await, 1);
    for node in [1, 2] {
        trio.nodes.signal(node, Signal::SIGCONT).expect("thawed");
    }
    let inbox = &mut trio.inbox;
    let arrival = async || {
        let received = inbox.next_within(Duration::from_secs(1)).await?;
        received.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
        (received.id() == id).then_some(())
    };
    eventually_within(GOES_ON_WITHIN, "the message", arrival).await;
    trio.wait_for_nodes().await;
    trio.expect_nothing_left().await;
}

#[tokio::test]
async fn rows_are_delivered_while_the_nodes_of_the_daemon_are_restarted_one_after_the_other() {
    let mut trio = start_trio_on(&[1, 2], "").await;
    let mut waiting: BTreeSet<Uuid> = BTreeSet::new();
    trio.deliver_row().await;
    for node in [1, 2] {
        trio.lead(node, &QUEUES);
        for _ in 0..20 {
            waiting.insert(schedule_message(&trio.world, MESSAGE).await);
        }
        trio.nodes.restart(node, Signal::SIGTERM).expect("it starts again");
        trio.wait_for_nodes().await;
    }
    let inbox = &mut trio.inbox;
    let all = async || {
        let received = inbox.next_within(Duration::from_secs(1)).await?;
        received.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
        waiting.remove(&received.id());
        waiting.is_empty().then_some(())
    };
    eventually_within(GOES_ON_WITHIN, "the messages", all).await;
    wait_until_ready(&mut trio.daemon).await;
    trio.expect_nothing_left().await;
}
