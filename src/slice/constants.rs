//! Cutting the constants: in place where all readers lose the same, else a copy for the reader that does.

use super::cutset::{CutSet, Stays};
use super::refit::Edit;
use super::shapes::gather;
use super::{Cloned, TensorCut};
use crate::axes::Axes;
use crate::axes::relation::Slot;
use crate::graph::{Graph, Id, Tensor, Use, ValueId};
use std::collections::BTreeMap;

/// Axis -> positions that stay.
pub(super) type Keeps = BTreeMap<usize, Vec<usize>>;

/// What each reader of each constant needs of it. Computed before the graph changes.
pub(super) fn needs(graph: &Graph, axes: &Axes, cut: &CutSet<'_>) -> BTreeMap<ValueId, Vec<(Use, Keeps)>> {
    let touched = cut.touched();
    let mut needs: BTreeMap<ValueId, Vec<(Use, Keeps)>> = BTreeMap::new();
    for (id, node) in graph.nodes() {
        for (slot, v) in node.inputs().iter().enumerate() {
            let Some(v) = v else { continue };
            let Some(carrier) = axes.carrier_at(graph, id, Slot::In(slot)).filter(|c| axes.carriers()[*c].constant) else {
                continue;
            };
            // A computed constant that one reader alone sees is cut where it comes from.
            if !graph.is_constant(*v) && carrier == v.index() {
                continue;
            }
            let mut keeps = Keeps::new();
            for (_, axis) in touched.range((carrier, 0)..(carrier + 1, 0)) {
                if let Stays::Positions(p) = cut.stays((carrier, *axis)) {
                    keeps.insert(*axis, p);
                }
            }
            needs.entry(*v).or_default().push((Use { node: id, slot }, keeps));
        }
    }
    needs.retain(|_, readers| readers.iter().any(|(_, k)| !k.is_empty()));
    needs
}

/// Whether all readers of a constant lose the same, so that it can be cut itself.
pub(super) fn is_common(graph: &Graph, v: ValueId, readers: &[(Use, Keeps)]) -> bool {
    let all_told = graph.value(v).users().len() == readers.len();
    graph.is_constant(v) && all_told && !graph.outputs().contains(&v) && readers.windows(2).all(|w| w[0].1 == w[1].1)
}

/// Cuts all constants.
pub(super) fn cut(graph: &mut Graph, needs: BTreeMap<ValueId, Vec<(Use, Keeps)>>) -> (Vec<TensorCut>, Vec<Cloned>) {
    let (mut cuts, mut cloned) = (Vec::new(), Vec::new());
    for (v, readers) in needs {
        let name = graph.value(v).name().to_string();
        let Some(tensor) = graph.constant(v) else {
            for (at, keeps) in readers.into_iter().filter(|(_, k)| !k.is_empty()) {
                let narrowed = keeps.iter().fold(v, |v, (axis, kept)| gather(graph, v, *axis, kept, "cut"));
                graph.set_input(at, Some(narrowed));
            }
            continue;
        };
        if is_common(graph, v, &readers) {
            let keeps = &readers[0].1;
            cuts.extend(keeps.iter().map(|(axis, kept)| tensor_cut(&name, &tensor, *axis, kept)));
            graph.set_constant(v, take_all(&tensor, keeps));
            continue;
        }
        let mut copies: Vec<(Keeps, ValueId)> = Vec::new();
        for (at, keeps) in readers.into_iter().filter(|(_, k)| !k.is_empty()) {
            let known = copies.iter().find(|(k, _)| *k == keeps).map(|(_, v)| *v);
            let copy = known.unwrap_or_else(|| {
                let copy = graph.add_initializer(&format!("{name}_cut"), take_all(&tensor, &keeps));
                copies.push((keeps.clone(), copy));
                copy
            });
            let user = graph.value(copy).name().to_string();
            if known.is_none() {
                cloned.extend(keeps.iter().map(|(axis, kept)| {
                    let TensorCut { initializer, axis, removed, of } = tensor_cut(&name, &tensor, *axis, kept);
                    Cloned { initializer, axis, user: user.clone(), removed, of }
                }));
            }
            graph.set_input(at, Some(copy));
        }
    }
    (cuts, cloned)
}

/// Edits the constant at an input, in place where nothing else reads it.
///
/// What is taken along an axis counts as cut; a constant that is stored anew has no positions to name.
pub(super) fn edit(graph: &mut Graph, at: Use, edit: &Edit, cuts: &mut Vec<TensorCut>, cloned: &mut Vec<Cloned>) {
    let Some((v, tensor)) = graph.node(at.node).input(at.slot).and_then(|v| Some((v, graph.constant(v)?))) else { return };
    let name = graph.value(v).name().to_string();
    let edited = match edit {
        Edit::Take { axis, kept } => tensor.take(*axis, kept),
        Edit::Repack(repack) => repack(&tensor),
    };
    let alone = graph.value(v).users().len() == 1 && !graph.outputs().contains(&v);
    let told = match edit {
        Edit::Take { axis, kept } => Some(tensor_cut(&name, &tensor, *axis, kept)),
        Edit::Repack(_) => None,
    };
    if alone {
        graph.set_constant(v, edited);
        cuts.extend(told);
        return;
    }
    let copy = graph.add_initializer(&format!("{name}_cut"), edited);
    let user = graph.value(copy).name().to_string();
    cloned.extend(told.map(|TensorCut { initializer, axis, removed, of }| Cloned { initializer, axis, user, removed, of }));
    graph.set_input(at, Some(copy));
}

fn take_all(tensor: &Tensor, keeps: &Keeps) -> Tensor {
    keeps.iter().fold(tensor.clone(), |t, (axis, kept)| t.take(*axis, kept))
}

fn tensor_cut(name: &str, tensor: &Tensor, axis: usize, kept: &[usize]) -> TensorCut {
    let of = tensor.dims[axis];
    let removed = (0..of).filter(|i| kept.binary_search(i).is_err()).collect();
    TensorCut { initializer: name.to_string(), axis, removed, of }
}
