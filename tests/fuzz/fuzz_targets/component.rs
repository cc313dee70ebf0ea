//! A file in the plugin directory, which the daemon inspects before it compiles anything. Start from real plugins: give
//! their directory as a second corpus.

#![cfg_attr(fuzzing, no_main)]

use tidings::plugins::{check_world, inspect};

/// The first bytes of every component.
const PREAMBLE: [u8; 8] = *b"\0asm\x0d\0\x01\0";

tidings_fuzz::target!(try_component);

fn try_component(bytes: &[u8]) {
    try_file(bytes);
    try_file(&[&PREAMBLE, bytes].concat());
}

fn try_file(bytes: &[u8]) {
    match inspect(bytes) {
        Ok(world) => {
            let names = [world.imports.concat(), world.exports.concat()].concat();
            assert!(names.len() <= 64 * 1024 && !names.contains(char::is_control));
            if let Err(error) = check_world(&world) {
                assert!(error.to_string().len() <= 512 * 1024);
            }
        }
        Err(error) => assert!(error.to_string().len() < 200 * 1024),
    }
}
