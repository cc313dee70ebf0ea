//! What lies in the plugin directory: any file, read before anything is compiled. A file of its own is a good beginning:
//! give the directory with the plugins as a second corpus.

#![cfg_attr(fuzzing, no_main)]

use tidings::plugins::{check_world, inspect};

/// What every component begins with.
const PREAMBLE: [u8; 8] = *b"\0asm\x0d\0\x01\0";

tidings_fuzz::target!(try_component);

fn try_component(bytes: &[u8]) {
    look_into(bytes);
    look_into(&[&PREAMBLE, bytes].concat());
}

fn look_into(bytes: &[u8]) {
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
