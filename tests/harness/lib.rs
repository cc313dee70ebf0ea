//! What the tests and the measurements need beside the testkit, which it hands on: worlds, proxies, collectors, browsers, hostile
//! guests, and the pages of the documentation. Never a mock.

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
pub mod world;

pub use testkit::{
    PATIENCE, build, command_line, consumer, daemon, eventually, eventually_within, image, place, profile_dir,
    repository, servers, setup, target,
};
