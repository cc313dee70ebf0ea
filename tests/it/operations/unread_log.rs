//! A log that cannot be written: the daemon continues to deliver, and counts the lost lines.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Stdio};

use harness::eventually;
use harness::world::World;

use crate::operations::metrics::scrape_at;
use crate::operations::process::find_free_port;

const DROPPED: &str = "tidings_log_lines_dropped_total";

/// A daemon whose standard error is not read by the harness. Dropping this value kills it.
struct UnreadDaemon {
    child: Child,
    addr: String,
}

impl Drop for UnreadDaemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts a daemon that logs much, with `sh -c`. The script must contain `exec "$0" run`, so that the child process is
/// the daemon.
fn start_with_log(world: &World, shell: &str, log: Stdio) -> UnreadDaemon {
    let addr = format!("127.0.0.1:{}", find_free_port());
    let launch = world.launch().with("TIDINGS_HTTP_ADDR", &addr).with("RUST_LOG", "debug").with("TIDINGS_SWEEP_MS", 50);
    let mut command = launch.command();
    let settings: Vec<_> =
        command.get_envs().map(|(name, value)| (name.to_owned(), value.map(ToOwned::to_owned))).collect();
    command = Command::new("sh");
    command.args(["-c", shell]).arg(World::binary()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    for (name, value) in settings {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    UnreadDaemon { child: command.spawn().expect("sh runs"), addr }
}

/// Checks that the daemon is running and delivers a row.
async fn check_delivery(world: &World, daemon: &mut UnreadDaemon) {
    let body = uuid::Uuid::new_v4();
    let mut inbox = world.inbox(&[&format!("unread.{body}")]).await;
    world
        .sql(&format!(
            r#"SELECT tidings.schedule('message', now(), '{{"routing_key":"unread.{body}","body":"{body}"}}')"#
        ))
        .await;
    let received = eventually("the row", async || {
        if let Some(ended) = daemon.child.try_wait().expect("our child") {
            panic!("the daemon ended: {ended}");
        }
        inbox.next_within(std::time::Duration::from_millis(200)).await
    })
    .await;
    assert_eq!(received.text(), body.to_string());
}

async fn count_dropped_lines(daemon: &UnreadDaemon) -> f64 {
    scrape_at(&daemon.addr).await[DROPPED]
}

#[tokio::test]
async fn a_daemon_whose_log_is_closed_or_on_a_full_disk_delivers_and_counts_the_lost_lines() {
    let world = World::with_plugins(&["message"]).await;
    for (shell, log, counts) in [
        // The reading end of the pipe is closed at once.
        (r#"exec "$0" run"#, Stdio::piped(), true),
        (r#"exec "$0" run 2>/dev/full"#, Stdio::null(), true),
        // Rust's standard library opens /dev/null for the closed descriptor, so no line is lost; otherwise a connection
        // would get its number.
        (r#"exec "$0" run 2>&-"#, Stdio::null(), false),
    ] {
        let mut daemon = start_with_log(&world, shell, log);
        drop(daemon.child.stderr.take());
        check_delivery(&world, &mut daemon).await;
        assert_eq!(count_dropped_lines(&daemon).await > 0.0, counts, "{shell}");
    }
}

#[tokio::test]
async fn a_daemon_continues_to_deliver_when_the_reader_of_its_log_is_gone() {
    let world = World::with_plugins(&["message"]).await;
    let mut daemon = start_with_log(&world, r#"exec "$0" run"#, Stdio::piped());
    let mut reader = BufReader::new(daemon.child.stderr.take().expect("piped"));
    let mut line = String::new();
    reader.read_line(&mut line).expect("a line");
    check_delivery(&world, &mut daemon).await;

    drop(reader);

    eventually("lines that are lost", async || (count_dropped_lines(&daemon).await > 0.0).then_some(())).await;
    check_delivery(&world, &mut daemon).await;
    let pid = nix::unistd::Pid::from_raw(daemon.child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it is running");
    let ended = eventually("its end", async || daemon.child.try_wait().expect("our child")).await;
    assert!(ended.success(), "{ended}");
}

#[tokio::test]
async fn a_daemon_continues_to_deliver_when_its_log_goes_into_a_full_pipe() {
    let world = World::with_plugins(&["message"]).await;
    let mut daemon = start_with_log(&world, r#"exec "$0" run"#, Stdio::piped());
    let mut log = daemon.child.stderr.take().expect("piped");

    check_delivery(&world, &mut daemon).await;
    // These rows cause many more lines than fit into a pipe.
    let _inbox = world.inbox(&["unread"]).await;
    world
        .sql(
            r#"INSERT INTO tidings.schedules (kind, due_at, payload)
               SELECT 'message', now(), '{"routing_key":"unread","body":1}' FROM generate_series(1, 5000)"#,
        )
        .await;
    world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;

    eventually("lines that are lost", async || (count_dropped_lines(&daemon).await > 0.0).then_some(())).await;
    check_delivery(&world, &mut daemon).await;
    let mut start = [0; 1024];
    log.read_exact(&mut start).expect("what was written first is there");
}
