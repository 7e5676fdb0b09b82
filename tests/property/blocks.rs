//! Blocks of networks, in the spellings that exporters and people use, each from `[B, N, D]` to `[B, N, D]`.
//!
//! A block that is an ordinary one says which constants must be offered to be cut ([`Net::must`]), so that an engine which refuses
//! everything does not pass.

use super::net::{Net, Size, Val, fixed, float, int};
use super::steps::{batch_norm, chain, constant, conv, itself, slice, split};
use vitrim::graph::build::attr;
use vitrim::graph::{AttrValue, ValueId};

/// What a graph is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Block {
    /// Two weights and a function between them.
    Mlp,
    /// The same with steps between that keep the shape.
    Wide,
    /// Two projections multiplied.
    Gated,
    /// Queries, keys, values.
    Attention,
    /// Convolutions.
    Conv,
    /// Two layers that share constants.
    Shared,
    /// One hidden value with several readers, or several joined into one.
    Branch,
    /// Any steps at all, and a graph output.
    Free,
}

pub(crate) const BLOCKS: &[Block] = &[
    Block::Mlp,
    Block::Wide,
    Block::Gated,
    Block::Attention,
    Block::Attention,
    Block::Conv,
    Block::Shared,
    Block::Branch,
    Block::Free,
    Block::Free,
    Block::Free,
];

/// The block behind `x`, residual and normalization included.
pub(crate) fn build(net: &mut Net, x: &Val, block: Block) -> Val {
    let inner = match net.below(4) {
        0 => x.clone(),
        1 => net.rms_norm(x),
        _ => net.layer_norm(x),
    };
    let d = x.n(2);
    let y = match block {
        Block::Mlp => mlp(net, &inner, d),
        Block::Wide => wide(net, &inner, d),
        Block::Gated => gated(net, &inner, d),
        Block::Attention => attention(net, &inner, d),
        Block::Conv => convolutions(net, &inner, d),
        Block::Shared => shared(net, &inner, d),
        Block::Branch => branch(net, &inner, d),
        Block::Free => return free(net, &inner, x),
    };
    let y = if net.one_in(4) {
        let scale = net.constant(&[d]);
        net.binary("Mul", &y, scale)
    } else {
        y
    };
    if net.one_in(6) { y } else { net.add(x, &y) }
}

/// A projection by a plain matrix that must be offered: its columns are a hidden axis that nothing bars.
pub(crate) fn hidden(net: &mut Net, x: &Val, out: usize) -> Val {
    let first = net.graph.value_count();
    let y = net.dense(x, out);
    let k = x.n(x.rank() - 1);
    let mut found = None;
    for v in net.graph.values().skip(first).map(|(v, _)| v) {
        if let Some(t) = net.graph.constant(v).filter(|t| t.dtype.is_float() && t.dims.iter().filter(|d| **d > 1).count() == 2) {
            found = t.dims.iter().position(|n| *n == out).filter(|_| k != out).map(|axis| (v, axis));
        }
    }
    net.must.extend(found);
    y
}

fn mlp(net: &mut Net, x: &Val, d: usize) -> Val {
    let m = 3 + net.below(9);
    net.story.push(format!("mlp of {m}"));
    let h = hidden(net, x, m);
    let h = net.unary(&h);
    net.dense(&h, d)
}

/// Steps between the two weights that keep `[B, N, M]`.
fn wide(net: &mut Net, x: &Val, d: usize) -> Val {
    let m = 2 * (1 + net.below(6));
    net.story.push(format!("wide of {m}"));
    let mut h = net.dense(x, m);
    for _ in 0..1 + net.below(4) {
        let last = h.rank() - 1;
        h = match net.below(7) {
            0 | 1 => constant(net, &h).unwrap_or(h),
            2 => itself(net, &h).unwrap_or(h),
            3 => {
                // In heads and back, with something in each head.
                let n = h.n(last);
                let divisors: Vec<usize> = (1..=n).filter(|x| n.is_multiple_of(*x)).collect();
                let outer = net.pick(&divisors);
                let mut dims = h.dims.clone();
                dims[last] = fixed(&[outer])[0];
                dims.push(fixed(&[n / outer])[0]);
                let heads = net.reshape(&h, dims);
                let heads = match net.below(3) {
                    0 => net.layer_norm(&heads),
                    1 => constant(net, &heads).unwrap_or(heads),
                    _ => net.unary(&heads),
                };
                net.reshape(&heads, h.dims.clone())
            }
            4 if h.n(last) > 1 => on_last(net, &h, slice),
            5 if h.n(last) > 1 => on_last(net, &h, split),
            _ => net.unary(&h),
        };
    }
    net.dense(&h, d)
}

/// A step on the last axis alone: the others are hidden in the batch.
fn on_last(net: &mut Net, v: &Val, step: fn(&mut Net, &Val) -> Option<Val>) -> Val {
    let rows = Size { n: v.count() / v.n(v.rank() - 1), batch: true };
    let flat = net.reshape(v, vec![rows, v.dims[v.rank() - 1]]);
    let Some(new) = step(net, &flat) else { return v.clone() };
    let mut dims = v.dims.clone();
    dims[v.rank() - 1] = new.dims[1];
    net.reshape(&new, dims)
}

fn gated(net: &mut Net, x: &Val, d: usize) -> Val {
    let m = 3 + net.below(6);
    let style = net.below(4);
    net.story.push(format!("gated of {m}, style {style}"));
    let (a, b) = if style == 0 {
        (hidden(net, x, m), hidden(net, x, m))
    } else {
        let both = hidden(net, x, 2 * m);
        match style {
            1 => {
                let mut parts = net.split(&both, 2, &[m, m]);
                (parts.swap_remove(0), parts.swap_remove(0))
            }
            2 => (net.slice(&both, 2, 0, m), net.slice(&both, 2, m, 2 * m)),
            _ => {
                let inner = net.one_in(2);
                let mut dims = both.dims.clone();
                dims.truncate(2);
                dims.extend(if inner { fixed(&[m, 2]) } else { fixed(&[2, m]) });
                let both = net.reshape(&both, dims);
                let axis = if inner { 3 } else { 2 };
                (net.at(&both, axis, 0), net.at(&both, axis, 1))
            }
        }
    };
    let a = net.unary(&a);
    let h = net.op("Mul", &[a.id, b.id], vec![], a.dims.clone());
    net.dense(&h, d)
}

/// Sizes of an attention layer.
struct Heads {
    /// Key/value heads, and queries of each.
    kv: usize,
    per: usize,
    /// Widths of queries and of values.
    e: usize,
    ev: usize,
}

fn attention(net: &mut Net, x: &Val, d: usize) -> Val {
    let grouped = net.one_in(3);
    let heads = Heads { kv: 1 + net.below(3), per: if grouped { 2 } else { 1 }, e: 2 + net.below(4), ev: 2 + net.below(4) };
    if net.opset >= 23 && net.one_in(2) {
        return fused_attention(net, x, &heads, d);
    }
    let (q, k, v) = projections(net, x, &heads);
    let n = x.n(1);
    let logits = product_of(net, &q, &k, true, n);
    let logits = scaled(net, &logits, &q, heads.e);
    let logits = if net.one_in(3) {
        let dims = net.broadcast_dims(&logits);
        let mask = net.constant(&dims);
        net.binary("Add", &logits, mask)
    } else {
        logits
    };
    let p = net.softmax(&logits, logits.rank() - 1);
    let o = product_of(net, &p, &v, false, v.n(v.rank() - 1));
    merged(net, &o, x, d)
}

/// One Attention node on `[B, N, H*E]` or `[B, H, N, E]`, whose scale follows from the width unless it is given.
fn fused_attention(net: &mut Net, x: &Val, h: &Heads, d: usize) -> Val {
    let hq = h.kv * h.per;
    net.story.push(format!("Attention of {}x{} heads, widths {} and {}", h.kv, h.per, h.e, h.ev));
    let (shared, must) = (net.shared, net.must.len());
    let parts = [(hq, h.e), (h.kv, h.e), (h.kv, h.ev)].map(|(heads, width)| (hidden(net, x, heads * width), heads));
    if net.shared > shared {
        // A bias that others use is cut in a copy and not zeroed; where q and k have one each, nothing makes their product zero.
        net.must.truncate(must);
    }
    let mut attrs = Vec::new();
    if net.one_in(3) {
        attrs.push(float("scale", 0.4));
    }
    let flat = net.one_in(2);
    let mut inputs: Vec<ValueId> = Vec::new();
    for (v, heads) in &parts {
        inputs.push(if flat { v.id } else { in_heads(net, v, *heads).id });
    }
    if net.one_in(3) {
        let n = x.n(1);
        inputs.push(net.constant(&[n, n]));
    }
    let mut dims = x.dims.clone();
    if flat {
        attrs.extend([int("q_num_heads", hq as i64), int("kv_num_heads", h.kv as i64)]);
        dims[2].n = hq * h.ev;
        let o = net.op("Attention", &inputs, attrs, dims);
        return net.dense(&o, d);
    }
    let dims: Vec<Size> = [x.dims[0]].into_iter().chain(fixed(&[hq, x.n(1), h.ev])).collect();
    let o = net.op("Attention", &inputs, attrs, dims);
    merged(net, &o, x, d)
}

/// q `[B, H, N, E]`, k `[B, H, N, E]`, v `[B, H, N, Ev]`, by one projection or by three.
fn projections(net: &mut Net, x: &Val, h: &Heads) -> (Val, Val, Val) {
    let hq = h.kv * h.per;
    let style = if h.per > 1 { net.pick(&[0, 1]) } else { net.below(4) };
    let ev = if style >= 2 { h.e } else { h.ev };
    net.story.push(format!("attention of {}x{} heads, widths {} and {ev}, style {style}", h.kv, h.per, h.e));
    let (q, k, v) = match style {
        0 => {
            let (q, k, v) = (net.dense(x, hq * h.e), net.dense(x, h.kv * h.e), net.dense(x, h.kv * ev));
            (in_heads(net, &q, hq), in_heads(net, &k, h.kv), in_heads(net, &v, h.kv))
        }
        1 => {
            let sizes = [hq * h.e, h.kv * h.e, h.kv * ev];
            let all = net.dense(x, sizes.iter().sum());
            let parts = if net.one_in(2) {
                net.split(&all, 2, &sizes)
            } else {
                let ends = [0, sizes[0], sizes[0] + sizes[1], sizes[0] + sizes[1] + sizes[2]];
                (0..3).map(|i| net.slice(&all, 2, ends[i], ends[i + 1])).collect()
            };
            (in_heads(net, &parts[0], hq), in_heads(net, &parts[1], h.kv), in_heads(net, &parts[2], h.kv))
        }
        _ => fused(net, x, h, style),
    };
    let (q, k) = if net.one_in(6) { (net.layer_norm(&q), net.layer_norm(&k)) } else { (q, k) };
    if h.per == 1 {
        return (q, k, v);
    }
    (q, repeated(net, &k, h.per), repeated(net, &v, h.per))
}

/// `[B, N, 3, H, E]` or `[B, N, H, 3, E]`, transposed, and picked from.
fn fused(net: &mut Net, x: &Val, h: &Heads, style: usize) -> (Val, Val, Val) {
    let all = net.dense(x, 3 * h.kv * h.e);
    let sizes = if style == 2 { [3, h.kv, h.e] } else { [h.kv, 3, h.e] };
    let dims: Vec<Size> = all.dims[..2].iter().copied().chain(fixed(&sizes)).collect();
    let all = net.reshape(&all, dims);
    let perm = if style == 2 { [2, 0, 3, 1, 4] } else { [3, 0, 2, 1, 4] };
    let all = net.transpose(&all, &perm);
    let style = net.below(3);
    let mut parts: Vec<Val> = if style == 0 {
        let parts = net.split(&all, 0, &[1, 1, 1]);
        parts.iter().map(|p| net.squeeze(p, 0)).collect()
    } else if style == 1 {
        (0..3)
            .map(|i| {
                let part = net.slice(&all, 0, i, i + 1);
                net.squeeze(&part, 0)
            })
            .collect()
    } else {
        (0..3).map(|i| net.at(&all, 0, i)).collect()
    };
    let v = parts.remove(2);
    let k = parts.remove(1);
    (parts.remove(0), k, v)
}

/// `[B, N, H*E]` to `[B, H, N, E]`; the heads may lie outside or inside of the widths.
fn in_heads(net: &mut Net, v: &Val, heads: usize) -> Val {
    let width = v.n(2) / heads;
    let inside = net.one_in(6);
    let sizes = if inside { [width, heads] } else { [heads, width] };
    let dims: Vec<Size> = v.dims[..2].iter().copied().chain(fixed(&sizes)).collect();
    let v = net.reshape(v, dims);
    net.transpose(&v, if inside { &[0, 3, 1, 2] } else { &[0, 2, 1, 3] })
}

/// Every key/value head `per` times: by Expand, by a Gather, or by joining.
fn repeated(net: &mut Net, v: &Val, per: usize) -> Val {
    let n = v.n(1);
    match net.below(3) {
        0 => {
            let index: Vec<usize> = (0..n).flat_map(|h| vec![h; per]).collect();
            net.gather(v, 1, &index)
        }
        1 => {
            let one = net.unsqueeze(v, 2);
            let parts = vec![one; per];
            let all = net.concat(&parts, 2);
            let mut dims = v.dims.clone();
            dims[1].n = n * per;
            net.reshape(&all, dims)
        }
        _ => {
            let one = net.unsqueeze(v, 2);
            let mut dims = one.dims.clone();
            dims[2].n = per;
            let target: Vec<i64> = dims.iter().map(|d| if d.batch { 1 } else { d.n as i64 }).collect();
            let target = net.b().ints(&target);
            let wide = net.op("Expand", &[one.id, target], vec![], dims);
            let mut dims = v.dims.clone();
            dims[1].n = n * per;
            net.reshape(&wide, dims)
        }
    }
}

/// `a b^T` or `a b` of `[B, H, .., ..]`, by MatMul, by Einsum, or with batch and heads as one axis.
fn product_of(net: &mut Net, a: &Val, b: &Val, turn: bool, columns: usize) -> Val {
    let mut dims = a.dims.clone();
    dims[3] = fixed(&[columns])[0];
    match net.below(4) {
        0 => {
            let text = if turn { "bhnd,bhmd->bhnm" } else { "bhnm,bhmd->bhnd" };
            net.op("Einsum", &[a.id, b.id], vec![attr("equation", AttrValue::Str(text.as_bytes().to_vec().into()))], dims)
        }
        1 => {
            let b = if turn { net.transpose(b, &[0, 1, 3, 2]) } else { b.clone() };
            let merge = |v: &Val| vec![Size { n: v.n(1), batch: true }, v.dims[2], v.dims[3]];
            let (x, y) = (net.reshape(a, merge(a)), net.reshape(&b, merge(&b)));
            let out = Val { id: x.id, dims: dims.clone() };
            let out = net.op("MatMul", &[x.id, y.id], vec![], merge(&out));
            net.reshape(&out, dims)
        }
        _ => {
            let b = if turn { net.transpose(b, &[0, 1, 3, 2]) } else { b.clone() };
            net.op("MatMul", &[a.id, b.id], vec![], dims)
        }
    }
}

/// Logits times a constant, or over the root of the width, which may be read at run time.
fn scaled(net: &mut Net, logits: &Val, q: &Val, e: usize) -> Val {
    match net.below(4) {
        0 => {
            let s = net.scalar((e as f32).sqrt());
            net.op("Div", &[logits.id, s], vec![], logits.dims.clone())
        }
        1 => {
            let s = net.scalar(1.0 / (e as f32).sqrt());
            net.binary("Mul", logits, s)
        }
        2 => {
            let shape = net.b().shape_of(q.id);
            let width = if net.one_in(2) {
                let at = net.b().ints(&[3]);
                net.b().gather(shape, at, 0)
            } else {
                net.b().slice(shape, &[-1], &[i64::MAX], &[0])
            };
            let width = net.b().op("Cast", &[width], vec![int("to", 1)]);
            let root = net.b().op("Sqrt", &[width], vec![]);
            net.op("Div", &[logits.id, root], vec![], logits.dims.clone())
        }
        _ => logits.clone(),
    }
}

/// Heads side by side, and the output projection.
fn merged(net: &mut Net, o: &Val, x: &Val, d: usize) -> Val {
    let (h, e) = (o.n(1), o.n(3));
    if net.one_in(5) {
        let w: ValueId = net.weight(&[h, e, d], h * e);
        let text = "bhne,hed->bnd";
        return net.op(
            "Einsum",
            &[o.id, w],
            vec![attr("equation", AttrValue::Str(text.as_bytes().to_vec().into()))],
            x.dims.clone(),
        );
    }
    let o = if net.one_in(4) {
        let gate = net.constant(&[h, 1, 1]);
        net.binary("Mul", o, gate)
    } else {
        o.clone()
    };
    let o = net.transpose(&o, &[0, 2, 1, 3]);
    let mut dims = x.dims.clone();
    dims[2] = fixed(&[h * e])[0];
    let o = net.reshape(&o, dims);
    net.dense(&o, d)
}

fn convolutions(net: &mut Net, x: &Val, d: usize) -> Val {
    let n = x.n(1);
    let sides: Vec<usize> = (1..=n).filter(|s| n.is_multiple_of(*s)).collect();
    let side = net.pick(&sides);
    let turned = net.transpose(x, &[0, 2, 1]);
    let dims = |c: usize| -> Vec<Size> { [x.dims[0]].into_iter().chain(fixed(&[c, side, n / side])).collect() };
    let mut h = net.reshape(&turned, dims(d));
    net.story.push(format!("convolutions at {side}x{}", n / side));
    for _ in 0..2 + net.below(3) {
        h = match net.below(6) {
            0 => batch_norm(net, &h),
            1 => net.unary(&h),
            2 => squeeze_excite(net, &h),
            3 => constant(net, &h).unwrap_or(h),
            _ => conv(net, &h).unwrap_or(h),
        };
    }
    let c = h.n(1);
    let w = net.weight(&[d, c, 1, 1], c);
    let h = net.op("Conv", &[h.id, w], vec![], dims(d));
    let h = net.reshape(&h, turned.dims.clone());
    net.transpose(&h, &[0, 2, 1])
}

/// Channels times a gate that is computed of their means.
fn squeeze_excite(net: &mut Net, h: &Val) -> Val {
    let c = h.n(1);
    let mean =
        if net.one_in(2) { net.b().reduce_mean(h.id, &[2, 3], true) } else { net.b().op("GlobalAveragePool", &[h.id], vec![]) };
    let m = 2 + net.below(3);
    let dims = |c: usize| -> Vec<Size> { [h.dims[0]].into_iter().chain(fixed(&[c, 1, 1])).collect() };
    let (down, up) = (net.weight(&[m, c, 1, 1], c), net.weight(&[c, m, 1, 1], m));
    let y = net.op("Conv", &[mean, down], vec![], dims(m));
    let y = net.op("Relu", &[y.id], vec![], dims(m));
    let y = net.op("Conv", &[y.id, up], vec![], dims(c));
    let y = net.op("Sigmoid", &[y.id], vec![], dims(c));
    net.op("Mul", &[h.id, y.id], vec![], h.dims.clone())
}

/// Two layers with one first weight, one second weight, or one bias.
fn shared(net: &mut Net, x: &Val, d: usize) -> Val {
    let m = 3 + net.below(6);
    let what = net.below(4);
    net.story.push(format!("two layers of {m} that share {what}"));
    let bias = net.constant(&[m]);
    let one: (ValueId, ValueId) = (net.weight(&[d, m], d), net.weight(&[m, d], m));
    let two = (net.weight(&[d, m], d), net.weight(&[m, d], m));
    let two = match what {
        0 => (one.0, two.1),
        1 => (two.0, one.1),
        2 => one,
        _ => two,
    };
    let mut x = x.clone();
    for (first, second) in [one, two] {
        let mut dims = x.dims.clone();
        dims[2].n = m;
        let h = net.op("MatMul", &[x.id, first], vec![], dims);
        let h = net.binary("Add", &h, bias);
        let h = net.unary(&h);
        let y = net.op("MatMul", &[h.id, second], vec![], x.dims.clone());
        x = net.add(&x, &y);
    }
    x
}

/// One hidden value for two readers, or two joined for one.
fn branch(net: &mut Net, x: &Val, d: usize) -> Val {
    let m = 3 + net.below(6);
    let style = net.below(4);
    net.story.push(format!("branches of {m}, style {style}"));
    let h = net.dense(x, m);
    let h = net.unary(&h);
    let other = if net.one_in(2) { constant(net, &h).unwrap_or(h.clone()) } else { net.unary(&h) };
    match style {
        0 => {
            let out = net.dense(&other, 3);
            net.output(&out);
            net.dense(&h, d)
        }
        1 => {
            let wide = net.dense(x, 2 + m / 2);
            let both = net.concat(&[h, wide, other], 2);
            net.dense(&both, d)
        }
        2 => {
            let (a, b) = (net.dense(&h, d), net.dense(&other, d));
            net.add(&a, &b)
        }
        _ => {
            let inner = net.dense(&other, m);
            let sum = net.add(&h, &inner);
            let sum = net.unary(&sum);
            net.dense(&sum, d)
        }
    }
}

/// A projection, any steps at all, another projection, and out.
fn free(net: &mut Net, inner: &Val, x: &Val) -> Val {
    let m = 2 * (1 + net.below(6));
    net.story.push(format!("free of {m}"));
    let h = net.dense(inner, m);
    let count = 1 + net.below(6);
    let v = chain(net, h, count);
    let last = v.rank() - 1;
    let y = if v.dims[last].batch { v } else { net.dense(&v, 3) };
    net.output(&y);
    x.clone()
}
