//! In which order the requests of a batch are carried out. Requests that touch different rows go together; requests that touch the
//! same row keep their order. No I/O.

use std::collections::HashSet;

use uuid::Uuid;

use crate::model::intake::{OnConflict, Request, Step, Target};

/// What a step touches.
#[derive(Default)]
struct Touched<'a> {
    keys: HashSet<(&'a str, &'a str)>,
    ids: HashSet<Uuid>,
    /// A subject, which any row may be about.
    everything: bool,
    requests: usize,
}

/// The steps in which `requests` are carried out.
#[must_use]
pub(super) fn steps(requests: &[Request]) -> Vec<Step<'_>> {
    let (mut steps, mut touched) = (Vec::<Step<'_>>::new(), Touched::default());
    for (at, request) in requests.iter().enumerate() {
        if steps.is_empty() || !touched.add(request) {
            touched = Touched::default();
            touched.add(request);
            steps.push(Step::default());
        }
        add(steps.last_mut().expect("there is one"), at, request);
    }
    for step in &mut steps {
        for rows in [&mut step.same, &mut step.replace, &mut step.careful] {
            rows.sort_by(|(_, row), (_, other)| (&row.kind, &row.key).cmp(&(&other.kind, &other.key)));
        }
        step.cancel.sort_by_key(|(_, target)| *target);
        step.reschedule.sort_by_key(|(_, target, _)| *target);
    }
    steps
}

impl<'a> Touched<'a> {
    /// Adds what a request touches; `false` = something of it is touched already.
    fn add(&mut self, request: &'a Request) -> bool {
        let is_first = self.requests == 0;
        self.requests += 1;
        let (key, id) = match request {
            Request::Schedule(row) => (row.key.as_deref().map(|key| (row.kind.as_str(), key)), row.id),
            Request::Cancel(target) | Request::Reschedule(target, _) => match target {
                Target::Key { kind, key } => (Some((kind.as_str(), key.as_str())), None),
                Target::Subject(_) => {
                    self.everything = true;
                    return is_first;
                }
            },
        };
        !self.everything && key.is_none_or(|key| self.keys.insert(key)) && id.is_none_or(|id| self.ids.insert(id))
    }
}

fn add<'a>(step: &mut Step<'a>, at: usize, request: &'a Request) {
    match request {
        Request::Schedule(row) => match row.on_conflict {
            OnConflict::Same => step.same.push((at, row)),
            OnConflict::Replace => step.replace.push((at, row)),
            OnConflict::Keep | OnConflict::Error => step.careful.push((at, row)),
        },
        Request::Cancel(target) => step.cancel.push((at, target)),
        Request::Reschedule(target, when) => step.reschedule.push((at, target, *when)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::model::intake::{NewRow, When};

    fn request() -> impl Strategy<Value = Request> {
        let key = || proptest::sample::select(&["a", "b", "c"][..]).prop_map(str::to_owned);
        let target = move || {
            prop_oneof![
                4 => key().prop_map(|key| Target::Key { kind: "k".into(), key }),
                1 => Just(Target::Subject("s".into())),
            ]
        };
        let on_conflict =
            proptest::sample::select(&[OnConflict::Same, OnConflict::Replace, OnConflict::Keep, OnConflict::Error][..]);
        prop_oneof![
            4 => (proptest::option::of(key()), proptest::option::of(0..3_u128), on_conflict).prop_map(|(key, id, on_conflict)| {
                Request::Schedule(Box::new(NewRow {
                    id: id.map(Uuid::from_u128),
                    redelivered: false,
                    kind: "k".into(),
                    key,
                    subject: None,
                    due: When::After(0),
                    expires_ms: None,
                    expires_after_ms: None,
                    priority: 4,
                    payload: "{}".into(),
                    headers: "{}".into(),
                    on_conflict,
                }))
            }),
            1 => target().prop_map(Request::Cancel),
            1 => target().prop_map(|target| Request::Reschedule(target, When::After(0))),
        ]
    }

    /// The places of the requests of a step.
    fn places(step: &Step<'_>) -> Vec<usize> {
        let rows = [&step.same, &step.replace, &step.careful].into_iter().flatten().map(|(at, _)| *at);
        let cancels = step.cancel.iter().map(|(at, _)| *at);
        rows.chain(cancels).chain(step.reschedule.iter().map(|(at, ..)| *at)).collect()
    }

    /// What a request touches, as a text; the empty text = everything.
    fn touched(request: &Request) -> Vec<String> {
        match request {
            Request::Schedule(row) => row
                .key
                .iter()
                .map(|key| format!("key {key}"))
                .chain(row.id.iter().map(|id| format!("id {id}")))
                .collect(),
            Request::Cancel(Target::Key { key, .. }) | Request::Reschedule(Target::Key { key, .. }, _) => {
                vec![format!("key {key}")]
            }
            Request::Cancel(Target::Subject(_)) | Request::Reschedule(Target::Subject(_), _) => vec![String::new()],
        }
    }

    proptest! {
        #[test]
        fn each_request_is_carried_out_once_and_those_that_touch_the_same_row_in_their_order(
            requests in proptest::collection::vec(request(), 0..20),
        ) {
            let steps = steps(&requests);
            let mut step_of = BTreeMap::new();
            for (number, step) in steps.iter().enumerate() {
                for at in places(step) {
                    prop_assert_eq!(step_of.insert(at, number), None);
                }
            }
            prop_assert_eq!(step_of.len(), requests.len());
            for (first, second) in (0..requests.len()).flat_map(|second| (0..second).map(move |first| (first, second))) {
                prop_assert!(step_of[&first] <= step_of[&second]);
                let (one, other) = (touched(&requests[first]), touched(&requests[second]));
                let everything = one.contains(&String::new()) || other.contains(&String::new());
                if everything || one.iter().any(|what| other.contains(what)) {
                    prop_assert!(step_of[&first] < step_of[&second], "{:?} and {:?}", &requests[first], &requests[second]);
                }
            }
        }
    }
}
