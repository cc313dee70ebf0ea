//! The binary format of components, as far as it takes to add to one what no tool would.

/// The magic number, the version and the layer of a component.
pub(super) const COMPONENT: &[u8] = b"\0asm\x0d\0\x01\0";
/// The same of a core module.
pub(super) const MODULE: &[u8] = b"\0asm\x01\0\0\0";

const CUSTOM: u8 = 0;
const CORE_MODULE: u8 = 1;
const CORE_INSTANCES: u8 = 2;
const NESTED_COMPONENT: u8 = 4;
const INSTANCES: u8 = 5;

/// A custom section. It means nothing, in a module as in a component.
pub(super) fn custom(name: &str, data: &[u8]) -> Vec<u8> {
    section(CUSTOM, &[&leb128(name.len()), name.as_bytes(), data].concat())
}

/// `component` with core modules that it does not use. They are compiled all the same.
pub(super) fn with_modules(component: &[u8], modules: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = component.to_vec();
    for module in modules {
        bytes.extend(section(CORE_MODULE, module));
    }
    bytes
}

/// `component` with `module`, instantiated `times` times whenever the component is.
pub(super) fn with_instances(component: &[u8], module: &[u8], times: usize) -> Vec<u8> {
    let index = sections(component).filter(|id| *id == CORE_MODULE).count();
    // Of a module by its index, without arguments.
    let instance = [&[0], &*leb128(index), &[0]].concat();
    let instances = section(CORE_INSTANCES, &[leb128(times), instance.repeat(times)].concat());
    [component, &section(CORE_MODULE, module), &instances].concat()
}

/// `component` with another one in it that is instantiated whenever it is.
pub(super) fn with_component(component: &[u8], inner: &[u8]) -> Vec<u8> {
    let index = sections(component).filter(|id| *id == NESTED_COMPONENT).count();
    let instance = section(INSTANCES, &[&[1, 0], &*leb128(index), &[0]].concat());
    [component, &section(NESTED_COMPONENT, inner), &instance].concat()
}

/// `inner` in a component in a component, `depth` times.
pub(super) fn nested(inner: &[u8], depth: usize) -> Vec<u8> {
    let mut length = inner.len();
    let mut around: Vec<Vec<u8>> = Vec::with_capacity(depth);
    for _ in 0..depth {
        // From the inside out: each begins with the length of what is in it.
        let start = [COMPONENT, &[NESTED_COMPONENT], &leb128(length)].concat();
        length += start.len();
        around.push(start);
    }
    around.reverse();
    [&around.concat(), inner].concat()
}

/// A core module of `count` functions that all have the same body. `locals` are the declarations of the locals: how
/// many, each a number and a type.
pub(super) fn functions(count: usize, locals: &[u8], code: &[u8]) -> Vec<u8> {
    const TYPES: u8 = 1;
    const FUNCTIONS: u8 = 3;
    const CODE: u8 = 10;
    const END: &[u8] = &[0x0b];
    let body = [&leb128(locals.len() + code.len() + END.len()), locals, code, END].concat();
    [
        MODULE,
        // One type: a function without parameters and results. All have it.
        &section(TYPES, &[1, 0x60, 0, 0]),
        &section(FUNCTIONS, &[leb128(count), vec![0; count]].concat()),
        &section(CODE, &[leb128(count), body.repeat(count)].concat()),
    ]
    .concat()
}

/// A number in LEB128, as the format has it everywhere.
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

/// The ids of the sections of `component`, which is a good one.
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
