//! Listing dead and parked letters: how much memory it takes, how many letters it looks at, and what it prints
//! meanwhile.

use std::time::Duration;

use harness::daemon::Launch;
use harness::world::World;
use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};

use crate::dead_letters::replay::{
    count_messages, launch_with_hourly_passes, suppress_pass_at_start, wait_for_message_count,
};
use crate::operations::commands::run_json;

/// Publishes `count` dead letters without an `x-death` header, with bodies of `bytes` bytes.
async fn publish_dead_letters(world: &World, count: usize, bytes: usize) {
    let (channel, body) = (world.broker.channel().await, vec![b'x'; bytes]);
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
    let mut confirms = Vec::new();
    for number in 0..count {
        let properties = BasicProperties::default().with_message_id(format!("{number}").into());
        let options = BasicPublishOptions::default();
        confirms.push(
            channel.basic_publish("tidings.dlx".into(), "".into(), options, &body, properties).await.expect("written"),
        );
    }
    for confirm in confirms {
        confirm.await.expect("taken");
    }
    wait_for_message_count(world, "tidings.dead", u32::try_from(count).expect("few")).await;
}

/// Makes a world in which a daemon has declared its queues and ended.
async fn create_world_with_queues() -> World {
    let world = World::empty().await;
    suppress_pass_at_start(&world).await;
    assert!(launch_with_hourly_passes(&world).start_ready().await.stop().await.success());
    world
}

/// Runs a command, and returns its peak memory in MiB and its output.
async fn measure_peak_memory(launch: &Launch) -> (u64, String) {
    let (mut command, mut most) = (launch.start(), 0);
    while !command.has_ended() {
        let status = std::fs::read_to_string(format!("/proc/{}/status", command.pid())).unwrap_or_default();
        let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
        most = most.max(kib.unwrap_or(0) / 1024);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(command.wait_for_end().await.success(), "{}", command.log());
    (most, command.log())
}

#[tokio::test]
async fn listing_letters_keeps_no_bodies_in_memory_however_many_and_large_they_are() {
    let world = create_world_with_queues().await;
    publish_dead_letters(&world, 100, 3 << 20).await;

    let run = async |command: &str| {
        let (first, rest) = command.split_once(' ').expect("two words");
        measure_peak_memory(&world.launch().subcommand(first).args(rest.split(' '))).await
    };
    let (nothing, _) = run("dead list --limit 0").await;
    for (command, answer, more) in [
        ("dead list", "100 of 100 dead letters", 8),
        ("dead replay --dry-run", "would be: 0 replayed, 0 expired, 100 parked", 8),
        // Messages that are published again are held in memory, in windows of 8 MiB, and for a moment twice.
        ("dead replay", "0 replayed, 0 expired, 100 parked, 0 left", 96),
        ("parked list", "0 rows and 100 letters", 8),
    ] {
        let (most, output) = run(command).await;
        assert!(output.contains(answer), "{output}");
        assert!(most <= nothing + more, "{command}: {most} MiB, where a command that does nothing has {nothing}");
    }
}

#[tokio::test]
async fn a_list_of_many_letters_first_prints_their_number_and_stops_at_the_limit() {
    let world = create_world_with_queues().await;
    publish_dead_letters(&world, 1_100, 10).await;

    let (code, output) = world.tidings(["dead", "list"]).await;
    assert_eq!(code, 0, "{output}");
    assert!(output.starts_with("tidings: looking at 1100 of 1100 dead letters\n"), "{output}");
    assert!(output.ends_with("1100 of 1100 dead letters"), "{output}");
    let (_, output) = world.tidings(["dead", "list", "--limit", "10"]).await;
    assert!(
        output.ends_with("10 of the first 10 dead letters; 1100 lie there") && !output.contains("looking"),
        "{output}"
    );
    let (_, output) = world.tidings(["dead", "list", "--limit", "0"]).await;
    assert_eq!(output, "0 of the first 0 dead letters; 1100 lie there");
    let (_, answer) = run_json(&world, &["dead", "list", "--limit", "1050", "--kind", "none"]).await;
    assert_eq!(
        (&answer["waiting"], &answer["looked_at"], &answer["listed"]),
        (&1_100.into(), &1_050.into(), &0.into())
    );
    assert_eq!(count_messages(&world, "tidings.dead").await, 1_100);
}

#[tokio::test]
async fn on_a_terminal_a_progress_bar_shows_how_many_of_the_letters_were_looked_at() {
    let world = create_world_with_queues().await;
    publish_dead_letters(&world, 2, 10).await;

    for command in ["dead list", "dead replay --dry-run"] {
        let script = format!("{} {command}", World::binary().display());
        let (code, output) =
            world.launch().with_program("script".as_ref()).args(["-qec", &script, "/dev/null"]).run_to_end().await;
        assert_eq!(code, 0, "{output}");
        assert!(output.contains("0 of 2 looked at"), "{output}");
        let (_, output) = world.tidings(command.split(' ')).await;
        assert!(!output.contains("looked at"), "{output}");
    }
}
