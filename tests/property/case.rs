//! One random graph: what it is made of is drawn from a seed, and each block draws its own numbers from a stream of its own, so that a
//! new kind of block does not change what the blocks of a known seed look like.

use super::blocks::{BLOCKS, Block, build};
use super::harness::{Random, f32s};
use super::net::Net;
use vitrim::data::array::Array;
use vitrim::graph::{Graph, ValueId};

/// A random graph from `x` `[batch, N, D]` to one output or several.
pub(crate) struct Case {
    pub(crate) seed: u64,
    pub(crate) blocks: Vec<Block>,
    pub(crate) graph: Graph,
    /// `(constant, axis)`: what must be offered to be cut.
    pub(crate) must: Vec<(ValueId, usize)>,
    pub(crate) story: Vec<String>,
    input: [usize; 3],
}

/// What a stream of numbers is for.
fn stream(seed: u64, purpose: u64) -> Random {
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9).wrapping_add(purpose << 40));
    random.bits();
    random
}

impl Case {
    /// The graph of a seed.
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = stream(seed, 1);
        let count = 1 + (random.bits() % 2) as usize;
        let blocks: Vec<Block> = (0..count).map(|_| BLOCKS[(random.bits() >> 33) as usize % BLOCKS.len()]).collect();
        Self::of(seed, &blocks)
    }

    /// The graph of a seed that is made of these blocks.
    pub(crate) fn of(seed: u64, blocks: &[Block]) -> Self {
        let mut random = stream(seed, 2);
        let mut draw = |of: &[usize]| of[(random.bits() >> 33) as usize % of.len()];
        let opset = draw(&[13, 13, 14, 17, 18, 20, 23]) as i64;
        let batch = [Some(1), Some(2), None, None][draw(&[0, 1, 2, 3])];
        let (n, d) = (draw(&[2, 3, 4, 6]), draw(&[2, 3, 4, 6, 8]));
        let mut net = Net::new(stream(seed, 3), opset, batch);
        net.story.push(format!("opset {opset}, batch {batch:?}, N {n}, D {d}"));
        let mut x = net.input("x", &[n, d]);
        for (number, block) in blocks.iter().enumerate() {
            net.random = stream(seed, 10 + number as u64);
            x = build(&mut net, &x, *block);
        }
        net.random = stream(seed, 4);
        let x = if net.one_in(2) { net.layer_norm(&x) } else { x };
        let y = if net.one_in(2) { net.dense(&x, 3) } else { x };
        net.output(&y);
        net.graph.remove_dead(&|_, _| false);
        net.graph.sort();
        let Net { graph, must, story, ties, .. } = net;
        let must = if ties { Vec::new() } else { must };
        Self { seed, blocks: blocks.to_vec(), graph, must, story, input: [batch.unwrap_or(3), n, d] }
    }

    /// What is fed.
    pub(crate) fn feeds(&self) -> Vec<(String, Array)> {
        let values = stream(self.seed, 5).f32s(self.input.iter().product(), -1.5, 1.5);
        vec![("x".into(), f32s(&self.input, values))]
    }

    /// Numbers for what is pruned.
    pub(crate) fn pruning(&self) -> Random {
        stream(self.seed, 6)
    }
}
