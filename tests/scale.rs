//! What deep and large models must not cost: counts that stand for time, and the parts that a model beyond one message is handed over in.

#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::panic, reason = "these are tests")]

mod harness;
#[path = "../benches/scale/vit.rs"]
mod vit;

use harness::has_ort;
use vit::Shape;
use vitrim::anatomy::{Group, Kind};
use vitrim::cost::{self, Sizes};
use vitrim::data::array::Array;
use vitrim::graph::{Graph, Storage};
use vitrim::onnx;
use vitrim::pipeline::analyse;
use vitrim::runtime::{RuntimeName, SessionOptions, open, open_with_initializers};
use vitrim::slice;

fn network(layers: usize) -> Graph {
    vit::graph(&Shape { layers, width: 16, heads: 2, patch: 56 }, Storage::Raw)
}

/// Axes that token sites reach, all sites together, and softmaxes behind the first and the last.
fn reached(graph: &Graph) -> (usize, usize, usize) {
    let (_, anatomy) = analyse(graph).unwrap();
    let sites: Vec<_> = anatomy.tokens.sites.iter().collect();
    let count = anatomy.tokens.last_before(&sites).iter().map(|(_, stretch)| stretch.reach.len()).sum();
    let softmaxes = |i: usize| anatomy.tokens.behind(sites[i]).map(|s| s.softmaxes.len()).sum();
    (count, softmaxes(0), softmaxes(sites.len() - 1))
}

#[test]
fn token_sites_of_a_deep_model_share_what_lies_behind_them() {
    let [three, six, twelve] = [3, 6, 12].map(|layers| reached(&network(layers)));
    assert_eq!((three.1, six.1, twelve.1), (3, 6, 12));
    assert_eq!((three.2, six.2, twelve.2), (1, 1, 1));
    assert_eq!(twelve.0 - six.0, 2 * (six.0 - three.0));
}

/// All units but those of the group's first step.
fn without_first(group: &Group) -> Vec<usize> {
    let width = group.stored.len();
    let first = if group.kind == Kind::Token { 1 } else { group.stored[0] };
    (0..group.units()).filter(|u| group.stored[u % width] != first).collect()
}

#[test]
fn the_first_step_of_every_group_saves_what_slicing_saves() {
    let graph = network(3);
    let (facts, anatomy) = analyse(&graph).unwrap();
    let whole = cost::count(&graph, &facts, &Sizes::new());
    let costs = cost::Model::new(&graph, &facts, &anatomy, &Sizes::new());
    assert_eq!(anatomy.groups.len(), 15);
    for group in &anatomy.groups {
        let kept = [(group.id.clone(), without_first(group))].into();
        let sliced = slice::apply(&graph, &facts, &anatomy, &kept, &analyse).unwrap().graph;
        let after = cost::count(&sliced, &analyse(&sliced).unwrap().0, &Sizes::new());
        let step = costs.first_step(group);
        assert_eq!(step.macs, whole.macs.zip(after.macs).map(|(a, b)| a - b), "{}", group.id);
        if group.kind != Kind::Token {
            assert_eq!(step.params, whole.params - after.params, "{}", group.id);
        }
    }
}

#[test]
fn many_values_of_one_name_are_numbered_in_order() {
    let mut graph = Graph::new(8, vec![(String::new(), 17)], bytes::Bytes::new());
    let names: Vec<String> = ["a", "a", "", "a", "a_2", ""]
        .map(|name| {
            let id = graph.add_value(name);
            graph.value(id).name().to_string()
        })
        .into();
    assert_eq!(names, ["a", "a_1", "value_1", "a_2", "a_2_1", "value_2"]);
}

#[test]
fn a_model_in_parts_computes_what_it_computes_in_one_piece() {
    let graph = network(2);
    let (bytes, outside) = onnx::to_parts(&graph, 1000, &|_| true).unwrap();
    let held: usize = outside.iter().map(|v| graph.value(*v).initializer().unwrap().bytes.len()).sum();
    assert!(outside.len() > 10 && bytes.len() + held > 100_000 && bytes.len() < held / 2);
    assert_eq!(onnx::to_parts(&graph, usize::MAX, &|_| true).unwrap(), (onnx::to_bytes(&graph).unwrap(), Vec::new()));
    if !has_ort() {
        return;
    }
    let options = SessionOptions { threads: 1, ..SessionOptions::default() };
    let array = |v: &vitrim::graph::ValueId| {
        let value = graph.value(*v);
        (value.name().to_string(), harness::array_of(value.initializer().unwrap()).unwrap())
    };
    let mut whole = open(RuntimeName::Ort, &onnx::to_bytes(&graph).unwrap(), &options).unwrap();
    let mut parts = open_with_initializers(RuntimeName::Ort, &bytes, outside.iter().map(array).collect(), &options).unwrap();
    let pixels = (0..3 * 224 * 224).map(|i| (i % 17) as f32 / 17.0).collect();
    let x = Array { dims: vec![1, 3, 224, 224], data: vitrim::data::array::ArrayData::F32(pixels) };
    let feeds = [("input".to_string(), x)];
    assert_eq!(whole.run(&feeds).unwrap(), parts.run(&feeds).unwrap());
}
