//! Which values must stay one block, and which may be taken apart.
//!
//! A value whose factor falls into cells may get parts of unlike width: of `[B, N, 3, H, E]` q may keep 16 dims and v 12. Such a value
//! does not exist; slicing makes one value of each part instead, from where the parts are one axis (`3*H*E`) up to where each is
//! picked. Where a value on that way is used as a whole, in a product, a merge with other axes, beside a constant, the parts must
//! keep the same: its cases are one tensor, as those of a constant are.
//! Example: key/value heads repeated by a Gather `0, 0, 1, 1` are told apart by their heads; but the product with q takes all
//! heads at once, so that their dims are one class.

use super::collect::{AxisOf, CarrierId, Collected, Ends, Of, Relation};
use super::partition::Partition;
use super::refine::FactorPair;
use crate::axes::relation::Slot;
use std::collections::{BTreeMap, BTreeSet};

/// What the search needs of the graph: how factors go on at each node.
pub(super) struct Apart<'a> {
    all: &'a Collected,
    p: &'a Partition,
    /// Axis of each factor.
    home: &'a BTreeMap<usize, AxisOf>,
    /// Factors of each carrier.
    own: Vec<Vec<usize>>,
    /// Equal factors between two slots of a node, both ways round.
    equal: BTreeMap<(Ends, CarrierId), BTreeSet<(usize, usize)>>,
    /// Carriers that are picked from, and put together, between two slots of a node.
    picked: BTreeSet<(Ends, CarrierId)>,
    joined: BTreeSet<(Ends, CarrierId)>,
    /// Pairs of slots that are related, with the carriers there, of each carrier.
    related: BTreeMap<CarrierId, BTreeSet<(Ends, CarrierId)>>,
}

impl<'a> Apart<'a> {
    pub(super) fn new(
        all: &'a Collected,
        p: &'a Partition,
        home: &'a BTreeMap<usize, AxisOf>,
        pairs: &[(Ends, FactorPair)],
    ) -> Self {
        let mut own = vec![Vec::new(); all.carriers.len()];
        home.iter().for_each(|(f, (carrier, _))| own[*carrier].push(*f));
        let mut apart = Self {
            all,
            p,
            home,
            own,
            equal: BTreeMap::new(),
            picked: BTreeSet::new(),
            joined: BTreeSet::new(),
            related: BTreeMap::new(),
        };
        for (ends, ((axis_a, ka), (axis_b, kb))) in pairs {
            let (fa, fb) = (p.factors(*axis_a).start + ka, p.factors(*axis_b).start + kb);
            for (x, y) in [(fa, fb), (fb, fa)] {
                let (from, to) = (home[&x].0, home[&y].0);
                apart.equal.entry((*ends, from)).or_default().insert((x, y));
                apart.related.entry(from).or_default().insert((*ends, to));
            }
        }
        for (ends, relation) in &all.relations {
            if let Relation::Select { from, to, index, .. } = relation {
                let whole = all.carriers[to.0].shape[to.1].is(index.len() as i64);
                let list = if whole { &mut apart.picked } else { &mut apart.joined };
                list.insert((*ends, if whole { from.0 } else { to.0 }));
                apart.related.entry(from.0).or_default().insert((*ends, to.0));
                apart.related.entry(to.0).or_default().insert((*ends, from.0));
            }
        }
        apart
    }

    /// Carriers that must stay one block: constants, and values that are used as a whole.
    pub(super) fn blocks(&self) -> Vec<bool> {
        let tensions: Vec<Vec<(usize, usize)>> = (0..self.all.carriers.len()).map(|c| self.tensions(c)).collect();
        let mut block: Vec<bool> = self.all.carriers.iter().map(|c| c.constant).collect();
        let open: Vec<CarrierId> = (0..block.len()).filter(|c| !block[*c] && !tensions[*c].is_empty()).collect();
        let readers = self.readers(&open);
        for c in &open {
            block[*c] = !self.is_made_of_parts(*c);
        }
        loop {
            let still = |c: &&CarrierId| !block[**c];
            let found: Vec<CarrierId> = open
                .iter()
                .filter(still)
                .filter(|c| !self.is_read_in_parts(**c, &tensions[**c], &readers, &block))
                .copied()
                .collect();
            if found.is_empty() {
                return block;
            }
            found.into_iter().for_each(|c| block[c] = true);
        }
    }

    /// Factors with cells, each with every factor of another axis: what may get as many widths as there are cells.
    fn tensions(&self, c: CarrierId) -> Vec<(usize, usize)> {
        let sized = || self.own[c].iter().filter(|f| self.p.sizes[**f].is_some());
        let parted = sized().filter(|f| self.p.cell_count(**f) > 1);
        parted.flat_map(|f| sized().filter(|g| self.home[f].1 != self.home[*g].1).map(|g| (*f, *g))).collect()
    }

    /// Nodes and slots that read each of some carriers.
    fn readers(&self, of: &[CarrierId]) -> BTreeMap<CarrierId, BTreeSet<Ends>> {
        let mut readers = BTreeMap::new();
        for c in of {
            let own = self.related.get(c).into_iter().flatten().map(|(ends, _)| *ends);
            readers.insert(*c, own.filter(|e| self.slots_of(*e, *c).iter().any(|s| matches!(s, Slot::In(_)))).collect());
        }
        readers
    }

    /// Slots of a pair at which a carrier stands.
    fn slots_of(&self, ends: Ends, c: CarrierId) -> Vec<Slot> {
        let is_at = |slot: &Slot| match slot {
            Slot::In(i) => self.all.inputs[ends.node].get(*i).copied().flatten() == Some(c),
            Slot::Virtual(v) => self.all.virtuals[ends.node] + v == c,
            // An output is what is left.
            Slot::Out(_) => matches!(self.all.carriers[c].of, Of::Value(_)) && !self.all.inputs[ends.node].contains(&Some(c)),
        };
        ends.slots().into_iter().filter(is_at).collect()
    }

    /// Whether the node that makes a carrier can be copied for a part of it.
    fn is_made_of_parts(&self, c: CarrierId) -> bool {
        let own = self.related.get(&c).into_iter().flatten();
        let makes = |ends: &Ends| self.slots_of(*ends, c).iter().any(|s| matches!(s, Slot::Out(_)));
        let made: Vec<(Ends, CarrierId)> = own.filter(|(ends, _)| makes(ends)).copied().collect();
        let is_parted = |c: CarrierId| self.own[c].iter().any(|f| self.p.cell_count(*f) > 1);
        let with_constant = made.iter().any(|(_, from)| self.all.carriers[*from].constant && is_parted(*from));
        let joined = made.iter().any(|(ends, _)| self.joined.contains(&(*ends, c)));
        let inside = matches!(self.all.carriers[c].of, Of::Virtual(..));
        let picked = || self.related.get(&c).into_iter().flatten().any(|(ends, _)| self.picked.contains(&(*ends, c)));
        !joined && !with_constant && (!inside || picked())
    }

    /// Whether every reader of a carrier picks from it, or makes a value that can be taken apart in the same way.
    fn is_read_in_parts(
        &self,
        c: CarrierId,
        tensions: &[(usize, usize)],
        readers: &BTreeMap<CarrierId, BTreeSet<Ends>>,
        block: &[bool],
    ) -> bool {
        if matches!(self.all.carriers[c].of, Of::Virtual(..)) {
            return true;
        }
        let mut nodes: BTreeMap<_, Vec<Ends>> = BTreeMap::new();
        for ends in &readers[&c] {
            nodes.entry(ends.node).or_default().push(*ends);
        }
        nodes.values().all(|all| {
            // What the operator sees of it, itself or inside; the rest are partners that it is summed with.
            let is_partner = |s: &Slot| matches!(s, Slot::In(_));
            let onward: Vec<&Ends> = all.iter().filter(|e| !e.slots().iter().all(is_partner)).collect();
            let whole: Vec<&Ends> = onward.iter().copied().filter(|e| !self.picked.contains(&(**e, c))).collect();
            match whole[..] {
                [] => !onward.is_empty(),
                [one] => onward.len() == 1 && self.goes_on(c, *one, tensions, block),
                _ => false,
            }
        })
    }

    /// Whether a node's output keeps apart what is apart in its input.
    fn goes_on(&self, c: CarrierId, ends: Ends, tensions: &[(usize, usize)], block: &[bool]) -> bool {
        let Some(equal) = self.equal.get(&(ends, c)) else { return false };
        let on = |f: usize| equal.iter().find(|(x, _)| *x == f).map(|(_, y)| self.home[y]);
        let is_inside = |c: CarrierId| matches!(self.all.carriers[c].of, Of::Virtual(..));
        tensions.iter().all(|(f, g)| match (on(*f), on(*g)) {
            (Some(x), Some(y)) => x.1 != y.1 && !block[x.0] && !is_inside(x.0),
            _ => false,
        })
    }
}
