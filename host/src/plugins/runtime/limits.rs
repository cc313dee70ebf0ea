//! What a plugin may use, and the limiter that holds its memory to it.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use wasmtime::ResourceLimiter;

/// A plugin's CPU time is measured in steps of this length.
pub(in crate::plugins) const TICK: Duration = Duration::from_millis(10);

/// What a call may use beyond `cpu-ms` and `wall-ms` for each MiB of its row's payload, in milliseconds.
const MS_FOR_A_MIB: u64 = 50;
/// What it may use beyond `memory-mib`, for each MiB: the payload itself, and what is made of it.
const MIB_FOR_A_MIB: u64 = 2;

/// The `[limits]` of a plugin's NAME.toml. What is not given has the default. A row whose payload has a MiB or more brings
/// its own share along, so that a plugin that passes it on needs no limits of its own.
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
    pub(in crate::plugins) fn mistake(&self) -> Option<String> {
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

    /// What a call with a payload of so many bytes may use. Below a KiB that is what the limits say.
    pub(in crate::plugins) fn with_payload(&self, bytes: usize) -> Self {
        let (mib, kib) = ((bytes >> 20) as u64, (bytes >> 10) as u64);
        Self {
            cpu_ms: self.cpu_ms + mib * MS_FOR_A_MIB,
            wall_ms: self.wall_ms + mib * MS_FOR_A_MIB,
            memory_mib: self.memory_mib + mib * MIB_FOR_A_MIB,
            output_kib: self.output_kib + kib,
        }
    }

    pub(in crate::plugins) fn ticks(&self) -> u64 {
        self.cpu_ms.div_ceil(u64::try_from(TICK.as_millis()).expect("10"))
    }

    pub(in crate::plugins) fn wall(&self) -> Duration {
        Duration::from_millis(self.wall_ms)
    }

    pub(in crate::plugins) fn memory_bytes(&self) -> usize {
        usize::try_from(self.memory_mib << 20).expect("a few GiB at most on a 64-bit host")
    }

    pub(in crate::plugins) fn output_bytes(&self) -> usize {
        usize::try_from(self.output_kib << 10).expect("a few hundred MiB at most")
    }
}

/// Table elements of one store together: twice what a large guest of a big toolchain has.
const TABLE_ELEMENTS: usize = 100_000;

/// Counts memory and tables over a whole store: wasmtime's own limits are per memory.
#[derive(Debug)]
pub(in crate::plugins) struct Limiter {
    memory_limit: usize,
    memory: usize,
    /// The most that was used at once, in bytes.
    pub(in crate::plugins) peak: usize,
    last_growth: usize,
    table_elements: usize,
    /// The limit that was blown, in words.
    pub(in crate::plugins) blown: Option<String>,
}

impl Limiter {
    pub(in crate::plugins) fn new(limits: &Limits) -> Self {
        Self { memory_limit: limits.memory_bytes(), memory: 0, peak: 0, last_growth: 0, table_elements: 0, blown: None }
    }

    /// For the next call. What is there already stays.
    pub(in crate::plugins) fn set(&mut self, limits: &Limits) {
        self.memory_limit = limits.memory_bytes();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_payload_brings_its_own_room_and_a_small_one_changes_nothing() {
        let limits = Limits::default();
        assert_eq!(limits.with_payload(1_000), limits);
        let large = limits.with_payload(16 << 20);
        assert_eq!((large.memory_mib, large.output_kib), (64 + 32, 1_024 + 16 * 1_024));
        assert_eq!((large.cpu_ms, large.wall_ms), (100 + 800, 1_000 + 800));
    }
}
