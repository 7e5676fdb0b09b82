//! A factor: what multiplies a value, with size 1 on every axis along which it does not change.

use crate::graph::Tensor;
use crate::infer::Dim;

/// Numbers that multiply a value of the same rank, broadcast along axes of size 1.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Factor {
    pub(super) dims: Vec<usize>,
    pub(super) values: Vec<f32>,
}

impl Factor {
    pub(super) fn new(dims: Vec<usize>, values: Vec<f32>) -> Self {
        Self { dims, values }
    }

    /// Whether it changes nothing.
    pub(super) fn is_one(&self) -> bool {
        self.values.iter().all(|v| v.to_bits() == 1f32.to_bits())
    }

    /// Axes along which it may change.
    pub(super) fn axes(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.dims.len()).filter(|a| self.dims[*a] > 1)
    }

    /// The same numbers on a value of rank `rank`, along one axis; `None` where it extends over others than `from`.
    pub(super) fn moved(&self, from: usize, rank: usize, to: usize) -> Option<Self> {
        if self.axes().any(|a| a != from) {
            return None;
        }
        let mut dims = vec![1; rank];
        *dims.get_mut(to)? = *self.dims.get(from)?;
        Some(Self::new(dims, self.values.clone()))
    }

    /// Of an operand that is broadcast to the value that this factor multiplies: leading axes go. `None` where the operand does not
    /// have the axes along which the factor changes.
    pub(super) fn trailing(&self, shape: &[Dim]) -> Option<Self> {
        let extra = self.dims.len().checked_sub(shape.len())?;
        if self.dims[..extra].iter().any(|d| *d > 1) {
            return None;
        }
        let fits = |(d, s): (&usize, &Dim)| *d == 1 || s.size() == Some(*d);
        let dims = &self.dims[extra..];
        dims.iter().zip(shape).all(fits).then(|| Self::new(dims.to_vec(), self.values.clone()))
    }

    /// Of the input of a Transpose, where this is of its output.
    pub(super) fn before_transpose(&self, perm: &[usize]) -> Self {
        let mut dims = vec![1; self.dims.len()];
        for (out, from) in perm.iter().enumerate() {
            dims[*from] = self.dims[out];
        }
        let place = |at: &[usize]| perm.iter().map(|from| at[*from]).collect::<Vec<_>>();
        let values = positions(&dims).map(|at| self.at(&place(&at))).collect();
        Self { dims, values }
    }

    /// Of the input of a Reshape, where this is of its output. Axes are matched from the left in runs of equal products; within a
    /// run in which the factor changes all sizes must be known.
    pub(super) fn before_reshape(&self, input: &[Dim], output: &[Dim]) -> Option<Self> {
        let (mut dims, mut spread) = (Vec::new(), Vec::new());
        let (mut i, mut o) = (0, 0);
        while i < input.len() || o < output.len() {
            let (from_i, from_o) = (i, o);
            (i, o) = run_end(input, output, i, o)?;
            let run = &self.dims[from_o..o];
            if run.iter().all(|d| *d == 1) {
                dims.extend(std::iter::repeat_n(1, i - from_i));
                spread.extend(std::iter::repeat_n(1, o - from_o));
                continue;
            }
            for d in &input[from_i..i] {
                dims.push(d.size()?);
            }
            for d in &output[from_o..o] {
                spread.push(d.size()?);
            }
        }
        let values = positions(&spread).map(|at| self.at(&at)).collect();
        let factor = Self { dims, values };
        (factor.dims.iter().product::<usize>() == factor.values.len()).then_some(factor)
    }

    /// Of the input of an Expand, where this is of its output; `None` where it changes along an axis that the input does not have or
    /// repeats.
    pub(super) fn before_expand(&self, input: &[Dim]) -> Option<Self> {
        let extra = self.dims.len().checked_sub(input.len())?;
        let mut before = self.clone();
        for axis in 0..self.dims.len() {
            let is_repeated = axis < extra || input[axis - extra].is(1);
            if is_repeated && self.dims[axis] > 1 {
                let mut dims = before.dims.clone();
                dims[axis] = 1;
                let same = positions(&before.dims).all(|at| {
                    let mut first = at.clone();
                    first[axis] = 0;
                    before.at(&at).to_bits() == before.at(&first).to_bits()
                });
                if !same {
                    return None;
                }
                let values = positions(&dims).map(|at| before.at(&at)).collect();
                before = Self { dims, values };
            }
        }
        let (dims, values) = (before.dims.split_off(extra), before.values);
        Some(Self { dims, values })
    }

    /// Of the input of an operator that picks positions of an axis of it, where this is of its output; the rest is 1. `size` is the
    /// input's. Where `is_gone`, the output lacks the axis.
    pub(super) fn before_pick(&self, axis: usize, size: usize, picks: &[usize], is_gone: bool) -> Option<Self> {
        let mut picked = self.clone();
        if is_gone {
            picked.dims.insert(axis, 1);
        }
        let width = *picked.dims.get(axis)?;
        if width != 1 && width != picks.len() {
            return None;
        }
        let mut dims = picked.dims.clone();
        dims[axis] = size;
        let value = |at: Vec<usize>| {
            let Some(from) = picks.iter().position(|p| *p == at[axis]) else { return 1.0 };
            let mut place = at;
            place[axis] = if width == 1 { 0 } else { from };
            picked.at(&place)
        };
        let values = positions(&dims).map(value).collect();
        Some(Self { dims, values })
    }

    /// Whether it is 1 at these positions of an axis.
    pub(super) fn is_one_at(&self, axis: usize, picks: &[usize]) -> bool {
        let is_one = |at: &[usize]| self.at(at).to_bits() == 1f32.to_bits();
        positions(&self.dims).filter(|at| self.dims[axis] == 1 || picks.contains(&at[axis])).all(|at| is_one(&at))
    }

    fn at(&self, place: &[usize]) -> f32 {
        let flat = self.dims.iter().zip(place).fold(0, |flat, (d, p)| flat * d + if *d == 1 { 0 } else { *p });
        self.values[flat]
    }

    /// Both, one after the other; `None` where their dims differ.
    pub(super) fn times(&self, other: &Self) -> Option<Self> {
        let same = self.dims == other.dims;
        same.then(|| Self::new(self.dims.clone(), self.values.iter().zip(&other.values).map(|(a, b)| a * b).collect()))
    }

    /// A constant times this; `None` where its shape does not fit or its elements are no floats.
    pub(super) fn scale(&self, tensor: &Tensor) -> Option<Tensor> {
        let fits = tensor.dims.len() == self.dims.len() && self.dims.iter().zip(&tensor.dims).all(|(f, t)| *f == 1 || f == t);
        let values = tensor.to_f32s().filter(|_| fits)?;
        let scaled: Vec<f32> = positions(&tensor.dims).zip(values).map(|(at, v)| v * self.at(&at)).collect();
        Some(tensor.with_f32s(&scaled))
    }
}

/// Where the shortest run of axes with equal products ends that starts at these axes.
fn run_end(input: &[Dim], output: &[Dim], i: usize, o: usize) -> Option<(usize, usize)> {
    let (mut a, mut b) = ((i + 1).min(input.len()), (o + 1).min(output.len()));
    loop {
        let (left, right): (Dim, Dim) = (input[i..a].iter().product(), output[o..b].iter().product());
        if left == right {
            return Some((a, b));
        }
        let left_is_less = match (left.known(), right.known()) {
            (Some(l), Some(r)) => l < r,
            _ => right.exact_div(&left).is_some(),
        };
        match (a < input.len(), b < output.len()) {
            (false, false) => return None,
            (true, true) if left_is_less => a += 1,
            (true, false) => a += 1,
            (_, true) => b += 1,
        }
    }
}

/// All positions of a shape, in row-major order.
fn positions(dims: &[usize]) -> impl Iterator<Item = Vec<usize>> + '_ {
    let count: usize = dims.iter().product();
    (0..count).map(|flat| {
        let mut at = vec![0; dims.len()];
        let mut rest = flat;
        for axis in (0..dims.len()).rev() {
            at[axis] = rest % dims[axis];
            rest /= dims[axis];
        }
        at
    })
}
