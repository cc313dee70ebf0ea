//! Generates a good guest from WebAssembly text, of which every part can be replaced, and the component around it.

use std::fmt::Write as _;
use std::sync::OnceLock;
use std::time::Duration;

use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

use crate::repository;

/// The address of the result of `build` in the guest's memory: a `result<built, build-error>` of 56 bytes. This address
/// and the following ones are laid out by the canonical ABI.
pub(super) const ANSWER: u32 = 1024;
/// The payload of the result: an event or an error.
pub(super) const PAYLOAD: u32 = ANSWER + 8;
/// The event's routing key: an address and a length, as for all strings and lists.
pub(super) const ROUTING_KEY: u32 = PAYLOAD;
/// The event's content type.
pub(super) const CONTENT_TYPE: u32 = PAYLOAD + 8;
/// The event's body.
pub(super) const BODY: u32 = PAYLOAD + 16;
/// The event's headers: 16 bytes each.
pub(super) const HEADERS: u32 = PAYLOAD + 24;
/// Whether there is a time to live. The value is 8 bytes further.
pub(super) const TTL: u32 = PAYLOAD + 32;
/// The address of the result of `describe`: a `plugin-info` of 24 bytes.
pub(super) const INFO: u32 = ANSWER + 56;
/// The plugin's version.
pub(super) const VERSION: u32 = INFO + 8;
/// The plugin's kinds: 40 bytes each.
pub(super) const KINDS: u32 = INFO + 16;
/// The first kind: its name, its summary, and two options of 12 bytes each.
pub(super) const FIRST_KIND: u32 = INFO + 24;
/// From this address on the memory, if it has enough pages, contains only zeros. Tests use them as large lists and
/// strings.
pub(super) const ZEROS: u32 = 1 << 20;

/// The interface that the daemon exports to plugins.
pub(super) const HOST: &str = "tidings:plugin/host@0.1.0";
/// The line of the world before which tests insert further lines.
pub(super) const EXPORT: &str = "export builder;";
/// The code of a function that never returns.
pub(super) const FOREVER: &str = "(loop $again (br $again))";

/// A guest. [`Module::new`] makes a guest that serves its kinds; the methods then break parts of it.
#[derive(Clone, Debug)]
pub(super) struct Module {
    wit: String,
    encoding: StringEncoding,
    /// The content of the memory from `ANSWER` on.
    memory: Vec<u8>,
    pages: u32,
    imports: String,
    fields: String,
    describe: String,
    build: String,
    realloc: String,
    post_return: String,
}

impl Module {
    /// A good guest: every row becomes an event with the routing key `hostile.NAME` and the body `good`.
    pub(super) fn new(name: &str, kinds: &[&str]) -> Self {
        Self::encoded(StringEncoding::UTF8, name, kinds)
    }

    /// A good guest whose strings have another encoding.
    pub(super) fn encoded(encoding: StringEncoding, name: &str, kinds: &[&str]) -> Self {
        let nothing = String::new;
        let mut guest = Self {
            wit: wit().to_owned(),
            encoding,
            memory: vec![0; (INFO - ANSWER) as usize + 24],
            pages: 1,
            imports: nothing(),
            fields: nothing(),
            describe: nothing(),
            build: nothing(),
            realloc: nothing(),
            post_return: nothing(),
        };
        let list = guest.place(&vec![0; 40 * kinds.len()]);
        debug_assert_eq!(list, FIRST_KIND, "nothing was placed before");
        guest = guest.text(INFO, name).text(VERSION, "1").list(KINDS, list, size(kinds.len()));
        for (at, kind) in (list..).step_by(40).zip(kinds) {
            guest = guest.text(at, kind).text(at + 8, "for the tests");
        }
        let routing_key = format!("hostile.{name}");
        guest.text(ROUTING_KEY, &routing_key).text(CONTENT_TYPE, "text/plain").bytes(BODY, b"good")
    }

    /// Changes the contract from that of `wit/plugin.wit`: replaces `text` by `replacement`.
    pub(super) fn replace(mut self, text: &str, replacement: &str) -> Self {
        assert!(self.wit.contains(text), "wit/plugin.wit has no {text:?} any more");
        self.wit = self.wit.replace(text, replacement);
        self
    }

    /// Changes the contract from that of `wit/plugin.wit`: adds `line` to its world, and the `declarations` that the
    /// line needs.
    pub(super) fn world(mut self, line: &str, declarations: &str) -> Self {
        self.wit += declarations;
        self.replace(EXPORT, &format!("{line}\n  {EXPORT}"))
    }

    /// Imports `function` of `interface`, which `declarations` declare. `core` declares the import in the core module.
    pub(super) fn import(self, interface: &str, declarations: &str, function: &str, core: &str) -> Self {
        self.world(&format!("import {interface};"), declarations).core_import(interface, function, core)
    }

    /// Imports `function` of an `interface` that the contract already declares.
    pub(super) fn core_import(mut self, interface: &str, function: &str, core: &str) -> Self {
        writeln!(self.imports, r#"(import "{interface}" "{function}" {core})"#).expect("a String takes everything");
        self
    }

    /// Imports the timers of WASI.
    pub(super) fn timers(self) -> Self {
        // The real packages declare more functions; a guest need declare only those that it imports.
        let wit = "
            package wasi:io@0.2.0 {
              interface poll {
                resource pollable { block: func(); }
              }
            }
            package wasi:clocks@0.2.0 {
              interface monotonic-clock {
                use wasi:io/poll@0.2.0.{pollable};
                subscribe-duration: func(nanoseconds: u64) -> pollable;
              }
            }";
        let subscribe = "(func $subscribe (param i64) (result i32))";
        self.import("wasi:clocks/monotonic-clock@0.2.0", wit, "subscribe-duration", subscribe)
    }

    /// Waits before `build` returns.
    pub(super) fn sleep(self, time: Duration) -> Self {
        self.timers().blocking().build(&wait(time))
    }

    /// Waits before `describe` returns.
    pub(super) fn sleep_when_described(self, time: Duration) -> Self {
        self.timers().blocking().describe(&wait(time))
    }

    /// Imports the function that waits for a timer.
    fn blocking(self) -> Self {
        self.core_import("wasi:io/poll@0.2.0", "[method]pollable.block", "(func $block (param i32))")
    }

    /// Adds fields to the core module: functions, memories, tables.
    pub(super) fn fields(mut self, text: &str) -> Self {
        self.fields += text;
        self
    }

    /// Adds code that runs before `describe` returns.
    pub(super) fn describe(mut self, code: &str) -> Self {
        self.describe += code;
        self
    }

    /// Adds code that runs before `build` returns.
    pub(super) fn build(mut self, code: &str) -> Self {
        self.build += code;
        self
    }

    /// Adds code that runs before `cabi_realloc` gives the host memory for an argument.
    pub(super) fn realloc(mut self, code: &str) -> Self {
        self.realloc += code;
        self
    }

    /// Adds code that runs after the host has read the result of `build`.
    pub(super) fn post_return(mut self, code: &str) -> Self {
        self.post_return += code;
        self
    }

    /// Gives the guest at least this many pages of memory, of 64 KiB each.
    pub(super) fn pages(mut self, pages: u32) -> Self {
        self.pages = pages;
        self
    }

    /// Overwrites the memory at `at`.
    pub(super) fn poke(mut self, at: u32, bytes: &[u8]) -> Self {
        let start = (at - ANSWER) as usize;
        self.memory[start..start + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// Writes a list at `at` whose elements are at `address`, without checking what lies there.
    pub(super) fn list(self, at: u32, address: u32, length: u32) -> Self {
        self.poke(at, &address.to_le_bytes()).poke(at + 4, &length.to_le_bytes())
    }

    /// Writes a list of bytes at `at`, or a string that need not be valid.
    pub(super) fn bytes(mut self, at: u32, bytes: &[u8]) -> Self {
        let address = self.place(bytes);
        self.list(at, address, size(bytes.len()))
    }

    /// Writes a string at `at` whose length is `units` code units.
    pub(super) fn units(mut self, at: u32, bytes: &[u8], units: u32) -> Self {
        let address = self.place(bytes);
        self.list(at, address, units)
    }

    /// Writes a string at `at`, in the encoding of the guest.
    pub(super) fn text(self, at: u32, text: &str) -> Self {
        let (bytes, units): (Vec<u8>, usize) = match self.encoding {
            StringEncoding::UTF8 => (text.into(), text.len()),
            StringEncoding::UTF16 => {
                (text.encode_utf16().flat_map(u16::to_le_bytes).collect(), text.encode_utf16().count())
            }
            // This encoding is either Latin-1, or UTF-16 with the highest bit of the length set.
            StringEncoding::CompactUTF16 => {
                let latin1 = |char| u8::try_from(char).expect("the texts of the tests are Latin-1");
                (text.chars().map(latin1).collect(), text.chars().count())
            }
        };
        self.units(at, &bytes, size(units))
    }

    /// Replaces the headers of the event.
    pub(super) fn headers(mut self, headers: &[(&str, &str)]) -> Self {
        let list = self.place(&vec![0; 16 * headers.len()]);
        self = self.list(HEADERS, list, size(headers.len()));
        for (at, (name, value)) in (list..).step_by(16).zip(headers) {
            self = self.text(at, name).text(at + 8, value);
        }
        self
    }

    /// Puts bytes behind the memory that is used so far, and returns their address.
    fn place(&mut self, bytes: &[u8]) -> u32 {
        self.memory.resize(self.memory.len().next_multiple_of(8), 0);
        let address = ANSWER + size(self.memory.len());
        self.memory.extend(bytes);
        address
    }

    /// The text of the core module.
    fn core(&self) -> String {
        let Self { imports, fields, describe, build, realloc, post_return, .. } = self;
        let version = self.wit.split_once('@').and_then(|(_, rest)| rest.split_once(';')).expect("it is a package").0;
        let heap = ANSWER + size(self.memory.len().next_multiple_of(16));
        let pages = self.pages.max(heap.div_ceil(1 << 16) + 1);
        let memory = self.memory.iter().fold(String::with_capacity(self.memory.len() * 3), |mut text, byte| {
            write!(text, "\\{byte:02x}").expect("a String takes everything");
            text
        });
        format!(
            r#"(module
                {imports}
                (memory (export "memory") {pages})
                (data (i32.const {ANSWER}) "{memory}")
                (global $heap (mut i32) (i32.const {heap}))
                (func (export "tidings:plugin/builder@{version}#describe") (result i32) {describe} (i32.const {INFO}))
                (func (export "tidings:plugin/builder@{version}#build") (param i32) (result i32)
                    {build} (i32.const {ANSWER}))
                (func (export "cabi_post_tidings:plugin/builder@{version}#build") (param i32)
                    {post_return} (global.set $heap (i32.const {heap})))
                (func (export "cabi_realloc")
                    (param $old i32) (param $old_size i32) (param $align i32) (param $size i32) (result i32)
                    (local $new i32)
                    {realloc}
                    (local.set $new (i32.and (i32.add (global.get $heap) (i32.const 7)) (i32.const -8)))
                    (global.set $heap (i32.add (local.get $new) (local.get $size)))
                    (loop $more
                        (if (i32.gt_u (global.get $heap) (i32.mul (memory.size) (i32.const 65536)))
                            (then (drop (memory.grow (i32.const 1))) (br $more))))
                    (memory.copy (local.get $new) (local.get $old)
                        (select (local.get $old_size) (local.get $size)
                            (i32.lt_u (local.get $old_size) (local.get $size))))
                    (local.get $new))
                {fields})"#
        )
    }

    /// Generates the component.
    ///
    /// # Panics
    ///
    /// When the guest is not valid WebAssembly or does not match its contract.
    pub(super) fn component(&self) -> Vec<u8> {
        let mut resolve = Resolve::default();
        let package = resolve.push_source("plugin.wit", &self.wit).expect("the contract is WIT");
        let world = resolve.select_world(&[package], Some("plugin")).expect("it has the world");
        let text = self.core();
        let mut module = wat::parse_str(&text).unwrap_or_else(|error| panic!("{error}"));
        embed_component_metadata(&mut module, &resolve, world, self.encoding).expect("the world can be encoded");
        let encoder = ComponentEncoder::default().validate(true).module(&module);
        encoder
            .and_then(|mut encoder| encoder.encode())
            .unwrap_or_else(|error| panic!("the guest does not fit its contract: {error:#}\n{text}"))
    }
}

/// The text of `wit/plugin.wit`.
fn wit() -> &'static str {
    static WIT: OnceLock<String> = OnceLock::new();
    WIT.get_or_init(|| {
        std::fs::read_to_string(repository().join("wit/plugin.wit")).expect("the repository has the contract")
    })
}

fn size(length: usize) -> u32 {
    u32::try_from(length).expect("a guest's memory has 32 bits")
}

/// Code that waits for `time`.
fn wait(time: Duration) -> String {
    format!("(call $block (call $subscribe (i64.const {})))", time.as_nanos())
}
