//! Makes cargo notice a new migration: the binary carries them.

fn main() {
    println!("cargo:rerun-if-changed=../migrations");
}
