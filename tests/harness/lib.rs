//! The library of the tests and the measurements. It re-exports the testkit and adds worlds (a database and a virtual
//! host for each test), proxies, collectors, browsers, hostile plugins, and the pages of the documentation. It never
//! mocks a server.

pub mod amqp_proxy;
pub mod authority;
pub mod bindings;
pub mod browser;
pub mod collector;
pub mod guests;
pub mod pages;
pub mod pg_proxy;
pub mod pooler;
pub mod proxy;
pub mod raw;
pub mod windows;
pub mod world;

pub use testkit::{
    EVENT_TIMEOUT, build, cluster, command_line, consumer, daemon, eventually, eventually_within, image, place,
    processes, profile_dir, repository, servers, setup, standby, target,
};
