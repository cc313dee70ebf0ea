//! From a file to compiled code: finds the files in the plugin directory, waits until each is written, reads it, checks
//! that it may serve, and has it compiled.
//!
//! Must never let a plugin serve: only the registry does. Must never compile in the daemon what a child process has not
//! compiled within its limits before.
//!
//! To change it, know that
//!
//! - compiling cannot be interrupted and may take hours and gigabytes, so a child process does it, which can be killed.
//!   It leaves the code in a cache that only the daemon's user can write. The daemon itself compiles only what a child
//!   has compiled within the limits but could not store, for instance because the disk is full. Commands such as
//!   `tidings plugin check` compile without a child and without limits if they find no usable state directory;
//! - everything that can be checked without compiling is checked before: `inspect` counts what makes compiling
//!   expensive, and `check` compares the imports and exports by name, so that errors are sentences for the author
//!   rather than the linker's;
//! - the allowlist holds digests, not names, and is checked where bytes become a generation. So it applies to files, to
//!   versions that are rolled back to, and to generations that serve already. If the list cannot be read, nothing new
//!   serves and nothing that serves is stopped;
//! - a file counts as written when two looks in a row have seen the same of it.

pub(super) mod allowlist;
pub(super) mod check;
pub(super) mod compile;
pub(super) mod directory;
pub(super) mod inspect;
pub(super) mod load_error;
pub(super) mod settings;
pub(super) mod source;
