//! Reports the figures, each beside its limit or rival of the same run and beside its target, as a table and as JSON.
//! It does not know how the figures are measured.

use std::time::Duration;

use serde_json::{Value, json};

use crate::rounds::{median, number};

/// One figure, whose value is the median of its rounds.
#[derive(Debug)]
pub(crate) struct Figure {
    pub(crate) label: String,
    pub(crate) unit: &'static str,
    rounds: Vec<f64>,
    beside: Option<Beside>,
    target: Option<Target>,
}

/// The figure with which another one is compared, measured in the same rounds and in the same unit.
#[derive(Debug)]
struct Beside {
    label: String,
    rounds: Vec<f64>,
}

/// The target of a figure.
#[derive(Clone, Copy, Debug)]
enum Target {
    AtMost(f64),
    Under(f64),
    AtLeast(f64),
    /// At least this share of the figure beside it.
    Share(f64),
    /// At most this multiple of the figure beside it.
    Multiple(f64),
}

impl Figure {
    /// A figure with one value for each round.
    pub(crate) fn new(label: impl Into<String>, unit: &'static str, rounds: impl IntoIterator<Item = f64>) -> Self {
        Self { label: label.into(), unit, rounds: rounds.into_iter().collect(), beside: None, target: None }
    }

    /// Sets the figure with which this one is compared.
    pub(crate) fn beside(mut self, label: impl Into<String>, rounds: impl IntoIterator<Item = f64>) -> Self {
        self.beside = Some(Beside { label: label.into(), rounds: rounds.into_iter().collect() });
        self
    }

    /// Sets the target to at most `most`.
    pub(crate) fn at_most(mut self, most: f64) -> Self {
        self.target = Some(Target::AtMost(most));
        self
    }

    /// Sets the target to at least `least`.
    pub(crate) fn at_least(mut self, least: f64) -> Self {
        self.target = Some(Target::AtLeast(least));
        self
    }

    /// Sets the target to less than `limit`.
    pub(crate) fn under(mut self, limit: f64) -> Self {
        self.target = Some(Target::Under(limit));
        self
    }

    /// Sets the target to at least this share of the figure beside it.
    pub(crate) fn at_least_share(mut self, share: f64) -> Self {
        self.target = Some(Target::Share(share));
        self
    }

    /// Sets the target to at most this multiple of the figure beside it.
    pub(crate) fn at_most_share(mut self, multiple: f64) -> Self {
        self.target = Some(Target::Multiple(multiple));
        self
    }

    /// The label of the figure with which this one is compared.
    pub(crate) fn beside_label(&self) -> Option<&str> {
        self.beside.as_ref().map(|beside| &*beside.label)
    }

    /// The median of the rounds.
    pub(crate) fn value(&self) -> f64 {
        median(self.rounds.iter().copied())
    }

    /// The quotient of this figure and the one beside it: the median of the rounds' quotients, in which a disturbance
    /// of a whole round cancels out.
    pub(crate) fn share(&self) -> Option<f64> {
        let beside = self.beside.as_ref()?;
        if beside.rounds.len() == self.rounds.len() {
            Some(median(self.rounds.iter().zip(&beside.rounds).map(|(figure, beside)| figure / beside)))
        } else {
            Some(self.value() / median(beside.rounds.iter().copied()))
        }
    }

    /// Whether the target is reached. `None` = there is no target.
    fn reached(&self) -> Option<bool> {
        Some(match self.target? {
            Target::AtMost(most) => self.value() <= most,
            Target::AtLeast(least) => self.value() >= least,
            Target::Under(limit) => self.value() < limit,
            Target::Share(share) => self.share().is_some_and(|reached| reached >= share),
            Target::Multiple(multiple) => self.share().is_some_and(|reached| reached <= multiple),
        })
    }

    fn line(&self) -> String {
        let beside = self.beside.as_ref().map_or(String::new(), |beside| {
            format!("{} {}", beside.label, number(median(beside.rounds.iter().copied())))
        });
        let share = self.share().filter(|share| share.is_finite()).map_or(String::new(), percent);
        let target = match self.target {
            None => String::new(),
            Some(Target::AtMost(most)) => format!("at most {}", number(most)),
            Some(Target::AtLeast(least)) => format!("at least {}", number(least)),
            Some(Target::Under(limit)) => format!("under {}", number(limit)),
            Some(Target::Share(share)) => format!("at least {}", percent(share)),
            Some(Target::Multiple(multiple)) => format!("at most {}", percent(multiple)),
        };
        let reached = match self.reached() {
            None => "",
            Some(true) => "reached",
            Some(false) => "MISSED",
        };
        let line = format!(
            "  {:<46} {:>9} {:<8} {beside:<46} {share:>6}   {target:<14} {reached}",
            self.label,
            number(self.value()),
            self.unit
        );
        line.trim_end().to_owned()
    }

    /// The figure as JSON, with the value of each round.
    pub(crate) fn json(&self) -> Value {
        let target = self.target.map(|target| match target {
            Target::AtMost(most) => json!({ "at_most": most }),
            Target::AtLeast(least) => json!({ "at_least": least }),
            Target::Under(limit) => json!({ "under": limit }),
            Target::Share(share) => json!({ "at_least_share": share }),
            Target::Multiple(multiple) => json!({ "at_most_share": multiple }),
        });
        let beside = self.beside.as_ref().map(|beside| {
            let value = median(beside.rounds.iter().copied());
            json!({ "what": beside.label, "value": value, "rounds": beside.rounds })
        });
        json!({
            "what": self.label, "unit": self.unit, "value": self.value(), "rounds": self.rounds, "beside": beside,
            "share": self.share(), "target": target, "reached": self.reached(),
        })
    }
}

/// Machine, versions and settings of a run, by name.
#[derive(Debug)]
pub(crate) struct Circumstances(pub(crate) Vec<(&'static str, String)>);

impl Circumstances {
    /// Prints a line for each.
    pub(crate) fn print(&self) {
        for (name, value) in &self.0 {
            println!("{name:<14} {value}");
        }
    }

    /// The same as JSON.
    pub(crate) fn json(&self) -> Value {
        self.0.iter().map(|(name, value)| ((*name).to_owned(), Value::from(&**value))).collect()
    }
}

/// The results of one run.
#[derive(Debug)]
pub(crate) struct Report {
    circumstances: Circumstances,
    scenarios: Vec<ScenarioResult>,
}

#[derive(Debug)]
struct ScenarioResult {
    name: &'static str,
    took: Duration,
    /// The figures, or the reason why there are none.
    result: Result<Vec<Figure>, String>,
}

impl Report {
    /// Prints the circumstances and begins a report with them.
    pub(crate) fn begin(circumstances: Circumstances) -> Self {
        circumstances.print();
        Self { circumstances, scenarios: Vec::new() }
    }

    /// Adds the result of a scenario, and prints it.
    pub(crate) fn add(&mut self, name: &'static str, label: &str, took: Duration, result: Result<Vec<Figure>, String>) {
        println!("\n{name}: {label} ({:.0} s)", took.as_secs_f64());
        match &result {
            Ok(figures) => figures.iter().for_each(|figure| println!("{}", figure.line())),
            Err(reason) => println!("  could not be measured: {reason}"),
        }
        self.scenarios.push(ScenarioResult { name, took, result });
    }

    /// Prints how many targets were reached, and returns whether every scenario ran to its end.
    pub(crate) fn end(&self) -> bool {
        let figures = || self.scenarios.iter().filter_map(|done| done.result.as_ref().ok()).flatten();
        let with_target = figures().filter(|figure| figure.target.is_some()).count();
        let reached = figures().filter(|figure| figure.reached() == Some(true)).count();
        let took: Duration = self.scenarios.iter().map(|done| done.took).sum();
        println!("\n{reached} of {with_target} targets reached, {:.0} min", took.as_secs_f64() / 60.0);
        let mut complete = true;
        for ScenarioResult { name, .. } in self.scenarios.iter().filter(|done| done.result.is_err()) {
            println!("{name} could not be measured");
            complete = false;
        }
        complete
    }

    /// The whole report as JSON, with the value of each round.
    pub(crate) fn json(&self) -> Value {
        let scenarios = self.scenarios.iter().map(|ScenarioResult { name, took, result }| {
            let (figures, failed) = match result {
                Ok(figures) => (figures.iter().map(Figure::json).collect(), None),
                Err(reason) => (Vec::new(), Some(reason)),
            };
            json!({ "scenario": name, "seconds": took.as_secs_f64(), "figures": figures, "failed": failed })
        });
        json!({ "circumstances": self.circumstances.json(), "scenarios": scenarios.collect::<Vec<_>>() })
    }
}

/// Durations in ms, sorted.
#[derive(Clone, Debug)]
pub(crate) struct Times(Vec<f64>);

impl Times {
    /// Sorts durations, given in ms in any order.
    pub(crate) fn new(times: impl IntoIterator<Item = f64>) -> Self {
        let mut times: Vec<f64> = times.into_iter().collect();
        assert!(!times.is_empty(), "nothing was measured");
        times.sort_by(f64::total_cmp);
        Self(times)
    }

    /// The percentile: the shortest duration that is at least as long as `percent` % of all.
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        self.0[(self.0.len() * percent).div_ceil(100).saturating_sub(1)]
    }

    /// The number of durations below zero.
    pub(crate) fn count_negative(&self) -> f64 {
        count(self.0.partition_point(|ms| *ms < 0.0))
    }
}

/// Converts a count to a figure.
pub(crate) fn count(number: usize) -> f64 {
    f64::from(u32::try_from(number).expect("fewer than four billion"))
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}
