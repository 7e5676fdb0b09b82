//! Operators that take some positions of an axis, or put values at some: Concat, Split, Slice, Gather and their like.
//!
//! Along an axis of a fixed size the positions are data (`Select`), so that a factor selected from has inner factors for each
//! position. Along an axis of unknown size they are a barrier. One file per way of saying which positions.

pub mod gather;
pub mod join;
pub mod scatter;
pub mod slice;

use super::shape::zeros;
use crate::autodiff::GradCx;
use crate::graph::build::attr;
use crate::graph::{AttrValue, Tensor, ValueId};
use crate::infer::Dim;
use bytes::Bytes;

/// Axes longer than this have no list of positions; no network has one, a hostile file may.
const POSITIONS_MAX: usize = 1 << 22;
/// Elements of the largest 0/1 matrix that a gradient may hold.
const MATRIX_MAX: usize = 1 << 22;

/// The size of an axis whose positions may be listed.
fn listed(size: &Dim) -> Option<usize> {
    size.size().filter(|n| *n <= POSITIONS_MAX)
}

/// Where position `p` of an axis went when only `kept` stayed; all stay where `kept` is `None`.
fn moved_to(p: usize, kept: Option<&[usize]>) -> Option<usize> {
    match kept {
        // What stays is in order but where heads of unlike width were sorted.
        Some(kept) => kept.binary_search(&p).ok().or_else(|| kept.iter().position(|k| *k == p)),
        None => Some(p),
    }
}

/// A value with known sizes on the way to a gradient.
#[derive(Clone)]
struct Sized {
    value: ValueId,
    shape: Vec<Dim>,
}

/// Zeros of the shape of `v` but `count` positions along `axis`.
fn zero_block(cx: &mut GradCx<'_>, v: &Sized, axis: usize, count: usize) -> ValueId {
    let sizes: Option<Vec<i64>> = v.shape.iter().map(Dim::known).collect();
    let count = count as i64;
    let sizes = match sizes {
        Some(mut sizes) => {
            sizes[axis] = count;
            cx.b.ints(&sizes)
        }
        None => {
            let count = cx.b.ints(&[count]);
            sizes_with(cx, v, axis, count)
        }
    };
    let like = cx.input(0);
    zeros(cx, like, sizes)
}

/// The run-time shape of `v` with the one-element vector `count` in the place of the size of `axis`.
fn sizes_with(cx: &mut GradCx<'_>, v: &Sized, axis: usize, count: ValueId) -> ValueId {
    let (rank, axis) = (v.shape.len() as i64, axis as i64);
    let shape = cx.b.shape_of(v.value);
    let mut parts = Vec::new();
    if axis > 0 {
        parts.push(cx.b.slice(shape, &[0], &[axis], &[0]));
    }
    parts.push(count);
    if axis + 1 < rank {
        parts.push(cx.b.slice(shape, &[axis + 1], &[rank], &[0]));
    }
    if parts.len() == 1 { count } else { cx.b.concat(&parts, 0) }
}

/// `out[index[j]] += v[j]` along `axis`, on zeros of `size` positions: the gradient of taking `index`.
///
/// Consecutive positions become a Concat with zeros, positions taken once each a Gather, repeated ones a product with a 0/1
/// matrix; where that would be large, ScatterND (opset 16).
fn scatter_along(cx: &mut GradCx<'_>, v: Sized, axis: usize, index: &[usize], size: usize) -> Result<Sized, String> {
    let mut shape = v.shape.clone();
    shape[axis] = Dim::from(size);
    let mut place = vec![None; size];
    for (j, i) in index.iter().enumerate() {
        *place.get_mut(*i).ok_or("an index lies outside")? = Some(j);
    }
    let once = place.iter().flatten().count() == index.len();
    let run = index.windows(2).all(|w| w[1] == w[0] + 1) && !index.is_empty();
    let value = if run {
        let (before, behind) = (index[0], size - index[0] - index.len());
        padded(cx, &v, axis, before, behind)
    } else if once {
        let behind = usize::from(index.len() < size);
        let with_zero = padded(cx, &v, axis, 0, behind);
        let inverse: Vec<i64> = place.iter().map(|j| j.unwrap_or(index.len()) as i64).collect();
        let inverse = cx.b.ints(&inverse);
        cx.b.gather(with_zero, inverse, axis as i64)
    } else if index.len().saturating_mul(size) <= MATRIX_MAX {
        let matrix = selection_matrix(cx, index, size);
        with_axis(cx, &v, axis, v.shape.len() - 1, |cx, last| Ok(cx.b.matmul(last, matrix)))?
    } else {
        scatter_rows(cx, &v, axis, index, &shape)?
    };
    Ok(Sized { value, shape })
}

/// `v` between zeros along `axis`.
fn padded(cx: &mut GradCx<'_>, v: &Sized, axis: usize, before: usize, behind: usize) -> ValueId {
    let mut parts = Vec::new();
    if before > 0 {
        parts.push(zero_block(cx, v, axis, before));
    }
    parts.push(v.value);
    if behind > 0 {
        parts.push(zero_block(cx, v, axis, behind));
    }
    if parts.len() == 1 { v.value } else { cx.b.concat(&parts, axis as i64) }
}

/// `[index.len(), size]` with a one at (j, index[j]).
fn selection_matrix(cx: &mut GradCx<'_>, index: &[usize], size: usize) -> ValueId {
    let mut ones = vec![0.0; index.len() * size];
    for (j, i) in index.iter().enumerate() {
        ones[j * size + i] = 1.0;
    }
    let dtype = cx.dtype(cx.input(0));
    let like = Tensor::new(dtype, vec![index.len(), size], Bytes::new());
    cx.b.constant(like.with_f32s(&ones))
}

/// `f` of `v` with `axis` moved to the place `to`; the result is moved back.
fn with_axis<'a>(
    cx: &mut GradCx<'a>,
    v: &Sized,
    axis: usize,
    to: usize,
    f: impl FnOnce(&mut GradCx<'a>, ValueId) -> Result<ValueId, String>,
) -> Result<ValueId, String> {
    if axis == to {
        return f(cx, v.value);
    }
    let mut there: Vec<usize> = (0..v.shape.len()).collect();
    there.remove(axis);
    there.insert(to, axis);
    let mut back: Vec<usize> = (0..v.shape.len()).collect();
    back.remove(to);
    back.insert(axis, to);
    let moved = cx.b.transpose(v.value, &there);
    let out = f(cx, moved)?;
    Ok(cx.b.transpose(out, &back))
}

fn scatter_rows(cx: &mut GradCx<'_>, v: &Sized, axis: usize, index: &[usize], shape: &[Dim]) -> Result<ValueId, String> {
    let mut rows = shape.to_vec();
    let size = rows.remove(axis);
    rows.insert(0, size.clone());
    let count = size.size().ok_or("the gathered axis has no fixed size")?;
    let indices: Vec<i64> = index.iter().map(|i| *i as i64).collect();
    let indices = cx.b.constant(Tensor { dims: vec![index.len(), 1], ..Tensor::i64s(&indices) });
    with_axis(cx, v, axis, 0, |cx, first| {
        let on = zero_block(cx, &Sized { value: first, shape: rows }, 0, count);
        scatter_add(cx, on, indices, first)
    })
}

/// ScatterND with addition.
fn scatter_add(cx: &mut GradCx<'_>, on: ValueId, indices: ValueId, updates: ValueId) -> Result<ValueId, String> {
    if cx.opset() < 16 {
        return Err("the gradient of a lookup needs ScatterND with addition, which opset 16 has".into());
    }
    Ok(cx.b.op("ScatterND", &[on, indices, updates], vec![attr("reduction", AttrValue::Str("add".into()))]))
}
