//! Guests that no toolchain would make, made in the test run: those that must be refused when they are loaded, those
//! whose builds must fail with a reason, and those that look odd and must be served all the same. Their numbers are
//! those of the project's catalogue of hostile plugins: those with the same number are variations of one idea.

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
    /// The stem of its file, unique; also its name, and the kind that it serves if it serves one.
    pub name: String,
    /// The file.
    pub bytes: Vec<u8>,
    /// A part of the sentence that the daemon must find for it; of a harmless one, a part of the message's body.
    pub says: &'static str,
}

impl std::fmt::Debug for Hostile {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { number, name, bytes, says } = self;
        write!(formatter, "{number} {name}, {} bytes: {says:?}", bytes.len())
    }
}

/// A guest that serves `kinds`: every row becomes an event with the routing key `hostile.NAME` and the body `tag`.
///
/// # Panics
///
/// When the repository's contract has changed so much that it cannot be made.
#[must_use]
pub fn well_behaved(name: &str, kinds: &[&str], tag: &str) -> Vec<u8> {
    tagged(name, kinds, tag).component()
}

/// The same, but every row takes `time` of waiting, which is no CPU time.
///
/// # Panics
///
/// When the repository's contract has changed so much that it cannot be made.
#[must_use]
pub fn slow(name: &str, kinds: &[&str], tag: &str, time: Duration) -> Vec<u8> {
    tagged(name, kinds, tag).sleep(time).component()
}

/// The same, but it takes `time` of waiting to load it.
///
/// # Panics
///
/// When the repository's contract has changed so much that it cannot be made.
#[must_use]
pub fn slow_to_load(name: &str, kinds: &[&str], tag: &str, time: Duration) -> Vec<u8> {
    tagged(name, kinds, tag).sleep_when_described(time).component()
}

/// The same, but it traps at the rows whose payload is `true`.
///
/// # Panics
///
/// When the repository's contract has changed so much that it cannot be made.
#[must_use]
pub fn trapping_at_true(name: &str, kinds: &[&str], tag: &str) -> Vec<u8> {
    // The row lies where the parameter points to; 76 bytes further is the address of its payload.
    let payload = "(i32.load8_u (i32.load offset=76 (local.get 0)))";
    let code = format!("(if (i32.eq {payload} (i32.const {})) (then unreachable))", b't');
    tagged(name, kinds, tag).build(&code).component()
}

/// A guest that serves `kinds` and traps whenever it should build.
///
/// # Panics
///
/// When the repository's contract has changed so much that it cannot be made.
#[must_use]
pub fn trapping(name: &str, kinds: &[&str]) -> Vec<u8> {
    Module::new(name, kinds).build("unreachable").component()
}

/// A guest that serves `kinds` and never comes to an end when it should build.
///
/// # Panics
///
/// When the repository's contract has changed so much that it cannot be made.
#[must_use]
pub fn spinning(name: &str, kinds: &[&str]) -> Vec<u8> {
    Module::new(name, kinds).build(FOREVER).component()
}

fn tagged(name: &str, kinds: &[&str], tag: &str) -> Module {
    Module::new(name, kinds).bytes(BODY, tag.as_bytes())
}

/// The same component with `text` in a custom section: other bytes, and hence another digest.
#[must_use]
pub fn with_custom_section(bytes: &[u8], text: &str) -> Vec<u8> {
    [bytes, &binary::custom("tests", text.as_bytes())].concat()
}

/// Beginnings of `bytes`, never all of it: the 1,000 shortest, about 1,000 in between, and the 100 longest. One that ends
/// where a section ends is whole, and may even be a good component that has lost no more than notes.
pub fn truncations(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let step = (bytes.len() / 1_000).max(1);
    let early = 1_000.min(bytes.len());
    let late = bytes.len().saturating_sub(100).max(early);
    (0..early).chain((early..late).step_by(step)).chain(late..bytes.len()).map(|length| &bytes[..length])
}

/// Copies of `bytes`, each with up to eight bits flipped. Endless, and the same for the same `seed`.
///
/// # Panics
///
/// When there are no bytes.
pub fn bit_flips(bytes: &[u8], seed: u64) -> impl Iterator<Item = Vec<u8>> {
    let mut state = seed;
    // SplitMix64: no more than a test needs, and the same on every machine and for all time.
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
