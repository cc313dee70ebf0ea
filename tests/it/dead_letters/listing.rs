//! Looks at letters, dead and parked: what they hold of them, how far they go, and what they say meanwhile.

use std::time::Duration;

use harness::daemon::Launch;
use harness::world::World;
use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};

use crate::dead_letters::replay::{no_pass_at_start, once, until_waiting, waiting};
use crate::operations::commands::json;

/// Publishes letters that died nowhere, with bodies of so many bytes.
async fn letters(world: &World, count: usize, bytes: usize) {
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
    until_waiting(world, "tidings.dead", u32::try_from(count).expect("few")).await;
}

/// A world in which a daemon has declared its queues, and ended.
async fn declared() -> World {
    let world = World::empty().await;
    no_pass_at_start(&world).await;
    assert!(once(&world).ready().await.stop().await.success());
    world
}

/// The most memory that a command had, in MiB, and what it wrote.
async fn most_memory(launch: &Launch) -> (u64, String) {
    let (mut command, mut most) = (launch.start(), 0);
    while !command.has_ended() {
        let status = std::fs::read_to_string(format!("/proc/{}/status", command.pid())).unwrap_or_default();
        let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
        most = most.max(kib.unwrap_or(0) / 1024);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(command.ended().await.success(), "{}", command.log());
    (most, command.log())
}

#[tokio::test]
async fn a_look_at_letters_holds_none_of_their_bodies_however_many_and_large_they_are() {
    let world = declared().await;
    letters(&world, 100, 3 << 20).await;

    let run = async |command: &str| {
        let (first, others) = command.split_once(' ').expect("two words");
        most_memory(&world.launch().subcommand(first).args(others.split(' '))).await
    };
    let (nothing, _) = run("dead list --limit 0").await;
    for (command, answer, more) in [
        ("dead list", "100 of 100 dead letters", 8),
        ("dead replay --dry-run", "would be: 0 replayed, 0 expired, 100 parked", 8),
        // What is sent on is held, in windows of 8 MiB, and for a moment twice.
        ("dead replay", "0 replayed, 0 expired, 100 parked, 0 left", 96),
        ("parked list", "0 rows and 100 letters", 8),
    ] {
        let (most, output) = run(command).await;
        assert!(output.contains(answer), "{output}");
        assert!(most <= nothing + more, "{command}: {most} MiB, where a command that does nothing has {nothing}");
    }
}

#[tokio::test]
async fn many_letters_are_counted_first_and_looked_at_up_to_a_limit() {
    let world = declared().await;
    letters(&world, 1_100, 10).await;

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
    let (_, answer) = json(&world, &["dead", "list", "--limit", "1050", "--kind", "none"]).await;
    assert_eq!(
        (&answer["waiting"], &answer["looked_at"], &answer["listed"]),
        (&1_100.into(), &1_050.into(), &0.into())
    );
    assert_eq!(waiting(&world, "tidings.dead").await, 1_100);
}

#[tokio::test]
async fn on_a_terminal_a_bar_says_how_many_letters_there_are_and_how_many_were_looked_at() {
    let world = declared().await;
    letters(&world, 2, 10).await;

    for command in ["dead list", "dead replay --dry-run"] {
        let script = format!("{} {command}", World::binary().display());
        let (code, output) =
            world.launch().running("script".as_ref()).args(["-qec", &script, "/dev/null"]).finished().await;
        assert_eq!(code, 0, "{output}");
        assert!(output.contains("0 of 2 looked at"), "{output}");
        let (_, output) = world.tidings(command.split(' ')).await;
        assert!(!output.contains("looked at"), "{output}");
    }
}
