//! Tests that no row is lost when anything is killed, cut off, frozen or refused. A second copy of a message occurs
//! only after a fault, and has the same id.

pub(crate) mod cluster;
pub(crate) mod crash;
pub(crate) mod faults;
pub(crate) mod nodes;
pub(crate) mod outcomes;
pub(crate) mod scenario;
pub(crate) mod sent_rows;
pub(crate) mod settling;
pub(crate) mod signals;
pub(crate) mod sizes;
pub(crate) mod soak;
