//! The limits of a plugin's calls, and the limiter that enforces those of memory and tables.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use wasmtime::ResourceLimiter;

/// CPU time is measured in steps of this length.
pub(in crate::plugins) const TICK: Duration = Duration::from_millis(10);

/// How many milliseconds a call may use beyond `cpu-ms` and `wall-ms`, for each MiB of its row's payload.
const EXTRA_MS_PER_MIB: u64 = 50;
/// How many MiB of memory a call may use beyond `memory-mib`, for each MiB of its row's payload: one for the payload,
/// one for the body.
const EXTRA_MEMORY_MIB_PER_MIB: u64 = 2;

/// The `[limits]` of a plugin's NAME.toml. A limit that is missing has its default. The limits rise with a large
/// payload, so that a plugin which passes payloads on needs no limits of its own.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields, rename_all(deserialize = "kebab-case"))]
pub struct Limits {
    /// The CPU time of one call, in milliseconds, 10 to 60,000; default 100. Measured in steps of 10.
    pub cpu_ms: u64,
    /// The wall-clock time of one call, in milliseconds, 10 to 60,000; default 1,000.
    pub wall_ms: u64,
    /// The linear memories of an instance together, in MiB, 1 to 4,096; default 64.
    pub memory_mib: u64,
    /// The data that one call may hand to the host, in KiB, 1 to 131,072; default 1,024.
    pub output_kib: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { cpu_ms: 100, wall_ms: 1_000, memory_mib: 64, output_kib: 1_024 }
    }
}

impl Limits {
    /// A sentence about the first limit that is outside its range; `None` = each is inside.
    pub(in crate::plugins) fn find_mistake(&self) -> Option<String> {
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

    /// The limits of a call whose row has a payload of `bytes`. For less than a KiB they are these limits.
    pub(in crate::plugins) fn with_payload(&self, bytes: usize) -> Self {
        let (mib, kib) = ((bytes >> 20) as u64, (bytes >> 10) as u64);
        Self {
            cpu_ms: self.cpu_ms + mib * EXTRA_MS_PER_MIB,
            wall_ms: self.wall_ms + mib * EXTRA_MS_PER_MIB,
            memory_mib: self.memory_mib + mib * EXTRA_MEMORY_MIB_PER_MIB,
            output_kib: self.output_kib + kib,
        }
    }

    pub(in crate::plugins) fn max_cpu_ticks(&self) -> u64 {
        self.cpu_ms.div_ceil(u64::try_from(TICK.as_millis()).expect("TICK is 10 ms"))
    }

    pub(in crate::plugins) fn wall_time(&self) -> Duration {
        Duration::from_millis(self.wall_ms)
    }

    pub(in crate::plugins) fn memory_bytes(&self) -> usize {
        usize::try_from(self.memory_mib << 20).expect("a few GiB at most on a 64-bit host")
    }

    pub(in crate::plugins) fn output_bytes(&self) -> usize {
        usize::try_from(self.output_kib << 10).expect("a few hundred MiB at most")
    }
}

/// The table elements of one store together: twice as many as a large guest of a big toolchain has.
const MAX_TABLE_ELEMENTS: usize = 100_000;

/// Limits the memories and tables of a whole store. Wasmtime's own limits apply to each memory by itself.
#[derive(Debug)]
pub(in crate::plugins) struct Limiter {
    memory_limit_bytes: usize,
    memory_bytes: usize,
    /// The most memory that was used at one time.
    pub(in crate::plugins) peak_bytes: usize,
    last_growth_bytes: usize,
    table_elements: usize,
    /// A sentence about the limit that was exceeded.
    pub(in crate::plugins) exceeded: Option<String>,
}

impl Limiter {
    pub(in crate::plugins) fn new(limits: &Limits) -> Self {
        Self {
            memory_limit_bytes: limits.memory_bytes(),
            memory_bytes: 0,
            peak_bytes: 0,
            last_growth_bytes: 0,
            table_elements: 0,
            exceeded: None,
        }
    }

    /// Sets the limits of the next call. Memory that is in use stays.
    pub(in crate::plugins) fn set_limits(&mut self, limits: &Limits) {
        self.memory_limit_bytes = limits.memory_bytes();
    }
}

impl ResourceLimiter for Limiter {
    fn memory_growing(&mut self, current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        let growth = desired.saturating_sub(current);
        let wanted = self.memory_bytes.saturating_add(growth);
        if wanted > self.memory_limit_bytes {
            let exceeded = format!(
                "it wants {} MiB of memory and may have {} (memory-mib)",
                wanted.div_ceil(1 << 20),
                self.memory_limit_bytes >> 20
            );
            self.exceeded = Some(exceeded.clone());
            // An error traps at once and names the limit. If `memory.grow` returned -1, the guest would fail later with
            // another error.
            return Err(wasmtime::Error::msg(exceeded));
        }
        self.memory_bytes = wanted;
        self.peak_bytes = self.peak_bytes.max(wanted);
        self.last_growth_bytes = growth;
        Ok(true)
    }

    fn memory_grow_failed(&mut self, _error: wasmtime::Error) -> wasmtime::Result<()> {
        self.memory_bytes -= std::mem::take(&mut self.last_growth_bytes);
        Ok(())
    }

    fn table_growing(&mut self, current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        let wanted = self.table_elements.saturating_add(desired.saturating_sub(current));
        if wanted > MAX_TABLE_ELEMENTS {
            let exceeded = format!("it wants {wanted} table elements and may have {MAX_TABLE_ELEMENTS}");
            self.exceeded = Some(exceeded.clone());
            return Err(wasmtime::Error::msg(exceeded));
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
    fn a_large_payload_raises_the_limits_and_a_small_one_does_not() {
        let limits = Limits::default();
        assert_eq!(limits.with_payload(1_000), limits);
        let large = limits.with_payload(16 << 20);
        assert_eq!((large.memory_mib, large.output_kib), (64 + 32, 1_024 + 16 * 1_024));
        assert_eq!((large.cpu_ms, large.wall_ms), (100 + 800, 1_000 + 800));
    }
}
