//! The status of each plugin file, as the daemon's HTTP API reports it to people.

use serde::Serialize;

use crate::plugins::registry::{Registry, Slot};
use crate::plugins::{BreakerState, Kind, Limits, Plugin};

/// The status of one file in the plugin directory.
#[derive(Debug, Serialize)]
pub struct PluginStatus {
    /// The name of the file.
    pub file: String,
    /// The generation that serves; `None` = none.
    pub active: Option<GenerationStatus>,
    /// Why the file's present version does not serve; `None` = it does.
    pub problem: Option<String>,
}

/// The status of one generation.
#[derive(Debug, Serialize)]
pub struct GenerationStatus {
    /// The generation's number, counted from 1 over all plugins of the daemon.
    pub generation: u64,
    /// `name@version+digest8`.
    pub plugin: String,
    /// SHA-256 of the file.
    pub digest: String,
    /// The kinds that the generation serves.
    pub kinds: Vec<KindStatus>,
    /// The limits of its calls.
    pub limits: Limits,
    /// The most memory that a call has used, in bytes.
    pub peak_memory_bytes: usize,
    /// The most CPU time that a call has used, in ms, in steps of 10.
    pub peak_cpu_ms: u64,
    /// The largest body that a call has built, in bytes.
    pub peak_output_bytes: usize,
}

/// The status of one kind of a generation.
#[derive(Debug, Serialize)]
pub struct KindStatus {
    /// The kind's name.
    pub kind: String,
    /// What the plugin says about the kind, in one line.
    pub summary: String,
    /// Whether rows of the kind are built.
    pub breaker: BreakerState,
    /// How many calls the plugin answered.
    pub answered: u64,
    /// How many calls ended in a trap, exceeded a limit or broke the contract.
    pub failed: u64,
    /// The error of the last call that failed.
    pub last_error: Option<String>,
    /// How long ago that call failed, in seconds.
    pub last_error_seconds_ago: Option<u64>,
}

impl Registry {
    /// The status of each file, in the order of their names.
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
