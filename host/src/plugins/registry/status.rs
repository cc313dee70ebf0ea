//! What serves and what does not, for people: the answer of the daemon's HTTP interface.

use serde::Serialize;

use crate::plugins::registry::{Registry, Slot};
use crate::plugins::{BreakerState, Kind, Limits, Plugin};

/// What serves, and what does not, for people.
#[derive(Debug, Serialize)]
pub struct PluginStatus {
    /// The name of the file.
    pub file: String,
    /// What serves; `None` = nothing.
    pub active: Option<GenerationStatus>,
    /// Why the file that lies there does not serve.
    pub problem: Option<String>,
}

/// One generation, for people.
#[derive(Debug, Serialize)]
pub struct GenerationStatus {
    /// Counted from 1 over all plugins.
    pub generation: u64,
    /// `name@version+digest8`.
    pub plugin: String,
    /// SHA-256 of the file.
    pub digest: String,
    /// The kinds it serves.
    pub kinds: Vec<KindStatus>,
    /// What it may use.
    pub limits: Limits,
    /// The most memory that a call has used, in bytes.
    pub peak_memory_bytes: usize,
    /// The most CPU time that a call has used, in ms, in steps of 10.
    pub peak_cpu_ms: u64,
    /// The largest body that it has built, in bytes.
    pub peak_output_bytes: usize,
}

/// One kind of a generation, for people.
#[derive(Debug, Serialize)]
pub struct KindStatus {
    /// Its name.
    pub kind: String,
    /// One line about it.
    pub summary: String,
    /// Whether rows are built.
    pub breaker: BreakerState,
    /// Calls that were answered.
    pub answered: u64,
    /// Calls that ended in a trap, a blown limit or a broken contract.
    pub failed: u64,
    /// What the last call that failed said.
    pub last_error: Option<String>,
    /// How long ago that was, in seconds.
    pub last_error_seconds_ago: Option<u64>,
}

impl Registry {
    /// Every file and what serves of it, in the order of their names.
    #[must_use]
    pub fn status(&self) -> Vec<PluginStatus> {
        let slots = self.slots();
        let status = |(file, slot): (&String, &Slot)| PluginStatus {
            file: file.clone(),
            active: slot.active.as_deref().map(generation_status),
            problem: slot.problem.as_ref().map(|(problem, _)| problem.clone()),
        };
        slots.by_file.iter().map(status).collect()
    }
}

fn generation_status(plugin: &Plugin) -> GenerationStatus {
    let (peak_memory_bytes, peak_cpu_ms, peak_output_bytes) = plugin.peak();
    let kind = |(name, kind): (&String, &Kind)| {
        let (breaker, answered, failed) = kind.breaker();
        let (ago, last_error) = kind.last_error().unzip();
        KindStatus {
            kind: name.clone(),
            summary: kind.summary.clone(),
            breaker,
            answered,
            failed,
            last_error,
            last_error_seconds_ago: ago.map(|ago| ago.as_secs()),
        }
    };
    GenerationStatus {
        generation: plugin.generation(),
        plugin: plugin.label().to_owned(),
        digest: plugin.digest().to_owned(),
        kinds: plugin.kinds().iter().map(kind).collect(),
        limits: plugin.limits(),
        peak_memory_bytes,
        peak_cpu_ms,
        peak_output_bytes,
    }
}
