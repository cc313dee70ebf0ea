//! What was measured: figures, each beside its limit or rival of the same run and its target, as a table for people and as
//! JSON. Knows nothing of how anything is measured.

use std::time::Duration;

use serde_json::{Value, json};

/// One figure: the median of its rounds.
#[derive(Debug)]
pub(crate) struct Figure {
    what: String,
    unit: &'static str,
    rounds: Vec<f64>,
    beside: Option<Beside>,
    target: Option<Target>,
}

/// What a figure is held against: measured in the same rounds, in the same unit.
#[derive(Debug)]
struct Beside {
    what: String,
    rounds: Vec<f64>,
}

/// What a figure is to reach.
#[derive(Clone, Copy, Debug)]
enum Target {
    AtMost(f64),
    Under(f64),
    /// Of what stands beside it.
    Share(f64),
}

impl Figure {
    /// A figure of one value a round.
    pub(crate) fn new(what: impl Into<String>, unit: &'static str, rounds: impl IntoIterator<Item = f64>) -> Self {
        Self { what: what.into(), unit, rounds: rounds.into_iter().collect(), beside: None, target: None }
    }

    /// Held against this.
    pub(crate) fn beside(mut self, what: impl Into<String>, rounds: impl IntoIterator<Item = f64>) -> Self {
        self.beside = Some(Beside { what: what.into(), rounds: rounds.into_iter().collect() });
        self
    }

    /// To be at most this much.
    pub(crate) fn at_most(mut self, most: f64) -> Self {
        self.target = Some(Target::AtMost(most));
        self
    }

    /// To be less than this.
    pub(crate) fn under(mut self, limit: f64) -> Self {
        self.target = Some(Target::Under(limit));
        self
    }

    /// To be at least this share of what stands beside it.
    pub(crate) fn at_least_share(mut self, share: f64) -> Self {
        self.target = Some(Target::Share(share));
        self
    }

    fn value(&self) -> f64 {
        median(self.rounds.iter().copied())
    }

    /// The figure in parts of what stands beside it: the median of the rounds' quotients, in which what disturbed a whole
    /// round cancels out.
    fn share(&self) -> Option<f64> {
        let beside = self.beside.as_ref()?;
        if beside.rounds.len() == self.rounds.len() {
            Some(median(self.rounds.iter().zip(&beside.rounds).map(|(figure, beside)| figure / beside)))
        } else {
            Some(self.value() / median(beside.rounds.iter().copied()))
        }
    }

    /// Whether the target is reached; `None` = there is none.
    fn reached(&self) -> Option<bool> {
        Some(match self.target? {
            Target::AtMost(most) => self.value() <= most,
            Target::Under(limit) => self.value() < limit,
            Target::Share(share) => self.share().is_some_and(|reached| reached >= share),
        })
    }

    fn line(&self) -> String {
        let beside = self.beside.as_ref().map_or(String::new(), |beside| {
            format!("{} {}", beside.what, number(median(beside.rounds.iter().copied())))
        });
        let share = self.share().filter(|share| share.is_finite()).map_or(String::new(), percent);
        let target = match self.target {
            None => String::new(),
            Some(Target::AtMost(most)) => format!("at most {}", number(most)),
            Some(Target::Under(limit)) => format!("under {}", number(limit)),
            Some(Target::Share(share)) => format!("at least {}", percent(share)),
        };
        let reached = match self.reached() {
            None => "",
            Some(true) => "reached",
            Some(false) => "MISSED",
        };
        let line = format!(
            "  {:<46} {:>9} {:<8} {beside:<46} {share:>6}   {target:<14} {reached}",
            self.what,
            number(self.value()),
            self.unit
        );
        line.trim_end().to_owned()
    }

    fn json(&self) -> Value {
        let target = self.target.map(|target| match target {
            Target::AtMost(most) => json!({ "at_most": most }),
            Target::Under(limit) => json!({ "under": limit }),
            Target::Share(share) => json!({ "at_least_share": share }),
        });
        let beside = self.beside.as_ref().map(|beside| {
            let value = median(beside.rounds.iter().copied());
            json!({ "what": beside.what, "value": value, "rounds": beside.rounds })
        });
        json!({
            "what": self.what, "unit": self.unit, "value": self.value(), "rounds": self.rounds, "beside": beside,
            "share": self.share(), "target": target, "reached": self.reached(),
        })
    }
}

/// Everything of one run.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// Machine, versions and settings, by name.
    circumstances: Vec<(&'static str, String)>,
    scenarios: Vec<Done>,
}

#[derive(Debug)]
struct Done {
    name: &'static str,
    took: Duration,
    /// The figures, or why there are none.
    came_to: Result<Vec<Figure>, String>,
}

impl Report {
    /// Begins with the circumstances, which are printed.
    pub(crate) fn begin(circumstances: Vec<(&'static str, String)>) -> Self {
        for (name, value) in &circumstances {
            println!("{name:<14} {value}");
        }
        Self { circumstances, scenarios: Vec::new() }
    }

    /// Adds what became of a scenario, and prints it.
    pub(crate) fn add(&mut self, name: &'static str, what: &str, took: Duration, came_to: Result<Vec<Figure>, String>) {
        println!("\n{name}: {what} ({:.0} s)", took.as_secs_f64());
        match &came_to {
            Ok(figures) => figures.iter().for_each(|figure| println!("{}", figure.line())),
            Err(why) => println!("  could not be measured: {why}"),
        }
        self.scenarios.push(Done { name, took, came_to });
    }

    /// Prints how many targets were reached, and returns whether every scenario ran to its end.
    pub(crate) fn end(&self) -> bool {
        let figures = || self.scenarios.iter().filter_map(|done| done.came_to.as_ref().ok()).flatten();
        let with_target = figures().filter(|figure| figure.target.is_some()).count();
        let reached = figures().filter(|figure| figure.reached() == Some(true)).count();
        let took: Duration = self.scenarios.iter().map(|done| done.took).sum();
        println!("\n{reached} of {with_target} targets reached, {:.0} min", took.as_secs_f64() / 60.0);
        let mut complete = true;
        for Done { name, .. } in self.scenarios.iter().filter(|done| done.came_to.is_err()) {
            println!("{name} could not be measured");
            complete = false;
        }
        complete
    }

    /// All of it, with the value of each round.
    pub(crate) fn json(&self) -> Value {
        let circumstances: serde_json::Map<String, Value> =
            self.circumstances.iter().map(|(name, value)| ((*name).to_owned(), value.clone().into())).collect();
        let scenarios = self.scenarios.iter().map(|Done { name, took, came_to }| {
            let (figures, failed) = match came_to {
                Ok(figures) => (figures.iter().map(Figure::json).collect(), None),
                Err(why) => (Vec::new(), Some(why)),
            };
            json!({ "scenario": name, "seconds": took.as_secs_f64(), "figures": figures, "failed": failed })
        });
        json!({ "circumstances": circumstances, "scenarios": scenarios.collect::<Vec<_>>() })
    }
}

/// Durations of one kind, in ms, from the shortest to the longest.
#[derive(Clone, Debug)]
pub(crate) struct Times(Vec<f64>);

impl Times {
    /// In ms, in any order.
    pub(crate) fn new(times: impl IntoIterator<Item = f64>) -> Self {
        let mut times: Vec<f64> = times.into_iter().collect();
        assert!(!times.is_empty(), "nothing was measured");
        times.sort_by(f64::total_cmp);
        Self(times)
    }

    /// The shortest that is at least as long as `percent` of them.
    pub(crate) fn at(&self, percent: usize) -> f64 {
        self.0[(self.0.len() * percent).div_ceil(100).saturating_sub(1)]
    }

    /// How many are below zero.
    pub(crate) fn negative(&self) -> f64 {
        count(self.0.partition_point(|ms| *ms < 0.0))
    }
}

/// The median; of an even number, the upper one.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    *values.get(values.len() / 2).expect("a figure has a round")
}

/// A number of things as a figure.
pub(crate) fn count(number: usize) -> f64 {
    f64::from(u32::try_from(number).expect("fewer than four billion"))
}

/// Three digits, or all before the point.
fn number(value: f64) -> String {
    let decimals = match value.abs() {
        small if small > 0.0 && small < 10.0 => 2,
        medium if medium > 0.0 && medium < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}
