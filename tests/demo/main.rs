//! `cargo demo` shows the main job of Tidings with real servers. A small application keeps games in a table whose
//! triggers schedule, reschedule and cancel rows through the SQL functions. The daemon turns due rows into messages and
//! replays rejected ones. A consumer prints the messages with their lateness, and rejects some. A minute of the games
//! lasts a tenth of a second.
//!
//! Uses the servers of `TIDINGS_DATABASE_URL` and `TIDINGS_AMQP_URL` if both are set (the demo changes the database and
//! the virtual host, so give it scratch ones), and starts its own otherwise. With `--once` it ends by itself, and
//! succeeds only if exactly the announced messages arrived.

mod consumer;
mod scenario;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{bail, ensure};
use sqlx::PgConnection;
use testkit::consumer::Broker;
use testkit::containers::{Containers, has_docker};
use testkit::daemon::{Daemon, Launch};
use testkit::servers::{Servers, amqp_url, database_url, execute};
use testkit::{build, setup};
use uuid::Uuid;

use consumer::Consumer;

/// The URLs of the servers.
struct Urls {
    database: String,
    amqp: String,
    /// Servers that the demo has started; dropping them stops them.
    _servers: StartedServers,
}

/// The servers that the demo has started.
enum StartedServers {
    None,
    Processes { _servers: Servers },
    Containers { _containers: Containers },
}

fn main() -> ExitCode {
    let once = match std::env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => false,
        [once] if once == "--once" => true,
        other => {
            eprintln!("demo: the only argument is --once, not {}", other.join(" "));
            return ExitCode::from(64);
        }
    };
    let outcome = tokio::runtime::Runtime::new().map_err(Into::into).and_then(|runtime| runtime.block_on(demo(once)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn demo(once: bool) -> anyhow::Result<()> {
    let urls = find_servers().await?;
    println!("building the daemon and the plugins (the first time takes minutes) ...");
    let binary = build::daemon()?;
    let plugins = build::plugins()?;

    let (code, output) =
        Launch::new(&binary, "migrate").with("TIDINGS_DATABASE_URL", &urls.database).run_to_end().await;
    ensure!(code == 0, "tidings migrate failed: {output}");
    println!("migrated: {output}");
    let directory = PluginDirectory::with(&plugins, &["game-reminder", "game-status"])?;
    let mut daemon = start_daemon(&binary, &directory.0, &urls).await;
    println!("the daemon is ready, with the plugins game-reminder and game-status in {}", directory.0.display());
    let page = format!("http://{}/", daemon.http_addr().await);
    println!("the daemon's page, which shows all of this: {page}");

    let mut db = <PgConnection as sqlx::Connection>::connect(&urls.database).await?;
    let broker = Broker::connect(&urls.amqp).await;
    let consumer = Consumer::start(&broker).await?;
    scenario::create_games_table(&mut db).await?;
    let outcome = tokio::select! {
        outcome = play(&mut db, consumer, once, (&urls.database, &page), &mut daemon, || directory.add(&plugins, "message")) => outcome,
        _ = tokio::signal::ctrl_c() => Ok(()),
    };
    if outcome.is_err() {
        eprintln!("--- log of the daemon\n{}", daemon.log());
    }
    let stopped = daemon.stop().await;
    println!("the daemon stopped: {stopped}");
    outcome
}

/// Uses the user's servers if their URLs are set. Otherwise starts private servers: as processes, or in containers if
/// their programs are missing and cannot be installed.
async fn find_servers() -> anyhow::Result<Urls> {
    let given = |name| std::env::var(name).ok().filter(|url| !url.is_empty());
    let (postgres_port, rabbitmq_port, started) = match (given("TIDINGS_DATABASE_URL"), given("TIDINGS_AMQP_URL")) {
        (Some(database), Some(amqp)) => {
            println!("using the servers of TIDINGS_DATABASE_URL and TIDINGS_AMQP_URL");
            return Ok(Urls { database, amqp, _servers: StartedServers::None });
        }
        (None, None) if !setup::has_servers() && has_docker() => {
            println!("starting PostgreSQL and RabbitMQ in Docker, because their programs are not installed ...");
            let containers = Containers::start().await?;
            (containers.postgres_port, containers.rabbitmq_port, StartedServers::Containers { _containers: containers })
        }
        (None, None) => {
            println!("starting a private PostgreSQL and RabbitMQ ...");
            let servers = Servers::start()?;
            (servers.postgres_port, servers.rabbitmq_port, StartedServers::Processes { _servers: servers })
        }
        _ => bail!("set both TIDINGS_DATABASE_URL and TIDINGS_AMQP_URL, or none"),
    };
    execute(postgres_port, "CREATE DATABASE demo").await;
    let (database, amqp) = (database_url(postgres_port, "demo"), amqp_url(rabbitmq_port));
    println!("PostgreSQL: {database}\nRabbitMQ:   {amqp}");
    Ok(Urls { database, amqp, _servers: started })
}

async fn start_daemon(binary: &Path, plugins: &Path, urls: &Urls) -> Daemon {
    Launch::new(binary, "run")
        .with("TIDINGS_DATABASE_URL", &urls.database)
        .with("TIDINGS_AMQP_URL", &urls.amqp)
        .with("TIDINGS_PLUGIN_DIR", plugins.display())
        .with("TIDINGS_STATE_DIR", testkit::target().join("demo-state").display())
        .with("TIDINGS_HTTP_ADDR", "127.0.0.1:0")
        // The shortest interval. By default the demo would wait a quarter of an hour for a replay.
        .with("TIDINGS_REPLAY_INTERVAL_MS", 1_000)
        .start_ready()
        .await
}

/// The daemon's plugin directory. Dropping this value removes it.
struct PluginDirectory(PathBuf);

impl PluginDirectory {
    fn with(built: &Path, plugins: &[&str]) -> anyhow::Result<Self> {
        let directory = Self(testkit::target().join(format!("demo-plugins-{}", std::process::id())));
        std::fs::create_dir_all(&directory.0)?;
        for plugin in plugins {
            directory.add(built, plugin)?;
        }
        Ok(directory)
    }

    /// Copies a plugin to a hidden name and then renames it, so that the daemon never sees half a file.
    fn add(&self, built: &Path, plugin: &str) -> anyhow::Result<()> {
        let aside = self.0.join(format!(".{plugin}"));
        std::fs::copy(built.join(format!("{plugin}.wasm")), &aside)?;
        std::fs::rename(aside, self.0.join(format!("{plugin}.wasm")))?;
        Ok(())
    }
}

impl Drop for PluginDirectory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Plays the scenario, and checks the messages that come of it.
async fn play(
    db: &mut PgConnection,
    mut consumer: Consumer,
    once: bool,
    (database, page): (&str, &str),
    daemon: &mut Daemon,
    add_plugin: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let announced = scenario::play(db).await?;
    let held = daemon.wait_for_line("held rows").await;
    println!("the daemon's log: {}", log_from(&held, "held rows"));
    println!("adding message.wasm to the plugin directory while the daemon runs");
    add_plugin()?;
    println!("\nexactly these {} messages must arrive:", announced.len());
    for description in announced.values() {
        println!("  {description}");
    }
    consumer.receive(&announced).await?;
    // Only the rejected reminder can expire. A pass after the start of the game finds that it has.
    let expired = daemon.wait_for_line("expired=1").await;
    println!("the game has started, so the reminder that was rejected every time is not replayed again");
    println!("the daemon's log: {}", log_from(&expired, "took back"));
    consumer.check_no_dead_letters().await?;
    scenario::check_all_delivered(db).await?;
    if once {
        return Ok(());
    }
    println!(
        "\nNow try it yourself. Open {page}, and in another terminal:\n\n  psql {database}\n\n\
         SELECT tidings.schedule('message', now() + interval '5 seconds', '{{\"routing_key\": \"hello\", \"body\": \"Hello!\"}}', key => 'mine');\n\
         SELECT tidings.reschedule('message', 'mine', now() + interval '20 seconds');\n\
         SELECT tidings.cancel('message', 'mine');\n\
         INSERT INTO games (title, starts_at) VALUES ('Yours', now() + interval '10 seconds');\n\n\
         The messages of due rows are printed here. Ctrl-C ends the demo.\n"
    );
    consumer.receive_for_ever().await
}

/// The part of a log line that begins with `text`, without the time and the target before it.
fn log_from<'a>(line: &'a str, text: &str) -> &'a str {
    line.find(text).map_or(line, |at| &line[at..])
}

/// The messages that must arrive: their ids, each with a description.
type Announced = BTreeMap<Uuid, String>;
