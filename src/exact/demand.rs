//! Which positions of its inputs an operator needs for some positions of its outputs: read off the relations between axes.

use crate::axes::relation::{At, Blocks, Link, Relations, Slot};
use crate::graph::{Graph, NodeId};
use crate::infer::{Dim, Facts};
use crate::ops::attention::is_fused_attention;
use std::collections::{BTreeMap, BTreeSet};

/// What is needed of an axis.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kept {
    /// These positions, ascending.
    List(Vec<usize>),
    /// Of an axis of a size that only run time knows, which is a product with a factor of size `of` (`batch * tokens`), these
    /// positions of the factor. `behind` is the product of the factors inside of it.
    Factor { of: usize, behind: Dim, list: Vec<usize> },
}

impl Kept {
    fn is_all(&self, size: Option<usize>) -> bool {
        match self {
            Kept::List(list) => size == Some(list.len()),
            Kept::Factor { of, list, .. } => list.len() == *of,
        }
    }

    /// What is needed where one reader needs this and another that; `None` where that is the whole axis.
    fn with(&self, other: &Self) -> Option<Self> {
        let union = |a: &[usize], b: &[usize]| a.iter().chain(b).copied().collect::<BTreeSet<_>>().into_iter().collect();
        match (self, other) {
            (Kept::List(a), Kept::List(b)) => Some(Kept::List(union(a, b))),
            (Kept::Factor { of, behind, list }, Kept::Factor { of: n, behind: inner, list: b }) if (of, behind) == (n, inner) => {
                Some(Kept::Factor { of: *of, behind: behind.clone(), list: union(list, b) })
            }
            _ => None,
        }
    }

    /// The same, counted in what `has` leaves.
    pub(super) fn inside(&self, has: Option<&Self>) -> Option<Self> {
        let find = |list: &[usize], there: &[usize]| list.iter().map(|p| there.binary_search(p).ok()).collect::<Option<Vec<_>>>();
        match (self, has) {
            (_, None) => Some(self.clone()),
            (Kept::List(list), Some(Kept::List(there))) => Some(Kept::List(find(list, there)?)),
            (Kept::Factor { behind, list, .. }, Some(Kept::Factor { list: there, .. })) => {
                Some(Kept::Factor { of: there.len(), behind: behind.clone(), list: find(list, there)? })
            }
            _ => None,
        }
    }

    /// The part of the axis that is left.
    pub(super) fn share(&self, size: Option<usize>) -> f64 {
        match self {
            Kept::List(list) => list.len() as f64 / size.unwrap_or(UNKNOWN_SIZE) as f64,
            Kept::Factor { of, list, .. } => list.len() as f64 / *of as f64,
        }
    }

    /// The size that an axis of this size has then.
    pub(super) fn size_of(&self, whole: &Dim) -> Option<Dim> {
        match self {
            Kept::List(list) => Some(Dim::from(list.len())),
            Kept::Factor { of, list, .. } => Some(&whole.exact_div(&Dim::from(*of))? * &Dim::from(list.len())),
        }
    }
}

/// Of an axis whose size is not known: what it is taken for where volumes are compared.
const UNKNOWN_SIZE: usize = 256;

/// What is needed of some axes of a value; axes that are not named are whole.
pub(super) type Rect = BTreeMap<usize, Kept>;

/// What a reader needs of a value.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Demand {
    /// The positions.
    pub(super) rect: Rect,
    /// Axes of it from which the reader itself picks: it can be given more.
    pub(super) picked: BTreeSet<usize>,
}

impl Demand {
    /// What the reader must be given exactly.
    pub(super) fn exact(&self) -> Rect {
        self.rect.iter().filter(|(a, _)| !self.picked.contains(a)).map(|(a, p)| (*a, p.clone())).collect()
    }
}

/// The smallest positions that hold those of all.
pub(super) fn hull<'a>(mut rects: impl Iterator<Item = &'a Rect>, size: &dyn Fn(usize) -> Option<usize>) -> Rect {
    let Some(mut all) = rects.next().cloned() else { return Rect::new() };
    for rect in rects {
        all = all.into_iter().filter_map(|(axis, kept)| Some((axis, kept.with(rect.get(&axis)?)?))).collect();
    }
    all.retain(|axis, kept: &mut Kept| !kept.is_all(size(*axis)));
    all
}

/// A node, and what its operator says of its axes.
pub(super) struct Said<'a> {
    pub(super) graph: &'a Graph,
    pub(super) facts: &'a Facts,
    pub(super) id: NodeId,
    pub(super) relations: &'a Relations,
}

impl Said<'_> {
    fn dim(&self, (slot, axis): At) -> Option<&Dim> {
        let node = self.graph.node(self.id);
        match slot {
            Slot::In(i) => self.facts.shape(node.input(i)?)?.get(axis),
            Slot::Out(o) => self.facts.shape(node.output(o)?)?.get(axis),
            Slot::Virtual(v) => self.relations.virtuals.get(v)?.get(axis),
        }
    }

    fn size(&self, at: At) -> Option<usize> {
        self.dim(at)?.size()
    }

    /// What every input is needed for these positions of the outputs, all of which that are read are named.
    ///
    /// Errors: why the operator needs all of an axis, or treats positions unlike.
    pub(super) fn inputs_for(&self, outputs: &BTreeMap<usize, Rect>) -> Result<BTreeMap<usize, Demand>, String> {
        let given: BTreeMap<At, Kept> =
            outputs.iter().flat_map(|(o, rect)| rect.iter().map(|(a, p)| ((Slot::Out(*o), *a), p.clone()))).collect();
        if !given.is_empty() {
            self.is_alike()?;
        }
        let mut needed = given.clone();
        let mut picked: BTreeSet<At> = BTreeSet::new();
        // Relations through values inside the operator take a round each.
        for _ in 0..4 {
            for link in &self.relations.links {
                match link {
                    Link::Same(a, b) => {
                        self.carry(*a, *b, &mut needed, &mut picked)?;
                        self.carry(*b, *a, &mut needed, &mut picked)?;
                    }
                    Link::Regroup(a, b) => {
                        self.regroup(a, b, &mut needed)?;
                        self.regroup(b, a, &mut needed)?;
                    }
                    _ => {}
                }
            }
        }
        self.selects(outputs, &mut needed, &mut picked)?;
        for link in &self.relations.links {
            self.allows(link, &needed, &picked)?;
        }
        let mut demands: BTreeMap<usize, Demand> = BTreeMap::new();
        for ((slot, axis), positions) in &needed {
            match slot {
                Slot::In(i) => {
                    let demand = demands.entry(*i).or_default();
                    demand.rect.insert(*axis, positions.clone());
                    if picked.contains(&(*slot, *axis)) {
                        demand.picked.insert(*axis);
                    }
                }
                Slot::Out(o) if outputs.contains_key(o) && given.get(&(*slot, *axis)) != Some(positions) => {
                    return Err("its outputs are needed at unlike positions".to_string());
                }
                Slot::Out(_) | Slot::Virtual(_) => {}
            }
        }
        Ok(demands)
    }

    /// Refuses operators whose positions know their place: what a query sees of a causal attention depends on where it stands.
    fn is_alike(&self) -> Result<(), String> {
        let node = self.graph.node(self.id);
        let flag = |name: &str| node.attr_int(name).unwrap_or(0) != 0;
        let is_fused = is_fused_attention(node.domain(), node.op());
        let is_known = match node.op() {
            "Attention" => matches!(node.domain(), "" | "ai.onnx") && (4..7).all(|slot| node.input(slot).is_none()),
            "MultiHeadAttention" => (6..node.inputs().len()).all(|slot| node.input(slot).is_none()),
            _ => false,
        };
        if is_fused && (!is_known || flag("is_causal") || flag("unidirectional")) {
            return Err(format!("{} may see where its queries stand", node.op()));
        }
        if matches!((node.domain(), node.op()), ("com.microsoft", "RotaryEmbedding") | ("" | "ai.onnx", "Trilu")) {
            return Err(format!("{} counts positions", node.op()));
        }
        Ok(())
    }

    fn carry(&self, a: At, b: At, needed: &mut BTreeMap<At, Kept>, picked: &mut BTreeSet<At>) -> Result<(), String> {
        let Some(positions) = needed.get(&a).cloned() else { return Ok(()) };
        match needed.get(&b) {
            Some(known) if *known == positions => {}
            Some(_) => return Err("it meets unlike positions".to_string()),
            None => {
                needed.insert(b, positions);
                if picked.contains(&a) {
                    picked.insert(b);
                }
            }
        }
        Ok(())
    }

    /// Positions of the axes `to` that hold the elements of those of `from`, row-major.
    fn regroup(&self, from: &(Slot, Vec<usize>), to: &(Slot, Vec<usize>), needed: &mut BTreeMap<At, Kept>) -> Result<(), String> {
        let at = |side: &(Slot, Vec<usize>)| side.1.iter().map(|a| (side.0, *a)).collect::<Vec<At>>();
        let (from, to) = (at(from), at(to));
        if !from.iter().any(|x| needed.contains_key(x)) || to.iter().any(|x| needed.contains_key(x)) {
            return Ok(());
        }
        let refused = || "it regroups the positions with others".to_string();
        if let Some((x, kept)) = self.regroup_of_unknown_size(&from, &to, needed) {
            needed.insert(x, kept);
            return Ok(());
        }
        let sizes = |side: &[At]| side.iter().map(|x| self.size(*x)).collect::<Option<Vec<usize>>>();
        let (from_sizes, to_sizes) = (sizes(&from).ok_or_else(refused)?, sizes(&to).ok_or_else(refused)?);
        let mut flat = vec![0];
        for (x, size) in from.iter().zip(&from_sizes) {
            let list = match needed.get(x) {
                Some(Kept::List(list)) => list.clone(),
                Some(Kept::Factor { .. }) => return Err(refused()),
                None => (0..*size).collect(),
            };
            flat = flat.iter().flat_map(|base| list.iter().map(move |p| base * size + p)).collect();
        }
        let mut parts: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); to.len()];
        for position in &flat {
            let mut rest = *position;
            for (part, size) in parts.iter_mut().zip(&to_sizes).rev() {
                part.insert(rest % size);
                rest /= size;
            }
        }
        if parts.iter().map(BTreeSet::len).product::<usize>() != flat.len() {
            return Err(refused());
        }
        for ((x, part), size) in to.into_iter().zip(parts).zip(to_sizes) {
            if part.len() < size {
                needed.insert(x, Kept::List(part.into_iter().collect()));
            }
        }
        Ok(())
    }

    /// One axis of several becomes a factor of one, or a factor of one becomes an axis of several: `[batch, N]` and `[batch * N]`.
    fn regroup_of_unknown_size(&self, from: &[At], to: &[At], needed: &BTreeMap<At, Kept>) -> Option<(At, Kept)> {
        let dims = |side: &[At]| side.iter().map(|x| self.dim(*x).cloned()).collect::<Option<Vec<Dim>>>();
        let (from_dims, to_dims) = (dims(from)?, dims(to)?);
        if from_dims.iter().chain(&to_dims).all(|d| d.size().is_some()) {
            return None;
        }
        let mut narrow = from.iter().enumerate().filter_map(|(i, x)| Some((i, needed.get(x)?)));
        let (i, kept) = narrow.next()?;
        if narrow.next().is_some() {
            return None;
        }
        match (kept, from, to) {
            (Kept::List(list), _, [x]) => {
                let behind = from_dims[i + 1..].iter().product();
                Some((*x, Kept::Factor { of: from_dims[i].size()?, behind, list: list.clone() }))
            }
            (Kept::Factor { of, behind, list }, [_], _) => {
                let is_factor =
                    |j: &usize| to_dims[*j].size() == Some(*of) && to_dims[j + 1..].iter().product::<Dim>() == *behind;
                let j = (0..to.len()).find(is_factor)?;
                Some((to[j], Kept::List(list.clone())))
            }
            _ => None,
        }
    }

    /// What selections by constant index need; of one axis all of them together.
    fn selects(
        &self,
        outputs: &BTreeMap<usize, Rect>,
        needed: &mut BTreeMap<At, Kept>,
        picked: &mut BTreeSet<At>,
    ) -> Result<(), String> {
        let mut found: BTreeMap<At, BTreeSet<usize>> = BTreeMap::new();
        for link in &self.relations.links {
            let Link::Select { from, to, index, at } = link else { continue };
            if matches!(to.0, Slot::Out(o) if !outputs.contains_key(&o)) {
                continue;
            }
            let wanted: Vec<usize> = match needed.get(to) {
                Some(Kept::List(positions)) => {
                    let inside = positions.iter().filter_map(|p| index.get(p.checked_sub(*at)?).copied());
                    inside.collect()
                }
                Some(Kept::Factor { .. }) => return Err("it picks across samples".to_string()),
                None => index.clone(),
            };
            if wanted.is_empty() {
                return Err("some of what it joins is not needed at all".to_string());
            }
            found.entry(*from).or_default().extend(wanted);
        }
        for (from, positions) in self.picks_of_unknown_size().into_iter().chain(found) {
            if self.size(from) == Some(positions.len()) {
                continue;
            }
            let positions = Kept::List(positions.into_iter().collect());
            match needed.get(&from) {
                Some(known) if *known != positions => return Err("it meets unlike positions".to_string()),
                _ => {
                    needed.insert(from, positions);
                    picked.insert(from);
                }
            }
        }
        Ok(())
    }

    /// A Gather or Slice of constant positions, counted from the start, of an axis whose size only run time knows.
    pub(super) fn picks_of_unknown_size(&self) -> Option<(At, BTreeSet<usize>)> {
        let node = self.graph.node(self.id);
        let shape = self.facts.shape(node.input(0)?)?;
        let numbers = |slot: usize| self.facts.get(node.input(slot)?).known.as_ref()?.numbers();
        let (axis, list) = match (node.domain(), node.op()) {
            ("" | "ai.onnx", "Gather") => {
                let axis = crate::infer::normalize_axis(node.attr_int("axis").unwrap_or(0), shape.len())?;
                (axis, numbers(1)?)
            }
            ("" | "ai.onnx", "Slice") => {
                let ([axis], [start], [end]) = (&numbers(3)?[..], &numbers(1)?[..], &numbers(2)?[..]) else { return None };
                let is_one = node.input(4).is_none() || numbers(4)? == [1];
                let axis = crate::infer::normalize_axis(*axis, shape.len()).filter(|_| is_one && *end < i64::from(i32::MAX))?;
                (axis, (*start..*end).collect())
            }
            _ => return None,
        };
        let positions = list.into_iter().map(|p| usize::try_from(p).ok()).collect::<Option<BTreeSet<_>>>()?;
        (shape[axis].size().is_none() && !positions.is_empty()).then_some(((Slot::In(0), axis), positions))
    }

    fn allows(&self, link: &Link, needed: &BTreeMap<At, Kept>, picked: &BTreeSet<At>) -> Result<(), String> {
        // From what the operator picks itself it is given more where need be: that is no demand on what it does.
        let is_narrow = |at: &At| needed.contains_key(at) && !picked.contains(at);
        match link {
            Link::Contract(a, b) if is_narrow(a) || is_narrow(b) => Err("it sums over the positions".to_string()),
            Link::Sum(a) if is_narrow(a) => Err("it sums over the positions".to_string()),
            Link::Barrier(a, reason) | Link::Vanish(a, reason) | Link::Blocks(a, Blocks { else_barrier: Some(reason), .. })
                if is_narrow(a) =>
            {
                Err(reason.clone())
            }
            _ => Ok(()),
        }
    }
}
