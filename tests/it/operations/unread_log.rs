//! A log that nobody takes: the daemon delivers on, and counts what it could not write.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Stdio};

use harness::eventually;
use harness::world::World;

use crate::operations::metrics::scrape_at;
use crate::operations::process::free_port;

const DROPPED: &str = "tidings_log_lines_dropped_total";

/// A daemon that is started otherwise than by the harness; killed when dropped.
struct Unread {
    child: Child,
    addr: String,
}

impl Drop for Unread {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A daemon of `world` that logs much, started by `sh -c` with `exec "$0" run` in it, so that it is the process itself.
fn unread(world: &World, shell: &str, log: Stdio) -> Unread {
    let addr = format!("127.0.0.1:{}", free_port());
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
    Unread { child: command.spawn().expect("sh runs"), addr }
}

/// It delivers a row.
async fn delivers(world: &World, daemon: &mut Unread) {
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
        inbox.within(std::time::Duration::from_millis(200)).await
    })
    .await;
    assert_eq!(received.text(), body.to_string());
}

async fn dropped(daemon: &Unread) -> f64 {
    scrape_at(&daemon.addr).await[DROPPED]
}

#[tokio::test]
async fn a_daemon_whose_log_is_closed_disk_full_or_never_there_delivers_and_counts_the_lines_that_are_lost() {
    let world = World::with(&["message"]).await;
    for (shell, log, counts) in [
        // Nobody has ever read it.
        (r#"exec "$0" run"#, Stdio::piped(), true),
        (r#"exec "$0" run 2>/dev/full"#, Stdio::null(), true),
        // The standard library opens /dev/null in its place, or a connection would get the number.
        (r#"exec "$0" run 2>&-"#, Stdio::null(), false),
    ] {
        let mut daemon = unread(&world, shell, log);
        drop(daemon.child.stderr.take());
        delivers(&world, &mut daemon).await;
        assert_eq!(dropped(&daemon).await > 0.0, counts, "{shell}");
    }
}

#[tokio::test]
async fn a_daemon_whose_log_is_read_for_a_while_delivers_on_when_its_reader_is_gone() {
    let world = World::with(&["message"]).await;
    let mut daemon = unread(&world, r#"exec "$0" run"#, Stdio::piped());
    let mut reader = BufReader::new(daemon.child.stderr.take().expect("piped"));
    let mut line = String::new();
    reader.read_line(&mut line).expect("a line");
    delivers(&world, &mut daemon).await;

    drop(reader);

    eventually("lines that are lost", async || (dropped(&daemon).await > 0.0).then_some(())).await;
    delivers(&world, &mut daemon).await;
    let pid = nix::unistd::Pid::from_raw(daemon.child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it is running");
    let ended = eventually("its end", async || daemon.child.try_wait().expect("our child")).await;
    assert!(ended.success(), "{ended}");
}

#[tokio::test]
async fn a_daemon_whose_log_goes_into_a_pipe_that_is_full_delivers_on() {
    let world = World::with(&["message"]).await;
    let mut daemon = unread(&world, r#"exec "$0" run"#, Stdio::piped());
    let mut log = daemon.child.stderr.take().expect("piped");

    delivers(&world, &mut daemon).await;
    // Many more lines than fit into a pipe, at every level.
    let _inbox = world.inbox(&["unread"]).await;
    world
        .sql(
            r#"INSERT INTO tidings.schedules (kind, due_at, payload)
               SELECT 'message', now(), '{"routing_key":"unread","body":1}' FROM generate_series(1, 5000)"#,
        )
        .await;
    world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;

    eventually("lines that are lost", async || (dropped(&daemon).await > 0.0).then_some(())).await;
    delivers(&world, &mut daemon).await;
    let mut start = [0; 1024];
    log.read_exact(&mut start).expect("what was written first is there");
}
