//! The notation in which an operator says how the axes of its inputs and outputs relate.
//!
//! Example: `MatMul` of `[B, N, D]` and `[D, M]` says `Same(in0.0, out0.0)`, `Same(in0.1, out0.1)`, `Contract(in0.2, in1.0)`,
//! `Same(in1.1, out0.2)`. A fused attention operator adds virtual values to speak of the head axis that its 3-D inputs hide.

use crate::graph::{Graph, Node, NodeId, ValueId};
use crate::infer::{Dim, Fact, Facts};

/// A value as a node sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Slot {
    /// Input number n.
    In(usize),
    /// Output number n.
    Out(usize),
    /// A value that the operator computes inside itself: number n of [`Relations::virtuals`].
    Virtual(usize),
}

/// One axis of a value of the node.
pub type At = (Slot, usize);

/// One relation between axes.
#[derive(Clone, Debug, PartialEq)]
pub enum Link {
    /// Parallel: both axes are the same factor; position i of one belongs to position i of the other. Equal sizes.
    Same(At, At),
    /// Contracted: products over both axes are summed; the factor ends here (a sink). Equal sizes.
    Contract(At, At),
    /// Summed over without a partner: ReduceSum and its like (a sink).
    Sum(At),
    /// Row-major regrouping: the axes of the first list, in order, hold the same elements as those of the second.
    /// Products of sizes are equal. This is what Reshape, Flatten, space-to-depth and grouped convolutions do.
    Regroup((Slot, Vec<usize>), (Slot, Vec<usize>)),
    /// Selection by constant index: `to[at + j] = from[index[j]]` along these axes. Split, Slice, Gather, Concat.
    Select {
        /// The axis that is read.
        from: At,
        /// The axis that is written.
        to: At,
        /// Positions of `from`, in the order of `to`.
        index: Vec<usize>,
        /// First position of `to`.
        at: usize,
    },
    /// The axis may lose positions unseen: the operator reads only the type or rank of the value.
    Unread(At),
    /// Positions may be removed only where they hold zero in the twin, the removed units' constants being zeroed there: the operator
    /// reads the whole value (its range), or has weights for them that cannot be zeroed one by one. Otherwise a barrier, for this reason.
    Vanish(At, String),
    /// The axis is stored in blocks, row-major over its factors: positions go in runs of a block.
    Blocks(At, Blocks),
    /// The axis cannot be cut here.
    Barrier(At, String),
}

/// The attention that a fused operator computes inside itself: which of its axes are what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FusedAttention {
    /// Heads of keys and values.
    pub head: At,
    /// Query heads that share a key head, where there are several.
    pub sharers: Option<At>,
    /// Width of a head of the query, which is contracted with that of the key.
    pub qk: At,
    /// Width of a head of the value.
    pub vo: At,
    /// Where keys can be masked.
    pub mask: Option<KeyMask>,
}

/// How keys of a fused attention are masked: by numbers that are added to the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyMask {
    /// Tokens of the keys, over which the softmax is normalized.
    pub keys: At,
    /// Tokens of the queries.
    pub queries: At,
    /// The input that is added to the logits, `[.., queries, keys]`.
    pub bias: usize,
}

/// What blocks of an axis ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// Positions that stay or go together.
    pub size: usize,
    /// Why the axis cannot be cut where its factors do not fall on blocks; `None` where the node copes with any positions, only better
    /// with whole blocks.
    pub else_barrier: Option<String>,
}

/// All relations of a node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Relations {
    /// The relations.
    pub links: Vec<Link>,
    /// Shapes of values that the operator computes inside itself.
    pub virtuals: Vec<Vec<Dim>>,
    /// What the operator is, where it computes the whole of attention.
    pub attention: Option<FusedAttention>,
    /// Which of them are made of constants alone: weights that are packed.
    pub constant_virtuals: Vec<usize>,
}

impl Relations {
    /// Adds `Same`.
    pub fn same(&mut self, a: At, b: At) {
        self.links.push(Link::Same(a, b));
    }
    /// Adds `Contract`.
    pub fn contract(&mut self, a: At, b: At) {
        self.links.push(Link::Contract(a, b));
    }
    /// Adds `Sum`.
    pub fn sum(&mut self, a: At) {
        self.links.push(Link::Sum(a));
    }
    /// Adds `Unread`.
    pub fn unread(&mut self, a: At) {
        self.links.push(Link::Unread(a));
    }
    /// Adds `Vanish`.
    pub fn vanish(&mut self, a: At, reason: &str) {
        self.links.push(Link::Vanish(a, reason.to_string()));
    }
    /// Adds `Blocks`.
    pub fn blocks(&mut self, a: At, size: usize, else_barrier: Option<String>) {
        self.links.push(Link::Blocks(a, Blocks { size, else_barrier }));
    }
    /// Adds a virtual value that is made of constants alone.
    pub fn constant_virtual(&mut self, shape: Vec<Dim>) -> Slot {
        self.constant_virtuals.push(self.virtuals.len());
        self.virtual_value(shape)
    }
    /// Adds `Barrier`.
    pub fn barrier(&mut self, a: At, reason: &str) {
        self.links.push(Link::Barrier(a, reason.to_string()));
    }
    /// Adds `Regroup`.
    pub fn regroup(&mut self, from: (Slot, Vec<usize>), to: (Slot, Vec<usize>)) {
        self.links.push(Link::Regroup(from, to));
    }
    /// Adds `Select`.
    pub fn select(&mut self, from: At, to: At, index: Vec<usize>, at: usize) {
        self.links.push(Link::Select { from, to, index, at });
    }
    /// Adds a virtual value.
    pub fn virtual_value(&mut self, shape: Vec<Dim>) -> Slot {
        self.virtuals.push(shape);
        Slot::Virtual(self.virtuals.len() - 1)
    }
}

/// What an operator's `axes` rule sees. Ranks of all inputs and outputs that are there are known.
pub struct AxesCx<'a> {
    /// The graph.
    pub graph: &'a Graph,
    /// Facts of all values.
    pub facts: &'a Facts,
    /// The node.
    pub node: &'a Node,
    /// Its number.
    pub id: NodeId,
    /// Opset of the node's domain.
    pub opset: i64,
}

impl<'a> AxesCx<'a> {
    /// The value at a slot, if it is there. Virtual values have none.
    pub fn value(&self, slot: Slot) -> Option<ValueId> {
        match slot {
            Slot::In(i) => self.node.input(i),
            Slot::Out(i) => self.node.output(i),
            Slot::Virtual(_) => None,
        }
    }

    /// The fact of the value at a slot; an empty fact where it is left out.
    pub fn fact(&self, slot: Slot) -> &'a Fact {
        static NOTHING: Fact = Fact { dtype: None, shape: None, known: None };
        self.value(slot).map_or(&NOTHING, |v| self.facts.get(v))
    }

    /// Shape of the value at a slot; empty where it is left out.
    pub fn shape(&self, slot: Slot) -> &'a [Dim] {
        self.fact(slot).shape.as_deref().unwrap_or(&[])
    }

    /// Whether there is a value at the slot.
    pub fn has(&self, slot: Slot) -> bool {
        self.value(slot).is_some()
    }

    /// Known integers of input `slot`, where all are numbers.
    pub fn numbers(&self, slot: usize) -> Option<Vec<i64>> {
        self.fact(Slot::In(slot)).known.as_ref()?.numbers()
    }

    /// Relates every axis of input `slot` to the axis of output 0 that it is broadcast to (numpy rules: aligned at the end).
    ///
    /// An axis of size 1 that is stretched has no relation: it carries nothing that could be cut.
    pub fn broadcast(&self, relations: &mut Relations, slot: usize) {
        let (input, output) = (self.shape(Slot::In(slot)), self.shape(Slot::Out(0)));
        let Some(shift) = output.len().checked_sub(input.len()) else { return };
        for (axis, size) in input.iter().enumerate() {
            let (a, b) = ((Slot::In(slot), axis), (Slot::Out(0), axis + shift));
            if *size == output[axis + shift] {
                relations.same(a, b);
            } else if !size.is(1) {
                relations.barrier(a, "broadcast between sizes that are not known to be equal");
                relations.barrier(b, "broadcast between sizes that are not known to be equal");
            }
        }
    }

    /// Relates axis i of input `slot` to axis i of output `out`, for all axes but those in `except`.
    pub fn parallel(&self, relations: &mut Relations, slot: usize, out: usize, except: &[usize]) {
        for axis in (0..self.shape(Slot::In(slot)).len()).filter(|a| !except.contains(a)) {
            relations.same((Slot::In(slot), axis), (Slot::Out(out), axis));
        }
    }
}
