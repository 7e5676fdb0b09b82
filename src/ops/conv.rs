//! Conv (opset 1 to 24), in one, two or three spatial dimensions; ConvTranspose is beside it.
//!
//! Shape: `x [B, C, in..]`, `w [M, C/g, k..]`, `b [M]` -> `[B, M, out..]` with `out = floor((in + pads - d(k-1) - 1) / s) + 1`.
//! Example: the patch embedding `[B, 3, 224, 224]`, `w [192, 3, 16, 16]`, stride 16 -> `[B, 192, 14, 14]` contracts the input
//! channels and costs `B * 192 * 14 * 14 * 3 * 16 * 16` MACs. Spatial axes are barriers unless the kernel looks at one position.

pub mod transpose;

use super::matmul::{contradict, product};
use super::{Axes, Cost, CostCx, Grad, OpRule, Refit};
use crate::autodiff::GradCx;
use crate::axes::relation::{At, AxesCx, Relations, Slot};
use crate::graph::build::attr;
use crate::graph::{Attr, AttrValue, Node, ValueId};
use crate::infer::{Dim, Fact, InferCx, InferError};
use crate::slice::refit::{RefitCx, RefitError};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    OpRule {
        name: "Conv",
        domain: "",
        opsets: (1, 24),
        infer: conv_infer,
        axes: Axes::Rule(conv_axes),
        grad: Grad::Rule(conv_grad),
        cost: Cost::Rule(conv_cost),
        refit: Refit::Rule(conv_refit),
    },
    transpose::RULE,
];

/// How many positions are added around the input.
#[derive(Clone, Debug, PartialEq)]
enum Padding {
    /// `(before, after)` per spatial axis.
    Explicit(Vec<(i64, i64)>),
    /// As many as make `out = ceil(in / stride)`; the odd one behind (`SAME_UPPER`) or before.
    Same { upper: bool },
}

/// The window that a convolution or pooling moves over the spatial axes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Window {
    /// Positions per axis.
    pub(super) kernel: Vec<Dim>,
    /// Step per axis.
    pub(super) strides: Vec<i64>,
    /// Distance of neighbouring kernel positions per axis.
    pub(super) dilations: Vec<i64>,
    padding: Padding,
}

impl Window {
    /// The window of `node` with the given kernel.
    pub(super) fn of(node: &Node, kernel: Vec<Dim>) -> Result<Self, String> {
        let rank = kernel.len();
        let list = |name: &str| match node.attr_ints(name) {
            Some(v) if v.len() == rank && v.iter().all(|x| *x > 0) => Ok(v.to_vec()),
            Some(v) => Err(format!("{name} {v:?} for {rank} spatial axes")),
            None => Ok(vec![1; rank]),
        };
        let (strides, dilations) = (list("strides")?, list("dilations")?);
        let padding = match (node.attr_str("auto_pad").unwrap_or("NOTSET"), node.attr_ints("pads")) {
            ("SAME_UPPER", _) => Padding::Same { upper: true },
            ("SAME_LOWER", _) => Padding::Same { upper: false },
            ("VALID", _) | (_, None) => Padding::Explicit(vec![(0, 0); rank]),
            (_, Some(p)) if p.len() == 2 * rank => Padding::Explicit((0..rank).map(|i| (p[i], p[i + rank])).collect()),
            (_, Some(p)) => return Err(format!("pads {p:?} for {rank} spatial axes")),
        };
        Ok(Self { kernel, strides, dilations, padding })
    }

    /// Number of spatial axes.
    pub(super) fn rank(&self) -> usize {
        self.kernel.len()
    }

    fn stride(&self, axis: usize) -> Dim {
        Dim::from(self.strides[axis])
    }

    /// Positions from the first to the last of the kernel: `d(k-1) + 1`.
    pub(super) fn reach(&self, axis: usize) -> Dim {
        let one = Dim::from(1i64);
        &(&(&self.kernel[axis] - &one) * &Dim::from(self.dilations[axis])) + &one
    }

    /// Positions that remain for the window to move over: `in + pads - reach`; `None` where the padding follows the input.
    pub(super) fn slack(&self, axis: usize, input: &Dim) -> Option<Dim> {
        let Padding::Explicit(pads) = &self.padding else { return None };
        let padded = &(input + &Dim::from(pads[axis].0)) + &Dim::from(pads[axis].1);
        Some(&padded - &self.reach(axis))
    }

    /// Output size of an axis.
    pub(super) fn output(&self, axis: usize, input: &Dim) -> Result<Dim, String> {
        let Some(slack) = self.slack(axis, input) else { return Ok(input.ceil_div(&self.stride(axis))) };
        match slack.known() {
            Some(n) if n < 0 => Err(format!("a window of reach {} over {input} positions", self.reach(axis))),
            _ => Ok(&slack.floor_div(&self.stride(axis)) + &Dim::from(1i64)),
        }
    }

    /// Positions added before and after the input of an axis, where they are numbers.
    pub(super) fn pads(&self, axis: usize, input: &Dim) -> Option<(i64, i64)> {
        let upper = match &self.padding {
            Padding::Explicit(pads) => return Some(pads[axis]),
            Padding::Same { upper } => *upper,
        };
        let one = Dim::from(1i64);
        let steps = &input.ceil_div(&self.stride(axis)) - &one;
        let needed = &(&(&steps * &self.stride(axis)) + &self.reach(axis)) - input;
        let total = needed.known()?.max(0);
        Some(if upper { (total / 2, total - total / 2) } else { (total - total / 2, total / 2) })
    }

    /// Whether each output position of an axis sees the input position of the same number only.
    pub(super) fn is_pointwise(&self, axis: usize) -> bool {
        let bare = match &self.padding {
            Padding::Explicit(pads) => pads[axis] == (0, 0),
            Padding::Same { .. } => true,
        };
        self.kernel[axis].is(1) && self.strides[axis] == 1 && bare
    }

    /// Whether the windows tile an input axis: next to each other, none left out, no padding.
    pub(super) fn tiles(&self, axis: usize, input: &Dim) -> bool {
        let whole = input.modulo(&self.stride(axis)).is(0) && self.pads(axis, input) == Some((0, 0));
        whole && self.kernel[axis].is(self.strides[axis]) && (self.dilations[axis] == 1 || self.kernel[axis].is(1))
    }
}

/// Relates the spatial axes (from 2 on): parallel where the window looks at one position, else barriers on both sides.
pub(super) fn relate_spatial(relations: &mut Relations, pointwise: impl Fn(usize) -> bool, rank: usize, reason: &str) {
    for axis in 0..rank {
        let (a, b) = ((Slot::In(0), axis + 2), (Slot::Out(0), axis + 2));
        if pointwise(axis) {
            relations.same(a, b);
        } else {
            relations.barrier(a, reason);
            relations.barrier(b, reason);
        }
    }
}

/// `value` in the shape `dims`; sizes that are no numbers are read at run time off the axes of `sources` that have them.
pub(super) fn reshape_like(cx: &mut GradCx<'_>, value: ValueId, dims: &[Dim], sources: &[ValueId]) -> Result<ValueId, String> {
    if dims.iter().filter(|d| d.known().is_none()).count() <= 1 {
        let target: Vec<i64> = dims.iter().map(|d| d.known().unwrap_or(-1)).collect();
        return Ok(cx.b.reshape(value, &target));
    }
    let mut pieces = Vec::new();
    for dim in dims {
        pieces.push(if let Some(n) = dim.known() {
            cx.b.ints(&[n])
        } else {
            let found = sources.iter().find_map(|s| cx.shape(*s).iter().position(|d| d == dim).map(|axis| (*s, axis)));
            let (source, axis) = found.ok_or_else(|| format!("the size {dim} is not known before the run"))?;
            let shape = cx.b.shape_of(source);
            let at = cx.b.ints(&[axis as i64]);
            cx.b.gather(shape, at, 0)
        });
    }
    let target = cx.b.concat(&pieces, 0);
    Ok(cx.b.reshape_to(value, target))
}

fn group(node: &Node) -> i64 {
    node.attr_int("group").unwrap_or(1).max(1)
}

/// Shapes of x and w, and the window or what is wrong with it.
type Parts<'a> = (&'a [Dim], &'a [Dim], Result<Window, String>);

/// What a rule needs of the operands, where their ranks are known.
fn parts<'a>(node: &Node, x: Option<&'a [Dim]>, w: Option<&'a [Dim]>) -> Option<Parts<'a>> {
    let (x, w) = (x?, w?);
    if x.len() < 3 || x.len() != w.len() {
        let what = format!("an input of rank {} and a weight of rank {}", x.len(), w.len());
        return Some((x, w, Err(what)));
    }
    Some((x, w, Window::of(node, w[2..].to_vec())))
}

pub(super) fn conv_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    Ok(vec![Fact::new(cx.dtype(0), conv_shape(cx, 1)?)])
}

/// Shape of the convolution of input 0 with the weight at a slot; `None` where a rank is unknown.
pub(super) fn conv_shape(cx: &InferCx<'_>, weight: usize) -> Result<Option<Vec<Dim>>, InferError> {
    let Some((x, w, window)) = parts(cx.node, cx.shape(0), cx.shape(weight)) else { return Ok(None) };
    let window = window.map_err(|e| cx.error(e))?;
    let channels = &w[1] * &Dim::from(group(cx.node));
    if contradict(&x[1], &channels) {
        return Err(cx.error(format!("{} input channels, the weight takes {channels}", x[1])));
    }
    let mut out = vec![x[0].clone(), w[0].clone()];
    for axis in 0..window.rank() {
        out.push(window.output(axis, &x[axis + 2]).map_err(|e| cx.error(e))?);
    }
    Ok(Some(out))
}

/// A channel axis of `g` groups of `inner` channels: the axis itself where `inner` is 1, else a virtual `[g, inner]`.
fn grouped(relations: &mut Relations, at: At, g: &Dim, inner: &Dim) -> (At, Option<At>) {
    if inner.is(1) {
        return (at, None);
    }
    let v = relations.virtual_value(vec![g.clone(), inner.clone()]);
    relations.regroup((at.0, vec![at.1]), (v, vec![0, 1]));
    ((v, 0), Some((v, 1)))
}

pub(super) fn conv_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    relate_conv(cx, &mut relations, 1, Some(2));
    relations
}

/// One group: `b |c| .., m |c| .. -> b m ..`. Groups: channels are `(g, c/g)` and `(g, m/g)`, the group is parallel.
/// Depthwise: `b c .., c 1 .. -> b c ..`. The weight is at slot `weight`, the bias at slot `bias`.
pub(super) fn relate_conv(cx: &AxesCx<'_>, relations: &mut Relations, weight: usize, bias: Option<usize>) {
    let (x, weight, out) = (Slot::In(0), Slot::In(weight), Slot::Out(0));
    let Some((_, w, Ok(window))) = parts(cx.node, Some(cx.shape(x)), Some(cx.shape(weight))) else { return };
    let g = Dim::from(group(cx.node));
    relations.same((x, 0), (out, 0));
    if g.is(1) {
        relations.contract((x, 1), (weight, 1));
        relations.same((weight, 0), (out, 1));
    } else {
        let per_group = w[0].floor_div(&g);
        let (x_group, x_inner) = grouped(relations, (x, 1), &g, &w[1]);
        let (w_group, w_inner) = grouped(relations, (weight, 0), &g, &per_group);
        let (y_group, y_inner) = grouped(relations, (out, 1), &g, &per_group);
        relations.same(x_group, w_group);
        relations.same(w_group, y_group);
        if let (Some(a), Some(b)) = (w_inner, y_inner) {
            relations.same(a, b);
        }
        if let Some(inner) = x_inner {
            relations.contract(inner, (weight, 1));
        }
    }
    relate_bias_and_kernel(cx, relations, &window, weight, bias.map(Slot::In));
    relate_spatial(relations, |a| window.is_pointwise(a), window.rank(), "convolution mixes positions");
}

fn relate_bias_and_kernel(cx: &AxesCx<'_>, relations: &mut Relations, window: &Window, weight: Slot, bias: Option<Slot>) {
    if let Some(bias) = bias.filter(|b| cx.has(*b)) {
        relations.same((bias, 0), (Slot::Out(0), 1));
    }
    for axis in (0..window.rank()).filter(|a| !window.kernel[*a].is(1)) {
        relations.barrier((weight, axis + 2), "positions of a convolution kernel");
    }
}

/// `elements of the output * C/g * kernel positions`
pub(super) fn conv_cost(cx: &CostCx<'_>) -> Option<Dim> {
    conv_macs(cx, 1)
}

/// The same with the weight at a slot.
pub(super) fn conv_macs(cx: &CostCx<'_>, weight: usize) -> Option<Dim> {
    let (w, out) = (cx.inputs.get(weight).copied().flatten()?, cx.outputs.first().copied().flatten()?);
    Some(&out.iter().product::<Dim>() * &w.get(1..)?.iter().product::<Dim>())
}

/// Groups that remain = input channels that remain / those of one group.
pub(super) fn conv_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    refit_group(cx, 1, cx.kept_input(0, 1).map(<[usize]>::len), cx.old_input(0).get(1).and_then(Dim::size))
}

/// Groups from the channels, `kept` of `old`, on the outer side of the groups, and those of one group on axis 1 of the weight.
pub(super) fn refit_group(
    cx: &mut RefitCx<'_>,
    weight: usize,
    kept: Option<usize>,
    old: Option<usize>,
) -> Result<(), RefitError> {
    let before = group(cx.node());
    let kept_inner = cx.kept_input(weight, 1).map(<[usize]>::len);
    if before == 1 || (kept.is_none() && kept_inner.is_none()) {
        return Ok(());
    }
    let channels = kept.or(old);
    let inner = kept_inner.or_else(|| cx.old_input(weight).get(1).and_then(Dim::size));
    let (Some(channels), Some(inner)) = (channels, inner) else { return Err(cx.error("the number of channels is not known")) };
    if inner == 0 || channels % inner != 0 {
        return Err(cx.error(format!("{channels} channels in groups of {inner}")));
    }
    let after = i64::try_from(channels / inner).unwrap_or(i64::MAX);
    if after != before {
        cx.set_attr("group", AttrValue::Int(after));
    }
    Ok(())
}

/// What the gradients of both operators share: the window in numbers.
pub(super) struct Geometry {
    pub(super) strides: Vec<i64>,
    pub(super) dilations: Vec<i64>,
    pub(super) pads: Vec<(i64, i64)>,
    pub(super) group: i64,
}

impl Geometry {
    fn attrs(&self) -> Vec<Attr> {
        let pads = self.pads.iter().map(|p| p.0).chain(self.pads.iter().map(|p| p.1)).collect();
        let mut attrs = vec![
            attr("strides", AttrValue::Ints(self.strides.clone())),
            attr("dilations", AttrValue::Ints(self.dilations.clone())),
            attr("pads", AttrValue::Ints(pads)),
        ];
        if self.group != 1 {
            attrs.push(attr("group", AttrValue::Int(self.group)));
        }
        attrs
    }
}

/// `db = sum of dY over batch and positions`
fn bias_grad(cx: &mut GradCx<'_>, dy: ValueId, rank: usize) {
    if cx.wants(2) {
        let axes: Vec<i64> = [0].into_iter().chain(2..2 + rank as i64).collect();
        let db = cx.b.reduce_sum(dy, &axes, false);
        cx.give(2, db);
    }
}

/// Patches that tile the input become rows of a matrix product; a kernel of one position is a product with the transposed
/// weight; everything else goes through ConvTranspose (`dX`) and a convolution with batch and channel swapped (`dW`).
fn conv_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let dy = cx.dy()?;
    let (x, w) = (cx.input(0), cx.input(1));
    let (shape_x, shape_w) = (cx.shape(x), cx.shape(w));
    let Some((_, _, window)) = parts(cx.node(), Some(shape_x), Some(shape_w)) else { return Err("no shapes".to_string()) };
    let window = window?;
    let (rank, g) = (window.rank(), group(cx.node()));
    bias_grad(cx, dy, rank);
    let pads: Option<Vec<_>> = (0..rank).map(|a| window.pads(a, &shape_x[a + 2])).collect();
    let pads = pads.ok_or("the padding depends on sizes that are not known")?;
    let geometry = Geometry { strides: window.strides.clone(), dilations: window.dilations.clone(), pads, group: g };
    let pointwise = g == 1 && (0..rank).all(|a| window.is_pointwise(a));
    let tiles = g == 1 && (0..rank).all(|a| window.tiles(a, &shape_x[a + 2]));
    if cx.wants(0) {
        let dx = if pointwise {
            let perm: Vec<usize> = [1, 0].into_iter().chain(2..rank + 2).collect();
            let w_t = cx.b.transpose(w, &perm);
            cx.b.op("Conv", &[dy, w_t], vec![])
        } else if tiles {
            patches_to_input(cx, dy, &window)?
        } else {
            spread(cx, dy, w, &window, &geometry)?
        };
        cx.give(0, dx);
    }
    if cx.wants(1) {
        let dw = if tiles { patch_weight_grad(cx, dy, &window)? } else { correlate(cx, (x, dy), &geometry, shape_w)? };
        cx.give(1, dw);
    }
    Ok(())
}

/// `dX = ConvTranspose(dY, W)`, padded to the input's size. Where that is not known before the run, it is padded by all that a
/// stride can leave over, and cut to the size that the input has.
pub(super) fn spread(
    cx: &mut GradCx<'_>,
    dy: ValueId,
    w: ValueId,
    window: &Window,
    geometry: &Geometry,
) -> Result<ValueId, String> {
    let (x, rank) = (cx.input(0), window.rank());
    let (shape_x, shape_y) = (cx.shape(x), cx.shape(cx.output(0)));
    let (mut output_padding, mut exact) = (Vec::new(), true);
    for axis in 0..rank {
        let (input, output) = (&shape_x[axis + 2], &shape_y[axis + 2]);
        let padded = &(input + &Dim::from(geometry.pads[axis].0)) + &Dim::from(geometry.pads[axis].1);
        let covered = &(&(output - &Dim::from(1i64)) * &window.stride(axis)) + &window.reach(axis);
        output_padding.push(match (&padded - &covered).known() {
            Some(rest) if rest < 0 => return Err("windows that reach past the end of the input".to_string()),
            Some(rest) => rest,
            None => {
                exact = false;
                window.strides[axis] - 1
            }
        });
    }
    let mut attrs = geometry.attrs();
    if output_padding.iter().any(|p| *p != 0) {
        attrs.push(attr("output_padding", AttrValue::Ints(output_padding)));
    }
    let dx = cx.b.op("ConvTranspose", &[dy, w], attrs);
    if exact {
        return Ok(dx);
    }
    let axes: Vec<i64> = (2..2 + rank as i64).collect();
    let sizes = cx.b.shape_of(x);
    let (starts, axes) = (cx.b.ints(&vec![0; rank]), cx.b.ints(&axes));
    let ends = cx.b.gather(sizes, axes, 0);
    Ok(cx.b.op("Slice", &[dx, starts, ends, axes], vec![]))
}

/// The axes of an input cut into patches: `[B, C, o1, k1, o2, ..]`, where a kernel of 1 has no axis of its own.
struct Patches {
    /// Sizes of `[B, C, o1, k1, ..]`.
    cut: Vec<Dim>,
    /// The order `[B, o1, o2, .., C, k1, k2, ..]`.
    perm: Vec<usize>,
    /// `C * k1 * k2 ..`
    row: Dim,
}

fn patches(cx: &GradCx<'_>, window: &Window) -> Patches {
    let (x, y, w) = (cx.shape(cx.input(0)), cx.shape(cx.output(0)), cx.shape(cx.input(1)));
    let mut cut = vec![x[0].clone(), w[1].clone()];
    let (mut outer, mut inner) = (vec![0], vec![1]);
    for axis in 0..window.rank() {
        outer.push(cut.len());
        cut.push(y[axis + 2].clone());
        if !window.kernel[axis].is(1) {
            inner.push(cut.len());
            cut.push(window.kernel[axis].clone());
        }
    }
    Patches { cut, perm: [outer, inner].concat(), row: w[1..].iter().product() }
}

/// dY as rows: `[B * o1 * o2 .., M]`.
fn rows_of_output(cx: &mut GradCx<'_>, dy: ValueId, rank: usize) -> Result<ValueId, String> {
    let channels = cx.shape(cx.input(1))[0].known().ok_or("the number of output channels is not known")?;
    let perm: Vec<usize> = [0].into_iter().chain(2..rank + 2).chain([1]).collect();
    let rows = cx.b.transpose(dy, &perm);
    Ok(cx.b.reshape(rows, &[-1, channels]))
}

/// `dW = dY_rows^T * patches`
fn patch_weight_grad(cx: &mut GradCx<'_>, dy: ValueId, window: &Window) -> Result<ValueId, String> {
    let Patches { cut, perm, row } = patches(cx, window);
    let (x, w, y) = (cx.input(0), cx.input(1), cx.output(0));
    let row = row.known().ok_or("the size of a patch is not known")?;
    let whole = if cut.len() == cx.shape(x).len() { x } else { reshape_like(cx, x, &cut, &[x, y])? };
    let whole = cx.b.transpose(whole, &perm);
    let whole = cx.b.reshape(whole, &[-1, row]);
    let rows = rows_of_output(cx, dy, window.rank())?;
    let dw = product(cx, (rows, true), (whole, false), 1.0);
    reshape_like(cx, dw, cx.shape(w), &[w])
}

/// `dX = dY_rows * W`, its patches put back in their places.
fn patches_to_input(cx: &mut GradCx<'_>, dy: ValueId, window: &Window) -> Result<ValueId, String> {
    let Patches { cut, perm, row } = patches(cx, window);
    let (x, w, y) = (cx.input(0), cx.input(1), cx.output(0));
    let row = row.known().ok_or("the size of a patch is not known")?;
    let rows = rows_of_output(cx, dy, window.rank())?;
    let flat = cx.b.reshape(w, &[-1, row]);
    let out = product(cx, (rows, false), (flat, false), 1.0);
    let permuted: Vec<Dim> = perm.iter().map(|p| cut[*p].clone()).collect();
    let out = reshape_like(cx, out, &permuted, &[x, y])?;
    let mut back = vec![0; perm.len()];
    perm.iter().enumerate().for_each(|(i, p)| back[*p] = i);
    let out = cx.b.transpose(out, &back);
    reshape_like(cx, out, cx.shape(x), &[x])
}

/// `dW[m, c, k] = sum over b, o of small[b, m, o] * big[b, c, o*s + k*d - pad]`, a convolution whose channel is the batch and
/// whose strides and dilations are swapped. `big` has `g * C/g` channels, `small` has M.
fn correlate(
    cx: &mut GradCx<'_>,
    (big, small): (ValueId, ValueId),
    geometry: &Geometry,
    shape_w: &[Dim],
) -> Result<ValueId, String> {
    let rank = geometry.strides.len();
    let swap: Vec<usize> = [1, 0].into_iter().chain(2..rank + 2).collect();
    let kernel: Option<Vec<i64>> = shape_w[2..].iter().map(Dim::known).collect();
    let (Some(kernel), Some(inner)) = (kernel, shape_w[1].known()) else { return Err("the weight's shape is not known".into()) };
    let g = geometry.group;
    let big = if g == 1 {
        cx.b.transpose(big, &swap)
    } else if inner == 1 {
        // [B, g, ..] -> [1, g*B, ..]: each group sees its own channel of the whole batch.
        let swapped = cx.b.transpose(big, &swap);
        cx.b.reshape(swapped, &[&[1, -1][..], &vec![0; rank]].concat())
    } else {
        // [B, g*I, ..] -> [.., g, I, B] -> [.., I, g*B] -> [I, g*B, ..]; the spatial sizes stay in front, so 0 copies them.
        let zeros = vec![0; rank];
        let last: Vec<usize> = (2..rank + 2).chain([1, 0]).collect();
        let out = cx.b.transpose(big, &last);
        let out = cx.b.reshape(out, &[&zeros[..], &[g, inner, -1]].concat());
        let out = cx.b.transpose(out, &(0..rank).chain([rank + 1, rank, rank + 2]).collect::<Vec<_>>());
        let out = cx.b.reshape(out, &[&zeros[..], &[inner, -1]].concat());
        cx.b.transpose(out, &[rank, rank + 1].into_iter().chain(0..rank).collect::<Vec<_>>())
    };
    let small = cx.b.transpose(small, &swap);
    let turned = Geometry {
        strides: geometry.dilations.clone(),
        dilations: geometry.strides.clone(),
        pads: geometry.pads.clone(),
        group: g,
    };
    let dw = cx.b.op("Conv", &[big, small], turned.attrs());
    // Positions behind the last window would make the kernel longer than it is.
    let axes: Vec<i64> = (2..2 + rank as i64).collect();
    let dw = cx.b.slice(dw, &vec![0; rank], &kernel, &axes);
    Ok(cx.b.transpose(dw, &swap))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::matmul::one_node::{graph, links, macs, refit, shapes};
    use bytes::Bytes;

    fn list(name: &str, values: &[i64]) -> Attr {
        attr(name, AttrValue::Ints(values.to_vec()))
    }

    fn auto_pad(text: &'static str) -> Attr {
        attr("auto_pad", AttrValue::Str(Bytes::from_static(text.as_bytes())))
    }

    fn groups(n: i64) -> Attr {
        attr("group", AttrValue::Int(n))
    }

    #[test]
    fn output_sizes_follow_the_window() {
        let cases: &[(&str, &str, Vec<Attr>, &str)] = &[
            ("b 3 224 224", "192 3 16 16", vec![list("strides", &[16, 16])], "b 192 14 14"),
            ("1 3 9 9", "4 3 3 3", vec![list("strides", &[2, 2]), list("pads", &[1, 1, 1, 1])], "1 4 5 5"),
            ("1 3 9", "4 3 3", vec![list("dilations", &[2])], "1 4 5"),
            ("1 3 h w", "4 3 3 3", vec![auto_pad("SAME_UPPER")], "1 4 h w"),
            ("1 3 10 10", "4 3 3 3", vec![auto_pad("SAME_LOWER"), list("strides", &[4, 4])], "1 4 3 3"),
            ("1 3 4 5 6", "4 3 2 2 2", vec![auto_pad("VALID")], "1 4 3 4 5"),
        ];
        for (x, w, attrs, out) in cases {
            assert_eq!(shapes(&graph("Conv", 17, &[x, w], attrs.clone(), 1)), Ok(vec![out.to_string()]), "{x} {w}");
        }
        assert!(shapes(&graph("Conv", 17, &["1 4 9 9", "4 3 3 3"], vec![], 1)).is_err());
        assert!(shapes(&graph("Conv", 17, &["1 3 2 2", "4 3 3 3"], vec![], 1)).is_err());
    }

    #[test]
    fn channels_are_contracted_and_positions_are_barriers() {
        let g = graph("Conv", 17, &["b 3 224 224", "192 3 16 16", "192"], vec![list("strides", &[16, 16])], 1);
        let expected = [
            "in0.0=out0.0",
            "in0.1*in1.1",
            "in1.0=out0.1",
            "in2.0=out0.1",
            "!in1.2",
            "!in1.3",
            "!in0.2",
            "!out0.2",
            "!in0.3",
            "!out0.3",
        ];
        assert_eq!(links(&g), expected);
        assert_eq!(macs(&g), (192 * 14 * 14 * 768).to_string() + "*b");
        let g = graph("Conv", 17, &["b 8 7 7", "4 8 1 1"], vec![], 1);
        assert_eq!(links(&g), ["in0.0=out0.0", "in0.1*in1.1", "in1.0=out0.1", "in0.2=out0.2", "in0.3=out0.3"]);
    }

    #[test]
    fn groups_are_parallel() {
        let g = graph("Conv", 17, &["b 8 7", "8 1 1", "8"], vec![groups(8)], 1);
        assert_eq!(links(&g), ["in0.0=out0.0", "in0.1=in1.0", "in1.0=out0.1", "in2.0=out0.1", "in0.2=out0.2"]);
        let g = graph("Conv", 17, &["b 8 7", "6 4 1"], vec![groups(2)], 1);
        let expected = [
            "in0.0=out0.0",
            "in0.1~v0.0,v0.1",
            "in1.0~v1.0,v1.1",
            "out0.1~v2.0,v2.1",
            "v0.0=v1.0",
            "v1.0=v2.0",
            "v1.1=v2.1",
            "v0.1*in1.1",
            "in0.2=out0.2",
        ];
        assert_eq!(links(&g), expected);
    }

    #[test]
    fn cut_groups_are_counted_again() {
        let mut g = graph("Conv", 17, &["b 8 7", "8 1 3"], vec![groups(8)], 1);
        assert_eq!(refit(&mut g, &[(0, 1, vec![0, 2, 5]), (1, 0, vec![0, 2, 5])]), Ok(vec![]));
        assert_eq!(g.node(g.order()[0]).attr_int("group"), Some(3));
        let mut g = graph("Conv", 17, &["b 8 7", "6 4 3"], vec![groups(2)], 1);
        assert_eq!(refit(&mut g, &[(0, 1, vec![0, 1, 4, 5]), (1, 1, vec![0, 1])]), Ok(vec![]));
        assert_eq!(g.node(g.order()[0]).attr_int("group"), Some(2));
        let mut g = graph("Conv", 17, &["b 8 7", "6 4 3"], vec![groups(2)], 1);
        assert!(refit(&mut g, &[(0, 1, vec![0, 1, 4])]).is_err());
    }
}
