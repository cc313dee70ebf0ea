//! The host's side of wit/plugin.wit, generated.

wasmtime::component::bindgen!({
    path: "../wit",
    world: "plugin",
    // A row is copied once, into the plugin.
    ownership: Borrowing { duplicate_if_necessary: false },
    exports: { default: async },
});
