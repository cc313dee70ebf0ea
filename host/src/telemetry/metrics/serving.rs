//! The gauges of the plugins that serve.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use metrics::gauge;

use crate::telemetry::metrics::counts::to_f64;
use crate::telemetry::metrics::names::{BREAKER, GENERATION, PLUGIN_CPU, PLUGIN_MEMORY};

/// The plugins that have gauges. The gauges of those that no longer serve are set to zero.
static SHOWN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// One plugin that serves.
#[derive(Debug)]
pub struct Serving {
    /// Its name, without version and digest.
    pub plugin: String,
    /// Its generation, counted over all plugins.
    pub generation: u64,
    /// The most memory that it has used.
    pub memory_bytes: usize,
    /// The most CPU time that one call has used.
    pub cpu: Duration,
    /// Its kinds, and whether their breakers are open.
    pub breakers: Vec<(String, bool)>,
}

/// Sets the gauges of the plugins that serve now, and clears those of plugins that served before.
pub fn set_serving(serving: &[Serving]) {
    let mut shown = SHOWN.lock().expect("the lock is not poisoned");
    for gone in shown.iter().filter(|shown| serving.iter().all(|serving| serving.plugin != **shown)) {
        for name in [GENERATION, PLUGIN_MEMORY, PLUGIN_CPU] {
            gauge!(name, "plugin" => gone.clone()).set(0.0);
        }
    }
    for Serving { plugin, generation, memory_bytes, cpu, breakers } in serving {
        gauge!(GENERATION, "plugin" => plugin.clone()).set(to_f64(*generation));
        gauge!(PLUGIN_MEMORY, "plugin" => plugin.clone()).set(to_f64(*memory_bytes as u64));
        gauge!(PLUGIN_CPU, "plugin" => plugin.clone()).set(cpu.as_secs_f64());
        for (kind, open) in breakers {
            gauge!(BREAKER, "kind" => kind.clone()).set(u8::from(*open));
        }
    }
    *shown =
        std::mem::take(&mut *shown).into_iter().chain(serving.iter().map(|serving| serving.plugin.clone())).collect();
}
