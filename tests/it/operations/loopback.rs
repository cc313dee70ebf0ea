//! The private servers of the demo and the tests are nobody else's: they listen on 127.0.0.1 alone.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use harness::servers::Servers;

/// The inodes of the sockets that our PostgreSQL, RabbitMQ and epmd have open.
fn sockets_of_servers() -> HashSet<String> {
    let processes = fs::read_dir("/proc").expect("proc").filter_map(Result::ok).map(|entry| entry.path());
    let servers = processes.filter(|path| {
        let command = fs::read(path.join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).into_owned();
        let ours = harness::target().join("servers-").to_string_lossy().into_owned();
        let is_server = ["postgres", "beam.smp", "epmd"].iter().any(|name| command.contains(name));
        // epmd has nothing of ours in its arguments but its address, and its working directory is ours.
        let lies = fs::read_link(path.join("cwd")).unwrap_or_default();
        is_server && (command.contains(&ours) || lies.starts_with(harness::target()) || command.contains("epmd\0-port"))
    });
    servers.flat_map(|path| sockets(&path)).collect()
}

fn sockets(process: &Path) -> Vec<String> {
    let files = fs::read_dir(process.join("fd")).into_iter().flatten().filter_map(Result::ok);
    files
        .filter_map(|file| fs::read_link(file.path()).ok())
        .filter_map(|link| Some(link.to_string_lossy().strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect()
}

#[tokio::test]
async fn the_private_servers_listen_on_the_loopback_address_alone() {
    let _servers = Servers::start_private_async().await;
    let sockets = sockets_of_servers();
    let mut listening = 0;
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        for line in fs::read_to_string(table).expect("the table of sockets").lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // The state LISTEN.
            if fields[3] != "0A" || !sockets.contains(fields[9]) {
                continue;
            }
            listening += 1;
            let address = fields[1].split(':').next().expect("an address");
            let loopback = ["0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"];
            assert!(loopback.contains(&address), "a server listens on {}", fields[1]);
        }
    }
    // PostgreSQL, AMQP, the management interface, Erlang's distribution, epmd.
    assert!(listening >= 5, "{listening} sockets of our servers were found");
}
