//! Whether rows kept to a limit, however a window of time is chosen.

/// What a limit allows beyond itself, in seconds.
const ALLOWANCE: f64 = 0.02;

/// By how many rows the busiest of all windows exceeds what a limit allows of `rate` rows a second and `burst` at once, and what it
/// allows in 20 ms more; 0 = none does. `sent` has when the rows were sent, in seconds, in order.
#[must_use]
pub fn excess(sent: &[f64], rate: f64, burst: f64) -> f64 {
    let (mut fewest, mut most, mut number) = (f64::MAX, 0.0_f64, 0.0);
    for at in sent {
        // A window from the row i to the row j has j - i + 1 rows, and may have burst + rate * (t_j - t_i + allowance).
        let place = number - rate * at;
        fewest = fewest.min(place);
        most = most.max(place - fewest + 1.0 - burst - rate * ALLOWANCE);
        number += 1.0;
    }
    // What was allowed is seldom a whole number.
    most.floor().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_with_more_rows_than_the_limit_allows_is_found() {
        let even: Vec<f64> = (0..100).map(|n| 1e9 + f64::from(n) / 10.0).collect();
        assert!(excess(&even, 10.0, 1.0) < 0.5);
        let twice: Vec<f64> = even.iter().flat_map(|at| [*at, *at]).collect();
        assert!(excess(&twice, 10.0, 1.0) >= 98.0);
        let burst = vec![1e9; 60];
        assert!((excess(&burst, 500.0, 50.0) - 0.0).abs() < 0.5);
        assert!((excess(&burst, 500.0, 40.0) - 10.0).abs() < 0.5);
    }
}
