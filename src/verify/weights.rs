//! Every weight of OUT that the plan does not name as edited must be the original's, bit for bit.
//!
//! In: what the plan makes of MODEL (sliced again in memory), OUT as it was read, and the names that the plan records as edited.
//! Out: the first constant that differs, or `None`. Example: one changed byte in `blocks.3.mlp.fc1.weight` is found and named,
//! whether or not it changes an output.

use std::collections::BTreeSet;

use crate::graph::{Graph, Id, Tensor};
use crate::slice::Sliced;

/// A constant that is not what the plan makes of MODEL.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightDifference {
    /// Its name.
    pub name: String,
    /// max|a - b| where both are floats of the same dims.
    pub max_abs: Option<f64>,
    /// What is different.
    pub reason: String,
}

/// Names of constants in a sliced graph that hold edited values: those named, and the copies that the cut made of them.
pub fn edited_names<'a>(edited: impl Iterator<Item = &'a str>, sliced: &Sliced) -> BTreeSet<String> {
    let mut names: BTreeSet<String> = edited.map(str::to_string).collect();
    let copies = sliced.cloned.iter().filter(|c| names.contains(&c.initializer)).map(|c| c.user.clone());
    let copies: Vec<String> = copies.collect();
    names.extend(copies);
    names
}

/// Compares all constants by name, in the order of `expected`, then those that only `out` has.
///
/// `expected` is the sliced graph made afresh from MODEL and the plan. Edited constants must have its types and dims only.
pub fn first_difference(expected: &Graph, out: &Graph, edited: &BTreeSet<String>) -> Option<WeightDifference> {
    let expected_names: BTreeSet<&str> = constants(expected).map(|(name, _)| name).collect();
    for (name, tensor) in constants(expected) {
        let found = out.find(name).and_then(|v| out.constant(v));
        if let Some((max_abs, reason)) = differs(&tensor, found.as_ref(), edited.contains(name)) {
            return Some(WeightDifference { name: name.to_string(), max_abs, reason });
        }
    }
    let extra = constants(out).map(|(name, _)| name).find(|name| !expected_names.contains(name) && !edited.contains(*name));
    let reason = "the plan makes no such constant".to_string();
    extra.map(|name| WeightDifference { name: name.to_string(), max_abs: None, reason })
}

fn constants(graph: &Graph) -> impl Iterator<Item = (&str, Tensor)> {
    let ids = (0..graph.value_count()).map(Id::new);
    ids.filter_map(|id| Some((graph.value(id).name(), graph.constant(id)?)))
}

fn differs(expected: &Tensor, found: Option<&Tensor>, is_edited: bool) -> Option<(Option<f64>, String)> {
    let Some(found) = found else { return Some((None, "it is missing".to_string())) };
    if expected.dtype != found.dtype || expected.dims != found.dims {
        let (a, b) = (expected.dtype.name(), found.dtype.name());
        return Some((None, format!("expected {a} {:?}, found {b} {:?}", expected.dims, found.dims)));
    }
    if is_edited || (expected.bytes == found.bytes && expected.strings == found.strings) {
        return None;
    }
    let Some((a, b)) = found.to_f32s().zip(expected.to_f32s()) else {
        return Some((None, "its elements are not the model's".to_string()));
    };
    let count = a.iter().zip(&b).filter(|(x, y)| x.to_bits() != y.to_bits()).count();
    let max_abs = a.iter().zip(&b).map(|(x, y)| f64::from((x - y).abs())).fold(0.0, f64::max);
    let max_abs = a.iter().all(|x| x.is_finite()).then_some(max_abs);
    Some((
        max_abs,
        format!("{count} of {} elements are not the model's, and the plan does not say that they were edited", a.len()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slice::{Cloned, NodeChanges};

    fn graph(constants: &[(&str, &[f32])]) -> Graph {
        let mut graph = Graph::default();
        for (name, values) in constants {
            graph.add_initializer(name, Tensor::f32(&[values.len()], values));
        }
        graph
    }

    fn edited(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|n| n.to_string()).collect()
    }

    #[test]
    fn the_first_changed_constant_is_named() {
        let expected = graph(&[("a", &[1.0]), ("b", &[1.0, 2.0]), ("c", &[3.0])]);
        assert_eq!(first_difference(&expected, &expected, &edited(&[])), None);
        let out = graph(&[("c", &[4.0]), ("b", &[1.0, 2.5]), ("a", &[1.0])]);
        let found = first_difference(&expected, &out, &edited(&[])).unwrap();
        assert_eq!((found.name.as_str(), found.max_abs), ("b", Some(0.5)));
        assert_eq!(first_difference(&expected, &out, &edited(&["b"])).unwrap().name, "c");
        assert_eq!(first_difference(&expected, &out, &edited(&["b", "c"])), None);
    }

    #[test]
    fn the_sign_of_zero_missing_and_added_constants_count() {
        let expected = graph(&[("a", &[0.0])]);
        assert_eq!(first_difference(&expected, &graph(&[("a", &[-0.0])]), &edited(&[])).unwrap().max_abs, Some(0.0));
        assert_eq!(first_difference(&expected, &graph(&[]), &edited(&["a"])).unwrap().reason, "it is missing");
        let more = graph(&[("a", &[0.0]), ("z", &[0.0])]);
        assert_eq!(first_difference(&expected, &more, &edited(&[])).unwrap().name, "z");
        assert_eq!(first_difference(&expected, &more, &edited(&["z"])), None);
    }

    #[test]
    fn edited_constants_keep_their_dims() {
        let expected = graph(&[("a", &[0.0])]);
        let found = first_difference(&expected, &graph(&[("a", &[0.0, 1.0])]), &edited(&["a"])).unwrap();
        assert_eq!(found.reason, "expected float32 [1], found float32 [2]");
    }

    #[test]
    fn copies_of_edited_constants_are_edited() {
        let copy = |initializer: &str, user: &str| Cloned {
            initializer: initializer.into(),
            axis: 0,
            user: user.into(),
            removed: vec![],
            of: 1,
        };
        let cloned = vec![copy("a", "a_cut"), copy("b", "b_cut")];
        let sliced = Sliced { graph: Graph::default(), cuts: vec![], cloned, nodes: NodeChanges::default() };
        assert_eq!(edited_names(["a"].into_iter(), &sliced), edited(&["a", "a_cut"]));
    }
}
