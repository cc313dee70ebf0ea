//! Files that the daemon must refuse to load.

use super::Hostile;
use super::binary::{self, COMPONENT, MODULE};
use super::module::{EXPORT, FIRST_KIND, FOREVER, HOST, INFO, KINDS, Module, VERSION, ZEROS};

const DAMAGED: &str = "it is damaged";
const DOES_NOT_FIT: &str = "it does not fit wit/plugin.wit";
const NOT_A_COMPONENT: &str = "not a WebAssembly component";
const NO_BUILDER: &str = "it does not export tidings:plugin/builder@0.1.0, ";

/// Files that the daemon must refuse to load, with a reason that contains [`Hostile::expected`]. They must not harm the
/// daemon or other plugins. One of them has 65 MiB.
///
/// # Panics
///
/// When the contract in `wit/plugin.wit` has changed so much that they cannot be generated.
#[must_use]
pub fn refused() -> Vec<Hostile> {
    [files(), worlds(), builders(), features(), starts(), descriptions(), bombs(), nests()]
        .into_iter()
        .flatten()
        .collect()
}

/// A file with these bytes.
fn file(number: u8, name: &str, expected: &'static str, bytes: impl Into<Vec<u8>>) -> Hostile {
    Hostile { number, name: name.to_owned(), bytes: bytes.into(), expected }
}

/// A guest that `spoil` modifies before it becomes a component.
fn guest(number: u8, name: &str, expected: &'static str, spoil: impl FnOnce(Module) -> Module) -> Hostile {
    file(number, name, expected, spoil(Module::new(name, &[name])).component())
}

/// A good component that `spoil` modifies.
fn spoilt(number: u8, name: &str, expected: &'static str, spoil: impl FnOnce(&[u8]) -> Vec<u8>) -> Hostile {
    file(number, name, expected, spoil(&Module::new(name, &[name]).component()))
}

/// Assembles WebAssembly text.
fn wasm(text: &str) -> Vec<u8> {
    wat::parse_str(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// Files that are not components, or are incomplete or damaged.
fn files() -> Vec<Hostile> {
    // The header of wasmtime's precompiled files: ELF, with wasmtime's own operating system id.
    let mut precompiled = b"\x7fELF\x02\x01\x01\xc8".to_vec();
    precompiled.resize(64, 0);
    vec![
        file(27, "core-module", "it is a core module, not a WebAssembly component; build it with", MODULE),
        file(27, "core-module-of-wasi", "it is a core module", wasm(r#"(module (func (export "_start")))"#)),
        spoilt(28, "cut-in-the-header", "it is cut off", |good| good[..6].to_vec()),
        spoilt(28, "cut-in-the-middle", DAMAGED, |good| good[..good.len() / 2].to_vec()),
        spoilt(28, "cut-at-the-end", DAMAGED, |good| good[..good.len() - 1].to_vec()),
        file(29, "empty", "it is empty", ""),
        file(29, "script", NOT_A_COMPONENT, "#!/bin/sh\nexit 1\n"),
        file(29, "text", "it is WebAssembly text", "(component)\n"),
        file(29, "text-with-a-comment", "it is WebAssembly text", ";; a plugin\n(component)\n"),
        file(29, "precompiled", "it is native or precompiled code", precompiled),
        file(29, "gzip", "it is a gzip archive", b"\x1f\x8b\x08\0\0\0\0\0\0\x03"),
        file(29, "windows", "it is a program for Windows", b"MZ\x90\0\x03\0\0\0\x04\0\0\0\xff\xff\0\0"),
        file(29, "archive", NOT_A_COMPONENT, b"!<arch>\n"),
        file(29, "zeros", NOT_A_COMPONENT, vec![0; 4096]),
        file(29, "layer-of-tomorrow", NOT_A_COMPONENT, b"\0asm\x0d\0\x02\0"),
        file(29, "version-of-tomorrow", DAMAGED, b"\0asm\x0e\0\x01\0"),
        spoilt(29, "junk-behind", DAMAGED, |good| [good, b"\xff\xff\xff\xff"].concat()),
        // A valid component that is too large.
        spoilt(33, "padding-65-mib", "more than 67108864", |good| {
            [good, &binary::custom("padding", &vec![0; 65 << 20])].concat()
        }),
    ]
}

/// Components that import something unknown, or with another type, or of another version.
fn worlds() -> Vec<Hostile> {
    const MANY: &str =
        "wasi:keyvalue/store@0.2.0: a part of WASI that plugins are not given; acme:things/thing@1.0.0: not known";
    let foreign = "
        package wasi:http@0.2.0 { interface outgoing-handler { take: func(); } }
        package wasi:keyvalue@0.2.0 { interface store { take: func(); } }
        package acme:things@1.0.0 { interface thing { take: func(); } }";
    let sockets = "package wasi:sockets@0.2.0 { interface tcp { take: func(); } }";
    let future = "package wasi:cli@0.3.0 { interface environment { take: func(); } }";
    let another_result = "package wasi:cli@0.2.0 { interface environment { get-environment: func() -> string; } }";
    let take = "(func)";
    let version = |name: &str, version: &str, expected| guest(25, name, expected, |it| it.replace("0.1.0", version));
    vec![
        guest(23, "imports-many", MANY, |it| {
            // The first import declares the packages of all three.
            it.import("wasi:http/outgoing-handler@0.2.0", foreign, "take", take)
                .import("wasi:keyvalue/store@0.2.0", "", "take", take)
                .import("acme:things/thing@1.0.0", "", "take", take)
        }),
        guest(23, "imports-sockets", "it imports wasi:sockets/tcp@0.2.0: the network, which no plugin has", |it| {
            it.import("wasi:sockets/tcp@0.2.0", sockets, "take", take)
        }),
        guest(23, "imports-wasi-0-3", "it imports wasi:cli/environment@0.3.0: of a version that is not served", |it| {
            it.import("wasi:cli/environment@0.3.0", future, "take", take)
        }),
        guest(23, "imports-host2", "it imports tidings:plugin/host2@0.1.0: not known to this daemon", |it| {
            it.world("import host2;", "interface host2 { take: func(); }").core_import(
                "tidings:plugin/host2@0.1.0",
                "take",
                take,
            )
        }),
        file(
            23,
            "imports-a-function",
            "it imports do-it: not known to this daemon",
            wasm(r#"(component (import "do-it" (func)))"#),
        ),
        guest(24, "host-with-less", DOES_NOT_FIT, |it| {
            it.replace("log: func(level: level, message: string)", "log: func(message: string)").core_import(
                HOST,
                "log",
                "(func (param i32 i32))",
            )
        }),
        guest(24, "host-with-more", DOES_NOT_FIT, |it| {
            it.replace("log: func(", "take: func();\n  log: func(").core_import(HOST, "take", take)
        }),
        guest(24, "host-with-another-level", DOES_NOT_FIT, |it| {
            it.replace("warn, error }", "warn, error, fatal }").core_import(HOST, "log", "(func (param i32 i32 i32))")
        }),
        guest(24, "wasi-with-another-result", DOES_NOT_FIT, |it| {
            it.import("wasi:cli/environment@0.2.0", another_result, "get-environment", "(func (param i32))")
        }),
        version("version-0-9", "0.9.0", "it speaks tidings:plugin 0.9; this daemon serves 0.1"),
        version("version-1-0", "1.0.0", "it speaks tidings:plugin 1.0; this daemon serves 0.1"),
        version("version-0-1-0-rc-1", "0.1.0-rc.1", "it speaks tidings:plugin 0.1.0-rc.1; this daemon serves 0.1"),
    ]
}

/// Components that lack the export `builder`, or export it with another type.
fn builders() -> Vec<Hostile> {
    let builder = |exports: &str| {
        wasm(&format!(
            r#"(component
                (core module $module (func (export "describe")))
                (core instance $core (instantiate $module))
                (func $describe (canon lift (core func $core "describe")))
                (instance $builder {exports})
                (export "tidings:plugin/builder@0.1.0" (instance $builder)))"#
        ))
    };
    let half = r#"(export "describe" (func $describe))"#;
    vec![
        guest(24, "row-with-more", DOES_NOT_FIT, |it| it.replace("attempt: u32,", "attempt: u32,\n    zone: string,")),
        guest(24, "event-with-a-text", DOES_NOT_FIT, |it| it.replace("body: list<u8>,", "body: string,")),
        guest(24, "describe-with-less", DOES_NOT_FIT, |it| it.replace("func() -> plugin-info", "func() -> string")),
        file(26, "exports-nothing", NO_BUILDER, COMPONENT),
        guest(26, "exports-something-else", NO_BUILDER, |it| {
            it.replace(EXPORT, "export other: func();").fields(r#"(func (export "other"))"#)
        }),
        file(26, "exports-an-empty-builder", DOES_NOT_FIT, builder("")),
        file(26, "exports-half-a-builder", DOES_NOT_FIT, builder(half)),
    ]
}

/// Components that use WebAssembly features which the daemon switches off.
fn features() -> Vec<Hostile> {
    let using =
        |name: &str, module: &str| spoilt(25, name, DAMAGED, |good| binary::with_modules(good, &[wasm(module)]));
    let swizzle = "(module (func (param v128) (result v128) (i8x16.relaxed_swizzle (local.get 0) (local.get 0))))";
    vec![
        using("feature-memory64", "(module (memory i64 1))"),
        using("feature-shared-memory", "(module (memory 1 1 shared))"),
        using("feature-atomics", "(module (memory 1) (func (drop (i32.atomic.load (i32.const 0)))))"),
        using("feature-gc", "(module (type (struct (field i32))))"),
        using("feature-exceptions", "(module (tag) (func (throw 0)))"),
        using("feature-stack-switching", "(module (type $f (func)) (type (cont $f)))"),
        using("feature-relaxed-simd", swizzle),
        using("feature-page-sizes", "(module (memory 1 (pagesize 1)))"),
        spoilt(25, "feature-streams", DAMAGED, |good| {
            binary::with_component(good, &wasm("(component (type (stream u8)))"))
        }),
    ]
}

/// Components that fail while they are instantiated.
fn starts() -> Vec<Hostile> {
    const CPU: &str = "while starting, it used more than 100 ms of CPU time (cpu-ms)";
    const MEMORY: &str = "MiB of memory and may have 64 (memory-mib)";
    const TABLE: &str = "table elements and may have 100000";
    const ELSEWHERE: &str = "while starting, it trapped (wasm trap: out of bounds memory access)";
    let start = |code: &str| format!("(func $start {code}) (start $start)");
    let inside = format!("(component (core module $module {}) (core instance (instantiate $module)))", start(FOREVER));
    let instances = |number, name: &str, expected, module: &str, times| {
        spoilt(number, name, expected, |good| binary::with_instances(good, &wasm(module), times))
    };
    vec![
        guest(2, "start-loop", CPU, |it| it.fields(&start(FOREVER))),
        spoilt(2, "start-loop-inside", CPU, |good| binary::with_component(good, &wasm(&inside))),
        guest(2, "start-trap", "while starting, it trapped (unreachable)", |it| it.fields(&start("unreachable"))),
        guest(2, "start-with-data-elsewhere", ELSEWHERE, |it| it.fields(r#"(data (i32.const -8) "elsewhere")"#)),
        instances(7, "memories-of-many", MEMORY, "(module (memory 160))", 10),
        guest(7, "memories-100", "memory count too high", |it| it.fields(&"(memory 0)".repeat(99))),
        guest(8, "memory-4-gib", MEMORY, |it| it.pages(65_536)),
        guest(8, "memory-65-mib", MEMORY, |it| it.pages(65 * 16)),
        guest(9, "table-10-million", TABLE, |it| it.fields("(table 10000000 funcref)")),
        instances(9, "tables-of-many", TABLE, "(module (table 20000 funcref))", 10),
        guest(9, "tables-90", "table count too high", |it| it.fields(&"(table 0 funcref)".repeat(90))),
        instances(32, "instances-900", "instance count too high", "(module)", 900),
    ]
}

/// Guests whose `describe` fails or returns an invalid description.
fn descriptions() -> Vec<Hostile> {
    const CPU: &str = "its describe() failed: it used more than 100 ms of CPU time (cpu-ms)";
    const OUTPUT: &str = "its describe() failed: it handed more than 1024 KiB to the host in one call (output-kib)";
    const TRAP: &str = "its describe() failed: it trapped (unreachable)";
    const LIST: &str = "its describe() failed: it broke the contract: list pointer/length out of bounds";
    const UTF8: &str = "its describe() failed: it broke the contract: invalid utf-8";
    const OPTION: &str = "its describe() failed: it broke the contract: invalid option discriminant";
    const PRINTABLE: &str = "which is not 1 to 100 printable bytes";
    const KIND: &str = "which does not match [a-z0-9][a-z0-9._-]{0,99}";
    let kinds = |name: &str, expected, kinds: &[&str]| file(36, name, expected, Module::new(name, kinds).component());
    let many: Vec<String> = (0..1_001).map(|number| format!("k{number}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    vec![
        guest(3, "describe-loop", CPU, |it| it.describe(FOREVER)),
        guest(12, "describe-trap", TRAP, |it| it.describe("unreachable")),
        guest(14, "describe-60-mib", OUTPUT, |it| it.pages(61 * 16).list(INFO, 0, 60 << 20)),
        guest(15, "describe-without-end", LIST, |it| it.list(KINDS, 0, u32::MAX)),
        guest(17, "describe-not-utf8", UTF8, |it| it.bytes(INFO, b"\xff")),
        guest(18, "describe-option-2", OPTION, |it| it.poke(FIRST_KIND + 16, &[2])),
        guest(36, "name-empty", PRINTABLE, |it| it.text(INFO, "")),
        guest(36, "name-101", PRINTABLE, |it| it.text(INFO, &"n".repeat(101))),
        guest(36, "name-1-mb", PRINTABLE, |it| it.pages(32).list(INFO, ZEROS, 1_000_000)),
        guest(36, "name-with-escape", PRINTABLE, |it| it.text(INFO, "a\x1b[31mb")),
        guest(36, "name-with-at", PRINTABLE, |it| it.text(INFO, "a@b")),
        guest(36, "name-with-plus", PRINTABLE, |it| it.text(INFO, "a+b")),
        guest(36, "version-empty", PRINTABLE, |it| it.text(VERSION, "")),
        guest(36, "version-with-lines", PRINTABLE, |it| it.text(VERSION, "1\n2")),
        kinds("kind-empty", KIND, &["good", ""]),
        kinds("kind-path", KIND, &["good", "../x"]),
        kinds("kind-upper-case", KIND, &["good", "Kind"]),
        kinds("kind-with-nul", KIND, &["good", "a\0b"]),
        kinds("kind-101", KIND, &["good", &"k".repeat(101)]),
        guest(36, "kind-1-mb", KIND, |it| it.pages(32).list(FIRST_KIND, ZEROS, 1_000_000)),
        kinds("kinds-none", "names 0 kinds, not 1 to 1000", &[]),
        kinds("kinds-1001", "names 1001 kinds, not 1 to 1000", &many),
        guest(36, "kinds-100000", OUTPUT, |it| it.pages(128).list(KINDS, ZEROS, 100_000)),
    ]
}

/// Components that take too much time and memory to compile.
fn bombs() -> Vec<Hostile> {
    let with = |name: &str, expected, module: Vec<u8>| {
        spoilt(31, name, expected, |good| binary::with_modules(good, &[module]))
    };
    // i32.const 1; then 700,000 times: i32.const 1, i32.add; then drop.
    let sum = [&[0x41, 1], &*[0x41, 1, 0x6a].repeat(700_000), &[0x1a]].concat();
    // i32.const 0; then br_table with 500,000 targets and the default target.
    let targets = [&[0x41, 0, 0x0e], &*binary::leb128(500_000), &vec![0; 500_001]].concat();
    // One declaration: 50,000 locals of type i64.
    let locals = [&[1], &*binary::leb128(50_000), &[0x7e]].concat();
    vec![
        with("function-2-mib", "more than 1048576", binary::functions(1, &[0], &sum)),
        with("functions-600000", "functions, more than", binary::functions(600_000, &[0], &[])),
        with("locals-100-million", "locals, more than", binary::functions(2_000, &locals, &[])),
        with("targets-500000", DAMAGED, binary::functions(1, &[0], &targets)),
    ]
}

/// Components with too many or too deeply nested parts.
fn nests() -> Vec<Hostile> {
    // Each type is twice as large as the previous one.
    let doubled: Vec<String> =
        (0..40).map(|number| format!("(type $t{} (tuple $t{number} $t{number}))", number + 1)).collect();
    let types = wasm(&format!("(component (type $t0 u8) {})", doubled.concat()));
    vec![
        spoilt(32, "modules-500", "more than 200", |good| binary::with_modules(good, &vec![MODULE.to_vec(); 500])),
        spoilt(32, "nested-10000", "nested", |good| binary::with_component(good, &binary::nested(COMPONENT, 10_000))),
        spoilt(32, "types-exploding", DAMAGED, |good| binary::with_component(good, &types)),
    ]
}
