//! What this machine says of itself and of processes: time on the processors, memory, load. Reads, and changes nothing.

use std::fs;
use std::process::Command;

use harness::world::World;
use serde_json::Value;

/// A load average above this says that others are at work, and that the figures are theirs as well.
const BUSY: f64 = 0.5;
/// What `/proc` counts processor time in.
const TICKS_PER_SECOND: f64 = 100.0;

/// Seconds on the processors, of all threads that a process has and had; steps of 10 ms. `None` = our own.
pub(crate) fn cpu(pid: Option<u32>) -> f64 {
    let of = pid.map_or("self".to_owned(), |pid| pid.to_string());
    let stat = fs::read_to_string(format!("/proc/{of}/stat")).expect("it runs");
    // The name, in brackets, may hold anything. Behind it: the state, ten numbers, the time as a user, that as the system.
    let rest = stat.rsplit(')').next().expect("there is a name");
    let ticks: u32 = rest.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<u32>().ok()).sum();
    f64::from(ticks) / TICKS_PER_SECOND
}

/// Seconds on the processors of those threads of a process that have this name.
pub(crate) fn cpu_of_threads(pid: u32, name: &str) -> f64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let read = |dir: &std::path::Path, file| fs::read_to_string(dir.join(file)).unwrap_or_default();
    let dirs = tasks.filter_map(|task| Some(task.ok()?.path()));
    let nanoseconds = dirs.filter(|dir| read(dir, "comm").trim() == name).filter_map(|dir| {
        let text = read(&dir, "schedstat");
        text.split_whitespace().next()?.parse::<f64>().ok()
    });
    nanoseconds.sum::<f64>() / 1e9
}

/// Resident memory now, in MiB.
pub(crate) fn resident_mib(pid: u32) -> f64 {
    status_mib(pid, "VmRSS:")
}

/// Resident memory at its peak, in MiB.
pub(crate) fn peak_mib(pid: u32) -> f64 {
    status_mib(pid, "VmHWM:")
}

fn status_mib(pid: u32, name: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    kib(&status, name) / 1024.0
}

/// Open files and sockets.
pub(crate) fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").count()
}

/// The load average of the last minute, with a warning if it is too high to measure. `None` = not known here.
pub(crate) fn load_average() -> Option<f64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    let load = text.split_whitespace().next()?.parse().ok()?;
    if load > BUSY {
        eprintln!(
            "warning: the load average is {load}: somebody else is at work, and these figures will be about them as well; \
             after a build, wait a minute and measure again"
        );
    }
    Some(load)
}

/// The machine, the versions and the settings that matter, by name.
pub(crate) async fn circumstances(load: Option<f64>) -> Vec<(&'static str, String)> {
    let world = World::empty().await;
    let setting = async |name: &str| world.value::<String>(&format!("SELECT current_setting('{name}')")).await;
    let postgres = format!(
        "{} (fsync {}, synchronous_commit {}, shared_buffers {})",
        setting("server_version").await,
        setting("fsync").await,
        setting("synchronous_commit").await,
        setting("shared_buffers").await
    );
    let broker = overview(&world);
    let of_broker = |name: &str| broker[name].as_str().unwrap_or("unknown").to_owned();
    let rabbitmq = format!("{} (Erlang {})", of_broker("rabbitmq_version"), of_broker("erlang_version"));
    let (_, tidings) = world.tidings(["--version"]).await;
    world.remove().await;

    let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let processor = read("/proc/cpuinfo");
    let processor = processor.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = kib(&read("/proc/meminfo"), "MemTotal:") / 1024.0 / 1024.0;
    let machine = format!(
        "{cores} cores of {}, {memory:.0} GiB, Linux {}",
        processor.trim_start_matches([' ', '\t', ':']),
        read("/proc/sys/kernel/osrelease").trim()
    );
    let commit = Command::new("git").args(["rev-parse", "--short", "HEAD"]).current_dir(harness::repository()).output();
    let commit = commit.map_or_else(|_| String::new(), |output| String::from_utf8_lossy(&output.stdout).into_owned());
    let profile = if cfg!(debug_assertions) { "not optimised: these figures say nothing" } else { "release" };
    vec![
        ("machine", machine),
        ("load average", load.map_or("unknown".to_owned(), |load| format!("{load} at the start"))),
        ("tidings", format!("{} {} ({profile})", tidings.trim().trim_start_matches("tidings "), commit.trim())),
        ("PostgreSQL", postgres),
        ("RabbitMQ", rabbitmq),
    ]
}

/// What RabbitMQ says of itself.
fn overview(world: &World) -> Value {
    let url = world.management_url().replace("guest:guest@", "") + "/api/overview";
    let answer = ureq::get(&url).header("Authorization", "Basic Z3Vlc3Q6Z3Vlc3Q=").call();
    let text = answer.ok().and_then(|mut answer| answer.body_mut().read_to_string().ok());
    text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}

/// The number behind `name` in a file of lines such as `VmRSS:  1234 kB`.
fn kib(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("0");
    line.split_whitespace().next().and_then(|kib| kib.parse().ok()).expect("a number")
}
