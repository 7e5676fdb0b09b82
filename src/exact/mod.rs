//! Savings that change no output: Graph + Facts -> a graph that computes the same with less.
//!
//! In: a graph, cut or not. Out: [`Saved`], with what was saved where, or why not. Nothing here depends on the elements of a
//! constant, so that a graph whose elements were left out saves the same (C3).
//! Invariant: outputs are equal up to rounding, for every input.

mod demand;
mod tokens;

use crate::cost::Sizes;
use crate::graph::{Graph, Tensor};
use crate::infer::Facts;
use demand::{Kept, Rect};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A way to save.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// What no output depends on is not computed: rows of tokens that are not read.
    Tokens,
    /// The bias of keys, which a softmax does not see, is gone.
    KeyBias,
    /// The bias of values is part of the output projection's.
    ValueBias,
}

impl What {
    /// As a sentence names it.
    pub fn as_sentence(self) -> &'static str {
        match self {
            What::Tokens => "tokens that no output depends on",
            What::KeyBias => "the bias of keys",
            What::ValueBias => "the bias of values",
        }
    }
}

/// Something saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saving {
    /// The way.
    pub what: What,
    /// Label of the softmax, or of the fused attention.
    pub node: String,
    /// MACs per sample; `None` where a size is not known.
    pub macs_saved: Option<u64>,
}

/// Something that is not saved. One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refused {
    /// The way.
    pub what: What,
    /// Label of the softmax, or of the fused attention; empty where there is none.
    pub node: String,
    /// The reason.
    pub reason: String,
}

/// A constant that holds a part of one of before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its name before.
    pub initializer: String,
    /// The name of the part; the same for one part at most.
    pub name: String,
    rect: Rect,
}

/// A graph that computes the same with less.
pub struct Saved {
    /// The graph.
    pub graph: Graph,
    /// What was saved.
    pub savings: Vec<Saving>,
    /// What was not.
    pub refused: Vec<Refused>,
    /// Constants that were taken apart.
    pub parts: Vec<Part>,
}

/// Puts constants together again that were taken apart: what no part holds is as in `before`.
pub fn put_together(graph: &mut Graph, before: &Graph, parts: &[Part]) {
    let mut whole: BTreeMap<&str, Tensor> = BTreeMap::new();
    for part in parts {
        let source = || before.find(&part.initializer).and_then(|v| before.constant(v));
        let Some(small) = graph.find(&part.name).and_then(|v| graph.constant(v)) else { continue };
        let Some(tensor) = whole.remove(part.initializer.as_str()).or_else(source) else { continue };
        whole.insert(&part.initializer, part.written_into(tensor, &small));
    }
    for (name, tensor) in whole {
        match graph.find(name) {
            Some(v) => graph.set_constant(v, tensor),
            None => drop(graph.add_initializer(name, tensor)),
        }
    }
}

impl Part {
    /// `whole` with this part's elements in their places.
    fn written_into(&self, whole: Tensor, small: &Tensor) -> Tensor {
        let width = whole.dtype.bits() / 8;
        let kept = |axis: usize| match self.rect.get(&axis) {
            Some(Kept::List(list)) => list.clone(),
            _ => (0..whole.dims[axis]).collect::<Vec<_>>(),
        };
        let kept: Vec<Vec<usize>> = (0..whole.dims.len()).map(kept).collect();
        let sizes: Vec<usize> = kept.iter().map(Vec::len).collect();
        if width == 0 || small.dims != sizes || whole.bytes.len() != whole.element_count() * width {
            return whole;
        }
        let mut bytes = whole.bytes.to_vec();
        for (n, chunk) in small.bytes.chunks_exact(width).enumerate() {
            let (mut rest, mut at, mut stride) = (n, 0, 1);
            for axis in (0..sizes.len()).rev() {
                at += kept[axis][rest % sizes[axis]] * stride;
                rest /= sizes[axis];
                stride *= whole.dims[axis];
            }
            bytes[at * width..(at + 1) * width].copy_from_slice(chunk);
        }
        Tensor { bytes: bytes.into(), ..whole }
    }
}

/// Leaves out what is computed of tokens that no output depends on: where outputs read a few tokens only, the last block computes
/// queries, output projection and MLP for those alone.
pub fn tokens(graph: &Graph, facts: &Facts, sizes: &Sizes) -> Saved {
    match tokens::narrow(graph, facts, sizes) {
        Ok(found) => Saved { graph: found.graph, savings: found.savings, refused: Vec::new(), parts: found.parts },
        Err(refused) => Saved { graph: graph.clone(), savings: Vec::new(), refused: vec![refused], parts: Vec::new() },
    }
}
