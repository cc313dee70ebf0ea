//! From a file to compiled code: what lies in the plugin directory, whether it is complete and may serve, and compiling it
//! in a process that can be killed.
//!
//! Must never let anything serve: only the registry does.

pub(super) mod allowlist;
pub(super) mod check;
pub(super) mod compile;
pub(super) mod directory;
pub(super) mod inspect;
pub(super) mod load_error;
pub(super) mod settings;
pub(super) mod source;
