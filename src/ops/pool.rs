//! Operators on the spatial axes of images: AveragePool, MaxPool and their global forms (opset 1 to 24), Resize (10 to 24),
//! DepthToSpace and SpaceToDepth (1 to 24), Col2Im (18 to 24).
//!
//! Shape: `[B, C, in..] -> [B, C, out..]`; batch and channel are parallel, spatial axes are barriers unless nothing happens to
//! them. Example: AveragePool of `[B, 64, 56, 56]`, kernel 2, stride 2 -> `[B, 64, 28, 28]`. DepthToSpace moves a part of the
//! channel axis to the spatial axes: `[B, b*b*C, H, W] -> [B, C, H*b, W*b]`.

mod interpolate;

use super::conv::{Geometry, Window, relate_spatial, reshape_like, spread};
use super::matmul::scaled;
use super::{Axes, Cost, Grad, OpRule, Refit};
use crate::autodiff::GradCx;
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::build::attr;
use crate::graph::{AttrValue, DType, Node, Tensor, ValueId};
use crate::infer::{Dim, Fact, InferCx, InferError, Known};
use crate::slice::refit::{RefitCx, RefitError};
use bytes::Bytes;

/// A record whose work is not counted: data movement, sums and comparisons.
const fn record(
    name: &'static str,
    since: i64,
    infer: fn(&InferCx<'_>) -> Result<Vec<Fact>, InferError>,
    axes: fn(&AxesCx<'_>) -> Relations,
    grad: Grad,
) -> OpRule {
    OpRule { name, domain: "", opsets: (since, 24), infer, axes: Axes::Rule(axes), grad, cost: Cost::Free, refit: Refit::Nothing }
}

const NO_MAX: Grad = Grad::No("the gradient of a maximum over positions is not written");

/// The records of this family.
pub static RULES: &[OpRule] = &[
    record("AveragePool", 1, pool_infer, pool_axes, Grad::Rule(average_pool_grad)),
    record("MaxPool", 1, pool_infer, pool_axes, Grad::Rule(max_pool_grad)),
    record("GlobalAveragePool", 1, global_infer, global_axes, Grad::Rule(global_average_grad)),
    record("GlobalMaxPool", 1, global_infer, global_axes, NO_MAX),
    record("DepthToSpace", 1, depth_to_space_infer, depth_to_space_axes, Grad::Rule(depth_to_space_grad)),
    record("SpaceToDepth", 1, space_to_depth_infer, space_to_depth_axes, Grad::Rule(space_to_depth_grad)),
    record("Col2Im", 18, col2im_infer, col2im_axes, Grad::Rule(col2im_grad)),
    OpRule { refit: Refit::Rule(resize_refit), ..record("Resize", 10, resize_infer, resize_axes, Grad::Rule(resize_grad)) },
];

/// The window of a pooling node over an input of rank `rank`.
fn pool_window(node: &Node, rank: usize) -> Result<Window, String> {
    let kernel = node.attr_ints("kernel_shape").unwrap_or(&[]);
    if rank < 3 || kernel.len() != rank - 2 || kernel.iter().any(|k| *k < 1) {
        return Err(format!("kernel_shape {kernel:?} for an input of rank {rank}"));
    }
    Window::of(node, kernel.iter().map(|k| Dim::from(*k)).collect())
}

pub(super) fn pool_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let Some(x) = cx.shape(0) else {
        return Ok(vec![Fact::new(cx.dtype(0), None), Fact::new(Some(DType::I64), None)]);
    };
    let window = pool_window(cx.node, x.len()).map_err(|e| cx.error(e))?;
    let ceil = cx.node.attr_int("ceil_mode").unwrap_or(0) != 0;
    let mut out = x[..2].to_vec();
    for axis in 0..window.rank() {
        let size = pool_output(&window, axis, &x[axis + 2], ceil).map_err(|e| cx.error(e))?;
        out.push(size.unwrap_or_else(|| cx.fresh(&format!("pooled{axis}"))));
    }
    Ok(vec![Fact::new(cx.dtype(0), Some(out.clone())), Fact::new(Some(DType::I64), Some(out))])
}

/// Output size of an axis. With `ceil_mode` a window may reach past the end, as long as it starts inside the input or the
/// padding before it; `None` where that depends on a size that is not known.
fn pool_output(window: &Window, axis: usize, input: &Dim, ceil: bool) -> Result<Option<Dim>, String> {
    let (floor, stride) = (window.output(axis, input)?, Dim::from(window.strides[axis]));
    let (Some(slack), true) = (window.slack(axis, input), ceil) else { return Ok(Some(floor)) };
    let after = window.pads(axis, input).map_or(0, |p| p.1);
    let rounded = &slack.ceil_div(&stride) + &Dim::from(1i64);
    if (&window.reach(axis) - &Dim::from(after)).known().is_some_and(|r| r >= window.strides[axis]) {
        return Ok(Some(rounded));
    }
    // The window at `out - 1` starts at `(out - 1) * s`; it must lie before `in + pad before = slack + reach - pad after`.
    let end = &(&slack + &window.reach(axis)) - &Dim::from(after);
    let last = &(&rounded - &Dim::from(1i64)) * &stride;
    let (Some(end), Some(last)) = (end.known(), last.known()) else { return Ok(None) };
    Ok(Some(if last >= end { &rounded - &Dim::from(1i64) } else { rounded }))
}

/// `b c .. -> b c ..`; the indices of MaxPool number positions over all axes, so they are barriers.
pub(super) fn pool_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let Ok(window) = pool_window(cx.node, cx.shape(Slot::In(0)).len()) else { return relations };
    relations.same((Slot::In(0), 0), (Slot::Out(0), 0));
    relations.same((Slot::In(0), 1), (Slot::Out(0), 1));
    relate_spatial(&mut relations, |a| window.is_pointwise(a), window.rank(), "pooling mixes positions");
    for axis in 0..cx.shape(Slot::Out(1)).len() {
        relations.barrier((Slot::Out(1), axis), "indices count over all axes");
        if axis < 2 {
            relations.barrier((Slot::In(0), axis), "indices count over all axes");
        }
    }
    relations
}

pub(super) fn global_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let one = |(axis, d): (usize, &Dim)| if axis < 2 { d.clone() } else { Dim::from(1i64) };
    Ok(vec![Fact::new(cx.dtype(0), cx.shape(0).map(|x| x.iter().enumerate().map(one).collect()))])
}

/// `b c .. -> b c 1 ..`
pub(super) fn global_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    for axis in 0..cx.shape(Slot::In(0)).len() {
        if axis < 2 {
            relations.same((Slot::In(0), axis), (Slot::Out(0), axis));
        } else {
            relations.barrier((Slot::In(0), axis), "pooling mixes positions");
        }
    }
    relations
}

/// `dx = dy / positions`, stretched over the positions.
fn global_average_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x) = (cx.dy()?, cx.input(0));
    let shape = cx.shape(x);
    let share = match shape.get(2..).unwrap_or(&[]).iter().product::<Dim>().known() {
        Some(count) => scaled(cx, dy, 1.0 / count as f32, x),
        None => {
            let sizes = cx.b.shape_of(x);
            let mut count = cx.b.ints(&[1]);
            for axis in 2..shape.len() as i64 {
                let at = cx.b.ints(&[axis]);
                let size = cx.b.gather(sizes, at, 0);
                count = cx.b.mul(count, size);
            }
            let dtype = cx.dtype(x);
            let count = cx.b.cast(count, dtype);
            cx.b.div(dy, count)
        }
    };
    let sizes = cx.b.shape_of(x);
    let dx = cx.b.op("Expand", &[share, sizes], vec![]);
    cx.give(0, dx);
    Ok(())
}

/// Windows that tile the input: `dx = dy / k`, each position repeated. Otherwise a depthwise ConvTranspose with the constant
/// kernel `1 / k`, where positions in the padding that are not counted make the share larger.
fn average_pool_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x) = (cx.dy()?, cx.input(0));
    let (shape, out) = (cx.shape(x), cx.shape(cx.output(0)));
    let window = pool_window(cx.node(), shape.len())?;
    let rank = window.rank();
    let positions = window.kernel.iter().product::<Dim>().known().ok_or("the kernel is not known")?;
    if (0..rank).all(|a| window.tiles(a, &shape[a + 2])) {
        let axes: Vec<i64> = (0..rank as i64).map(|a| 2 * a + 3).collect();
        let share = scaled(cx, dy, 1.0 / positions as f32, x);
        let split = cx.b.unsqueeze(share, &axes);
        let repeats: Vec<i64> = [1, 1].into_iter().chain(window.strides.iter().flat_map(|s| [1, *s])).collect();
        let repeats = cx.b.ints(&repeats);
        let wide = cx.b.op("Expand", &[split, repeats], vec![]);
        let dx = reshape_like(cx, wide, shape, &[x])?;
        cx.give(0, dx);
        return Ok(());
    }
    let past_end = |a: usize| window.slack(a, &shape[a + 2]).is_some_and(|s| !s.modulo(&Dim::from(window.strides[a])).is(0));
    if cx.node().attr_int("ceil_mode").unwrap_or(0) != 0 && (0..rank).any(past_end) {
        return Err("windows that may reach past the end of the input".to_string());
    }
    let channels = shape[1].known().ok_or("the number of channels is not known")?;
    let pads: Option<Vec<_>> = (0..rank).map(|a| window.pads(a, &shape[a + 2])).collect();
    let pads = pads.ok_or("the padding depends on sizes that are not known")?;
    let mut share = dy;
    if cx.node().attr_int("count_include_pad").unwrap_or(0) == 0 && pads.iter().any(|p| *p != (0, 0)) {
        let larger = uncounted_padding(&window, &pads, &shape[2..], &out[2..])?;
        let dims: Vec<usize> = [1, 1].into_iter().chain(out[2..].iter().filter_map(Dim::size)).collect();
        let like = Tensor::new(cx.dtype(x), dims, Bytes::new());
        let larger = cx.b.constant(like.with_f32s(&larger));
        share = cx.b.mul(dy, larger);
    }
    let kernel = window.kernel.iter().filter_map(Dim::size);
    let dims: Vec<usize> = [usize::try_from(channels).unwrap_or(0), 1].into_iter().chain(kernel).collect();
    let like = Tensor::new(cx.dtype(x), dims.clone(), Bytes::new());
    let weight = cx.b.constant(like.with_f32s(&vec![1.0 / positions as f32; dims.iter().product()]));
    let geometry = Geometry { strides: window.strides.clone(), dilations: window.dilations.clone(), pads, group: channels };
    let dx = spread(cx, share, weight, &window, &geometry)?;
    cx.give(0, dx);
    Ok(())
}

/// `dx` is the sum over the places of the kernel of `m * dy / sum(m)`, with `m = (x there = y)`: equal maxima share the gradient. What
/// each place gives is put back by a depthwise ConvTranspose.
fn max_pool_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x, y) = (cx.dy()?, cx.input(0), cx.output(0));
    let (shape, out, dtype) = (cx.shape(x), cx.shape(y), cx.dtype(x));
    let window = pool_window(cx.node(), shape.len())?;
    let rank = window.rank();
    let numbers = |dims: &[Dim]| -> Option<Vec<i64>> { dims.iter().map(Dim::known).collect() };
    let channels = shape[1].known().ok_or("the number of channels is not known")?;
    let kernel = numbers(&window.kernel).ok_or("the kernel is not known")?;
    let out = numbers(&out[2..]).ok_or("a maximum over an image of unknown size")?;
    let pads: Option<Vec<_>> = (0..rank).map(|a| window.pads(a, &shape[a + 2])).collect();
    let pads = pads.ok_or("the padding depends on sizes that are not known")?;
    let mut padded = x;
    if pads.iter().any(|p| *p != (0, 0)) {
        let (before, after) = (pads.iter().map(|p| p.0), pads.iter().map(|p| p.1));
        let widths: Vec<i64> = [0, 0].into_iter().chain(before).chain([0, 0]).chain(after).collect();
        let widths = cx.b.ints(&widths);
        let lowest = cx.b.constant(Tensor::new(dtype, Vec::new(), Bytes::new()).with_f32s(&[-1e30]));
        padded = cx.b.op("Pad", &[x, widths, lowest], vec![]);
    }
    let places = kernel.iter().fold(vec![Vec::new()], |places, size| {
        let step = |at: &Vec<i64>, i: i64| at.iter().copied().chain([i]).collect::<Vec<i64>>();
        places.iter().flat_map(|at| (0..*size).map(move |i| step(at, i))).collect()
    });
    let (axes, steps) = (cx.b.ints(&(2..2 + rank as i64).collect::<Vec<_>>()), cx.b.ints(&window.strides));
    let mut masks = Vec::with_capacity(places.len());
    for at in &places {
        let starts: Vec<i64> = at.iter().zip(&window.dilations).map(|(i, d)| i * d).collect();
        let ends: Vec<i64> = (0..rank).map(|a| starts[a] + (out[a] - 1) * window.strides[a] + 1).collect();
        let (starts, ends) = (cx.b.ints(&starts), cx.b.ints(&ends));
        let there = cx.b.op("Slice", &[padded, starts, ends, axes, steps], vec![]);
        let is_largest = cx.b.op("Equal", &[there, y], vec![]);
        masks.push(cx.b.cast(is_largest, dtype));
    }
    let count = masks[1..].iter().fold(masks[0], |sum, m| cx.b.add(sum, *m));
    let share = cx.b.div(dy, count);
    let mut part = |mask: &ValueId| {
        let part = cx.b.mul(*mask, share);
        cx.b.unsqueeze(part, &[2])
    };
    let parts: Vec<ValueId> = masks.iter().map(&mut part).collect();
    let parts = cx.b.concat(&parts, 2);
    let target: Vec<i64> = [0, channels * places.len() as i64].into_iter().chain(out).collect();
    let parts = cx.b.reshape(parts, &target);
    let place = |n: usize| (0..places.len()).map(move |i| if i == n { 1.0 } else { 0.0 });
    let weights: Vec<f32> = (0..channels).flat_map(|_| (0..places.len()).flat_map(place)).collect();
    let sizes = kernel.iter().map(|k| usize::try_from(*k).unwrap_or(0));
    let dims: Vec<usize> = [usize::try_from(target[1]).unwrap_or(0), 1].into_iter().chain(sizes).collect();
    let weight = cx.b.constant(Tensor::new(dtype, dims, Bytes::new()).with_f32s(&weights));
    let geometry = Geometry { strides: window.strides.clone(), dilations: window.dilations.clone(), pads, group: channels };
    let dx = spread(cx, parts, weight, &window, &geometry)?;
    cx.give(0, dx);
    Ok(())
}

/// Per output position: kernel positions / those of them that lie inside the input.
fn uncounted_padding(window: &Window, pads: &[(i64, i64)], input: &[Dim], out: &[Dim]) -> Result<Vec<f32>, String> {
    let mut factors = vec![1.0f32];
    for axis in 0..window.rank() {
        let sizes = (window.kernel[axis].known(), input[axis].known(), out[axis].known());
        let (Some(k), Some(size), Some(out)) = sizes else { return Err("padding over a size that is not known".to_string()) };
        let inside = |o: i64| {
            let start = o * window.strides[axis] - pads[axis].0;
            (0..k).map(|i| start + i * window.dilations[axis]).filter(|p| (0..size).contains(p)).count().max(1)
        };
        let along: Vec<f32> = (0..out).map(|o| k as f32 / inside(o) as f32).collect();
        factors = factors.iter().flat_map(|f| along.iter().map(move |a| f * a)).collect();
    }
    Ok(factors)
}

/// The block size of DepthToSpace and SpaceToDepth.
fn block(node: &Node) -> Result<i64, String> {
    node.attr_int("blocksize").filter(|b| *b > 0).ok_or_else(|| "no positive blocksize".to_string())
}

fn is_crd(node: &Node) -> bool {
    node.op() == "DepthToSpace" && node.attr_str("mode") == Some("CRD")
}

fn depth_to_space_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let Some([n, c, h, w]) = cx.shape(0) else { return Ok(vec![Fact::new(cx.dtype(0), None)]) };
    let b = Dim::from(block(cx.node).map_err(|e| cx.error(e))?);
    let inner = per_block(c, &(&b * &b)).map_err(|e| cx.error(e))?;
    Ok(vec![Fact::new(cx.dtype(0), Some(vec![n.clone(), inner, h * &b, w * &b]))])
}

/// Channels per block position. Sizes that are no numbers are taken to divide, as the operator demands.
fn per_block(channels: &Dim, positions: &Dim) -> Result<Dim, String> {
    match (channels.exact_div(positions), channels.known(), positions.known()) {
        (Some(inner), ..) => Ok(inner),
        (None, Some(_), Some(_)) => Err(format!("{channels} channels in blocks of {positions} positions")),
        (None, ..) => Ok(channels.floor_div(positions)),
    }
}

fn space_to_depth_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let Some([n, c, h, w]) = cx.shape(0) else { return Ok(vec![Fact::new(cx.dtype(0), None)]) };
    let b = Dim::from(block(cx.node).map_err(|e| cx.error(e))?);
    let sizes = vec![n.clone(), &(c * &b) * &b, h.floor_div(&b), w.floor_div(&b)];
    Ok(vec![Fact::new(cx.dtype(0), Some(sizes))])
}

/// `b (i j c) h w -> b c (h i) (w j)`, or `b (c i j) h w` in mode CRD.
fn depth_to_space_axes(cx: &AxesCx<'_>) -> Relations {
    block_axes(cx, Slot::In(0), Slot::Out(0))
}

/// `b c (h i) (w j) -> b (i j c) h w`
fn space_to_depth_axes(cx: &AxesCx<'_>) -> Relations {
    block_axes(cx, Slot::Out(0), Slot::In(0))
}

fn block_axes(cx: &AxesCx<'_>, deep: Slot, wide: Slot) -> Relations {
    let mut relations = Relations::default();
    let (small, large) = (cx.shape(deep), cx.shape(wide));
    let (Ok(b), true) = (block(cx.node), small.len() == 4 && large.len() == 4) else { return relations };
    let b = Dim::from(b);
    let (channel, rows) = if is_crd(cx.node) { (0, 1) } else { (2, 0) };
    let mut factors = vec![b.clone(); 3];
    factors[channel] = large[1].clone();
    let parts = relations.virtual_value(factors);
    relations.same((deep, 0), (wide, 0));
    if &(&b * &b) * &large[1] == small[1] {
        relations.regroup((deep, vec![1]), (parts, vec![0, 1, 2]));
        relations.same((parts, channel), (wide, 1));
    } else {
        relations.barrier((deep, 1), "channels of a number that is not known");
        relations.barrier((wide, 1), "channels of a number that is not known");
    }
    for axis in 0..2 {
        let split = relations.virtual_value(vec![small[axis + 2].clone(), b.clone()]);
        if &small[axis + 2] * &b != large[axis + 2] {
            relations.barrier((deep, axis + 2), "positions of a number that is not known");
            relations.barrier((wide, axis + 2), "positions of a number that is not known");
            continue;
        }
        relations.regroup((wide, vec![axis + 2]), (split, vec![0, 1]));
        relations.same((deep, axis + 2), (split, 0));
        relations.same((parts, rows + axis), (split, 1));
        relations.barrier((split, 1), "positions inside a block");
    }
    relations
}

/// The channels and positions of the gradient go back where they came from.
fn depth_to_space_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x, y) = (cx.dy()?, cx.input(0), cx.output(0));
    let b = Dim::from(block(cx.node())?);
    let ([n, _, h, w], [_, c, ..]) = (cx.shape(x), cx.shape(y)) else { return Err("no shapes".to_string()) };
    let cut = [n, c, h, &b, w, &b].map(Clone::clone);
    let perm = if is_crd(cx.node()) { [0, 1, 3, 5, 2, 4] } else { [0, 3, 5, 1, 2, 4] };
    let out = reshape_like(cx, dy, &cut, &[x, y])?;
    let out = cx.b.transpose(out, &perm);
    let dx = reshape_like(cx, out, cx.shape(x), &[x])?;
    cx.give(0, dx);
    Ok(())
}

fn space_to_depth_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x, y) = (cx.dy()?, cx.input(0), cx.output(0));
    let b = Dim::from(block(cx.node())?);
    let ([n, c, ..], [_, _, h, w]) = (cx.shape(x), cx.shape(y)) else { return Err("no shapes".to_string()) };
    let cut = [n, &b, &b, c, h, w].map(Clone::clone);
    let out = reshape_like(cx, dy, &cut, &[x, y])?;
    let out = cx.b.transpose(out, &[0, 3, 4, 1, 5, 2]);
    let dx = reshape_like(cx, out, cx.shape(x), &[x])?;
    cx.give(0, dx);
    Ok(())
}

/// `[N, C * k, L]`, image_shape, block_shape -> `[N, C, image..]` with `k` the positions of a block.
fn col2im_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let (Some(x), Some(image), Some(block)) = (cx.shape(0), cx.ints(1), cx.ints(2)) else {
        return Ok(vec![Fact::new(cx.dtype(0), None)]);
    };
    let [n, c, _] = x else { return Err(cx.error(format!("an input of rank {}, expected 3", x.len()))) };
    let positions: Dim = block.iter().product();
    let channels = per_block(c, &positions).map_err(|e| cx.error(e))?;
    Ok(vec![Fact::new(cx.dtype(0), Some([&[n.clone(), channels], image].concat()))])
}

/// `b (c k) l -> b c ..`
fn col2im_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let (x, y) = (cx.shape(Slot::In(0)), cx.shape(Slot::Out(0)));
    if x.len() != 3 || y.len() < 3 {
        return relations;
    }
    let split = relations.virtual_value(vec![y[1].clone(), x[1].floor_div(&y[1])]);
    relations.same((Slot::In(0), 0), (Slot::Out(0), 0));
    if (&y[1] * &x[1].floor_div(&y[1])) == x[1] {
        relations.regroup((Slot::In(0), vec![1]), (split, vec![0, 1]));
        relations.same((split, 0), (Slot::Out(0), 1));
        relations.barrier((split, 1), "positions inside a block");
    } else {
        relations.barrier((Slot::In(0), 1), "channels of a number that is not known");
        relations.barrier((Slot::Out(0), 1), "channels of a number that is not known");
    }
    relations.barrier((Slot::In(0), 2), "blocks overlap");
    (2..y.len()).for_each(|axis| relations.barrier((Slot::Out(0), axis), "blocks overlap"));
    relations
}

/// `dx = im2col(dy)`: a grouped convolution of dy whose kernels hold a single 1 each, one kernel per position of a block.
fn col2im_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, y) = (cx.dy()?, cx.output(0));
    let channels = cx.shape(y).get(1).and_then(Dim::size).ok_or("channels of a number that is not known")?;
    let block = cx.numbers(cx.input(2)).ok_or("the size of a block is only known at run time")?;
    let sizes: Vec<usize> = block.iter().filter_map(|n| usize::try_from(*n).ok()).collect();
    let positions: usize = sizes.iter().product();
    let mut kernels = vec![0f32; channels * positions * positions];
    (0..channels * positions).for_each(|k| kernels[k * positions + k % positions] = 1.0);
    let like = Tensor::new(cx.dtype(y), [&[channels * positions, 1], &sizes[..]].concat(), Bytes::new());
    let kernels = cx.b.constant(like.with_f32s(&kernels));
    let mut attrs: Vec<_> = cx.node().attrs().to_vec();
    attrs.push(attr("group", AttrValue::Int(channels as i64)));
    attrs.push(attr("kernel_shape", AttrValue::Ints(block)));
    let columns = cx.b.op("Conv", &[dy, kernels], attrs);
    let dx = cx.b.reshape(columns, &[0, (channels * positions) as i64, -1]);
    cx.give(0, dx);
    Ok(())
}

/// What Resize does to one axis.
#[derive(Clone, Debug, PartialEq)]
struct Stretch {
    /// Output size, where it can be known.
    out: Option<Dim>,
    /// Output / input, where it is a number.
    scale: Option<f64>,
    /// The axis stays as it is.
    whole: bool,
}

/// Input slots of scales and sizes.
fn resize_slots(opset: i64) -> (usize, usize) {
    if opset >= 11 { (2, 3) } else { (1, usize::MAX) }
}

/// What happens to each axis of `x`; `known` gives the content of an input.
fn stretches(node: &Node, opset: i64, x: &[Dim], known: &dyn Fn(usize) -> Option<Known>) -> Result<Vec<Stretch>, String> {
    let rank = x.len();
    let axes: Vec<usize> = match node.attr_ints("axes") {
        Some(list) => list.iter().filter_map(|a| crate::infer::normalize_axis(*a, rank)).collect(),
        None => (0..rank).collect(),
    };
    let (scales_at, sizes_at) = resize_slots(opset);
    let content = |slot: usize| known(slot).filter(|k| !k.is_empty());
    let crops = node.attr_str("coordinate_transformation_mode") == Some("tf_crop_and_resize");
    let even = node.attr_str("keep_aspect_ratio_policy").is_none_or(|p| p == "stretch");
    let whole = |d: &Dim| Stretch { out: Some(d.clone()), scale: Some(1.0), whole: true };
    let unknown = Stretch { out: None, scale: None, whole: false };
    let mut out: Vec<Stretch> = x.iter().map(whole).collect();
    let given = (content(scales_at), content(sizes_at));
    let count = given.0.as_ref().or(given.1.as_ref()).map_or(axes.len(), Known::len);
    if count != axes.len() {
        return Err(format!("{count} scales or sizes for {} axes", axes.len()));
    }
    for (i, axis) in axes.into_iter().enumerate() {
        out[axis] = match &given {
            (Some(Known::Floats(scales)), _) if !crops => by_scale(&x[axis], scales[i]),
            (_, Some(Known::Ints(sizes))) if even => by_size(&x[axis], &sizes[i], crops),
            _ => unknown.clone(),
        };
    }
    if let (None, Some(Known::Ints(sizes)), false, false) = (&given.0, &given.1, even, crops) {
        let smallest = node.attr_str("keep_aspect_ratio_policy") == Some("not_larger");
        keep_aspect(&mut out, x, sizes, smallest);
    }
    Ok(out)
}

/// One scale for all axes that are resized: the smallest (`not_larger`) or the largest of `size / in`, then rounded, halves up.
fn keep_aspect(out: &mut [Stretch], x: &[Dim], sizes: &[Dim], smallest: bool) {
    let resized: Vec<usize> = (0..x.len()).filter(|a| out[*a].out.is_none()).collect();
    let ratio = |(axis, size): (&usize, &Dim)| Some(size.known()? as f64 / x[*axis].known().filter(|n| *n > 0)? as f64);
    let Some(ratios) = resized.iter().zip(sizes).map(ratio).collect::<Option<Vec<f64>>>() else { return };
    let scale = ratios.into_iter().reduce(if smallest { f64::min } else { f64::max }).unwrap_or(1.0);
    for axis in resized {
        let size = x[axis].known().map(|n| Dim::from((n as f64 * scale + 0.5).floor() as i64));
        out[axis] = Stretch { out: size, scale: Some(scale), whole: scale == 1.0 };
    }
}

/// `floor(in * scale)`
fn by_scale(size: &Dim, scale: f64) -> Stretch {
    let exact = |v: f64| ((1.0..1e9).contains(&v) && (v - v.round()).abs() < 1e-9).then(|| Dim::from(v.round() as i64));
    let out = match (size.known(), exact(scale), exact(1.0 / scale)) {
        (Some(n), ..) => Some(Dim::from((n as f32 * scale as f32).floor() as i64)),
        (None, Some(up), _) => Some(size * &up),
        (None, _, Some(down)) => Some(size.floor_div(&down)),
        (None, None, None) => None,
    };
    Stretch { out, scale: Some(scale), whole: exact(scale).is_some_and(|s| s.is(1)) }
}

fn by_size(size: &Dim, asked: &Dim, crops: bool) -> Stretch {
    let scale = match (size.known(), asked.known()) {
        (Some(n), Some(m)) if n > 0 => Some(m as f64 / n as f64),
        _ => asked.exact_div(size).and_then(|d| d.known()).map(|d| d as f64),
    };
    Stretch { out: Some(asked.clone()), scale, whole: size == asked && !crops }
}

fn resize_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let Some(x) = cx.shape(0) else { return Ok(vec![Fact::new(cx.dtype(0), None)]) };
    let known = |slot: usize| cx.input(slot).known.clone();
    let axes = stretches(cx.node, cx.opset, x, &known).map_err(|e| cx.error(e))?;
    let size = |(axis, s): (usize, Stretch)| s.out.unwrap_or_else(|| cx.fresh(&format!("resized{axis}")));
    Ok(vec![Fact::new(cx.dtype(0), Some(axes.into_iter().enumerate().map(size).collect()))])
}

/// An axis that keeps its size is parallel; any other is a barrier.
fn resize_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let x = cx.shape(Slot::In(0));
    let axes = stretches(cx.node, cx.opset, x, &|slot| cx.fact(Slot::In(slot)).known.clone()).unwrap_or_default();
    for axis in 0..x.len() {
        let (a, b) = ((Slot::In(0), axis), (Slot::Out(0), axis));
        if axes.get(axis).is_some_and(|s| s.whole) {
            relations.same(a, b);
        } else {
            relations.barrier(a, "resizing mixes positions");
            relations.barrier(b, "resizing mixes positions");
        }
    }
    relations
}

/// The entries of `sizes` that name an axis that was cut.
fn resize_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    let rank = cx.old_input(0).len();
    let sizes_at = resize_slots(cx.opset()).1;
    if cx.node().input(sizes_at).is_none() {
        return Ok(());
    }
    let axes: Vec<usize> = match cx.node().attr_ints("axes") {
        Some(list) => list.iter().filter_map(|a| crate::infer::normalize_axis(*a, rank)).collect(),
        None => (0..rank).collect(),
    };
    let kept = |(entry, axis): (usize, &usize)| cx.kept_input(0, *axis).map(|k| (entry, i64::try_from(k.len()).unwrap_or(0)));
    let entries = axes.iter().enumerate().filter_map(kept).collect();
    cx.patch_ints(sizes_at, entries);
    Ok(())
}

/// Repetition by whole numbers: `dx = sum of dy over each block`. Other interpolations: [`interpolate`].
fn resize_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x, y) = (cx.dy()?, cx.input(0), cx.output(0));
    let shape = cx.shape(x);
    let content = |slot: usize| cx.known(cx.node().input(slot)?).cloned();
    let axes = stretches(cx.node(), cx.opset(), shape, &content)?;
    let is_integer = |s: &Stretch| s.scale.is_some_and(|s| s >= 1.0 && s.fract().abs() < 1e-9);
    if !repeats(cx.node(), cx.opset()) || !axes.iter().all(is_integer) {
        let dx = interpolate::grad(cx, &axes)?;
        cx.give(0, dx);
        return Ok(());
    }
    let (mut cut, mut summed) = (Vec::new(), Vec::new());
    for (size, stretch) in shape.iter().zip(&axes) {
        cut.push(size.clone());
        if !stretch.whole {
            summed.push(cut.len() as i64);
            cut.push(Dim::from(stretch.scale.unwrap_or(1.0) as i64));
        }
    }
    if summed.is_empty() {
        cx.give(0, dy);
        return Ok(());
    }
    let blocks = reshape_like(cx, dy, &cut, &[x, y])?;
    let dx = cx.b.reduce_sum(blocks, &summed, false);
    cx.give(0, dx);
    Ok(())
}

/// Whether the node repeats each position, provided that its scales are whole numbers.
fn repeats(node: &Node, opset: i64) -> bool {
    let attr = |name: &str, default: &'static str| node.attr_str(name).unwrap_or(default).to_string();
    let nearest = attr("mode", "nearest") == "nearest";
    if opset < 11 {
        return nearest;
    }
    let positions = attr("coordinate_transformation_mode", "half_pixel");
    let rounding = attr("nearest_mode", "round_prefer_floor");
    let centred = positions == "half_pixel" && rounding.starts_with("round_prefer");
    nearest && (centred || (positions == "asymmetric" && rounding == "floor"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Attr, Graph, Use};
    use crate::ops::matmul::one_node::{graph, ints, links, refit, shapes};

    fn list(name: &str, values: &[i64]) -> Attr {
        attr(name, AttrValue::Ints(values.to_vec()))
    }

    /// A Resize whose scales or sizes are a constant at input `slot`.
    fn resize(x: &str, slot: usize, tensor: Tensor) -> Graph {
        let mut g = graph("Resize", 18, &[x], vec![], 1);
        let constant = g.add_initializer("c", tensor);
        let node = g.order()[0];
        g.set_input(Use { node, slot }, Some(constant));
        g
    }

    #[test]
    fn pools_follow_the_window() {
        let cases: &[(&str, Vec<Attr>, &str)] = &[
            ("b 8 9 9", vec![list("kernel_shape", &[2, 2]), list("strides", &[2, 2])], "b 8 4 4"),
            ("b 8 h", vec![list("kernel_shape", &[3]), list("pads", &[1, 1])], "b 8 h"),
            ("b 8 9", vec![list("kernel_shape", &[2]), list("strides", &[2]), ints(&[("ceil_mode", 1)]).remove(0)], "b 8 5"),
            // The last window would start in the padding behind the input.
            (
                "b 8 5",
                vec![
                    list("kernel_shape", &[2]),
                    list("strides", &[3]),
                    list("pads", &[1, 1]),
                    ints(&[("ceil_mode", 1)]).remove(0),
                ],
                "b 8 2",
            ),
        ];
        for (x, attrs, out) in cases {
            assert_eq!(shapes(&graph("AveragePool", 19, &[x], attrs.clone(), 1)), Ok(vec![out.to_string()]), "{x}");
        }
        assert!(shapes(&graph("MaxPool", 12, &["b 8 9 9"], vec![], 1)).is_err());
        let both = shapes(&graph("MaxPool", 12, &["b 8 9"], vec![list("kernel_shape", &[3])], 2));
        assert_eq!(both, Ok(vec!["b 8 7".to_string(), "b 8 7".to_string()]));
    }

    #[test]
    fn channels_pass_pools_and_positions_do_not() {
        let g = graph("AveragePool", 19, &["b 8 9"], vec![list("kernel_shape", &[2])], 1);
        assert_eq!(links(&g), ["in0.0=out0.0", "in0.1=out0.1", "!in0.2", "!out0.2"]);
        let g = graph("AveragePool", 19, &["b 8 9"], vec![list("kernel_shape", &[1])], 1);
        assert_eq!(links(&g), ["in0.0=out0.0", "in0.1=out0.1", "in0.2=out0.2"]);
        let g = graph("GlobalAveragePool", 1, &["b 8 h w"], vec![], 1);
        assert_eq!(shapes(&g), Ok(vec!["b 8 1 1".to_string()]));
        assert_eq!(links(&g), ["in0.0=out0.0", "in0.1=out0.1", "!in0.2", "!in0.3"]);
    }

    #[test]
    fn blocks_move_between_channels_and_positions() {
        let g = graph("DepthToSpace", 13, &["n 12 h 5"], ints(&[("blocksize", 2)]), 1);
        assert_eq!(shapes(&g), Ok(vec!["n 3 2*h 10".to_string()]));
        let expected = [
            "in0.0=out0.0",
            "in0.1~v0.0,v0.1,v0.2",
            "v0.2=out0.1",
            "out0.2~v1.0,v1.1",
            "in0.2=v1.0",
            "v0.0=v1.1",
            "!v1.1",
            "out0.3~v2.0,v2.1",
            "in0.3=v2.0",
            "v0.1=v2.1",
            "!v2.1",
        ];
        assert_eq!(links(&g), expected);
        assert_eq!(shapes(&graph("SpaceToDepth", 13, &["n 3 4 6"], ints(&[("blocksize", 2)]), 1)), Ok(vec!["n 12 2 3".into()]));
        assert!(shapes(&graph("DepthToSpace", 13, &["n 10 4 5"], ints(&[("blocksize", 2)]), 1)).is_err());
    }

    #[test]
    fn resize_keeps_axes_of_the_same_size() {
        let g = resize("b 8 h 4", 2, Tensor::f32(&[4], &[1.0, 1.0, 2.0, 1.5]));
        assert_eq!(shapes(&g), Ok(vec!["b 8 2*h 6".to_string()]));
        assert_eq!(links(&g), ["in0.0=out0.0", "in0.1=out0.1", "!in0.2", "!out0.2", "!in0.3", "!out0.3"]);
        let g = resize("1 8 4 4", 3, Tensor::i64s(&[1, 8, 7, 4]));
        assert_eq!(shapes(&g), Ok(vec!["1 8 7 4".to_string()]));
        assert_eq!(links(&g), ["in0.0=out0.0", "in0.1=out0.1", "!in0.2", "!out0.2", "in0.3=out0.3"]);
        // A scale that happens to keep the size still moves positions.
        let g = resize("1 8 4 4", 2, Tensor::f32(&[4], &[1.0, 1.0, 1.1, 1.0]));
        assert_eq!(links(&g)[2], "!in0.2");
        assert!(shapes(&resize("1 8 4", 2, Tensor::f32(&[4], &[1.0; 4]))).is_err());
        let mut g = resize("1 8 4 4", 3, Tensor::i64s(&[1, 8, 7, 4]));
        assert_eq!(refit(&mut g, &[(0, 1, vec![0, 3])]), Ok(vec![(3, vec![(1, 2)])]));
    }

    #[test]
    fn unfolded_blocks_keep_their_channels() {
        let mut g = graph("Col2Im", 18, &["n 27 16"], vec![], 1);
        for (slot, values) in [(1, [4i64, 4]), (2, [3, 3])] {
            let constant = g.add_initializer("c", Tensor::i64s(&values));
            let node = g.order()[0];
            g.set_input(Use { node, slot }, Some(constant));
        }
        assert_eq!(shapes(&g), Ok(vec!["n 3 4 4".to_string()]));
        assert_eq!(links(&g), ["in0.0=out0.0", "in0.1~v0.0,v0.1", "v0.0=out0.1", "!v0.1", "!in0.2", "!out0.2", "!out0.3"]);
    }
}
