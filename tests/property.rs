//! Random graphs, pruned at random, against the original with zeros (`property/oracle.rs` says what must hold).
//!
//! Graphs come from a seed (`property/case.rs`), are made of blocks (`property/blocks.rs`) and of single steps in any order
//! (`property/steps.rs`), each spelled at random (`property/net.rs`). `VITRIM_PROPERTY_CASES=10000 cargo test --test property` runs
//! more of them, `VITRIM_PROPERTY_FIRST` says from which seed on; `VITRIM_PROPERTY_SEED=42` runs one alone and tells what it is made of
//! (`-- --nocapture`). Seeds that failed on the way are in `property/regressions.rs`; that the test notices faults is shown by
//! `property/mutation.rs`, which is compiled into the unit tests.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "these are tests")]

#[path = "property/blocks.rs"]
mod blocks;
#[path = "property/case.rs"]
mod case;
mod harness;
#[path = "property/net.rs"]
mod net;
#[path = "property/oracle.rs"]
mod oracle;
#[path = "property/refusals.rs"]
mod refusals;
#[path = "property/regressions.rs"]
mod regressions;
#[path = "property/steps.rs"]
mod steps;

use case::Case;
use harness::has_ort;
use oracle::{Outcome, check_caught};
use vitrim::anatomy::{Cut, Group};
use vitrim::graph::{Graph, Node, ValueId};
use vitrim::pipeline::analyse;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|v| v.parse().unwrap_or_else(|_| panic!("{variable} is no number")))
}

fn told(case: &Case, error: &str) -> String {
    format!("seed {} of {:?}: {error}\n  {}", case.seed, case.blocks, case.story.join("\n  "))
}

/// The nodes of a graph, one a line.
fn listing(graph: &Graph) -> String {
    let facts = vitrim::infer::facts(graph);
    let shape = |v: ValueId| match facts.as_ref().ok().and_then(|f| f.shape(v)) {
        Some(dims) => format!("{dims:?}"),
        None => "?".into(),
    };
    let text = |v: &Option<ValueId>| v.map_or("-".into(), |v| format!("{}{}", graph.value(v).name(), shape(v)));
    let line = |node: &Node| {
        let list = |side: &[Option<ValueId>]| side.iter().map(text).collect::<Vec<_>>().join(", ");
        let attrs: Vec<String> = node.attrs().iter().map(|a| format!("{}={:?}", a.name, a.value)).collect();
        let attrs = if node.op() == "Constant" { String::new() } else { attrs.join(" ") };
        format!("{} = {}({}) {attrs}", list(node.outputs()), node.op(), list(node.inputs()))
    };
    let nodes: Vec<String> = graph.nodes().map(|(id, node)| format!("{}: {}", graph.label(id), line(node))).collect();
    let cut = |c: &Cut| format!("{}.{}{}", graph.value(c.value).name(), c.axis, if c.reader.is_some() { "*" } else { "" });
    let group = |g: &Group| {
        format!("{} nest {:?} stored {:?} cuts {:?}", g.id, g.nest, g.stored, g.cuts.iter().map(cut).collect::<Vec<_>>())
    };
    let groups: Vec<String> = analyse(graph).map_or(vec![], |(_, a)| a.groups.iter().map(group).collect());
    [nodes, groups].concat().join("\n")
}

#[test]
fn what_is_sliced_computes_what_the_zeroed_original_does() {
    if !has_ort() {
        return;
    }
    if let Some(seed) = number("VITRIM_PROPERTY_SEED") {
        let case = Case::new(seed);
        println!("{}\n{}", told(&case, &format!("{:?}", check_caught(&case))), listing(&case.graph));
        return;
    }
    let count = number("VITRIM_PROPERTY_CASES").unwrap_or(400);
    let first = number("VITRIM_PROPERTY_FIRST").unwrap_or(0);
    let (mut cut, mut failed) = (0, Vec::new());
    for seed in first..first + count {
        let case = Case::new(seed);
        match check_caught(&case) {
            Ok(Outcome::Nothing) => {}
            Ok(Outcome::Cut(_)) => cut += 1,
            Err(error) => failed.push(told(&case, &error)),
        }
    }
    println!("{count} graphs, {cut} with something to cut, {} wrong", failed.len());
    assert!(failed.is_empty(), "{} of {count} graphs are wrong:\n{}", failed.len(), failed.join("\n"));
    assert!(3 * cut >= 2 * count, "only {cut} of {count} graphs have something to cut");
}
