//! Measures bodies from small ones to the largest that SQL accepts: bytes a second, beside those of raw messages of the
//! same size, and the memory of the daemon.

use crate::Bench;
use crate::load::Stage;
use crate::probe::peak_mib;
use crate::raw;
use crate::report::Figure;

/// Sizes of bodies in bytes, each with its name.
const SIZES: [(usize, &str); 6] =
    [(400, "400 B"), (5_000, "5 KB"), (20_000, "20 KB"), (100_000, "100 KB"), (300_000, "300 KB"), (900_000, "900 KB")];
/// The index in [`SIZES`] of the size with which the last one is compared.
const MIDDLE: usize = 2;
/// The largest body that fits into a payload, beside the routing key.
const LARGEST: usize = 16_770_000;
/// The number of bytes in a round, unless that takes more than `MOST_ROWS` rows.
const BYTES: usize = 100_000_000;
const MOST_ROWS: u32 = 40_000;
/// Limits that allow a plugin to build the largest body.
const LIMITS: &str = "[limits]\ncpu-ms = 10000\nwall-ms = 20000\nmemory-mib = 512\noutput-kib = 32768\n";

/// Measures rows of each size.
pub(crate) async fn sizes(bench: &Bench) -> Vec<Figure> {
    let stage = Stage::with_plugins(&["message"]).await;
    let daemon = stage.start_daemon().await;
    let (mut figures, mut middle) = (Vec::new(), Vec::new());
    for (place, (bytes, name)) in SIZES.into_iter().enumerate() {
        let (rates, limits) = measure_rounds(bench, &stage, bytes).await;
        let (rates, limits) = (in_megabytes(&rates, bytes), in_megabytes(&limits, bytes));
        let figure = Figure::new(format!("{name}, due to confirmed"), "MB/s", rates.clone());
        figures.push(figure.beside("raw publish and confirm", limits));
        if place == MIDDLE {
            middle.clone_from(&rates);
        } else if place == SIZES.len() - 1 {
            let figure = Figure::new(name, "MB/s", rates).beside(SIZES[MIDDLE].1, middle.clone());
            figures.push(figure.at_least_share(0.9));
        }
    }
    figures.push(Figure::new("resident memory, most", "MiB", [peak_mib(daemon.pid())]).at_most(128.0));
    assert!(daemon.stop().await.success());

    std::fs::write(stage.world.plugin_dir.join("message.toml"), LIMITS).expect("written");
    let daemon = stage.start_daemon().await;
    let (rates, limits) = measure_rounds(bench, &stage, LARGEST).await;
    let figure = Figure::new("16 MiB, due to confirmed", "MB/s", in_megabytes(&rates, LARGEST));
    figures.push(figure.beside("raw publish and confirm", in_megabytes(&limits, LARGEST)));
    let most = [peak_mib(daemon.pid())];
    figures.push(Figure::new("the same, with rows of 16 MiB", "MiB", most).at_most(256.0));
    assert!(daemon.stop().await.success());
    stage.remove().await;
    figures
}

/// The rates of the daemon and of the raw publisher with bodies of `bytes` bytes, in messages per second.
async fn measure_rounds(bench: &Bench, stage: &Stage, bytes: usize) -> (Vec<f64>, Vec<f64>) {
    let rows = u32::try_from(BYTES / bytes).expect("few").clamp(12, bench.rows(MOST_ROWS));
    let (mut rates, mut limits) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds() {
        limits.push(raw::publish_bodies(stage, rows, bytes).await);
        stage.tidy().await;
        rates.push(stage.drain_bodies(rows, bytes).await);
        stage.tidy().await;
    }
    (rates, limits)
}

fn in_megabytes(rates: &[f64], bytes: usize) -> Vec<f64> {
    let bytes = f64::from(u32::try_from(bytes).expect("at most 16 MiB"));
    rates.iter().map(|rate| rate * bytes / 1e6).collect()
}
