//! The gauges of the plugins that serve.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use metrics::gauge;

use crate::telemetry::metrics::counts::number;
use crate::telemetry::metrics::names::{BREAKER, GENERATION, PLUGIN_CPU, PLUGIN_MEMORY};

/// The plugins that have been shown: the gauges of those that are gone are set to zero.
static SHOWN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// One plugin that serves, as it is shown.
#[derive(Debug)]
pub struct Serving {
    /// Its name, without version and digest.
    pub plugin: String,
    /// Counted over all plugins.
    pub generation: u64,
    /// The most memory that it has used.
    pub memory_bytes: usize,
    /// The most CPU time that one call has used.
    pub cpu: Duration,
    /// Its kinds, and whether their breakers are open.
    pub breakers: Vec<(String, bool)>,
}

/// Notes what serves; whatever was noted before and is not among it does not serve any more.
pub fn set_serving(serving: &[Serving]) {
    let mut shown = SHOWN.lock().expect("nobody panics with it");
    for gone in shown.iter().filter(|shown| serving.iter().all(|serving| serving.plugin != **shown)) {
        for name in [GENERATION, PLUGIN_MEMORY, PLUGIN_CPU] {
            gauge!(name, "plugin" => gone.clone()).set(0.0);
        }
    }
    for Serving { plugin, generation, memory_bytes, cpu, breakers } in serving {
        gauge!(GENERATION, "plugin" => plugin.clone()).set(number(*generation));
        gauge!(PLUGIN_MEMORY, "plugin" => plugin.clone()).set(number(*memory_bytes as u64));
        gauge!(PLUGIN_CPU, "plugin" => plugin.clone()).set(cpu.as_secs_f64());
        for (kind, open) in breakers {
            gauge!(BREAKER, "kind" => kind.clone()).set(u8::from(*open));
        }
    }
    *shown =
        std::mem::take(&mut *shown).into_iter().chain(serving.iter().map(|serving| serving.plugin.clone())).collect();
}
