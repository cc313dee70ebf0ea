//! What a plugin may use, and the limiter that holds its memory to it.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use wasmtime::ResourceLimiter;

/// A plugin's CPU time is measured in steps of this length.
pub(super) const TICK: Duration = Duration::from_millis(10);

/// The `[limits]` of a plugin's NAME.toml. What is not given has the default.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields, rename_all(deserialize = "kebab-case"))]
pub struct Limits {
    /// CPU time of one call, in milliseconds, 10 to 60,000; default 100. Measured in steps of 10.
    pub cpu_ms: u64,
    /// Wall-clock time of one call, in milliseconds, 10 to 60,000; default 1,000.
    pub wall_ms: u64,
    /// All linear memories together, in MiB, 1 to 4,096; default 64.
    pub memory_mib: u64,
    /// What one call may hand to the host, in KiB, 1 to 131,072; default 1,024.
    pub output_kib: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { cpu_ms: 100, wall_ms: 1_000, memory_mib: 64, output_kib: 1_024 }
    }
}

impl Limits {
    /// What is wrong with the numbers, if anything is.
    pub(super) fn mistake(&self) -> Option<String> {
        [
            ("cpu-ms", self.cpu_ms, 10, 60_000),
            ("wall-ms", self.wall_ms, 10, 60_000),
            ("memory-mib", self.memory_mib, 1, 4_096),
            ("output-kib", self.output_kib, 1, 131_072),
        ]
        .into_iter()
        .find(|(_, value, least, most)| !(least..=most).contains(&value))
        .map(|(name, value, least, most)| format!("[limits] {name} is {value}, not a number from {least} to {most}"))
    }

    pub(super) fn wall(&self) -> Duration {
        Duration::from_millis(self.wall_ms)
    }

    pub(super) fn memory_bytes(&self) -> usize {
        usize::try_from(self.memory_mib << 20).expect("at most 4 GiB on a 64-bit host")
    }

    pub(super) fn output_bytes(&self) -> usize {
        usize::try_from(self.output_kib << 10).expect("at most 128 MiB")
    }
}

/// Table elements of one store together: twice what a large guest of a big toolchain has.
const TABLE_ELEMENTS: usize = 100_000;

/// Counts memory and tables over a whole store: wasmtime's own limits are per memory.
#[derive(Debug)]
pub(super) struct Limiter {
    memory_limit: usize,
    memory: usize,
    /// The most that was used at once, in bytes.
    pub(super) peak: usize,
    last_growth: usize,
    table_elements: usize,
    /// The limit that was blown, in words.
    pub(super) blown: Option<String>,
}

impl Limiter {
    pub(super) fn new(limits: &Limits) -> Self {
        Self { memory_limit: limits.memory_bytes(), memory: 0, peak: 0, last_growth: 0, table_elements: 0, blown: None }
    }
}

impl ResourceLimiter for Limiter {
    fn memory_growing(&mut self, current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        let growth = desired.saturating_sub(current);
        let wanted = self.memory.saturating_add(growth);
        if wanted > self.memory_limit {
            let blown = format!(
                "it wants {} MiB of memory and may have {} (memory-mib)",
                wanted.div_ceil(1 << 20),
                self.memory_limit >> 20
            );
            self.blown = Some(blown.clone());
            // An error traps at once, and is told exactly; a guest that gets -1 dies later of something else.
            return Err(wasmtime::Error::msg(blown));
        }
        self.memory = wanted;
        self.peak = self.peak.max(wanted);
        self.last_growth = growth;
        Ok(true)
    }

    fn memory_grow_failed(&mut self, _error: wasmtime::Error) -> wasmtime::Result<()> {
        self.memory -= std::mem::take(&mut self.last_growth);
        Ok(())
    }

    fn table_growing(&mut self, current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        let wanted = self.table_elements.saturating_add(desired.saturating_sub(current));
        if wanted > TABLE_ELEMENTS {
            let blown = format!("it wants {wanted} table elements and may have {TABLE_ELEMENTS}");
            self.blown = Some(blown.clone());
            return Err(wasmtime::Error::msg(blown));
        }
        self.table_elements = wanted;
        Ok(true)
    }

    fn instances(&self) -> usize {
        64
    }

    fn tables(&self) -> usize {
        64
    }

    fn memories(&self) -> usize {
        16
    }
}
