//! The behaviour of Tidings, against real servers. One folder per promise, one file per area; the names of the tests are what
//! users may rely on.

mod database;
mod dead_letters;
mod documentation;
mod nothing_lost;
mod on_time;
mod operations;
mod plugins;
