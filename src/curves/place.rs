//! Places of a graph: where it can be cut in two, which values are alive there, and which place a constant asks for.
//!
//! Only nodes that depend on the graph's inputs are counted; what depends on constants alone (a dequantized or transposed weight)
//! belongs to whichever part needs it. Place p lies behind the first p counted nodes of the topological order.
//! Example: `y = x + f(x)` has x alive at every place within f.

use crate::graph::{Graph, Id, SideMap, ValueId};
use crate::infer::Facts;
use crate::runtime;

/// A value that is alive at the places `from..=to`: computed before, read behind.
struct Span {
    value: ValueId,
    from: usize,
    to: usize,
}

/// The places of a graph.
pub(super) struct Places {
    /// The place before each node; `None` for nodes that are not counted.
    number: Vec<Option<usize>>,
    /// The first place behind what makes a value; `None` for values that do not depend on data.
    made: SideMap<ValueId, Option<usize>>,
    spans: Vec<Span>,
}

impl Places {
    /// The places of a graph.
    pub(super) fn of(graph: &Graph) -> Self {
        let mut from: SideMap<ValueId, Option<usize>> = SideMap::filled(graph.value_count(), None);
        graph.inputs().iter().for_each(|v| from[*v] = Some(0));
        let mut last = from.clone();
        let mut number = vec![None; graph.node_capacity()];
        let mut count = 0;
        for (id, node) in graph.nodes() {
            let reads: Vec<ValueId> = node.inputs().iter().flatten().chain(node.captures()).copied().collect();
            if !reads.iter().any(|v| from[*v].is_some()) {
                continue;
            }
            reads.iter().for_each(|v| last[*v] = Some(count));
            number[id.index()] = Some(count);
            count += 1;
            node.outputs().iter().flatten().for_each(|v| from[*v] = Some(count));
        }
        let span = |(value, from): (ValueId, &Option<usize>)| {
            let (from, to) = ((*from)?, last[value]?);
            (from <= to && (from > 0 || !graph.value(value).users().is_empty())).then_some(Span { value, from, to })
        };
        Self { number, spans: from.iter().filter_map(span).collect(), made: from }
    }

    /// Whether a value is computed before a place.
    pub(super) fn is_made(&self, v: ValueId, place: usize) -> bool {
        self.made.get(v).copied().flatten().is_some_and(|made| made <= place)
    }

    /// Values alive at a place, in the order of their ids.
    pub(super) fn alive(&self, place: usize) -> Vec<ValueId> {
        self.spans.iter().filter(|s| s.from <= place && place <= s.to).map(|s| s.value).collect()
    }

    /// The last place before every reader of the constants; `None` where nothing that depends on data reads them.
    pub(super) fn before(&self, graph: &Graph, constants: &[ValueId]) -> Option<usize> {
        let mut stack = constants.to_vec();
        let mut seen = vec![false; graph.value_count()];
        let mut first = None;
        while let Some(v) = stack.pop() {
            if std::mem::replace(&mut seen[v.index()], true) {
                continue;
            }
            for at in graph.value(v).users() {
                match self.number[at.node.index()] {
                    Some(n) => first = Some(first.map_or(n, |f: usize| f.min(n))),
                    None => stack.extend(graph.node(at.node).outputs().iter().flatten()),
                }
            }
        }
        first
    }

    /// The best place from `now` to `until`: the last whose values take at most `limit` bytes, since it saves the most work; where
    /// there is none, the one whose values take the least. Places where a value cannot be fed are left out, `now` never.
    pub(super) fn choose(
        &self,
        facts: &Facts,
        (now, until): (usize, usize),
        limit: u64,
        bytes: &dyn Fn(ValueId) -> u64,
    ) -> usize {
        let mut sizes: Vec<Option<u64>> = vec![Some(0); until - now + 1];
        for s in self.spans.iter().filter(|s| s.from <= until && now <= s.to) {
            let is_fed =
                facts.get(s.value).dtype.is_some_and(|d| runtime::kind_of(d).is_some()) && facts.shape(s.value).is_some();
            let size = bytes(s.value);
            for slot in &mut sizes[s.from.max(now) - now..=s.to.min(until) - now] {
                *slot = slot.filter(|_| is_fed).map(|sum| sum.saturating_add(size));
            }
        }
        let places = || sizes.iter().enumerate().filter_map(|(p, size)| size.map(|size| (size, p)));
        let fitting = places().filter(|(size, _)| *size <= limit).max_by_key(|(_, p)| *p);
        let smallest = || places().min_by_key(|(size, p)| (*size, std::cmp::Reverse(*p)));
        now + fitting.or_else(smallest).map_or(0, |(_, p)| p)
    }
}
