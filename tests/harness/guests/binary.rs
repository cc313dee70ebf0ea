//! Writes parts of the binary format of components, to add sections to a component that no tool would add.

/// The magic number, the version and the layer of a component.
pub(super) const COMPONENT: &[u8] = b"\0asm\x0d\0\x01\0";
/// The magic number and the version of a core module.
pub(super) const MODULE: &[u8] = b"\0asm\x01\0\0\0";

const CUSTOM: u8 = 0;
const CORE_MODULE: u8 = 1;
const CORE_INSTANCES: u8 = 2;
const NESTED_COMPONENT: u8 = 4;
const INSTANCES: u8 = 5;

/// A custom section, which has no effect in a module or a component.
pub(super) fn custom(name: &str, data: &[u8]) -> Vec<u8> {
    section(CUSTOM, &[&leb128(name.len()), name.as_bytes(), data].concat())
}

/// Adds core modules to `component` that it does not use. They are compiled nevertheless.
pub(super) fn with_modules(component: &[u8], modules: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = component.to_vec();
    for module in modules {
        bytes.extend(section(CORE_MODULE, module));
    }
    bytes
}

/// Adds `module` to `component`, instantiated `times` times whenever the component is instantiated.
pub(super) fn with_instances(component: &[u8], module: &[u8], times: usize) -> Vec<u8> {
    let index = sections(component).filter(|id| *id == CORE_MODULE).count();
    // An instance of the module with this index, without arguments.
    let instance = [&[0], &*leb128(index), &[0]].concat();
    let instances = section(CORE_INSTANCES, &[leb128(times), instance.repeat(times)].concat());
    [component, &section(CORE_MODULE, module), &instances].concat()
}

/// Adds the component `inner` to `component`, instantiated whenever `component` is instantiated.
pub(super) fn with_component(component: &[u8], inner: &[u8]) -> Vec<u8> {
    let index = sections(component).filter(|id| *id == NESTED_COMPONENT).count();
    let instance = section(INSTANCES, &[&[1, 0], &*leb128(index), &[0]].concat());
    [component, &section(NESTED_COMPONENT, inner), &instance].concat()
}

/// Nests `inner` in `depth` components.
pub(super) fn nested(inner: &[u8], depth: usize) -> Vec<u8> {
    let mut length = inner.len();
    let mut around: Vec<Vec<u8>> = Vec::with_capacity(depth);
    for _ in 0..depth {
        // Built from the inside out: each component begins with the length of its content.
        let start = [COMPONENT, &[NESTED_COMPONENT], &leb128(length)].concat();
        length += start.len();
        around.push(start);
    }
    around.reverse();
    [&around.concat(), inner].concat()
}

/// A core module of `count` functions that all have the same body. `locals` are the declarations of the locals: their
/// number, and then a count and a type for each.
pub(super) fn functions(count: usize, locals: &[u8], code: &[u8]) -> Vec<u8> {
    const TYPES: u8 = 1;
    const FUNCTIONS: u8 = 3;
    const CODE: u8 = 10;
    const END: &[u8] = &[0x0b];
    let body = [&leb128(locals.len() + code.len() + END.len()), locals, code, END].concat();
    [
        MODULE,
        // One type, which all functions have: no parameters and no results.
        &section(TYPES, &[1, 0x60, 0, 0]),
        &section(FUNCTIONS, &[leb128(count), vec![0; count]].concat()),
        &section(CODE, &[leb128(count), body.repeat(count)].concat()),
    ]
    .concat()
}

/// A number in LEB128, the encoding of all numbers in the format.
pub(super) fn leb128(mut number: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let low = u8::try_from(number & 0x7f).expect("seven bits");
        number >>= 7;
        if number == 0 {
            bytes.push(low);
            return bytes;
        }
        bytes.push(low | 0x80);
    }
}

fn section(id: u8, payload: &[u8]) -> Vec<u8> {
    [&[id], &*leb128(payload.len()), payload].concat()
}

/// The ids of the sections of `component`, which must be well-formed.
fn sections(component: &[u8]) -> impl Iterator<Item = u8> {
    let mut rest = &component[COMPONENT.len()..];
    std::iter::from_fn(move || {
        let (id, after) = rest.split_first()?;
        let length_bytes = after.iter().take_while(|byte| **byte & 0x80 != 0).count() + 1;
        let (length, payload) = after.split_at(length_bytes);
        let length = length.iter().rev().fold(0, |length, byte| length << 7 | usize::from(byte & 0x7f));
        rest = &payload[length..];
        Some(*id)
    })
}
