//! The doctor's checks of this host: the plugin directory, the state directory and the daemon.

use std::net::SocketAddr;
use std::path::Path;

use crate::cli::doctor::Report;
use crate::cli::ready::{Answer, ask};
use crate::config::Config;
use crate::plugins::{StateDir, StateError, count_files, try_watch};

pub(super) async fn check(report: &mut Report, config: &Config) {
    check_plugin_dir(report, &config.plugin_dir);
    check_state_dir(report, &config.state_dir);
    check_readiness(report, config.http_addr).await;
}

fn check_plugin_dir(report: &mut Report, dir: &Path) {
    let place = dir.display();
    match count_files(dir) {
        Ok(0) => report.warn(format_args!(
            "there is no plugin in the plugin directory {place}, and every row is held: put plugins there, one NAME.wasm each"
        )),
        Ok(files) => report.ok(format_args!("the plugin directory {place} can be read, with {files} plugins")),
        Err(error) => {
            return report.fail(format_args!(
                "the plugin directory {place} cannot be read: {error}; make it, let the daemon's user read it, or give another one with TIDINGS_PLUGIN_DIR"
            ));
        }
    }
    match try_watch(dir) {
        Ok(()) => report.ok(format_args!("the plugin directory {place} can be watched")),
        Err(error) => report.warn(format_args!(
            "the plugin directory {place} cannot be watched ({error}), so the daemon finds changes by looking every 5 s instead of at once: raise fs.inotify.max_user_watches or max_user_instances"
        )),
    }
}

fn check_state_dir(report: &mut Report, dir: &Path) {
    let place = dir.display();
    match StateDir::check(dir) {
        Ok(true) => report.ok(format_args!("the state directory {place} belongs to our user and can be written")),
        Ok(false) => {
            report
                .note(format_args!("the state directory {place} is not there: `tidings run` makes it when it starts"));
        }
        Err(error @ StateError::NoRoom { .. }) => report.warn(error),
        Err(error) => {
            report.fail(format_args!("{:#}; or run the doctor as the daemon's user", anyhow::Error::from(error)));
        }
    }
}

async fn check_readiness(report: &mut Report, addr: SocketAddr) {
    if addr.port() == 0 {
        return report
            .note("TIDINGS_HTTP_ADDR has port 0, so the daemon takes any free port and the doctor cannot ask it");
    }
    // `ask` blocks, until its deadline at most.
    let answer = tokio::task::spawn_blocking(move || ask(addr)).await.expect("asking does not panic");
    match answer {
        Answer::Ready(notes) => {
            report.ok(format_args!("the daemon at {addr} is ready"));
            for note in notes {
                report.warn(format_args!("the daemon at {addr} says: {note}"));
            }
        }
        Answer::NotReady(reasons) => report.fail(format_args!(
            "the daemon at {addr} is not ready: {reasons}; see the checks above, and its log"
        )),
        Answer::Unreachable(reason) => report.note(format_args!("no daemon answers at {addr} ({reason})")),
        Answer::Unexpected(problem) => report.fail(format_args!(
            "the server at {addr} is not a daemon, or it hangs: {problem}; check that TIDINGS_HTTP_ADDR is the daemon's, or restart the daemon"
        )),
    }
}
