//! Random steps on one activation: every family of the operator table, each in the spellings that exporters use.
//!
//! A step never looks at what was built before it, so chains of them make combinations that no exporter ever wrote.

use super::net::{Net, Size, Val, fixed, float, int, ints};
use vitrim::graph::build::attr;
use vitrim::graph::{AttrValue, Tensor, ValueId};

/// Elements per sample beyond which nothing grows any more.
const LARGE: usize = 200;

type Step = fn(&mut Net, &Val) -> Option<Val>;

/// Steps that keep the shape, and steps that may not.
const STEPS: &[(&str, Step)] = &[
    ("unary", |net, v| Some(net.unary(v))),
    ("constant", constant),
    ("itself", itself),
    ("regroup", regroup),
    ("factorize", factorize),
    ("transpose", transpose),
    ("slice", slice),
    ("split", split),
    ("gather", gather),
    ("join", join),
    ("expand", expand),
    ("reduce", reduce),
    ("normalize", normalize),
    ("dense", dense),
    ("product", product),
    ("unit axis", unit_axis),
    ("conv", conv),
    ("pad", pad),
    ("head", head),
];

/// Applies `count` random steps.
pub(crate) fn chain(net: &mut Net, v: Val, count: usize) -> Val {
    let mut v = v;
    for _ in 0..count {
        let (name, step) = net.pick(STEPS);
        if let Some(new) = step(net, &v) {
            net.story.push(format!("{name} {:?}", sizes(&new)));
            v = new;
        }
    }
    v
}

fn sizes(v: &Val) -> Vec<String> {
    v.dims.iter().map(|d| if d.batch { format!("{}B", d.n) } else { d.n.to_string() }).collect()
}

/// A random axis that is not the batch, of at least `least` positions.
fn some_axis(net: &mut Net, v: &Val, least: usize) -> Option<usize> {
    let axes: Vec<usize> = v.plain().into_iter().filter(|a| v.n(*a) >= least).collect();
    (!axes.is_empty()).then(|| net.pick(&axes))
}

/// With a constant that is broadcast.
pub(crate) fn constant(net: &mut Net, v: &Val) -> Option<Val> {
    let dims = net.broadcast_dims(v);
    Some(match net.below(10) {
        0 => {
            let c = net.constant_from(&dims, 0.5);
            net.op("Div", &[v.id, c], vec![], v.dims.clone())
        }
        1 => {
            let c = net.positive(&dims);
            net.op("PRelu", &[v.id, c], vec![], v.dims.clone())
        }
        2 => {
            let count: usize = dims.iter().product();
            let bits: Vec<bool> = (0..count).map(|_| net.one_in(2)).collect();
            let mask = net.tensor(Tensor { dims: dims.clone(), ..Tensor::bools(&bits) });
            let other = net.constant(&dims);
            let inputs = if net.one_in(2) { [mask, v.id, other] } else { [mask, other, v.id] };
            net.op("Where", &inputs, vec![], v.dims.clone())
        }
        3 => {
            // The same constant as a factor and as a summand.
            let c = net.constant(&dims);
            let scaled = net.binary("Mul", v, c);
            net.binary("Add", &scaled, c)
        }
        _ => {
            let op = net.pick(&["Add", "Mul", "Sub", "Mul", "Add", "Max", "Min"]);
            let c = net.constant(&dims);
            net.binary(op, v, c)
        }
    })
}

/// With a function of itself: gates and residuals.
pub(crate) fn itself(net: &mut Net, v: &Val) -> Option<Val> {
    let f = net.unary(v);
    let op = net.pick(&["Mul", "Add", "Sub", "Max", "Sum"]);
    Some(match net.below(5) {
        0 => {
            let zero = net.scalar(0.1);
            let sign = net.op("Greater", &[v.id, zero], vec![], v.dims.clone());
            net.op("Where", &[sign.id, f.id, v.id], vec![], v.dims.clone())
        }
        _ => net.op(op, &[v.id, f.id], vec![], v.dims.clone()),
    })
}

/// Splits an axis, or merges two.
fn regroup(net: &mut Net, v: &Val) -> Option<Val> {
    let mut dims = v.dims.clone();
    if net.one_in(2) || v.rank() < 3 {
        let axis = some_axis(net, v, 4)?;
        let n = v.n(axis);
        let divisors: Vec<usize> = (2..n).filter(|d| n.is_multiple_of(*d)).collect();
        if divisors.is_empty() || v.rank() > 5 {
            return None;
        }
        let outer = net.pick(&divisors);
        dims[axis].n = outer;
        dims.insert(axis + 1, fixed(&[n / outer])[0]);
    } else {
        let axis = net.below(v.rank() - 1);
        let inner = dims.remove(axis + 1);
        dims[axis] = Size { n: dims[axis].n * inner.n, batch: dims[axis].batch || inner.batch };
    }
    Some(net.reshape(v, dims))
}

/// All axes behind the batch as one, and that in other factors.
fn factorize(net: &mut Net, v: &Val) -> Option<Val> {
    if !v.dims[0].batch || v.rank() < 2 {
        return None;
    }
    let mut rest: usize = v.dims[1..].iter().map(|d| d.n).product();
    let mut dims = vec![v.dims[0]];
    while rest > 1 && dims.len() < 4 {
        let divisors: Vec<usize> = (2..=rest).filter(|d| rest.is_multiple_of(*d)).collect();
        let d = net.pick(&divisors);
        dims.push(fixed(&[d])[0]);
        rest /= d;
    }
    dims.push(fixed(&[rest])[0]);
    if net.one_in(3) && dims.len() == 2 && v.rank() > 2 {
        return Some(net.op("Flatten", &[v.id], vec![int("axis", 1)], dims));
    }
    Some(net.reshape(v, dims))
}

fn transpose(net: &mut Net, v: &Val) -> Option<Val> {
    // The batch mostly stays where it is.
    let perm = if net.one_in(4) {
        net.shuffled(v.rank())
    } else {
        let rest = net.shuffled(v.rank() - 1);
        std::iter::once(0).chain(rest.into_iter().map(|a| a + 1)).collect()
    };
    Some(net.transpose(v, &perm))
}

/// A run of positions, every second one, or all of them backwards.
pub(crate) fn slice(net: &mut Net, v: &Val) -> Option<Val> {
    let axis = some_axis(net, v, 2)?;
    let n = v.n(axis);
    let stepped = |net: &mut Net, start: i64, end: i64, step: i64, count: usize| {
        let lists = [start, end, axis as i64, step].map(|x| net.b().ints(&[x]));
        let mut dims = v.dims.clone();
        dims[axis].n = count;
        net.op("Slice", &[v.id, lists[0], lists[1], lists[2], lists[3]], vec![], dims)
    };
    Some(match net.below(6) {
        0 => stepped(net, -1, i64::MIN, -1, n),
        1 => {
            let start = net.below(2);
            stepped(net, start as i64, i64::MAX, 2, (n - start).div_ceil(2))
        }
        2 => {
            let (even, odd) = (stepped(net, 0, i64::MAX, 2, n.div_ceil(2)), stepped(net, 1, i64::MAX, 2, n / 2));
            let odd = net.op("Neg", &[odd.id], vec![], odd.dims);
            let parts = if net.one_in(2) { [even, odd] } else { [odd, even] };
            net.concat(&parts, axis)
        }
        3 => {
            // The halves the other way round.
            let half = n / 2;
            let (a, b) = (net.slice(v, axis, 0, half), net.slice(v, axis, half, n));
            let b = net.unary(&b);
            net.concat(&[b, a], axis)
        }
        _ => {
            let from = net.below(n - 1);
            let to = from + 1 + net.below(n - from);
            net.slice(v, axis, from, to)
        }
    })
}

/// Parts of an axis, each treated in its own way, and put together again.
pub(crate) fn split(net: &mut Net, v: &Val) -> Option<Val> {
    let axis = some_axis(net, v, 2)?;
    let n = v.n(axis);
    let count = 2 + net.below(2).min(n - 2);
    let sizes: Vec<usize> = if n.is_multiple_of(count) && !net.one_in(3) {
        vec![n / count; count]
    } else {
        let first = 1 + net.below(n - count + 1);
        let mut sizes = vec![1; count];
        sizes[0] = first;
        sizes[count - 1] += n - first - (count - 1);
        sizes
    };
    let mut parts = net.split(v, axis, &sizes);
    let at = net.below(parts.len());
    parts[at] = net.unary(&parts[at].clone());
    let equal = sizes.iter().all(|s| *s == sizes[0]);
    Some(match net.below(4) {
        0 | 1 if equal => {
            let op = net.pick(&["Mul", "Add", "Max"]);
            net.op(op, &[parts[0].id, parts[1].id], vec![], parts[0].dims.clone())
        }
        2 => parts.swap_remove(at),
        _ => {
            if net.one_in(2) {
                parts.swap(0, 1);
            }
            net.concat(&parts, axis)
        }
    })
}

/// Constant positions: one, some, all in another order, some twice.
fn gather(net: &mut Net, v: &Val) -> Option<Val> {
    let axis = some_axis(net, v, 2)?;
    let n = v.n(axis);
    Some(match net.below(4) {
        0 if v.rank() > 2 => {
            let at = net.below(n);
            net.at(v, axis, at)
        }
        1 => {
            let order = net.shuffled(n);
            net.gather(v, axis, &order)
        }
        2 if v.count() < LARGE => {
            let index: Vec<usize> = (0..n).flat_map(|i| [i, i]).collect();
            net.gather(v, axis, &index)
        }
        _ => {
            let count = 1 + net.below(n);
            let index = net.some_of(n, count);
            net.gather(v, axis, &index)
        }
    })
}

/// Joined with a constant, with a function of itself, or with another projection.
fn join(net: &mut Net, v: &Val) -> Option<Val> {
    if v.count() > LARGE / 2 {
        return None;
    }
    let axis = some_axis(net, v, 1)?;
    let other = match net.below(3) {
        0 if axis + 1 == v.rank() => {
            let out = 2 + net.below(5);
            net.dense(v, out)
        }
        // A class token: a constant for every sample.
        1 if net.batch == Some(1) || v.dims.iter().all(|d| !d.batch) => {
            let dims: Vec<usize> = v.dims.iter().map(|d| d.n).collect();
            let id = net.constant(&dims);
            Val { id, dims: v.dims.clone() }
        }
        _ => net.unary(v),
    };
    let parts = if net.one_in(2) { [v.clone(), other] } else { [other, v.clone()] };
    Some(net.concat(&parts, axis))
}

/// A new axis along which everything is repeated; sometimes merged with a neighbour, as keys of grouped queries are.
fn expand(net: &mut Net, v: &Val) -> Option<Val> {
    if v.count() > LARGE / 2 || v.rank() > 4 || !v.dims[0].batch || v.dims[0].n != 1 {
        return None;
    }
    let axis = 1 + net.below(v.rank());
    let times = 2 + net.below(2);
    let one = net.unsqueeze(v, axis);
    let mut dims = one.dims.clone();
    dims[axis].n = times;
    let wide = if net.one_in(2) {
        // 1 for the batch: Expand broadcasts both ways.
        let target: Vec<i64> = dims.iter().map(|d| if d.batch { 1 } else { d.n as i64 }).collect();
        let target = net.b().ints(&target);
        net.op("Expand", &[one.id, target], vec![], dims)
    } else {
        let repeats: Vec<i64> = (0..dims.len()).map(|a| if a == axis { times as i64 } else { 1 }).collect();
        let repeats = net.b().ints(&repeats);
        net.op("Tile", &[one.id, repeats], vec![], dims)
    };
    if net.one_in(2) || axis + 1 == wide.rank() {
        return Some(wide);
    }
    let mut dims = wide.dims.clone();
    let inner = dims.remove(axis + 1);
    dims[axis].n *= inner.n;
    Some(net.reshape(&wide, dims))
}

/// A sum, mean or maximum over an axis, alone or combined with what it was taken of.
fn reduce(net: &mut Net, v: &Val) -> Option<Val> {
    let axis = some_axis(net, v, 1)?;
    let op = net.pick(&["ReduceSum", "ReduceMean", "ReduceMax", "ReduceSum", "ReduceL2", "ReduceSumSquare"]);
    let keep = v.rank() < 3 || net.one_in(2);
    let at = [axis as i64];
    let id = match op {
        "ReduceSum" => net.b().reduce_sum(v.id, &at, keep),
        "ReduceMean" => net.b().reduce_mean(v.id, &at, keep),
        "ReduceMax" => net.b().reduce_max(v.id, &at, keep),
        _ if net.opset >= 18 => {
            let axes = net.b().ints(&at);
            net.b().op(op, &[v.id, axes], vec![int("keepdims", keep.into())])
        }
        _ => net.b().op(op, &[v.id], vec![ints("axes", &at), int("keepdims", keep.into())]),
    };
    if keep && net.one_in(2) {
        let op = net.pick(&["Sub", "Mul", "Add"]);
        return Some(net.op(op, &[v.id, id], vec![], v.dims.clone()));
    }
    let mut dims = v.dims.clone();
    if keep {
        dims[axis].n = 1;
    } else {
        dims.remove(axis);
    }
    Some(Val { id, dims })
}

fn normalize(net: &mut Net, v: &Val) -> Option<Val> {
    let last = v.rank() - 1;
    if v.dims[last].batch {
        return None;
    }
    let channels = v.rank() > 2 && v.dims[0].batch && !v.dims[1].batch;
    Some(match net.below(6) {
        0 => {
            let axis = some_axis(net, v, 1)?;
            net.softmax(v, axis)
        }
        1 | 2 if channels => batch_norm(net, v),
        3 => net.rms_norm(v),
        4 if channels => {
            let n = v.n(1);
            let (scale, shift) = (net.positive(&[n]), net.constant(&[n]));
            net.op("InstanceNormalization", &[v.id, scale, shift], vec![float("epsilon", 1e-2)], v.dims.clone())
        }
        // ONNX Runtime has it from opset 1 to 21.
        5 if net.opset <= 21 => net.op("LpNormalization", &[v.id], vec![int("axis", last as i64), int("p", 2)], v.dims.clone()),
        _ => net.layer_norm(v),
    })
}

/// Normalization of axis 1 by constant statistics.
pub(crate) fn batch_norm(net: &mut Net, v: &Val) -> Val {
    let n = [v.n(1)];
    let inputs = [net.positive(&n), net.constant(&n), net.constant(&n), net.positive(&n)];
    let inputs: Vec<ValueId> = [v.id].into_iter().chain(inputs).collect();
    net.op("BatchNormalization", &inputs, vec![float("epsilon", 1e-3)], v.dims.clone())
}

/// Another projection.
fn dense(net: &mut Net, v: &Val) -> Option<Val> {
    if v.dims[v.rank() - 1].batch {
        return None;
    }
    let out = 2 + net.below(7);
    Some(net.dense(v, out))
}

/// `v f(v)^T` over the last axis, or over the last but one.
fn product(net: &mut Net, v: &Val) -> Option<Val> {
    let rank = v.rank();
    if rank < 3 || v.dims[rank - 1].batch || v.dims[rank - 2].batch || v.count() > LARGE {
        return None;
    }
    let other = net.unary(v);
    let mut dims = v.dims.clone();
    if net.one_in(3) && rank < 7 {
        let head: String = "abcdefg".chars().take(rank - 2).collect();
        let (text, size) = if net.one_in(2) {
            (format!("{head}ij,{head}kj->{head}ik"), v.n(rank - 2))
        } else {
            (format!("{head}ji,{head}jk->{head}ik"), v.n(rank - 1))
        };
        dims[rank - 2].n = size;
        dims[rank - 1].n = size;
        return Some(net.op("Einsum", &[v.id, other.id], vec![attr("equation", AttrValue::Str(text.into_bytes().into()))], dims));
    }
    let mut perm: Vec<usize> = (0..rank).collect();
    perm.swap(rank - 2, rank - 1);
    let turned = net.transpose(&other, &perm);
    if net.one_in(2) {
        dims[rank - 1].n = v.n(rank - 2);
        Some(net.op("MatMul", &[v.id, turned.id], vec![], dims))
    } else {
        dims[rank - 2].n = v.n(rank - 1);
        Some(net.op("MatMul", &[turned.id, v.id], vec![], dims))
    }
}

/// An axis of size 1 more or less.
fn unit_axis(net: &mut Net, v: &Val) -> Option<Val> {
    let ones: Vec<usize> = v.plain().into_iter().filter(|a| v.n(*a) == 1).collect();
    if !ones.is_empty() && v.rank() > 2 {
        let axis = net.pick(&ones);
        return Some(net.squeeze(v, axis));
    }
    let axis = 1 + net.below(v.rank());
    (v.rank() < 6).then(|| net.unsqueeze(v, axis))
}

/// A convolution over what stands at axis 1: depthwise, in groups, or whole.
pub(crate) fn conv(net: &mut Net, v: &Val) -> Option<Val> {
    let spatial = v.rank().checked_sub(2).filter(|s| (1..=2).contains(s))?;
    if !v.dims[0].batch || v.dims[1..].iter().any(|d| d.batch) {
        return None;
    }
    let channels = v.n(1);
    let groups: Vec<usize> = (1..=channels).filter(|g| channels.is_multiple_of(*g)).collect();
    let group = net.pick(&groups);
    let per_group = 1 + net.below(if group == channels { 2 } else { 3 });
    let out = if net.one_in(3) { channels } else { group * per_group };
    let kernel = if net.one_in(2) { 1 } else { 3 };
    let mut dims = vec![out, channels / group];
    dims.extend(vec![kernel; spatial]);
    let w = net.weight(&dims, channels / group * kernel);
    let mut inputs = vec![v.id, w];
    if !net.one_in(3) {
        inputs.push(net.constant(&[out]));
    }
    let attrs = vec![int("group", group as i64), ints("pads", &vec![(kernel as i64 - 1) / 2; 2 * spatial])];
    let mut dims = v.dims.clone();
    dims[1].n = out;
    Some(net.op("Conv", &inputs, attrs, dims))
}

/// Zeros around an axis.
fn pad(net: &mut Net, v: &Val) -> Option<Val> {
    let axis = some_axis(net, v, 1)?;
    let (before, behind) = (net.below(2), net.below(2));
    let mut pads = vec![0i64; 2 * v.rank()];
    pads[axis] = before as i64;
    pads[axis + v.rank()] = behind as i64;
    let pads = net.b().ints(&pads);
    let mut dims = v.dims.clone();
    dims[axis].n += before + behind;
    Some(net.op("Pad", &[v.id, pads], vec![], dims))
}

/// What is there as a graph output of its own, through one more weight.
fn head(net: &mut Net, v: &Val) -> Option<Val> {
    if !v.dims[v.rank() - 1].batch {
        let y = net.dense(v, 2);
        net.output(&y);
    }
    None
}
