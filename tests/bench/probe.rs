//! Reads facts about this machine and its processes: processor time, memory, load. It changes nothing.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::processes::children_of;
use harness::world::World;
use serde_json::Value;

use crate::report::Circumstances;

/// A load average above this shows that other processes are active and affect the figures.
const BUSY: f64 = 0.5;
/// The unit of processor time in `/proc`.
const TICKS_PER_SECOND: f64 = 100.0;

/// The processor time of a process in seconds, in steps of 10 ms, including threads that have ended. `None` = this
/// process.
pub(crate) fn cpu_seconds(pid: Option<u32>) -> f64 {
    let of = pid.map_or("self".to_owned(), |pid| pid.to_string());
    stat_seconds(&of, 11)
}

/// The sum of two neighbouring times of a process in seconds; `place` is that of the first.
fn stat_seconds(process: &str, place: usize) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).expect("it runs");
    // The name, in brackets, may contain any characters. After it come the state, ten numbers, the user time and the
    // system time, and both times of the children that have ended.
    let rest = stat.rsplit(')').next().expect("there is a name");
    let ticks: u32 = rest.split_whitespace().skip(place).take(2).filter_map(|ticks| ticks.parse::<u32>().ok()).sum();
    f64::from(ticks) / TICKS_PER_SECOND
}

/// The processor time in seconds of a process and its children, each with one thread. That of the children that have
/// ended is included, in steps of 10 ms.
pub(crate) fn family_cpu_seconds(parent: u32) -> f64 {
    let alive = children_of(parent).into_iter().chain([parent]);
    let alive: f64 = alive.map(|pid| run_seconds(Path::new(&format!("/proc/{pid}")))).sum();
    alive + stat_seconds(&parent.to_string(), 13)
}

/// The processor time in seconds of those threads of a process that have this name.
pub(crate) fn thread_cpu_seconds(pid: u32, name: &str) -> f64 {
    let named = thread_dirs(pid).filter(|dir| read(dir, "comm").trim() == name);
    named.map(|dir| run_seconds(&dir)).sum()
}

/// What the threads of a process have used since each began: processor time in seconds and context switches, by their
/// directories in `/proc`.
pub(crate) struct Threads(HashMap<PathBuf, (f64, f64)>);

/// What the threads of a process used between two moments, except those that ended in between.
pub(crate) struct Used {
    /// Processor time in seconds, to the nanosecond.
    pub(crate) cpu_seconds: f64,
    /// How many times a thread had nothing more to do and gave up its processor.
    pub(crate) switches: f64,
    /// The number of threads that ran at all.
    pub(crate) threads: usize,
}

impl Threads {
    /// What the threads of a process have used until now.
    pub(crate) fn of(pid: u32) -> Self {
        let used = |dir: PathBuf| {
            let used = (run_seconds(&dir), parse_number(&read(&dir, "status"), "voluntary_ctxt_switches:"));
            (dir, used)
        };
        Self(thread_dirs(pid).map(used).collect())
    }

    /// What they have used since `before`.
    pub(crate) fn since(&self, before: &Self) -> Used {
        let mut used = Used { cpu_seconds: 0.0, switches: 0.0, threads: 0 };
        for (dir, (seconds, switches)) in &self.0 {
            let (seconds_before, switches_before) = before.0.get(dir).copied().unwrap_or_default();
            used.cpu_seconds += seconds - seconds_before;
            used.switches += switches - switches_before;
            used.threads += usize::from(*seconds > seconds_before);
        }
        used
    }
}

fn thread_dirs(pid: u32) -> impl Iterator<Item = PathBuf> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    threads.filter_map(|thread| Some(thread.ok()?.path()))
}

/// For how many seconds a thread, or a process with one thread, has run, to the nanosecond.
fn run_seconds(dir: &Path) -> f64 {
    let nanoseconds = read(dir, "schedstat").split_whitespace().next().and_then(|number| number.parse::<f64>().ok());
    nanoseconds.unwrap_or(0.0) / 1e9
}

/// A file in `/proc`; empty if the thread or process has ended.
fn read(dir: &Path, file: &str) -> String {
    fs::read_to_string(dir.join(file)).unwrap_or_default()
}

/// The current resident memory, in MiB.
pub(crate) fn resident_mib(pid: u32) -> f64 {
    status_mib(pid, "VmRSS:")
}

/// The peak of resident memory, in MiB.
pub(crate) fn peak_mib(pid: u32) -> f64 {
    status_mib(pid, "VmHWM:")
}

fn status_mib(pid: u32, name: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    parse_number(&status, name) / 1024.0
}

/// The number of open files and sockets.
pub(crate) fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").count()
}

/// The load average of the last minute; prints a warning if it is too high to measure. `None` = unknown on this system.
pub(crate) fn load_average() -> Option<f64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    let load = text.split_whitespace().next()?.parse().ok()?;
    if load > BUSY {
        eprintln!(
            "warning: the load average is {load}: other processes are running and will affect these figures; \
             after a build, wait a minute and measure again"
        );
    }
    Some(load)
}

/// The machine, the versions and the relevant settings, by name.
pub(crate) async fn circumstances(load: Option<f64>) -> Circumstances {
    let world = World::empty().await;
    let setting = async |name: &str| world.value::<String>(&format!("SELECT current_setting('{name}')")).await;
    let postgres = format!(
        "{} (fsync {}, synchronous_commit {}, shared_buffers {})",
        setting("server_version").await,
        setting("fsync").await,
        setting("synchronous_commit").await,
        setting("shared_buffers").await
    );
    let broker = fetch(&world, "/api/overview");
    let of_broker = |name: &str| broker[name].as_str().unwrap_or("unknown").to_owned();
    let rabbitmq = format!("{} (Erlang {})", of_broker("rabbitmq_version"), of_broker("erlang_version"));
    let (_, tidings) = world.tidings(["--version"]).await;
    world.remove().await;

    let proc = Path::new("/proc");
    let processor = read(proc, "cpuinfo");
    let processor = processor.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = parse_number(&read(proc, "meminfo"), "MemTotal:") / 1024.0 / 1024.0;
    let machine = format!(
        "{cores} cores of {}, {memory:.0} GiB, Linux {}",
        processor.trim_start_matches([' ', '\t', ':']),
        read(proc, "sys/kernel/osrelease").trim()
    );
    let commit = Command::new("git").args(["rev-parse", "--short", "HEAD"]).current_dir(harness::repository()).output();
    let commit = commit.map_or_else(|_| String::new(), |output| String::from_utf8_lossy(&output.stdout).into_owned());
    let profile = if cfg!(debug_assertions) { "not optimised: these figures are meaningless" } else { "release" };
    Circumstances(vec![
        ("machine", machine),
        ("load average", load.map_or("unknown".to_owned(), |load| format!("{load} at the start"))),
        ("tidings", format!("{} {} ({profile})", tidings.trim().trim_start_matches("tidings "), commit.trim())),
        ("PostgreSQL", postgres),
        ("RabbitMQ", rabbitmq),
    ])
}

/// The processes of the two servers.
#[derive(Clone, Copy)]
pub(crate) struct ServerPids {
    /// The process that starts those of the sessions.
    pub(crate) postmaster: u32,
    pub(crate) rabbitmq: u32,
}

impl ServerPids {
    /// Asks the servers.
    pub(crate) async fn of(world: &World) -> Self {
        let postmaster = "SELECT split_part(pg_read_file('postmaster.pid'), chr(10), 1)::int4";
        let postmaster = u32::try_from(world.value::<i32>(postmaster).await).expect("a pid");
        // A broker that has just started does not know its own figures yet.
        let rabbitmq = harness::eventually("RabbitMQ's process", async || {
            fetch(world, "/api/nodes")[0]["os_pid"].as_str().and_then(|pid| pid.parse().ok())
        });
        let rabbitmq = rabbitmq.await;
        Self { postmaster, rabbitmq }
    }

    /// The processor time in seconds of PostgreSQL and of RabbitMQ.
    pub(crate) fn cpu_seconds(self) -> [f64; 2] {
        [family_cpu_seconds(self.postmaster), cpu_seconds(Some(self.rabbitmq))]
    }
}

/// An answer of RabbitMQ's management API.
fn fetch(world: &World, path: &str) -> Value {
    let url = world.management_url().replace("guest:guest@", "") + path;
    let answer = ureq::get(&url).header("Authorization", "Basic Z3Vlc3Q6Z3Vlc3Q=").call();
    let text = answer.ok().and_then(|mut answer| answer.body_mut().read_to_string().ok());
    text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}

/// The number after `name` in a text with lines such as `VmRSS:  1234 kB`.
fn parse_number(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("0");
    line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number")
}
