//! Which numbers an integer input may hold: those that lie inside every table that it indexes.
//!
//! The input is followed through operators that move or shift integers to the operators that look something up. Example: token ids
//! that pass a Cast and index a table `[30522, 768]` are 0 to 30521; positions to which 2 is added before they index `[514, 768]`
//! are 0 to 511. An input that indexes nothing (a mask) has no bound.

use std::collections::BTreeSet;

use crate::graph::{Graph, Node, Use, ValueId};
use crate::infer::{Dim, Facts, Known};

/// What became of the input on its way: `scale * x + shift`, with the shift between `low` and `high`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Moved {
    scale: i64,
    low: i64,
    high: i64,
}

/// Values looked at for one input at most; what is not reached has no influence.
const STEPS: usize = 20_000;

/// The greatest number that `input` may hold, the least being 0; `None` where it indexes nothing.
///
/// `size` gives the sizes of symbols.
pub(super) fn greatest(graph: &Graph, facts: &Facts, input: ValueId, size: &dyn Fn(&str) -> Option<i64>) -> Option<i64> {
    let start = (input, Moved { scale: 1, low: 0, high: 0 });
    let mut seen = BTreeSet::from([start]);
    let mut open = vec![start];
    let mut greatest: Option<i64> = None;
    while let Some((value, moved)) = open.pop() {
        for at in graph.value(value).users() {
            let node = graph.node(at.node);
            for entries in tables(facts, node, *at) {
                // A bound below 0 is a branch for negative indices, which are not used here.
                let bound = entries.eval(size).map(|n| (n - 1 - moved.high).div_euclid(moved.scale)).filter(|b| *b >= 0);
                greatest = greatest.into_iter().chain(bound).min();
            }
            let Some(moved) = passed(facts, node, *at, moved) else { continue };
            for output in node.outputs().iter().flatten() {
                if seen.len() < STEPS && seen.insert((*output, moved)) {
                    open.push((*output, moved));
                }
            }
        }
    }
    greatest
}

/// What the integers are after `node`, where it only moves or shifts them.
fn passed(facts: &Facts, node: &Node, at: Use, moved: Moved) -> Option<Moved> {
    let first = at.slot == 0;
    let same = match node.op() {
        "Cast" | "Identity" | "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Expand" | "Tile" | "Transpose" | "Slice"
        | "Split" | "Gather" | "GatherElements" | "GatherND" | "Pad" | "Clip" | "ReduceMax" | "ReduceMin" | "TopK" | "Trilu" => {
            first
        }
        "Concat" | "Min" | "Max" => true,
        "Where" => at.slot > 0,
        "ScatterND" | "ScatterElements" => at.slot != 1,
        _ => false,
    };
    if same {
        return Some(moved);
    }
    let other = node.inputs().get(1 - at.slot.min(1)).copied().flatten();
    let (low, high) = match node.op() {
        "Add" | "Sub" | "Mul" => other.and_then(|v| range(facts, v)).unwrap_or((0, 0)),
        _ => return None,
    };
    let Moved { scale, low: a, high: b } = moved;
    match node.op() {
        "Add" => Some(Moved { scale, low: a.checked_add(low)?, high: b.checked_add(high)? }),
        "Sub" if first => Some(Moved { scale, low: a.checked_sub(high)?, high: b.checked_sub(low)? }),
        "Mul" if low == high && low > 0 => {
            Some(Moved { scale: scale.checked_mul(low)?, low: a.checked_mul(low)?, high: b.checked_mul(low)? })
        }
        _ => None,
    }
}

/// Least and greatest of a value whose content is known.
fn range(facts: &Facts, value: ValueId) -> Option<(i64, i64)> {
    let numbers = match facts.get(value).known.as_ref()? {
        Known::Ints(_) => facts.get(value).known.as_ref()?.numbers()?,
        Known::Floats(v) => v.iter().map(|x| (x.fract() == 0.0 && x.abs() < 1e15).then_some(*x as i64)).collect::<Option<_>>()?,
    };
    Some((*numbers.iter().min()?, *numbers.iter().max()?))
}

/// Numbers of entries of the tables that `node` looks up by its input `at.slot`.
fn tables(facts: &Facts, node: &Node, at: Use) -> Vec<Dim> {
    let size = |slot: usize, axis: i64| -> Option<Dim> {
        let shape = facts.shape(node.input(slot)?)?;
        shape.get(crate::infer::normalize_axis(axis, shape.len())?).cloned()
    };
    let one = |found: Option<Dim>| found.into_iter().collect::<Vec<Dim>>();
    let domain = if node.domain() == "ai.onnx" { "" } else { node.domain() };
    match (domain, node.op(), at.slot) {
        ("", "Gather" | "GatherElements", 1) => one(size(0, node.attr_int("axis").unwrap_or(0))),
        ("", "ScatterElements", 1) => one(size(0, node.attr_int("axis").unwrap_or(0))),
        ("", "GatherND" | "ScatterND", 1) => {
            let batch_dims = node.attr_int("batch_dims").unwrap_or(0);
            // Each index is a tuple over the axes behind the batch axes; its last axis says how many.
            let tuple = size(1, -1).and_then(|d| d.known()).unwrap_or(1);
            (0..tuple.clamp(1, 16)).filter_map(|i| size(0, batch_dims + i)).collect()
        }
        ("", "OneHot", 0) => {
            let depth = node.input(1).and_then(|v| facts.get(v).known.as_ref()?.ints()?.first().cloned());
            one(depth)
        }
        ("", "RotaryEmbedding", 3) => one(size(1, 0)),
        ("com.microsoft", "RotaryEmbedding", 1) => one(size(2, 0)),
        ("com.microsoft", "EmbedLayerNormalization", 0) => one(size(2, 0)),
        ("com.microsoft", "EmbedLayerNormalization", 1) => one(size(4, 0)),
        ("com.microsoft", "GatherBlockQuantized", 1) => one(size(0, node.attr_int("gather_axis").unwrap_or(0))),
        _ => Vec::new(),
    }
}
