//! `cargo rig` runs producers, daemons and consumers as separate processes, while a nemesis injects faults into them,
//! the servers and the connections. At the end every committed row must have arrived, been cancelled or expired. Usage:
//! `cargo rig -- --seconds 1800`. `--seed` repeats the faults of a run, `--daemons` and `--rate` (rows a second) set
//! its size, and `--only killed` uses only faults with that word in their names.

mod consumer;
mod intake;
mod ledger;
mod nemesis;
mod producer;
mod random;
mod recurrences;

use std::collections::BTreeMap;
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
use lapin::{Connection, ConnectionProperties};
use sqlx::Executor as _;

use ledger::Verdict;
use nemesis::{Nemesis, Victim};
use random::Random;

/// How long the delivery of all remaining rows may take after the last fault.
const DRAIN: Duration = Duration::from_mins(5);

/// The parameters of a run.
#[derive(Clone)]
struct Plan {
    seed: u64,
    seconds: u64,
    daemons: u64,
    producers: u64,
    consumers: u64,
    /// Rows a second, of all producers together.
    rate: u64,
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
        ["produce", url, seed, number, seconds, rate] => {
            producer::produce(url, seed.parse()?, number.parse()?, seconds.parse()?, rate.parse()?).await
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
    let mut plan = Plan { seed, seconds: 60, daemons: 2, producers: 2, consumers: 2, rate: 400, only: String::new() };
    for setting in settings.chunks(2) {
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
            other => bail!("unknown argument {other}; there are --seed, --seconds, --daemons, --rate and --only"),
        }
    }
    Ok(plan)
}

async fn run_rig(plan: &Plan) -> anyhow::Result<()> {
    println!("seed {}, {} s, {} daemons, {} rows/s", plan.seed, plan.seconds, plan.daemons, plan.rate);
    let servers = tokio::task::spawn_blocking(Servers::start_private).await??;
    let world = World::on_servers(&servers, &["message"]).await;
    let (postgres_port, rabbitmq_port) = world.ports();
    let (database, broker) = (database_url(postgres_port, &world.name), amqp_url(rabbitmq_port, &world.name));
    world.db.execute(ledger::TABLES).await?;
    recurrences::start(&world.db, plan.seconds).await?;
    intake::start(&world.db).await?;
    let dir = harness::target().join("rig").join(&world.name);
    std::fs::create_dir_all(&dir)?;

    let mut daemons = Vec::new();
    for number in 0..plan.daemons {
        let (postgres, rabbitmq) = (Proxy::start(0, postgres_port).await, Proxy::start(0, rabbitmq_port).await);
        let launch = world
            .launch()
            .with("TIDINGS_DATABASE_URL", database_url(postgres.port, &world.name))
            .with("TIDINGS_AMQP_URL", amqp_url(rabbitmq.port, &world.name))
            .with("TIDINGS_STATE_DIR", world.state_dir().with_extension(format!("state{number}")).display())
            .with("TIDINGS_REPLAY_INTERVAL_MS", 2_000)
            .with("TIDINGS_INTAKE", intake::SETTING)
            .with("RUST_LOG", "info,lapin=off,sqlx=off");
        daemons.push(Victim {
            daemon: launch.start_ready().await,
            earlier_logs: String::new(),
            launch,
            postgres,
            rabbitmq,
        });
    }
    let consumers: Vec<ChildProcess> = (0..plan.consumers)
        .map(|number| {
            spawn_self(&["consume", &broker, &plan.seed.to_string(), &number.to_string(), &dir.to_string_lossy()])
        })
        .collect::<Result<_, _>>()?;
    let reader = tokio::spawn(producer::hold_snapshot(database.clone()));
    let rate = (plan.rate / plan.producers).to_string();
    let mut producers: Vec<ChildProcess> = (0..plan.producers)
        .map(|number| {
            spawn_self(&[
                "produce",
                &database,
                &plan.seed.to_string(),
                &number.to_string(),
                &plan.seconds.to_string(),
                &rate,
            ])
        })
        .collect::<Result<_, _>>()?;
    let confirmed = dir.with_extension("confirmed");
    let (seed, seconds) = (plan.seed.to_string(), plan.seconds.to_string());
    producers.push(spawn_self(&["publish", &broker, &seed, &seconds, &rate, &confirmed.to_string_lossy()])?);

    let mut nemesis = Nemesis {
        random: Random::new(plan.seed),
        servers: Arc::new(std::sync::Mutex::new(servers)),
        world,
        amqp_url: broker.clone(),
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
    wait_until_drained(&nemesis, &broker).await?;
    drop(consumers);

    let verdict = ledger::judge(&nemesis.world.db, &ledger::read_arrivals(&dir)?, &nemesis.faults).await?;
    let instants = recurrences::judge(&nemesis.world.db).await?;
    let (taken, not_taken) = intake::judge(&nemesis.world.db, &confirmed).await?;
    report(&verdict, &nemesis);
    report_instants(&instants);
    report_intake(taken, &not_taken, &nemesis.faults);
    write_logs(&nemesis)?;
    if !verdict.is_clean() || !instants.are_right() || !not_taken.is_empty() {
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
    let _ = (std::fs::remove_dir_all(&dir), std::fs::remove_file(&confirmed));
    Ok(())
}

/// Prints how many messages an intake was given, and which of them never became a row.
fn report_intake(taken: usize, not_taken: &[(uuid::Uuid, i64)], faults: &[ledger::Fault]) {
    println!("intake: {taken} messages were confirmed, {} of them never became a row", not_taken.len());
    for (id, at_ms) in not_taken.iter().take(20) {
        let fault = faults.iter().rev().find(|fault| fault.from_ms <= *at_ms);
        let since = fault.map(|fault| format!("{} ms after the beginning of: {}", at_ms - fault.from_ms, fault.name));
        println!("  {id} was confirmed {}", since.unwrap_or_else(|| "before the first fault".into()));
    }
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

/// Waits until no row is pending, all recurrences have ended, and the queues of the consumers, of dead letters and for parking are empty.
async fn wait_until_drained(nemesis: &Nemesis, broker: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + DRAIN;
    let connection = Connection::connect(broker, ConnectionProperties::default()).await?;
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
        if pending == 0 && letters.iter().all(|letters| *letters == 0) {
            return Ok(());
        }
        if Instant::now() > deadline {
            write_logs(nemesis)?;
            let [rig, dead, parking, intake] = letters[..] else { unreachable!("four queues") };
            bail!(
                "{pending} rows and recurrences are still pending, {rig} messages are in the queue, {dead} are dead letters, {parking} are parked, {intake} wait in the intake"
            );
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Writes the daemons' logs to `target/rig/daemon0.log` and so on, over those of the previous run.
fn write_logs(nemesis: &Nemesis) -> anyhow::Result<()> {
    for (number, victim) in nemesis.daemons.iter().enumerate() {
        std::fs::write(harness::target().join("rig").join(format!("daemon{number}.log")), victim.log())?;
    }
    Ok(())
}

fn report_instants(recurrences::Instants { expected, missing, wrong }: &recurrences::Instants) {
    println!("\n{expected:>8}  instants of recurrences");
    for (name, instants) in [("not made", missing), ("made twice, or that no rule says", wrong)] {
        let example = instants.first().map_or(String::new(), |first| format!(", for example {first}"));
        println!("{:>8}  {name}{example}", instants.len());
    }
}

fn report(verdict: &Verdict, nemesis: &Nemesis) {
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    for fault in &nemesis.faults {
        *kinds.entry(fault.name).or_default() += 1;
    }
    let Verdict { committed, cancelled, arrived, expired, replayed, stale, duplicates, .. } = verdict;
    println!(
        "\n{} faults, each with the second copies that it caused, and the time until lateness was below 1 s again:",
        nemesis.faults.len()
    );
    for (name, count) in kinds {
        let doubled = duplicates.get(name).copied().unwrap_or_default();
        let mut normal = verdict.normal_after.get(name).cloned().unwrap_or_default();
        normal.sort_unstable();
        let (median, most) = (normal.get(normal.len() / 2).copied().unwrap_or(0), normal.last().copied().unwrap_or(0));
        println!("{count:>8}  {name:<32} {doubled:>6}   median {median:>6} ms   most {most:>6} ms");
    }
    let duplicates: usize = duplicates.values().sum();
    let lines: usize = nemesis.daemons.iter().map(|victim| victim.log().lines().count()).sum();
    println!("{lines:>8}  lines in the daemons' logs");
    println!("\n{committed:>8}  rows committed");
    println!("{arrived:>8}  arrived, {replayed} replays on top");
    println!("{cancelled:>8}  cancelled or moved");
    println!("{expired:>8}  expired before they arrived");
    println!("{stale:>8}  arrived after their deadline, and were not handled");
    let rate = f64::from(u32::try_from(duplicates).unwrap_or(u32::MAX))
        / f64::from(u32::try_from(*committed).unwrap_or(1))
        * 100.0;
    println!("{duplicates:>8}  second copies with the same id, each explained by a fault ({rate:.3} % of rows)");
    for (name, ids) in [
        ("lost", &verdict.lost),
        ("early", &verdict.early),
        ("handled after the deadline", &verdict.after_deadline),
        ("arrived, but were never committed", &verdict.never_committed),
        ("were cancelled, and arrived without a fault", &verdict.cancelled_and_seen),
        ("second copies without a fault", &verdict.unexplained_duplicates),
    ] {
        println!("{:>8}  {name}{}", ids.len(), ids.first().map_or(String::new(), |id| format!(", for example {id}")));
    }
    println!("\nlateness at the consumer after due time and commit, by the fault at that time or up to 10 s before:");
    for (name, late) in &verdict.lateness {
        let mut late = late.clone();
        late.sort_unstable();
        let at = |percent: usize| late[(late.len() - 1) * percent / 100];
        println!("{:>8}  p50 {:>6} ms   p99 {:>6} ms   most {:>6} ms   {name}", late.len(), at(50), at(99), at(100));
    }
}
