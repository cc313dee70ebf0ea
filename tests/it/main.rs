//! Tests of the behaviour of Tidings with real servers. There is one folder for each promise and one file for each
//! area. The name of each test states what users may rely on.

mod database;
mod dead_letters;
mod documentation;
mod intake;
mod limits;
mod nothing_lost;
mod on_time;
mod operations;
mod plugins;
mod recurrences;
