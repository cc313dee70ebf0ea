//! What the rounds of a figure say: their median and spread, and whether those of two builds differ by more than noise.
//! It must never know what a figure means, so it does not say which build is better. It depends on no other file of this
//! program, because it is also a test target of its own.
//!
//! The test is written here because no crate fits. The exact test of statrs 0.19 is wrong for groups of the same size
//! (p = 1 for groups that do not overlap) and takes no value that occurs twice. Its approximation, which is all that
//! hypors and rustats have, is meant for large groups: with eight rounds it gives up to six times the exact value.

/// The least number of rounds with each build with which a difference can be told from noise: with three, builds get
/// p = 0.1 even if none of their rounds overlap.
pub(crate) const LEAST_ROUNDS: usize = 4;
/// The probability below which a difference is not taken for noise.
pub(crate) const LEVEL: f64 = 0.05;

/// One figure's rounds with two builds.
#[derive(Debug)]
pub(crate) struct Pair {
    /// The values with the build that this one is compared with.
    pub(crate) base: Vec<f64>,
    /// The values with this checkout's build.
    pub(crate) this: Vec<f64>,
}

impl Pair {
    /// The probability that two builds of the same speed are at least as far apart as these, by the two-sided
    /// Mann-Whitney U test. It is exact, also with values that occur more than once: the share of all ways to deal the
    /// values to both builds in which the sum of the ranks is at least as far from its mean.
    pub(crate) fn probability(&self) -> f64 {
        let all = [&*self.base, &*self.this].concat();
        // Twice the rank, since equal values share the mean of their ranks.
        let rank = |value: &f64| {
            let count = |is: fn(&f64, &f64) -> bool| all.iter().filter(|other| is(other, value)).count();
            count(f64::lt) + count(f64::le) + 1
        };
        let ranks: Vec<usize> = all.iter().map(rank).collect();
        let most: usize = ranks.iter().sum();
        // By the number of values dealt to the base, and by the sum of their ranks.
        let mut ways = vec![vec![0.0; most + 1]; self.base.len() + 1];
        ways[0][0] = 1.0;
        for rank in &ranks {
            // From above, so that no value is dealt twice.
            for dealt in (0..self.base.len()).rev() {
                for sum in 0..=most - rank {
                    ways[dealt + 1][sum + rank] += ways[dealt][sum];
                }
            }
        }
        let ways = &ways[self.base.len()];
        let from_mean = |sum: usize| sum.abs_diff(self.base.len() * (all.len() + 1));
        let seen = from_mean(ranks[..self.base.len()].iter().sum());
        let as_far = ways.iter().enumerate().filter(|(sum, _)| from_mean(*sum) >= seen);
        as_far.map(|(_, ways)| ways).sum::<f64>() / ways.iter().sum::<f64>()
    }

    /// Whether the builds differ by more than noise. `None` = there are too few rounds to tell.
    pub(crate) fn differs(&self) -> Option<bool> {
        let enough = self.base.len().min(self.this.len()) >= LEAST_ROUNDS;
        enough.then(|| self.probability() < LEVEL)
    }

    /// The line of a table with the columns of [`heading`].
    pub(crate) fn line(&self, label: &str, unit: &str) -> String {
        let p = match self.probability() {
            p if p < 0.001 => "p < 0.001".to_owned(),
            p if p < 0.1 => format!("p = {p:.3}"),
            p => format!("p = {p:.2}"),
        };
        let verdict = match self.differs() {
            None => "too few rounds to tell".to_owned(),
            Some(true) => format!("differs ({p})"),
            Some(false) => format!("no difference beyond noise ({p})"),
        };
        let (base, this) = (median(self.base.iter().copied()), median(self.this.iter().copied()));
        // A percentage of nothing, or of a figure below zero, has no meaning.
        let change = if base > 0.0 { format!("{:+.1} %", (this / base - 1.0) * 100.0) } else { String::new() };
        columns(label, unit, &spread(&self.base), &spread(&self.this), &change, &verdict)
    }
}

/// The names of the columns of [`Pair::line`].
pub(crate) fn heading() -> String {
    columns("", "", "BASE (least to most)", "this build (least to most)", "change", "")
}

fn columns(label: &str, unit: &str, base: &str, this: &str, change: &str, verdict: &str) -> String {
    format!("  {label:<46} {unit:<8} {base:<28} {this:<28} {change:>9}   {verdict}").trim_end().to_owned()
}

fn spread(values: &[f64]) -> String {
    let (least, most) =
        (values.iter().copied().fold(f64::MAX, f64::min), values.iter().copied().fold(f64::MIN, f64::max));
    format!("{} ({} to {})", number(median(values.iter().copied())), number(least), number(most))
}

/// The median; for an even number of values, the upper one.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    *values.get(values.len() / 2).expect("a figure has a round")
}

/// Formats a number with three digits, or with all digits before the point.
pub(crate) fn number(value: f64) -> String {
    let decimals = match value.abs() {
        small if small > 0.0 && small < 10.0 => 2,
        medium if medium > 0.0 && medium < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(base: &[f64], this: &[f64]) -> Pair {
        Pair { base: base.to_vec(), this: this.to_vec() }
    }

    /// Checks a probability against one of the form `ways` of `all`.
    fn assert_probability(base: &[f64], this: &[f64], ways: f64, all: f64) {
        for pair in [pair(base, this), pair(this, base)] {
            let p = pair.probability();
            assert!((p - ways / all).abs() < 1e-12, "{pair:?}: {p} and not {}", ways / all);
        }
    }

    #[test]
    fn the_probability_is_that_of_the_tables() {
        // Groups that do not overlap: 2 of the 70 and of the 12,870 ways.
        assert_probability(&[1.0, 2.0, 3.0, 4.0], &[5.0, 6.0, 7.0, 8.0], 2.0, 70.0);
        let eight = |from: u8| (from..from + 8).map(f64::from).collect::<Vec<f64>>();
        assert_probability(&eight(0), &eight(8), 2.0, 12_870.0);
        assert_probability(&[1.0, 2.0, 3.0], &[4.0, 5.0, 6.0], 2.0, 20.0);
        // The example in the documentation of SciPy, which gives 0.1111.
        assert_probability(&[19.0, 22.0, 16.0, 29.0, 24.0], &[20.0, 11.0, 17.0, 12.0], 14.0, 126.0);
    }

    #[test]
    fn equal_values_share_their_rank() {
        assert_probability(&[1.0; 4], &[1.0; 4], 1.0, 1.0);
        assert_probability(&[1.0; 4], &[2.0; 4], 2.0, 70.0);
        // Of the 6 ways to deal 1, 2, 2, 3, those with both least or both largest values are as far apart: 1 with either
        // 2, and 3 with either 2.
        assert_probability(&[1.0, 2.0], &[2.0, 3.0], 4.0, 6.0);
    }

    #[test]
    fn a_line_says_whether_the_builds_differ() {
        let line =
            pair(&[100.0, 101.0, 102.0, 103.0], &[110.0, 111.0, 112.0, 113.0]).line("rows due to confirmed", "rows/s");
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(
            words.join(" "),
            "rows due to confirmed rows/s 102 (100 to 103) 112 (110 to 113) +9.8 % differs (p = 0.029)"
        );
        let line = pair(&[1.0, 3.0, 5.0, 7.0], &[2.0, 4.0, 6.0, 8.0]).line("most", "ms");
        assert!(line.ends_with("+20.0 %   no difference beyond noise (p = 0.69)"), "{line}");
    }

    #[test]
    fn three_rounds_are_too_few() {
        let line = pair(&[1.0, 2.0, 3.0], &[4.0, 5.0, 6.0]).line("", "");
        assert!(line.ends_with("too few rounds to tell"), "{line}");
    }

    #[test]
    fn a_share_of_nothing_has_no_percentage() {
        let line = pair(&[0.0; 4], &[1.0; 4]).line("rows that came early", "rows");
        assert!(line.contains("0 (0 to 0)") && !line.contains('%'), "{line}");
        assert!(heading().contains("BASE"));
    }
}
