//! A graph under construction, whose values know their sizes, and the random spellings of a single step: the same product as MatMul,
//! Gemm, Einsum or Conv, a constant as initializer or node, shared or not, a target shape of numbers or computed at run time.
//!
//! Shapes are kept beside the graph on purpose: they are what the generator meant, not what `infer` finds.

use super::harness::Random;
use vitrim::autodiff::interface::declare;
use vitrim::graph::build::{Builder, attr};
use vitrim::graph::{Attr, AttrValue, DType, DeclaredDim, Graph, NewNode, Tensor, ValueId};

/// Size of an axis: `n`, times the batch where `batch` says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) n: usize,
    pub(crate) batch: bool,
}

/// An activation and its shape.
#[derive(Clone, Debug)]
pub(crate) struct Val {
    pub(crate) id: ValueId,
    pub(crate) dims: Vec<Size>,
}

impl Val {
    /// Rank.
    pub(crate) fn rank(&self) -> usize {
        self.dims.len()
    }

    /// Size of an axis without the batch.
    pub(crate) fn n(&self, axis: usize) -> usize {
        self.dims[axis].n
    }

    /// Axes that are not the batch.
    pub(crate) fn plain(&self) -> Vec<usize> {
        (0..self.rank()).filter(|a| !self.dims[*a].batch).collect()
    }

    /// Elements per sample.
    pub(crate) fn count(&self) -> usize {
        self.dims.iter().map(|d| d.n).product()
    }
}

/// Sizes without the batch.
pub(crate) fn fixed(sizes: &[usize]) -> Vec<Size> {
    sizes.iter().map(|n| Size { n: *n, batch: false }).collect()
}

/// The batch axis, and fixed sizes behind it.
pub(crate) fn batched(sizes: &[usize]) -> Vec<Size> {
    std::iter::once(Size { n: 1, batch: true }).chain(fixed(sizes)).collect()
}

pub(crate) fn int(name: &str, value: i64) -> Attr {
    attr(name, AttrValue::Int(value))
}

pub(crate) fn float(name: &str, value: f32) -> Attr {
    attr(name, AttrValue::Float(value))
}

pub(crate) fn ints(name: &str, values: &[i64]) -> Attr {
    attr(name, AttrValue::Ints(values.to_vec()))
}

/// A graph under construction.
pub(crate) struct Net {
    pub(crate) graph: Graph,
    pub(crate) random: Random,
    pub(crate) opset: i64,
    /// Number of samples, or a symbol.
    pub(crate) batch: Option<usize>,
    /// Constants that may be used again, with their shapes and how far from 0 they stay.
    pool: Vec<(Vec<usize>, f32, ValueId)>,
    /// Whether a weight is used twice, which ties what would otherwise be free.
    pub(crate) ties: bool,
    /// How often another constant was used twice.
    pub(crate) shared: usize,
    /// `(constant, axis)`: what must be offered to be cut.
    pub(crate) must: Vec<(ValueId, usize)>,
    /// What was built, for whoever reads a failure.
    pub(crate) story: Vec<String>,
}

impl Net {
    pub(crate) fn new(mut random: Random, opset: i64, batch: Option<usize>) -> Self {
        let ir_version = if opset > 20 { 10 } else { 8 };
        let graph = Graph::new(ir_version, vec![(String::new(), opset)], Default::default());
        random.bits();
        Self { graph, random, opset, batch, pool: Vec::new(), ties: false, shared: 0, must: Vec::new(), story: Vec::new() }
    }

    /// A number below `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.random.bits() >> 33) as usize % n.max(1)
    }

    /// Yes, once in `n` times.
    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        let at = self.below(of.len());
        of[at]
    }

    /// Some of `0..n` in ascending order, at least one.
    pub(crate) fn some_of(&mut self, n: usize, count: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..n).collect();
        while all.len() > count.max(1) {
            let at = self.below(all.len());
            all.remove(at);
        }
        all
    }

    pub(crate) fn shuffled(&mut self, n: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..n).collect();
        for last in (1..n).rev() {
            let other = self.below(last + 1);
            all.swap(last, other);
        }
        all
    }

    pub(crate) fn b(&mut self) -> Builder<'_> {
        Builder::new(&mut self.graph, "")
    }

    /// The graph input.
    pub(crate) fn input(&mut self, name: &str, sizes: &[usize]) -> Val {
        let first = self.batch.map_or_else(|| DeclaredDim::Symbol("batch".into()), |n| DeclaredDim::Size(n as i64));
        let dims = std::iter::once(first).chain(sizes.iter().map(|n| DeclaredDim::Size(*n as i64))).collect();
        let id = self.graph.add_value(name);
        self.graph.add_input(id, declare(DType::F32, dims));
        Val { id, dims: batched(sizes) }
    }

    /// Makes a value a graph output.
    pub(crate) fn output(&mut self, v: &Val) {
        let nothing = vitrim::graph::Declared { dtype: None, dims: None, extra: Default::default() };
        if !self.graph.outputs().contains(&v.id) {
            self.graph.add_output(v.id, nothing);
        }
    }

    /// A node with one output of these sizes.
    pub(crate) fn op(&mut self, op: &str, inputs: &[ValueId], attrs: Vec<Attr>, dims: Vec<Size>) -> Val {
        let id = self.b().op(op, inputs, attrs);
        Val { id, dims }
    }

    /// A constant tensor as initializer or as the output of a Constant node, sometimes behind an Identity.
    pub(crate) fn tensor(&mut self, tensor: Tensor) -> ValueId {
        let id = if self.one_in(6) {
            let out = self.graph.add_value("constant");
            self.graph.add_node(NewNode {
                op: "Constant".into(),
                outputs: vec![Some(out)],
                attrs: vec![attr("value", AttrValue::Tensor(tensor))],
                ..NewNode::default()
            });
            out
        } else {
            self.graph.add_initializer("w", tensor)
        };
        if self.one_in(12) { self.b().op("Identity", &[id], vec![]) } else { id }
    }

    fn filled(&mut self, dims: &[usize], low: f32, reach: f32) -> Tensor {
        let count = dims.iter().product();
        let values = self.random.f32s(count, f64::from(low), f64::from(low + reach));
        let signed: Vec<f32> = values.iter().map(|v| if low > 0.0 && self.random.bits() & 1 == 1 { -v } else { *v }).collect();
        Tensor::f32(dims, &signed)
    }

    /// A constant of random numbers between -1 and 1, now and then one that is there already.
    pub(crate) fn constant(&mut self, dims: &[usize]) -> ValueId {
        self.constant_from(dims, 0.0)
    }

    /// A constant that keeps at least `low` from 0.
    pub(crate) fn constant_from(&mut self, dims: &[usize], low: f32) -> ValueId {
        let known: Vec<ValueId> = self.pool.iter().filter(|(d, l, _)| d == dims && *l == low).map(|(_, _, v)| *v).collect();
        if !known.is_empty() && self.one_in(4) {
            self.shared += 1;
            return self.pick(&known);
        }
        let tensor = if low > 0.0 { self.filled(dims, low, 1.0) } else { self.filled(dims, -1.0, 2.0) };
        let id = self.tensor(tensor);
        self.pool.push((dims.to_vec(), low, id));
        id
    }

    /// A constant of positive numbers around 1: scales, variances.
    pub(crate) fn positive(&mut self, dims: &[usize]) -> ValueId {
        let count = dims.iter().product();
        let values = self.random.f32s(count, 0.5, 1.5);
        self.tensor(Tensor::f32(dims, &values))
    }

    /// A weight whose products keep the size of what they are multiplied with; `k` positions are summed.
    pub(crate) fn weight(&mut self, dims: &[usize], k: usize) -> ValueId {
        let known: Vec<ValueId> = self.pool.iter().filter(|(d, l, _)| d == dims && *l < 0.0).map(|(_, _, v)| *v).collect();
        if !known.is_empty() && self.one_in(8) {
            self.ties = true;
            return self.pick(&known);
        }
        let reach = 1.7 / (k as f32).sqrt();
        let tensor = self.filled(dims, -reach, 2.0 * reach);
        let id = self.tensor(tensor);
        self.pool.push((dims.to_vec(), -1.0, id));
        id
    }

    /// A weight as it is multiplied, `[k, n]`, which may be stored transposed.
    fn matrix(&mut self, k: usize, n: usize) -> ValueId {
        if self.one_in(5) {
            let stored = self.weight(&[n, k], k);
            return self.b().transpose(stored, &[1, 0]);
        }
        self.weight(&[k, n], k)
    }

    /// A scalar.
    pub(crate) fn scalar(&mut self, value: f32) -> ValueId {
        let dims: &[usize] = if self.one_in(2) { &[] } else { &[1] };
        self.tensor(Tensor::f32(dims, &[value]))
    }

    /// The target of a Reshape of `v` to `dims`: numbers, -1, 0 where sizes stay, or sizes read at run time.
    fn target(&mut self, v: &Val, dims: &[Size]) -> ValueId {
        let number = |d: &Size, batch: Option<usize>| if d.batch { batch.map(|b| (d.n * b) as i64) } else { Some(d.n as i64) };
        let mut open = false;
        let mut entries: Vec<Option<i64>> = dims.iter().map(|d| number(d, self.batch)).collect();
        if let Some(at) = entries.iter().position(Option::is_none) {
            let copies = v.dims.get(at) == Some(&dims[at]);
            match self.below(3) {
                0 if copies => entries[at] = Some(0),
                // Batch times something is not read at run time here: -1 finds it.
                1 if dims[at].n == 1 && v.dims[at.min(v.rank() - 1)] == dims[at] => {
                    return self.target_at_run_time(v, at, &entries);
                }
                _ => {
                    entries[at] = Some(-1);
                    open = true;
                }
            }
        }
        let mut entries: Vec<i64> = entries.into_iter().flatten().collect();
        for at in 0..entries.len() {
            let stays = v.dims.get(at) == Some(&dims[at]);
            match self.below(5) {
                0 if stays => entries[at] = 0,
                1 if !open && entries[at] > 0 => {
                    entries[at] = -1;
                    open = true;
                }
                _ => {}
            }
        }
        self.b().ints(&entries)
    }

    /// `Concat(Gather(Shape(v), at), numbers)`.
    fn target_at_run_time(&mut self, v: &Val, at: usize, entries: &[Option<i64>]) -> ValueId {
        let shape = self.b().shape_of(v.id);
        let index = self.b().ints(&[at as i64]);
        let batch = self.b().gather(shape, index, 0);
        let numbers = |part: &[Option<i64>]| part.iter().flatten().copied().collect::<Vec<i64>>();
        let (before, behind) = (numbers(&entries[..at]), numbers(&entries[at + 1..]));
        let mut parts = Vec::new();
        if !before.is_empty() {
            parts.push(self.b().ints(&before));
        }
        parts.push(batch);
        for n in behind {
            parts.push(self.b().ints(&[n]));
        }
        self.b().concat(&parts, 0)
    }

    /// `v` in another shape of as many elements.
    pub(crate) fn reshape(&mut self, v: &Val, dims: Vec<Size>) -> Val {
        let target = self.target(v, &dims);
        self.op("Reshape", &[v.id, target], vec![], dims)
    }

    /// Axes in another order.
    pub(crate) fn transpose(&mut self, v: &Val, perm: &[usize]) -> Val {
        let id = self.b().transpose(v.id, perm);
        Val { id, dims: perm.iter().map(|p| v.dims[*p]).collect() }
    }

    /// `op(a, b)` in a random order of operands where that changes nothing that matters.
    pub(crate) fn binary(&mut self, op: &str, v: &Val, c: ValueId) -> Val {
        let turned = matches!(op, "Add" | "Mul" | "Sub" | "Max" | "Min") && self.one_in(3);
        let inputs = if turned { [c, v.id] } else { [v.id, c] };
        self.op(op, &inputs, vec![], v.dims.clone())
    }

    /// `a + b`.
    pub(crate) fn add(&mut self, a: &Val, b: &Val) -> Val {
        self.op("Add", &[a.id, b.id], vec![], a.dims.clone())
    }

    /// A product with a weight over the last axis, and a bias, in a random spelling.
    pub(crate) fn dense(&mut self, v: &Val, out: usize) -> Val {
        self.dense_with(v, out, None)
    }

    /// The same with a given bias.
    pub(crate) fn dense_with(&mut self, v: &Val, out: usize, bias: Option<ValueId>) -> Val {
        let (rank, k) = (v.rank(), v.n(v.rank() - 1));
        let mut dims = v.dims.clone();
        dims[rank - 1] = fixed(&[out])[0];
        let bias = match bias {
            Some(b) => Some(b),
            None if self.one_in(4) => None,
            None => Some(self.constant(&[out])),
        };
        let style = self.below(6);
        match style {
            2 => return self.dense_gemm(v, out, bias, dims),
            3 if rank == 3 && v.dims[0].batch => return self.dense_conv(v, out, bias, dims),
            _ => {}
        }
        let y = if style == 4 && self.opset >= 12 {
            let letters: String = "abcdefg".chars().take(rank - 1).collect();
            let turned = self.one_in(2);
            let w = if turned { self.weight(&[out, k], k) } else { self.weight(&[k, out], k) };
            let text = format!("{letters}x,{}->{letters}y", if turned { "yx" } else { "xy" });
            self.op("Einsum", &[v.id, w], vec![attr("equation", AttrValue::Str(text.into_bytes().into()))], dims)
        } else {
            let w = self.matrix(k, out);
            self.op("MatMul", &[v.id, w], vec![], dims)
        };
        match bias {
            Some(b) => self.binary("Add", &y, b),
            None => y,
        }
    }

    fn dense_gemm(&mut self, v: &Val, out: usize, bias: Option<ValueId>, dims: Vec<Size>) -> Val {
        let k = v.n(v.rank() - 1);
        let rows = Size { n: v.count() / k, batch: v.dims[..v.rank() - 1].iter().any(|d| d.batch) };
        let mut flat = if v.rank() == 2 { v.clone() } else { self.reshape(v, vec![rows, fixed(&[k])[0]]) };
        let mut attrs = Vec::new();
        if self.one_in(3) {
            flat = self.transpose(&flat, &[1, 0]);
            attrs.push(int("transA", 1));
        }
        let w = if self.one_in(2) {
            attrs.push(int("transB", 1));
            self.weight(&[out, k], k)
        } else {
            self.weight(&[k, out], k)
        };
        for name in ["alpha", "beta"] {
            if self.one_in(3) {
                attrs.push(float(name, 0.5));
            }
        }
        let inputs: Vec<ValueId> = [flat.id, w].into_iter().chain(bias).collect();
        let y = self.op("Gemm", &inputs, attrs, vec![rows, fixed(&[out])[0]]);
        if v.rank() == 2 { y } else { self.reshape(&y, dims) }
    }

    fn dense_conv(&mut self, v: &Val, out: usize, bias: Option<ValueId>, dims: Vec<Size>) -> Val {
        let k = v.n(2);
        let turned = self.transpose(v, &[0, 2, 1]);
        let w = self.weight(&[out, k, 1], k);
        let inputs: Vec<ValueId> = [turned.id, w].into_iter().chain(bias).collect();
        let y = self.op("Conv", &inputs, vec![ints("kernel_shape", &[1])], vec![dims[0], dims[2], dims[1]]);
        self.transpose(&y, &[0, 2, 1])
    }

    /// A pointwise function; `tame` ones keep zero a zero.
    pub(crate) fn unary(&mut self, v: &Val) -> Val {
        let mut names = vec![
            "Relu",
            "Sigmoid",
            "Tanh",
            "Neg",
            "Abs",
            "Erf",
            "Softplus",
            "Identity",
            "LeakyRelu",
            "Elu",
            "HardSigmoid",
            "Sin",
            "Cos",
            "gelu",
            "silu",
            "clip",
            "cast",
            "exp",
            "square",
            "dropout",
        ];
        if self.opset >= 14 {
            names.push("HardSwish");
        }
        if self.opset >= 20 {
            names.push("Gelu");
        }
        let name = self.pick(&names);
        let dims = v.dims.clone();
        match name {
            "gelu" => {
                let root = self.scalar(std::f32::consts::SQRT_2);
                let inner = self.op("Div", &[v.id, root], vec![], dims.clone());
                let inner = self.op("Erf", &[inner.id], vec![], dims.clone());
                let one = self.scalar(1.0);
                let inner = self.op("Add", &[inner.id, one], vec![], dims.clone());
                let half = self.scalar(0.5);
                let x = self.op("Mul", &[v.id, inner.id], vec![], dims.clone());
                self.op("Mul", &[x.id, half], vec![], dims)
            }
            "silu" => {
                let s = self.op("Sigmoid", &[v.id], vec![], dims.clone());
                self.op("Mul", &[s.id, v.id], vec![], dims)
            }
            "clip" => {
                let low = self.graph.add_initializer("low", Tensor::f32(&[], &[-0.7]));
                let high = self.graph.add_initializer("high", Tensor::f32(&[], &[0.9]));
                self.op("Clip", &[v.id, low, high], vec![], dims)
            }
            "cast" => {
                let wide = self.op("Cast", &[v.id], vec![int("to", 11)], dims.clone());
                self.op("Cast", &[wide.id], vec![int("to", 1)], dims)
            }
            "exp" => {
                let t = self.op("Tanh", &[v.id], vec![], dims.clone());
                self.op("Exp", &[t.id], vec![], dims)
            }
            "square" => {
                let two = self.graph.add_initializer("two", Tensor::f32(&[], &[2.0]));
                self.op("Pow", &[v.id, two], vec![], dims)
            }
            "dropout" => self.op("Dropout", &[v.id], vec![], dims),
            name => self.op(name, &[v.id], vec![], dims),
        }
    }

    /// Layer normalization of the last axis: as one operator, or written out.
    pub(crate) fn layer_norm(&mut self, v: &Val) -> Val {
        let n = v.n(v.rank() - 1);
        let (scale, shift) = (self.positive(&[n]), self.constant(&[n]));
        if self.opset >= 17 && self.one_in(2) {
            let attrs = vec![int("axis", -1), float("epsilon", 1e-2)];
            return self.op("LayerNormalization", &[v.id, scale, shift], attrs, v.dims.clone());
        }
        let dims = v.dims.clone();
        let mean = self.b().reduce_mean(v.id, &[-1], true);
        let centred = self.op("Sub", &[v.id, mean], vec![], dims.clone());
        let square = self.op("Mul", &[centred.id, centred.id], vec![], dims.clone());
        let variance = self.b().reduce_mean(square.id, &[-1], true);
        let h = self.over_root(&centred, variance);
        let h = self.op("Mul", &[h.id, scale], vec![], dims.clone());
        self.op("Add", &[h.id, shift], vec![], dims)
    }

    /// `v / sqrt(mean square + epsilon) * scale` over the last axis.
    pub(crate) fn rms_norm(&mut self, v: &Val) -> Val {
        let n = v.n(v.rank() - 1);
        let scale = self.positive(&[n]);
        if self.opset >= 23 && self.one_in(2) {
            let attrs = vec![int("axis", -1), float("epsilon", 1e-2)];
            return self.op("RMSNormalization", &[v.id, scale], attrs, v.dims.clone());
        }
        let square = self.op("Mul", &[v.id, v.id], vec![], v.dims.clone());
        let mean = self.b().reduce_mean(square.id, &[-1], true);
        let h = self.over_root(v, mean);
        self.op("Mul", &[h.id, scale], vec![], v.dims.clone())
    }

    fn over_root(&mut self, v: &Val, variance: ValueId) -> Val {
        let epsilon = self.scalar(1e-2);
        let shifted = self.b().add(variance, epsilon);
        let root = self.b().op("Sqrt", &[shifted], vec![]);
        self.op("Div", &[v.id, root], vec![], v.dims.clone())
    }

    /// The numbers `from..to` of an axis.
    pub(crate) fn slice(&mut self, v: &Val, axis: usize, from: usize, to: usize) -> Val {
        let n = v.n(axis);
        // The same bounds from the front, from the end, or beyond it.
        let from_end = |p: usize| p as i64 - n as i64;
        let start = if from > 0 && self.one_in(3) { from_end(from) } else { from as i64 };
        let end = match self.below(3) {
            0 if to < n => from_end(to),
            1 if to == n => i64::MAX,
            _ => to as i64,
        };
        let at = if self.one_in(2) { axis as i64 } else { axis as i64 - v.rank() as i64 };
        let id = self.b().slice(v.id, &[start], &[end], &[at]);
        let mut dims = v.dims.clone();
        dims[axis].n = to - from;
        Val { id, dims }
    }

    /// Consecutive parts of an axis.
    pub(crate) fn split(&mut self, v: &Val, axis: usize, sizes: &[usize]) -> Vec<Val> {
        let equal = sizes.windows(2).all(|w| w[0] == w[1]);
        let at = if self.one_in(2) { axis as i64 } else { axis as i64 - v.rank() as i64 };
        let mut attrs = vec![int("axis", at)];
        let mut inputs = vec![v.id];
        if equal && self.one_in(2) {
            if self.opset >= 18 {
                attrs.push(int("num_outputs", sizes.len() as i64));
            }
        } else {
            let sizes: Vec<i64> = sizes.iter().map(|s| *s as i64).collect();
            inputs.push(self.b().ints(&sizes));
        }
        let outs = self.b().ops("Split", &inputs, attrs, sizes.len());
        let part = |(id, n): (ValueId, &usize)| {
            let mut dims = v.dims.clone();
            dims[axis].n = *n;
            Val { id, dims }
        };
        outs.into_iter().zip(sizes).map(part).collect()
    }

    /// The positions `index` of an axis; some are named from the end.
    pub(crate) fn gather(&mut self, v: &Val, axis: usize, index: &[usize]) -> Val {
        let n = v.n(axis) as i64;
        let from_end = self.one_in(4);
        let index: Vec<i64> = index.iter().map(|i| if from_end { *i as i64 - n } else { *i as i64 }).collect();
        let ids = self.b().ints(&index);
        let id = self.b().gather(v.id, ids, axis as i64);
        let mut dims = v.dims.clone();
        dims[axis].n = index.len();
        Val { id, dims }
    }

    /// One position of an axis, which goes away.
    pub(crate) fn at(&mut self, v: &Val, axis: usize, position: usize) -> Val {
        let index = self.graph.add_initializer("index", Tensor::i64_scalar(position as i64));
        let id = self.b().gather(v.id, index, axis as i64);
        let mut dims = v.dims.clone();
        dims.remove(axis);
        Val { id, dims }
    }

    /// Values joined along an axis.
    pub(crate) fn concat(&mut self, parts: &[Val], axis: usize) -> Val {
        let ids: Vec<ValueId> = parts.iter().map(|p| p.id).collect();
        let id = self.b().concat(&ids, axis as i64);
        let mut dims = parts[0].dims.clone();
        dims[axis].n = parts.iter().map(|p| p.n(axis)).sum();
        Val { id, dims }
    }

    /// Softmax over an axis.
    pub(crate) fn softmax(&mut self, v: &Val, axis: usize) -> Val {
        let at = if self.one_in(2) { axis as i64 } else { axis as i64 - v.rank() as i64 };
        self.op("Softmax", &[v.id], vec![int("axis", at)], v.dims.clone())
    }

    /// With a new axis of size 1 before `axis`.
    pub(crate) fn unsqueeze(&mut self, v: &Val, axis: usize) -> Val {
        let id = self.b().unsqueeze(v.id, &[axis as i64]);
        let mut dims = v.dims.clone();
        dims.insert(axis, fixed(&[1])[0]);
        Val { id, dims }
    }

    /// Without an axis of size 1.
    pub(crate) fn squeeze(&mut self, v: &Val, axis: usize) -> Val {
        let id = self.b().squeeze(v.id, &[axis as i64]);
        let mut dims = v.dims.clone();
        dims.remove(axis);
        Val { id, dims }
    }

    /// The dims of a constant that is broadcast to `v`: some trailing axes, each whole or 1, never the batch.
    pub(crate) fn broadcast_dims(&mut self, v: &Val) -> Vec<usize> {
        let rank = v.rank() - self.below(v.rank());
        let mut dims = Vec::new();
        for axis in v.rank() - rank..v.rank() {
            let whole = !v.dims[axis].batch && !self.one_in(3);
            dims.push(if whole { v.n(axis) } else { 1 });
        }
        dims
    }
}
