//! Plugins ("guests") that no toolchain would produce, generated while the tests run: some must be refused when they
//! are loaded, some must fail with a reason when they build, and some look odd but must be served. Each has a number in
//! the project's catalogue of hostile plugins; guests with the same number are variations of one attack.

mod binary;
mod misbehaving;
mod module;
mod refused;

use std::time::Duration;

pub use misbehaving::{harmless, misbehaving};
pub use refused::refused;

use module::{BODY, FOREVER, Module};

/// A plugin that the daemon must survive.
#[derive(Clone)]
pub struct Hostile {
    /// Its number in the catalogue.
    pub number: u8,
    /// The stem of its file name, which is unique. It is also the plugin's name, and the kind that it serves, if any.
    pub name: String,
    /// The content of the file.
    pub bytes: Vec<u8>,
    /// A part of the error that the daemon must report. For a harmless guest, a part of the message's body.
    pub expected: &'static str,
}

impl std::fmt::Debug for Hostile {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { number, name, bytes, expected } = self;
        write!(formatter, "{number} {name}, {} bytes: {expected:?}", bytes.len())
    }
}

/// A good guest that serves `kinds`: every row becomes an event with the routing key `hostile.NAME` and the body `tag`.
///
/// # Panics
///
/// When the contract in `wit/plugin.wit` has changed so much that it cannot be generated.
#[must_use]
pub fn well_behaved(name: &str, kinds: &[&str], tag: &str) -> Vec<u8> {
    tagged(name, kinds, tag).component()
}

/// A good guest that waits for `time` at every row, which uses no CPU time.
///
/// # Panics
///
/// When the contract in `wit/plugin.wit` has changed so much that it cannot be generated.
#[must_use]
pub fn slow(name: &str, kinds: &[&str], tag: &str, time: Duration) -> Vec<u8> {
    tagged(name, kinds, tag).sleep(time).component()
}

/// A good guest that waits for `time` while it is loaded.
///
/// # Panics
///
/// When the contract in `wit/plugin.wit` has changed so much that it cannot be generated.
#[must_use]
pub fn slow_to_load(name: &str, kinds: &[&str], tag: &str, time: Duration) -> Vec<u8> {
    tagged(name, kinds, tag).sleep_when_described(time).component()
}

/// A good guest that traps at rows whose payload is `true`.
///
/// # Panics
///
/// When the contract in `wit/plugin.wit` has changed so much that it cannot be generated.
#[must_use]
pub fn trapping_at_true(name: &str, kinds: &[&str], tag: &str) -> Vec<u8> {
    // The parameter points to the row. 76 bytes further is the address of its payload.
    let payload = "(i32.load8_u (i32.load offset=76 (local.get 0)))";
    let code = format!("(if (i32.eq {payload} (i32.const {})) (then unreachable))", b't');
    tagged(name, kinds, tag).build(&code).component()
}

/// A guest that serves `kinds` and traps at every row.
///
/// # Panics
///
/// When the contract in `wit/plugin.wit` has changed so much that it cannot be generated.
#[must_use]
pub fn trapping(name: &str, kinds: &[&str]) -> Vec<u8> {
    Module::new(name, kinds).build("unreachable").component()
}

/// A guest that serves `kinds` and loops forever at every row.
///
/// # Panics
///
/// When the contract in `wit/plugin.wit` has changed so much that it cannot be generated.
#[must_use]
pub fn spinning(name: &str, kinds: &[&str]) -> Vec<u8> {
    Module::new(name, kinds).build(FOREVER).component()
}

fn tagged(name: &str, kinds: &[&str], tag: &str) -> Module {
    Module::new(name, kinds).bytes(BODY, tag.as_bytes())
}

/// Adds `text` to a component in a custom section, so that its digest changes and its behaviour does not.
#[must_use]
pub fn with_custom_section(bytes: &[u8], text: &str) -> Vec<u8> {
    [bytes, &binary::custom("tests", text.as_bytes())].concat()
}

/// Proper prefixes of `bytes`: the 1,000 shortest, about 1,000 in between, and the 100 longest. A prefix that ends at
/// the end of a section is well-formed, and is even a good component if only custom sections are missing.
pub fn truncations(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let step = (bytes.len() / 1_000).max(1);
    let early = 1_000.min(bytes.len());
    let late = bytes.len().saturating_sub(100).max(early);
    (0..early).chain((early..late).step_by(step)).chain(late..bytes.len()).map(|length| &bytes[..length])
}

/// An endless sequence of copies of `bytes`, each with up to eight bits flipped. The same `seed` gives the same copies.
///
/// # Panics
///
/// When `bytes` is empty.
pub fn bit_flips(bytes: &[u8], seed: u64) -> impl Iterator<Item = Vec<u8>> {
    let mut state = seed;
    // SplitMix64, because it is short and gives the same numbers on every machine.
    let mut random = move |below: usize| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let below = u64::try_from(below).expect("a length has at most 64 bits");
        usize::try_from((mixed ^ (mixed >> 31)) % below).expect("below a length")
    };
    std::iter::repeat_with(move || {
        let mut flipped = bytes.to_vec();
        for _ in 0..=random(8) {
            flipped[random(bytes.len())] ^= 1 << random(8);
        }
        flipped
    })
}
