//! Guests that can be loaded. Most of them misbehave when they build a row, which must end as a failure with a reason.
//! The harmless ones only look odd and must be served.

use std::time::Duration;

use wit_component::StringEncoding;

use super::module::{ANSWER, BODY, CONTENT_TYPE, FOREVER, HEADERS, HOST, Module, PAYLOAD, ROUTING_KEY, TTL, ZEROS};
use super::{Hostile, binary};

const LOG: &str = "(func $log (param i32 i32 i32))";
/// Ten years rather than the longest possible time, which might overflow into a short one.
const TEN_YEARS: Duration = Duration::from_hours(87_600);
const CPU: &str = "it used more than 100 ms of CPU time (cpu-ms)";
const MEMORY: &str = "MiB of memory and may have 64 (memory-mib)";
const OUTPUT: &str = "it handed more than 1024 KiB to the host in one call (output-kib)";
const STACK: &str = "its stack overflowed (1 MiB)";
const UNREACHABLE: &str = "it trapped (unreachable)";

/// Plugins that can be loaded, each of which serves one kind with the plugin's name. A row of that kind must fail with
/// a reason that contains [`Hostile::expected`], and must not harm the daemon or rows of other kinds.
///
/// # Panics
///
/// When the contract in `wit/plugin.wit` has changed so much that they cannot be generated.
#[must_use]
pub fn misbehaving() -> Vec<Hostile> {
    [time(), memory(), stack_and_traps(), lists(), texts(), values(), events(), handles()]
        .into_iter()
        .flatten()
        .collect()
}

/// Plugins that look odd and must be served. Each serves one kind with the plugin's name; its events have the routing
/// key `hostile.NAME`.
///
/// # Panics
///
/// As [`misbehaving`].
#[must_use]
pub fn harmless() -> Vec<Hostile> {
    let utf16 = Module::encoded(StringEncoding::UTF16, "text-utf16", &["text-utf16"]);
    let latin1 = Module::encoded(StringEncoding::CompactUTF16, "text-latin1", &["text-latin1"]);
    let json = "[".repeat(100_000);
    let blocks = binary::functions(1, &[0], &[[0x02, 0x40].repeat(10_000), vec![0x0b; 10_000]].concat());
    let with_blocks = binary::with_modules(&Module::new("blocks-10000", &["blocks-10000"]).component(), &[blocks]);
    vec![
        guest(17, "text-utf16", "good", |_| utf16),
        guest(17, "text-latin1", "good", |_| latin1),
        guest(19, "body-nested", "[[[[", |it| it.bytes(BODY, json.as_bytes())),
        guest(20, "ttl-longest", "good", |it| it.poke(TTL, &[1]).poke(TTL + 8, &u64::MAX.to_le_bytes())),
        guest(25, "version-0-1-9", "good", |it| it.replace("0.1.0", "0.1.9")),
        guest(26, "exports-more", "good", |it| {
            it.world("export more;", "interface more { further: func(); }")
                .fields(r#"(func (export "tidings:plugin/more@0.1.0#further"))"#)
        }),
        Hostile { number: 31, name: "blocks-10000".to_owned(), bytes: with_blocks, expected: "good" },
    ]
}

/// A guest that serves the kind `name`, modified by `spoil`.
fn guest(number: u8, name: &str, expected: &'static str, spoil: impl FnOnce(Module) -> Module) -> Hostile {
    let bytes = spoil(Module::new(name, &[name])).component();
    Hostile { number, name: name.to_owned(), bytes, expected }
}

/// Guests that take too much time.
fn time() -> Vec<Hostile> {
    vec![
        guest(1, "loop", CPU, |it| it.build(FOREVER)),
        guest(1, "loop-in-realloc", CPU, |it| it.realloc(FOREVER)),
        guest(1, "loop-after-return", CPU, |it| it.post_return(FOREVER)),
        guest(4, "loop-in-slices", CPU, |it| {
            let slices = "(func $slices (param $depth i32) (local $count i32)
                (loop $short
                    (local.set $count (i32.add (local.get $count) (i32.const 1)))
                    (br_if $short (i32.lt_u (local.get $count) (i32.const 100))))
                (if (local.get $depth) (then (call $slices (i32.sub (local.get $depth) (i32.const 1))))))";
            it.fields(slices).build("(loop $again (call $slices (i32.const 1000)) (br $again))")
        }),
        guest(5, "sleep", "it took longer than 1000 ms (wall-ms)", |it| it.sleep(TEN_YEARS)),
        guest(21, "log-forever", CPU, |it| {
            it.core_import(HOST, "log", LOG)
                .build("(loop $again (call $log (i32.const 2) (i32.const 0) (i32.const 8)) (br $again))")
        }),
    ]
}

/// Guests that take too much memory.
fn memory() -> Vec<Hostile> {
    let memories = each(10, |number| format!("(memory $other{number} 1)"));
    let grow_others = each(10, |number| format!("(drop (memory.grow $other{number} (i32.const 160)))"));
    vec![
        guest(6, "memory-steps", MEMORY, |it| {
            it.build("(loop $again (drop (memory.grow (i32.const 16))) (br $again))")
        }),
        guest(6, "memory-leap", MEMORY, |it| it.build("(drop (memory.grow (i32.const 65000)))")),
        guest(7, "memories", MEMORY, |it| it.fields(&memories).build(&grow_others)),
        guest(9, "table", "table elements and may have 100000", |it| {
            it.fields("(table $table 1 funcref)")
                .build("(loop $again (drop (table.grow $table (ref.null func) (i32.const 1000))) (br $again))")
        }),
    ]
}

/// Guests that overflow the stack or trap.
fn stack_and_traps() -> Vec<Hostile> {
    let recursion = "(func $deeper (param i32) (result i32) (i32.add (call $deeper (local.get 0)) (i32.const 1)))";
    let recurse = "(drop (call $deeper (i32.const 0)))";
    let deep_trap = "(func $deeper (param i32)
        (if (i32.eqz (local.get 0)) (then unreachable))
        (call $deeper (i32.sub (local.get 0) (i32.const 1))))";
    vec![
        guest(10, "recursion", STACK, |it| it.fields(recursion).build(recurse)),
        guest(10, "recursion-in-realloc", STACK, |it| it.fields(recursion).realloc(recurse)),
        guest(11, "recursion-with-host-calls", STACK, |it| {
            it.core_import(HOST, "log", LOG)
                .fields(&wide_recursion("(call $log (i32.const 2) (i32.const 1000) (i32.const 8))"))
                .build("(call $wide)")
        }),
        guest(12, "trap", UNREACHABLE, |it| it.build("unreachable")),
        guest(12, "trap-after-return", UNREACHABLE, |it| it.post_return("unreachable")),
        guest(12, "division", "it trapped (wasm trap: integer divide by zero)", |it| {
            it.build("(drop (i32.div_u (i32.const 1) (i32.const 0)))")
        }),
        guest(12, "memory-beyond-its-end", "it trapped (wasm trap: out of bounds memory access)", |it| {
            it.build("(drop (i32.load (i32.const -4)))")
        }),
        guest(12, "call-of-nothing", "it trapped (wasm trap: uninitialized element)", |it| {
            it.fields("(table $table 1 funcref)").build("(call_indirect $table (i32.const 0))")
        }),
        guest(13, "exit", "it called exit(1)", |it| {
            let wit = "package wasi:cli@0.2.0 { interface exit { exit: func(status: result); } }";
            it.import("wasi:cli/exit@0.2.0", wit, "exit", "(func $exit (param i32))")
                .build("(call $exit (i32.const 1))")
        }),
        guest(35, "host-call-in-realloc", "cannot leave component instance", |it| {
            it.core_import(HOST, "log", LOG).realloc("(call $log (i32.const 2) (i32.const 0) (i32.const 8))")
        }),
        guest(49, "trap-far-down", UNREACHABLE, |it| it.fields(deep_trap).build("(call $deeper (i32.const 10000))")),
    ]
}

/// A recursion that runs `code` in each frame. The frames are so large that the stack overflows before the CPU limit is
/// reached.
fn wide_recursion(code: &str) -> String {
    let locals = each(100, |number| format!("(local $l{number} i64)"));
    let load = each(100, |number| format!("(local.set $l{number} (i64.load (i32.const {})))", number * 8));
    let store = each(100, |number| format!("(i64.store (i32.const {}) (local.get $l{number}))", number * 8));
    // The values are read before the call and written after it, so they must be kept on the stack.
    format!("(func $wide {locals} {load} {code} (call $wide) {store})")
}

/// The concatenation of `text` for each number below `count`.
fn each(count: u32, text: impl FnMut(u32) -> String) -> String {
    (0..count).map(text).collect::<Vec<_>>().concat()
}

/// Guests that return invalid addresses and lengths, or more data than they may.
fn lists() -> Vec<Hostile> {
    const MIB: u32 = 1 << 20;
    const ELSEWHERE: &str = "it broke the contract: list pointer/length out of bounds of memory";
    // Each header takes 16 bytes in the guest and somewhat more in the host; all of them share one text of 16 KiB.
    let shared: Vec<u8> =
        [0, 0, ZEROS, 1 << 14].into_iter().flat_map(u32::to_le_bytes).collect::<Vec<_>>().repeat(1_000);
    vec![
        guest(14, "body-60-mib", OUTPUT, |it| it.pages(61 * 16).list(BODY, 0, 60 * MIB)),
        guest(14, "body-1-gib", ELSEWHERE, |it| it.list(BODY, 0, 1024 * MIB)),
        guest(15, "list-without-end", ELSEWHERE, |it| it.list(HEADERS, 0, u32::MAX)),
        guest(15, "list-of-2-31", ELSEWHERE, |it| it.list(HEADERS, 0, 1 << 31)),
        guest(15, "list-elsewhere", ELSEWHERE, |it| it.list(BODY, u32::MAX - 15, 16)),
        guest(15, "list-past-the-end", ELSEWHERE, |it| it.list(BODY, (2 << 16) - 1, 2)),
        guest(15, "list-misaligned", "it broke the contract: list pointer is not aligned", |it| it.list(HEADERS, 1, 1)),
        guest(15, "answer-misaligned", "it broke the contract: return pointer not aligned", |it| {
            it.build("(return (i32.const 1025))")
        }),
        guest(15, "answer-elsewhere", "it broke the contract: pointer out of bounds of memory", |it| {
            it.build("(return (i32.const -8))")
        }),
        guest(15, "realloc-misaligned", "it broke the contract: realloc return: result not aligned", |it| {
            it.realloc("(return (i32.const 1))")
        }),
        guest(15, "realloc-elsewhere", "it broke the contract: realloc return: beyond end of memory", |it| {
            it.realloc("(return (i32.const -8))")
        }),
        guest(16, "headers-1-million", OUTPUT, |it| it.pages(16 * 17).list(HEADERS, ZEROS, 1_000_000)),
        guest(16, "headers-shared", OUTPUT, |it| it.pages(32).units(HEADERS, &shared, 1_000)),
        guest(21, "log-2-mib", OUTPUT, |it| {
            it.core_import(HOST, "log", LOG)
                .pages(64)
                .build("(call $log (i32.const 2) (i32.const 1048576) (i32.const 2097152))")
        }),
    ]
}

/// Guests that return invalid strings.
fn texts() -> Vec<Hostile> {
    const ENDLESS: &str = "it broke the contract: string pointer/length out of bounds of memory";
    let encoded = |encoding, name: &'static str| move |_| Module::encoded(encoding, name, &[name]);
    let utf16 = |name| encoded(StringEncoding::UTF16, name);
    let compact = |name| encoded(StringEncoding::CompactUTF16, name);
    // One half of a surrogate pair.
    let lone: &[u8] = &[0x00, 0xd8];
    vec![
        guest(17, "utf8-broken", "it broke the contract: invalid utf-8", |it| it.units(ROUTING_KEY, b"ab\xff", 3)),
        guest(17, "utf8-surrogate", "it broke the contract: invalid utf-8", |it| {
            it.units(CONTENT_TYPE, b"\xed\xa0\x80", 3)
        }),
        guest(17, "utf16-surrogate", "it broke the contract: unpaired surrogate", |it| {
            utf16("utf16-surrogate")(it).units(ROUTING_KEY, lone, 1)
        }),
        guest(17, "utf16-misaligned", "it broke the contract: string pointer not aligned", |it| {
            utf16("utf16-misaligned")(it).list(ROUTING_KEY, ANSWER + 1, 1)
        }),
        guest(17, "utf16-without-end", ENDLESS, |it| {
            utf16("utf16-without-end")(it).list(ROUTING_KEY, ANSWER, u32::MAX)
        }),
        guest(17, "compact-surrogate", "it broke the contract: unpaired surrogate", |it| {
            compact("compact-surrogate")(it).units(ROUTING_KEY, lone, 1 | 1 << 31)
        }),
        guest(17, "compact-without-end", ENDLESS, |it| {
            compact("compact-without-end")(it).list(ROUTING_KEY, ANSWER, u32::MAX)
        }),
    ]
}

/// Guests that return invalid discriminants.
fn values() -> Vec<Hostile> {
    vec![
        guest(18, "result-7", "it broke the contract: invalid expected discriminant", |it| it.poke(ANSWER, &[7])),
        guest(18, "error-9", "it broke the contract: unexpected discriminant: 9", |it| {
            it.poke(ANSWER, &[1]).poke(PAYLOAD, &[9])
        }),
        guest(18, "option-2", "it broke the contract: invalid option discriminant", |it| it.poke(TTL, &[2])),
        guest(18, "level-99", "it broke the contract: unexpected discriminant: 99", |it| {
            it.core_import(HOST, "log", LOG).build("(call $log (i32.const 99) (i32.const 0) (i32.const 8))")
        }),
    ]
}

/// Guests that return events which cannot be published.
fn events() -> Vec<Hostile> {
    let names: Vec<String> = (0..8_000).map(|number| number.to_string()).collect();
    let many: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "")).collect();
    vec![
        guest(20, "key-empty", "its routing-key has 0 bytes", |it| it.text(ROUTING_KEY, "")),
        guest(20, "key-1-mb", "its routing-key has 1000000 bytes", |it| {
            it.pages(32).list(ROUTING_KEY, ZEROS, 1_000_000)
        }),
        guest(20, "key-256", "its routing-key has 256 bytes", |it| it.text(ROUTING_KEY, &"k".repeat(256))),
        guest(20, "type-256", "its content-type has 256 bytes", |it| it.text(CONTENT_TYPE, &"t".repeat(256))),
        guest(20, "headers-8000", "its headers have", |it| it.headers(&many)),
        guest(20, "headers-100000", OUTPUT, |it| it.pages(64).list(HEADERS, ZEROS, 100_000)),
        guest(20, "header-twice", r#"the header "a" appears twice"#, |it| it.headers(&[("a", "1"), ("a", "2")])),
        guest(20, "header-nameless", "the name of a header has 0 bytes", |it| it.headers(&[("", "1")])),
        guest(20, "header-long", "the name of a header has 256 bytes", |it| it.headers(&[(&"n".repeat(256), "1")])),
        guest(20, "header-reserved", r#"a header is named "tidings-kind""#, |it| it.headers(&[("tidings-kind", "1")])),
    ]
}

/// Guests that never drop their handles.
fn handles() -> Vec<Hostile> {
    let things = "interface things { resource thing { constructor(); } }";
    vec![
        guest(34, "handles-of-its-own", "it broke the contract: cannot allocate another handle", |it| {
            it.world("export things;", things)
                .core_import(
                    "[export]tidings:plugin/things@0.1.0",
                    "[resource-new]thing",
                    "(func $new (param i32) (result i32))",
                )
                .fields(r#"(func (export "tidings:plugin/things@0.1.0#[constructor]thing") (result i32) unreachable)"#)
                .build("(loop $again (drop (call $new (i32.const 1))) (br $again))")
        }),
        guest(34, "handles-of-the-host", "it broke the contract: resource table has no free keys", |it| {
            it.timers().build("(loop $again (drop (call $subscribe (i64.const 1000000000))) (br $again))")
        }),
    ]
}
