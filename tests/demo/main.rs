//! `cargo demo`: the main job, with everything real. A small application keeps games in a table whose triggers schedule,
//! reschedule and cancel through the SQL functions; the daemon turns what falls due into messages, and takes back what is
//! rejected; a consumer prints them with their lateness, and fails at some. A minute of the games lasts a tenth of a second.
//!
//! Uses the servers of `TIDINGS_DATABASE_URL` and `TIDINGS_AMQP_URL` if both are set (the database and the virtual host
//! must be scratch ones), and its own otherwise. With `--once` it ends by itself, and succeeds only if everything that it
//! announced arrived and nothing else did.

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

/// Where the servers are.
struct Urls {
    database: String,
    amqp: String,
    /// They end with the demo.
    _servers: Ours,
}

/// The servers that the demo has started.
enum Ours {
    None,
    Processes { _servers: Servers },
    Containers { _containers: Containers },
}

fn main() -> ExitCode {
    let once = match std::env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => false,
        [once] if once == "--once" => true,
        other => {
            eprintln!("demo: there is only --once, not {}", other.join(" "));
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

    let (code, output) = Launch::new(&binary, "migrate").with("TIDINGS_DATABASE_URL", &urls.database).finished().await;
    ensure!(code == 0, "tidings migrate failed: {output}");
    println!("migrated: {output}");
    let directory = Directory::with(&plugins, &["game-reminder", "game-status"])?;
    let mut daemon = start(&binary, &directory.0, &urls).await;
    println!("the daemon is ready, with the plugins game-reminder and game-status in {}", directory.0.display());
    let page = format!("http://{}/", daemon.http_addr().await);
    println!("its page, which shows all of this: {page}");

    let mut db = <PgConnection as sqlx::Connection>::connect(&urls.database).await?;
    let broker = Broker::connect(&urls.amqp).await;
    let consumer = Consumer::begin(&broker).await?;
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

/// The servers of the user, or our own: their programs, or where there are none and they cannot be installed, containers.
async fn find_servers() -> anyhow::Result<Urls> {
    let given = |name| std::env::var(name).ok().filter(|url| !url.is_empty());
    let (postgres_port, rabbitmq_port, ours) = match (given("TIDINGS_DATABASE_URL"), given("TIDINGS_AMQP_URL")) {
        (Some(database), Some(amqp)) => {
            println!("using the servers of TIDINGS_DATABASE_URL and TIDINGS_AMQP_URL");
            return Ok(Urls { database, amqp, _servers: Ours::None });
        }
        (None, None) if !setup::has_servers() && has_docker() => {
            println!("starting a PostgreSQL and a RabbitMQ in Docker: their programs are not on this machine ...");
            let containers = Containers::start().await?;
            (containers.postgres_port, containers.rabbitmq_port, Ours::Containers { _containers: containers })
        }
        (None, None) => {
            println!("starting a PostgreSQL and a RabbitMQ of our own ...");
            let servers = Servers::start()?;
            (servers.postgres_port, servers.rabbitmq_port, Ours::Processes { _servers: servers })
        }
        _ => bail!("set both TIDINGS_DATABASE_URL and TIDINGS_AMQP_URL, or none"),
    };
    execute(postgres_port, "CREATE DATABASE demo").await;
    let (database, amqp) = (database_url(postgres_port, "demo"), amqp_url(rabbitmq_port));
    println!("PostgreSQL: {database}\nRabbitMQ:   {amqp}");
    Ok(Urls { database, amqp, _servers: ours })
}

async fn start(binary: &Path, plugins: &Path, urls: &Urls) -> Daemon {
    Launch::new(binary, "run")
        .with("TIDINGS_DATABASE_URL", &urls.database)
        .with("TIDINGS_AMQP_URL", &urls.amqp)
        .with("TIDINGS_PLUGIN_DIR", plugins.display())
        .with("TIDINGS_STATE_DIR", testkit::target().join("demo-state").display())
        .with("TIDINGS_HTTP_ADDR", "127.0.0.1:0")
        // The shortest: nobody wants to watch for a quarter of an hour.
        .with("TIDINGS_REPLAY_INTERVAL_MS", 1_000)
        .ready()
        .await
}

/// The daemon's plugin directory, removed in the end.
struct Directory(PathBuf);

impl Directory {
    fn with(built: &Path, plugins: &[&str]) -> anyhow::Result<Self> {
        let directory = Self(testkit::target().join(format!("demo-plugins-{}", std::process::id())));
        std::fs::create_dir_all(&directory.0)?;
        for plugin in plugins {
            directory.add(built, plugin)?;
        }
        Ok(directory)
    }

    /// Puts a plugin there as one should: aside, and then renamed.
    fn add(&self, built: &Path, plugin: &str) -> anyhow::Result<()> {
        let aside = self.0.join(format!(".{plugin}"));
        std::fs::copy(built.join(format!("{plugin}.wasm")), &aside)?;
        std::fs::rename(aside, self.0.join(format!("{plugin}.wasm")))?;
        Ok(())
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Plays the scenario, and receives what comes of it.
async fn play(
    db: &mut PgConnection,
    mut consumer: Consumer,
    once: bool,
    (database, page): (&str, &str),
    daemon: &mut Daemon,
    drop_in: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let announced = scenario::play(db).await?;
    let held = daemon.wait_for_line("held rows").await;
    println!("its log: {}", from(&held, "held rows"));
    println!("dropping in message.wasm, while it runs");
    drop_in()?;
    println!("\nthese {} are announced, and nothing else:", announced.len());
    for what in announced.values() {
        println!("  {what}");
    }
    consumer.receive(&announced).await?;
    // Only the reminder can expire, and only a pass after the start of the game finds it so.
    let expired = daemon.wait_for_line("expired=1").await;
    println!("the reminder that was rejected until the game had started never comes again");
    println!("its log: {}", from(&expired, "took back"));
    consumer.no_letter_is_dead().await?;
    scenario::nothing_is_left(db).await?;
    if once {
        return Ok(());
    }
    println!(
        "\nNow you. Open {page}, and in another terminal:\n\n  psql {database}\n\n\
         SELECT tidings.schedule('message', now() + interval '5 seconds', '{{\"routing_key\": \"hello\", \"body\": \"Hello!\"}}', key => 'mine');\n\
         SELECT tidings.reschedule('message', 'mine', now() + interval '20 seconds');\n\
         SELECT tidings.cancel('message', 'mine');\n\
         INSERT INTO games (title, starts_at) VALUES ('Yours', now() + interval '10 seconds');\n\n\
         What becomes due is printed here. Ctrl-C ends it.\n"
    );
    consumer.go_on().await
}

/// A line of the log from `text` on, that is without its time and place.
fn from<'a>(line: &'a str, text: &str) -> &'a str {
    line.find(text).map_or(line, |at| &line[at..])
}

/// What is announced: the message ids, and what each is.
type Announced = BTreeMap<Uuid, String>;
