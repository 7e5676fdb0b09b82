//! Savings that change no output: Graph + Facts -> a graph that computes the same with less.
//!
//! In: a graph, cut or not. Out: [`Saved`], with what was saved where, or why not. Nothing here depends on the elements of a
//! constant, so that a graph whose elements were left out saves the same (C3).
//! Invariant: outputs are equal up to rounding, for every input.

mod demand;
mod tokens;

use crate::cost::Sizes;
use crate::graph::Graph;
use crate::infer::Facts;
use demand::Rect;
use serde::{Deserialize, Serialize};

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

/// Leaves out what is computed of tokens that no output depends on: where outputs read a few tokens only, the last block computes
/// queries, output projection and MLP for those alone.
pub fn tokens(graph: &Graph, facts: &Facts, sizes: &Sizes) -> Saved {
    match tokens::narrow(graph, facts, sizes) {
        Ok(found) => Saved { graph: found.graph, savings: found.savings, refused: Vec::new(), parts: found.parts },
        Err(refused) => Saved { graph: graph.clone(), savings: Vec::new(), refused: vec![refused], parts: Vec::new() },
    }
}
