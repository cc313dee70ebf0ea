//! The host's side of wit/plugin.wit, generated.

#![expect(clippy::pedantic, reason = "generated from wit/plugin.wit")]

wasmtime::component::bindgen!({
    path: "../wit",
    world: "plugin",
    exports: { default: async },
});
