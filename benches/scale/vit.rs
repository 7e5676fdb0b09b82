//! A vision transformer of any size, node by node as PyTorch's TorchScript exporter writes a timm network: opset 17, dynamic batch, fused
//! qkv taken apart by Gather, GELU spelled out; with random weights.

use bytes::Bytes;
use vitrim::graph::build::{Builder, attr};
use vitrim::graph::{AttrValue, DType, Declared, DeclaredDim, Graph, Storage, Tensor, ValueId};

/// A ViT with class token on images of 224 x 224; its MLP is four times as wide as itself.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    /// Blocks.
    pub(crate) layers: usize,
    /// D.
    pub(crate) width: usize,
    /// H.
    pub(crate) heads: usize,
    /// Unit: pixels.
    pub(crate) patch: usize,
}

/// Random numbers, of which every weight takes another piece: a large model then needs little memory to be made.
struct Weights {
    pool: Bytes,
    next: usize,
    storage: Storage,
}

impl Weights {
    fn new(largest: usize, storage: Storage) -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut number = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 0.1
        };
        let pool = (0..largest + 65_536).flat_map(|_| number().to_le_bytes()).collect();
        Self { pool, next: 0, storage }
    }

    fn tensor(&mut self, dims: &[usize]) -> Tensor {
        let bytes = dims.iter().product::<usize>() * 4;
        self.next = (self.next + 4 * 97) % (4 * 65_536);
        let storage = if bytes >= 1024 { self.storage } else { Storage::Raw };
        Tensor { storage, ..Tensor::new(DType::F32, dims.to_vec(), self.pool.slice(self.next..self.next + bytes)) }
    }
}

/// The network as a graph.
pub(crate) fn graph(shape: &Shape, storage: Storage) -> Graph {
    let mut graph = Graph::new(8, vec![(String::new(), 17)], Bytes::new());
    let input = graph.add_value("input");
    let declared = |dims: &[i64]| Declared {
        dtype: Some(DType::F32),
        dims: Some(
            std::iter::once(DeclaredDim::Symbol("batch".into())).chain(dims.iter().map(|d| DeclaredDim::Size(*d))).collect(),
        ),
        extra: Bytes::new(),
    };
    graph.add_input(input, declared(&[3, 224, 224]));
    let largest = (4 * shape.width).max(1000).max(3 * shape.patch * shape.patch) * shape.width;
    let mut weights = Weights::new(largest, storage);
    let mut net = Net { b: Builder::new(&mut graph, "/"), w: &mut weights, shape };
    let mut x = net.embed(input);
    for _ in 0..shape.layers {
        x = net.block(x);
    }
    let logits = net.head(x);
    graph.add_output(logits, declared(&[1000]));
    graph
}

struct Net<'a> {
    b: Builder<'a>,
    w: &'a mut Weights,
    shape: &'a Shape,
}

impl Net<'_> {
    fn weight(&mut self, dims: &[usize]) -> ValueId {
        let tensor = self.w.tensor(dims);
        self.b.constant(tensor)
    }

    fn tokens(&self) -> i64 {
        (224 / self.shape.patch as i64).pow(2)
    }

    fn int(&mut self, value: i64) -> ValueId {
        self.b.constant(Tensor::i64_scalar(value))
    }

    /// A shape made of the batch, read from `x` at run time, and of numbers.
    fn target(&mut self, x: ValueId, rest: &[i64]) -> ValueId {
        let (shape, zero) = (self.b.shape_of(x), self.int(0));
        let batch = self.b.gather(shape, zero, 0);
        let mut parts = vec![self.b.unsqueeze(batch, &[0])];
        for n in rest {
            parts.push(self.b.ints(&[*n]));
        }
        self.b.concat(&parts, 0)
    }

    fn linear(&mut self, x: ValueId, from: usize, to: usize) -> ValueId {
        let (weight, bias) = (self.weight(&[from, to]), self.weight(&[to]));
        let product = self.b.matmul(x, weight);
        self.b.add(bias, product)
    }

    fn norm(&mut self, x: ValueId) -> ValueId {
        let d = self.shape.width;
        let (scale, bias) = (self.weight(&[d]), self.weight(&[d]));
        self.b.op("LayerNormalization", &[x, scale, bias], vec![attr("axis", AttrValue::Int(-1))])
    }

    fn embed(&mut self, input: ValueId) -> ValueId {
        let (d, p, n) = (self.shape.width, self.shape.patch, self.tokens());
        let (kernel, bias) = (self.weight(&[d, 3, p, p]), self.weight(&[d]));
        let sides = |n: usize| AttrValue::Ints(vec![n as i64; 2]);
        let attrs = vec![attr("kernel_shape", sides(p)), attr("strides", sides(p))];
        let patches = self.b.op("Conv", &[input, kernel, bias], attrs);
        let target = self.target(patches, &[d as i64, n]);
        let flat = self.b.reshape_to(patches, target);
        let sequence = self.b.transpose(flat, &[0, 2, 1]);
        let class = self.weight(&[1, 1, d]);
        let target = self.target(sequence, &[-1, -1]);
        let ones = self.b.constant(Tensor::i64s(&[1, 1, 1]));
        let minus = self.b.constant(Tensor::i64s(&[-1, -1, -1]));
        let all = self.b.op("Equal", &[target, minus], vec![]);
        let sizes = self.b.op("Where", &[all, ones, target], vec![]);
        let class = self.b.op("Expand", &[class, sizes], vec![]);
        let joined = self.b.concat(&[class, sequence], 1);
        let positions = self.weight(&[1, n as usize + 1, d]);
        self.b.add(joined, positions)
    }

    fn block(&mut self, x: ValueId) -> ValueId {
        let normed = self.norm(x);
        let attended = self.attention(normed);
        let x = self.b.add(x, attended);
        let (d, normed) = (self.shape.width, self.norm(x));
        let hidden = self.linear(normed, d, 4 * d);
        let active = self.gelu(hidden);
        let out = self.linear(active, 4 * d, d);
        self.b.add(x, out)
    }

    fn attention(&mut self, x: ValueId) -> ValueId {
        let (d, h, n) = (self.shape.width, self.shape.heads, self.tokens() + 1);
        let e = (d / h) as i64;
        let qkv = self.linear(x, d, 3 * d);
        let target = self.target(x, &[n, 3, h as i64, e]);
        let split = self.b.reshape_to(qkv, target);
        let split = self.b.transpose(split, &[2, 0, 3, 1, 4]);
        let [q, k, v] = [0, 1, 2].map(|i| {
            let index = self.int(i);
            self.b.gather(split, index, 0)
        });
        let scale = self.b.scalar(DType::F32, (e as f32).powf(-0.25));
        let (q, k) = (self.b.mul(q, scale), self.b.transpose(k, &[0, 1, 3, 2]));
        let k = self.b.mul(k, scale);
        let logits = self.b.matmul(q, k);
        let probabilities = self.b.op("Softmax", &[logits], vec![attr("axis", AttrValue::Int(-1))]);
        let mixed = self.b.matmul(probabilities, v);
        let mixed = self.b.transpose(mixed, &[0, 2, 1, 3]);
        let target = self.target(x, &[n, d as i64]);
        let mixed = self.b.reshape_to(mixed, target);
        self.linear(mixed, d, d)
    }

    fn gelu(&mut self, x: ValueId) -> ValueId {
        let [root, one, half] = [std::f32::consts::SQRT_2, 1.0, 0.5].map(|n| self.b.scalar(DType::F32, n));
        let scaled = self.b.div(x, root);
        let erf = self.b.op("Erf", &[scaled], vec![]);
        let shifted = self.b.add(erf, one);
        let product = self.b.mul(x, shifted);
        self.b.mul(product, half)
    }

    fn head(&mut self, x: ValueId) -> ValueId {
        let (normed, zero) = (self.norm(x), self.int(0));
        let class = self.b.gather(normed, zero, 1);
        let (weight, bias) = (self.weight(&[1000, self.shape.width]), self.weight(&[1000]));
        self.b.op("Gemm", &[class, weight, bias], vec![attr("transB", AttrValue::Int(1))])
    }
}
