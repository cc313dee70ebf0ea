//! `cargo rig` runs producers, daemons and consumers as separate processes, while a nemesis injects faults into them,
//! the servers and the connections. At the end every committed row must have arrived, been cancelled or expired. Usage:
//! `cargo rig -- --seconds 1800`. `--seed` repeats the faults of a run, `--daemons` and `--rate` (rows a second) set
//! its size, `--limit` lets at most so many rows a second go, and `--only killed` uses only faults with that word in their names. With `--cluster`, PostgreSQL has two standbys
//! and RabbitMQ three nodes: primaries are replaced and nodes go away, while all other faults go on.

mod addresses;
mod cluster;
mod consumer;
mod intake;
mod ledger;
mod nemesis;
mod producer;
mod random;
mod recurrences;
mod report;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use harness::proxy::Proxy;
use harness::servers::Servers;
use harness::world::{World, amqp_url, database_url};
use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use sqlx::{AssertSqlSafe, Executor as _};

use addresses::{Nodes, with_ports};
use cluster::Cluster;
use nemesis::{Nemesis, Victim};
use random::Random;
use report::{report, report_confirmed, report_instants, report_intake, report_limit};

/// How long the delivery of all remaining rows may take after the last fault.
const DRAIN: Duration = Duration::from_mins(5);
/// The same in a cluster, where RabbitMQ may send a dead letter a second time before it arrives.
const CLUSTER_DRAIN: Duration = Duration::from_mins(8);

/// The parameters of a run.
#[derive(Clone)]
struct Plan {
    /// PostgreSQL has standbys, and RabbitMQ several nodes.
    cluster: bool,
    seed: u64,
    seconds: u64,
    daemons: u64,
    producers: u64,
    consumers: u64,
    /// Rows a second, of all producers together.
    rate: u64,
    /// How many rows a second may go; 0 = no limit.
    limit: u32,
    /// Use only faults whose names contain this text.
    only: String,
}

/// A child process. Dropping this value kills it.
struct ChildProcess(Child);

impl Drop for ChildProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rig: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &[String]) -> anyhow::Result<()> {
    let texts: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match texts.as_slice() {
        ["produce", url, seed, number, seconds, rate, file] => {
            let pace = (seconds.parse()?, rate.parse()?);
            producer::produce(url, seed.parse()?, number.parse()?, pace, Path::new(file)).await
        }
        ["consume", url, seed, number, dir] => {
            consumer::consume(url, seed.parse()?, number.parse()?, Path::new(dir)).await
        }
        ["publish", url, seed, seconds, rate, file] => {
            intake::publish(url, seed.parse()?, seconds.parse()?, rate.parse()?, Path::new(file)).await
        }
        settings => run_rig(&parse_plan(settings)?).await,
    }
}

fn parse_plan(settings: &[&str]) -> anyhow::Result<Plan> {
    let seed = u64::try_from(nemesis::now_ms())?;
    let (seconds, daemons, producers, consumers, rate) = (60, 2, 2, 2, 400);
    let cluster = settings.contains(&"--cluster");
    let mut plan = Plan { cluster, seed, seconds, daemons, producers, consumers, rate, limit: 0, only: String::new() };
    let others: Vec<&str> = settings.iter().copied().filter(|setting| *setting != "--cluster").collect();
    for setting in others.chunks(2) {
        let [name, value] = setting else { bail!("{} has no value", setting[0]) };
        if *name == "--only" {
            (*value).clone_into(&mut plan.only);
            continue;
        }
        let value = value.parse().with_context(|| format!("{name} {value}"))?;
        match *name {
            "--seed" => plan.seed = value,
            "--seconds" => plan.seconds = value,
            "--daemons" => plan.daemons = value,
            "--rate" => plan.rate = value,
            "--limit" => plan.limit = u32::try_from(value)?,
            other => {
                bail!(
                    "unknown argument {other}; there are --cluster, --seed, --seconds, --daemons, --rate, --limit and --only"
                )
            }
        }
    }
    Ok(plan)
}

async fn run_rig(plan: &Plan) -> anyhow::Result<()> {
    println!("seed {}, {} s, {} daemons, {} rows/s", plan.seed, plan.seconds, plan.daemons, plan.rate);
    let start = if plan.cluster { cluster::start_servers } else { Servers::start_private };
    let servers = tokio::task::spawn_blocking(start).await??;
    let world = World::on_servers(&servers, &["message"]).await;
    let servers = Arc::new(std::sync::Mutex::new(servers));
    let cluster = if plan.cluster { Some(Cluster::start(&servers).await?) } else { None };
    let stage = Stage::of(&world, cluster.as_ref());
    world.db.execute(ledger::TABLES).await?;
    if plan.limit > 0 {
        let limit = format!("SELECT tidings.limit('message', {}, burst => {})", plan.limit, burst(plan.limit));
        world.db.execute(AssertSqlSafe(limit)).await?;
    }
    recurrences::start(&world.db, plan.seconds).await?;
    intake::start(&world.db).await?;
    let dir = harness::target().join("rig").join(&world.name);
    std::fs::create_dir_all(&dir)?;

    let mut daemons = Vec::new();
    for number in 0..plan.daemons {
        daemons.push(stage.start_daemon(&world, number).await);
    }
    let Processes { consumers, mut producers, written, published } = start_processes(plan, &stage, &dir)?;
    let reader = tokio::spawn(producer::hold_snapshot(stage.database.clone()));

    let mut nemesis = Nemesis {
        random: Random::new(plan.seed),
        servers,
        world,
        nodes: Nodes::of(&stage.broker, plan.seed),
        cluster,
        daemons,
        faults: Vec::new(),
        generation: 0,
        only: plan.only.clone(),
        remaining_faults: Vec::new(),
    };
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(plan.seconds) {
        // One pause in four is so long that the effects of the last fault are over.
        let pause = if nemesis.random.below(4) == 0 { 15_000 } else { 500 + nemesis.random.below(4_000) };
        tokio::time::sleep(Duration::from_millis(pause)).await;
        nemesis.strike().await?;
    }
    for producer in &mut producers {
        anyhow::ensure!(producer.0.wait()?.success(), "a producer failed");
    }
    reader.abort();
    wait_until_drained(&nemesis, &dir).await?;
    drop(consumers);

    let db = &nemesis.world.db;
    let verdict = ledger::judge(db, &ledger::read_arrivals(&dir)?, &nemesis.faults).await?;
    let instants = recurrences::judge(db).await?;
    let (taken, not_taken) = intake::judge(db, &published).await?;
    let (confirmed, not_written) = producer::judge(db, &written).await?;
    report(&verdict, &nemesis);
    report_confirmed(confirmed, &not_written);
    report_instants(&instants);
    report_intake(taken, &not_taken, &nemesis.faults);
    if plan.limit > 0 {
        report_limit(&sent_seconds(db).await?, plan.limit, burst(plan.limit));
    }
    write_logs(&nemesis)?;
    // A lone RabbitMQ may lose dead letters.
    let has_lost_letters = plan.cluster && !verdict.only_rejected.is_empty();
    if !verdict.is_clean()
        || !instants.are_right()
        || !not_taken.is_empty()
        || !not_written.is_empty()
        || has_lost_letters
    {
        bail!(
            "a promise was broken; --seed {} repeats the faults; the consumers' files are in {}",
            plan.seed,
            dir.display()
        );
    }
    for victim in nemesis.daemons.drain(..) {
        let status = victim.daemon.stop().await;
        anyhow::ensure!(status.success(), "a daemon did not stop cleanly");
    }
    let _ = std::fs::remove_dir_all(&dir);
    for file in written.iter().chain([&published]) {
        let _ = std::fs::remove_file(file);
    }
    Ok(())
}

/// How many rows may go at once: what a tenth of a second brings.
fn burst(limit: u32) -> u32 {
    (limit / 10).max(1)
}

/// When the rows of the limited kind were confirmed, in seconds, in order.
async fn sent_seconds(db: &sqlx::PgPool) -> sqlx::Result<Vec<f64>> {
    let sent = "SELECT extract(epoch FROM finished_at)::float8 FROM tidings.deliveries
        WHERE outcome = 'delivered' AND kind = 'message' ORDER BY finished_at";
    sqlx::query_scalar(sent).fetch_all(db).await
}

/// Where the servers are: each URL names one server, or all of a cluster.
struct Stage {
    database: String,
    broker: String,
    postgres: Vec<u16>,
    rabbitmq: Vec<u16>,
}

impl Stage {
    fn of(world: &World, cluster: Option<&Cluster>) -> Self {
        let (postgres_port, rabbitmq_port) = world.ports();
        let (database, broker) = (database_url(postgres_port, &world.name), amqp_url(rabbitmq_port, &world.name));
        let Some(Cluster { postgres, rabbitmq, .. }) = cluster else {
            return Self { database, broker, postgres: vec![postgres_port], rabbitmq: vec![rabbitmq_port] };
        };
        // So that the rig's own processes leave a node that is frozen.
        let broker = with_ports(&broker, rabbitmq) + "?heartbeat=5";
        Self { database: with_ports(&database, postgres), broker, postgres: postgres.into(), rabbitmq: rabbitmq.into() }
    }

    /// Starts a daemon that reaches each server through a proxy of its own.
    async fn start_daemon(&self, world: &World, number: u64) -> Victim {
        let (mut postgres, mut rabbitmq) = (Vec::new(), Vec::new());
        for port in &self.postgres {
            postgres.push(Proxy::start(0, *port).await);
        }
        for port in &self.rabbitmq {
            rabbitmq.push(Proxy::start(0, *port).await);
        }
        let ports = |proxies: &[Proxy]| proxies.iter().map(|proxy| proxy.port).collect::<Vec<u16>>();
        let queue_type = if self.rabbitmq.len() > 1 { "quorum" } else { "classic" };
        let launch = world
            .launch()
            .with("TIDINGS_DATABASE_URL", with_ports(&database_url(0, &world.name), &ports(&postgres)))
            .with("TIDINGS_AMQP_URL", with_ports(&amqp_url(0, &world.name), &ports(&rabbitmq)))
            .with("TIDINGS_STATE_DIR", world.state_dir().with_extension(format!("state{number}")).display())
            .with("TIDINGS_REPLAY_INTERVAL_MS", 2_000)
            .with("TIDINGS_INTAKE", intake::SETTING)
            .with("TIDINGS_QUEUE_TYPE", queue_type)
            .with("RUST_LOG", "info,lapin=off,sqlx=off");
        Victim { daemon: launch.start_ready().await, earlier_logs: String::new(), launch, postgres, rabbitmq }
    }
}

/// The consumers and producers, and the files in which the latter note what was confirmed to them.
struct Processes {
    consumers: Vec<ChildProcess>,
    producers: Vec<ChildProcess>,
    written: Vec<PathBuf>,
    published: PathBuf,
}

fn start_processes(plan: &Plan, stage: &Stage, dir: &Path) -> anyhow::Result<Processes> {
    let (seed, seconds, rate) = (plan.seed.to_string(), plan.seconds.to_string(), plan.rate / plan.producers);
    let rate = rate.to_string();
    let consumers = (0..plan.consumers)
        .map(|number| spawn_self(&["consume", &stage.broker, &seed, &number.to_string(), &dir.to_string_lossy()]))
        .collect::<Result<_, _>>()?;
    let (mut producers, mut written) = (Vec::new(), Vec::new());
    for number in 0..plan.producers {
        let (file, number) = (dir.with_extension(format!("written{number}")), number.to_string());
        let path = file.to_string_lossy();
        producers.push(spawn_self(&["produce", &stage.database, &seed, &number, &seconds, &rate, &path])?);
        written.push(file);
    }
    let published = dir.with_extension("published");
    let path = published.to_string_lossy();
    producers.push(spawn_self(&["publish", &stage.broker, &seed, &seconds, &rate, &path])?);
    Ok(Processes { consumers, producers, written, published })
}

/// Starts this program again with `arguments`.
fn spawn_self(arguments: &[&str]) -> anyhow::Result<ChildProcess> {
    let program: PathBuf = std::env::current_exe()?;
    Ok(ChildProcess(
        Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?,
    ))
}

/// Waits until no row is pending, all recurrences have ended, and the queues of the consumers, of dead letters and for parking are
/// empty. In a cluster it also waits until rejected messages have come again, since RabbitMQ may hold dead letters back.
async fn wait_until_drained(nemesis: &Nemesis, dir: &Path) -> anyhow::Result<()> {
    let is_cluster = nemesis.cluster.is_some();
    let deadline = Instant::now() + if is_cluster { CLUSTER_DRAIN } else { DRAIN };
    let connection = nemesis.nodes.connect().await?;
    loop {
        let pending: i64 = nemesis.world.value("SELECT (SELECT count(*) FROM tidings.schedules) + (SELECT count(*) FROM tidings.recurrences WHERE NOT ended)").await;
        let mut letters = Vec::new();
        for queue in [consumer::QUEUE, "tidings.dead", "tidings.parking", intake::QUEUE] {
            let channel = connection.create_channel().await?;
            let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            // The parking queue may be missing until the next pass declares it; count that as not drained.
            let declared = channel.queue_declare(queue.into(), options, FieldTable::default()).await;
            letters.push(declared.map_or(1, |queue| queue.message_count()));
        }
        let is_late = Instant::now() > deadline;
        if pending == 0 && letters.iter().all(|letters| *letters == 0) {
            // The report counts as lost the rows that have not arrived by then.
            if !is_cluster || is_late || have_all_come_again(nemesis, dir).await? {
                return Ok(());
            }
        }
        if is_late {
            write_logs(nemesis)?;
            let [rig, dead, parking, intake] = letters[..] else { unreachable!("four queues") };
            bail!(
                "{pending} rows and recurrences are still pending, {rig} messages are in the queue, {dead} are dead letters, {parking} are parked, {intake} wait in the intake"
            );
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Whether each message that was rejected has been handled since.
async fn have_all_come_again(nemesis: &Nemesis, dir: &Path) -> anyhow::Result<bool> {
    // A consumer may be writing a line at this moment.
    let Ok(arrivals) = ledger::read_arrivals(dir) else { return Ok(false) };
    let verdict = ledger::judge(&nemesis.world.db, &arrivals, &nemesis.faults).await?;
    Ok(verdict.only_rejected.is_empty())
}

/// Writes the daemons' logs to `target/rig/daemon0.log` and so on, over those of the previous run.
fn write_logs(nemesis: &Nemesis) -> anyhow::Result<()> {
    for (number, victim) in nemesis.daemons.iter().enumerate() {
        std::fs::write(harness::target().join("rig").join(format!("daemon{number}.log")), victim.log())?;
    }
    Ok(())
}
