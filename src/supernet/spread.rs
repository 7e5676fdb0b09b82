//! Brings a gate [units], or [B, units], into the shape in which it broadcasts to an operand.
//!
//! Examples: [768] on axis 2 of [B, N, 768] stays as it is; [192] on axes [1, 3] of [B, 3, N, 64] becomes [3, 1, 64]; a gate of
//! 3 heads on axis 2 of [B, N, 192] is first multiplied by a constant 0/1 matrix [3, 192].
//! With a batch, [B, 768] becomes [B, 1, 768]; windows [B*nW, ..] repeat each sample's gate nW times. A batch of 1 is no batch.

use super::batch::{self, Order};
use crate::graph::build::Builder;
use crate::graph::{Graph, Tensor, ValueId};
use crate::infer::{Dim, Facts};

/// What stands at positions without a unit: what changes nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Fill {
    /// For factors.
    One,
    /// For terms.
    Zero,
}

/// Where a gate goes on an operand.
pub(super) struct Place<'a> {
    /// The model without gates, and its facts.
    pub(super) model: &'a Graph,
    pub(super) facts: &'a Facts,
    pub(super) operand: ValueId,
    /// The operand's shape.
    pub(super) shape: &'a [Dim],
    pub(super) axes: &'a [usize],
    pub(super) index: &'a [Option<u32>],
    pub(super) units: usize,
    /// The batch, where the gate has one.
    pub(super) batch: Option<&'a Dim>,
}

/// A gate in the operand's shape.
pub(super) struct Spread {
    pub(super) value: ValueId,
    /// Where the operand's axis must first be split.
    pub(super) split: Option<Split>,
}

/// An axis of the operand that is split before it meets the gate, and joined again.
pub(super) struct Split {
    axis: usize,
    inner: i64,
    /// Sizes of the axes behind it, where they are all known.
    behind: Option<Vec<i64>>,
}

impl Split {
    /// `value` with the axis split in two.
    pub(super) fn apart(&self, b: &mut Builder<'_>, value: ValueId) -> ValueId {
        self.reshape(b, value, &[-1, self.inner], value)
    }

    /// `value` with the two joined, as they are in `like`.
    pub(super) fn together(&self, b: &mut Builder<'_>, value: ValueId, like: ValueId) -> ValueId {
        self.reshape(b, value, &[-1], like)
    }

    fn reshape(&self, b: &mut Builder<'_>, value: ValueId, middle: &[i64], like: ValueId) -> ValueId {
        // A 0 copies the size of the same axis, which works in front of the split only.
        let front = [&vec![0i64; self.axis], middle].concat();
        if let Some(behind) = &self.behind {
            return b.reshape(value, &[&front[..], behind].concat());
        }
        let sizes = b.shape_of(like);
        let behind = b.slice(sizes, &[self.axis as i64 + 1], &[i64::MAX], &[0]);
        let front = b.ints(&front);
        let target = b.concat(&[front, behind], 0);
        b.reshape_to(value, target)
    }
}

impl Place<'_> {
    /// Appends what is needed. Errors: why the gate does not fit.
    pub(super) fn spread(&self, b: &mut Builder<'_>, gate: ValueId, fill: Fill) -> Result<Spread, String> {
        let (sizes, split_axis) = self.sizes()?;
        let split = split_axis.map(|axis| Split {
            axis,
            inner: sizes[0],
            behind: self.shape[axis + 1..].iter().map(Dim::known).collect(),
        });
        let mut shape = self.shape.to_vec();
        let mut axes = self.axes.to_vec();
        if let Some(axis) = split_axis {
            let inner = Dim::from(sizes[0]);
            shape[axis] = shape[axis].floor_div(&inner);
            shape.insert(axis + 1, inner);
            axes.iter_mut().for_each(|a| *a += 1);
        }
        let mut target = vec![1i64; shape.len()];
        for (axis, size) in axes.iter().zip(&sizes) {
            target[*axis] = *size;
        }
        let mut value = self.expand(b, gate, fill);
        let mut first = axes[0];
        if let Some(batch) = self.batch.filter(|b| !b.is(1)) {
            let (axis, order) = self.batch_axis(split_axis, &axes, batch)?;
            target[axis] = -1;
            first = first.min(axis);
            value = self.repeat(b, value, axis, order);
        }
        let target = &target[first..];
        let flat = self.batch.is_none() && self.is_identity() && target.len() == 1;
        Ok(Spread { value: if flat { value } else { b.reshape(value, target) }, split })
    }

    /// Sizes that the index gives to the axes, and the first axis where it is larger than that.
    fn sizes(&self) -> Result<(Vec<i64>, Option<usize>), String> {
        let (Some(first), len) = (self.axes.first(), self.index.len() as i64) else { return Err("no axis is named".into()) };
        if self.axes.windows(2).any(|w| w[0] >= w[1]) || self.axes.last().is_some_and(|a| *a >= self.shape.len()) {
            return Err(format!("axes {:?} are not increasing axes of {:?}", self.axes, self.shape));
        }
        if let Some(unit) = self.index.iter().flatten().find(|u| **u as usize >= self.units) {
            return Err(format!("unit {unit} of {}", self.units));
        }
        let misfit = || format!("{len} positions do not fit axes {:?} of {:?}", self.axes, self.shape);
        let rest: Vec<i64> = self.axes[1..].iter().map(|a| self.shape[*a].known()).collect::<Option<_>>().ok_or_else(misfit)?;
        let behind: i64 = rest.iter().product();
        if behind == 0 || len == 0 || len % behind != 0 {
            return Err(misfit());
        }
        let inner = len / behind;
        let axis = &self.shape[*first];
        let split = if axis.is(inner) { None } else { Some(*first) };
        if split.is_some() && axis.exact_div(&Dim::from(inner)).is_none() {
            return Err(misfit());
        }
        Ok((std::iter::once(inner).chain(rest).collect(), split))
    }

    fn is_identity(&self) -> bool {
        self.index.len() == self.units && self.index.iter().enumerate().all(|(i, u)| *u == Some(i as u32))
    }

    /// The gate by position: [positions] or [B, positions], in two dimensions where it was not the identity.
    fn expand(&self, b: &mut Builder<'_>, gate: ValueId, fill: Fill) -> ValueId {
        if self.is_identity() {
            return gate;
        }
        let (rows, columns) = (self.units, self.index.len());
        let mut matrix = vec![0f32; rows * columns];
        for (position, unit) in self.index.iter().enumerate().filter_map(|(p, u)| u.map(|u| (p, u as usize))) {
            matrix[unit * columns + position] = 1.0;
        }
        let matrix = b.constant(Tensor::f32(&[rows, columns], &matrix));
        let gate = if self.batch.is_some() { gate } else { b.reshape(gate, &[1, rows as i64]) };
        let spread = b.matmul(gate, matrix);
        if fill == Fill::Zero || self.index.iter().all(Option::is_some) {
            return spread;
        }
        let free: Vec<f32> = self.index.iter().map(|u| if u.is_none() { 1.0 } else { 0.0 }).collect();
        let free = b.constant(Tensor::f32(&[columns], &free));
        b.add(spread, free)
    }

    /// The axis of the (split) operand that holds the batch. A split axis holds it in front of the gate's positions.
    fn batch_axis(&self, split: Option<usize>, gated: &[usize], batch: &Dim) -> Result<(usize, Order), String> {
        if let Some(axis) = split
            && self.shape[axis].exact_div(batch).and_then(|d| d.known()) == Some(self.sizes()?.0[0])
        {
            return Ok((axis, Order::Alone));
        }
        let unsplit = |axis: usize| axis + usize::from(split.is_some_and(|s| axis > s));
        let is_gated = |axis: usize| split == Some(axis) || gated.contains(&unsplit(axis));
        batch::find(self.model, self.facts, self.operand, batch, &is_gated).map(|(axis, order)| (unsplit(axis), order))
    }

    /// A gate [B, n] as often as each sample stands on the operand's axis: [B * k, n], or [k * B, n].
    fn repeat(&self, b: &mut Builder<'_>, gate: ValueId, axis: usize, order: Order) -> ValueId {
        let positions = self.index.len() as i64;
        let (shape, times) = match order {
            Order::Alone => return gate,
            Order::Outermost => ([-1, 1, positions], [false, true]),
            Order::Innermost => ([1, -1, positions], [true, false]),
        };
        let size = |b: &mut Builder<'_>, v: ValueId, axis: usize| {
            let sizes = b.shape_of(v);
            b.slice(sizes, &[axis as i64], &[axis as i64 + 1], &[0])
        };
        let (all, samples) = (size(b, self.operand, axis), size(b, gate, 0));
        let count = b.div(all, samples);
        let one = b.ints(&[1]);
        let parts = [if times[0] { count } else { one }, if times[1] { count } else { one }, one];
        let target = b.concat(&parts, 0);
        let gate = b.reshape(gate, &shape);
        b.op("Expand", &[gate, target], vec![])
    }
}
