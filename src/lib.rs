//! vitrim makes an exported vision transformer smaller, on the ONNX file itself, and proves the result.
//!
//! ```text
//!  model.onnx -> onnx -> graph -> infer -> axes -> anatomy
//!                                                     |
//!         data -> supernet + autodiff -> search -> score -> plan <- cost
//!                                                            |
//!                                    out.onnx <- verify <- slice
//! ```
//!
//! The example of the README, in Rust (all of it: `examples/quickstart.rs`):
//!
//! ```no_run
//! use vitrim::{pipeline, plan::Ask, score};
//! let path = "vit.onnx".as_ref();
//! let model = pipeline::load(path, &Default::default())?;
//! let scores = score::magnitude(model.graph(), &model.anatomy);
//! let ask = Ask::Fractions([(vitrim::anatomy::Kind::Mlp, 0.5)].into());
//! let plan = pipeline::make_plan(&model, &scores, &ask, "mlp=0.5", &Default::default())?;
//! let sliced = pipeline::cut(&model, path, &plan, None, false)?.sliced;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Words, one per idea
//!
//! - *value*, *node*, *initializer*: as in ONNX.
//! - *factor*: an indivisible part of an axis. The 144 columns of a fused qkv weight are 3 x H x E.
//! - *group*: what must be cut together. *unit*: one index of a group.
//! - *kind*: what a group is: `mlp`, `qk`, `vo`, `head`, `token`, `channel`.
//! - *sink*: an operator that sums over the group's factor.
//! - *gate*: the mask on a group; soft: a real number, hard: 0 or 1.
//! - *barrier*: why an axis cannot be cut. It is data that is shown, never an error.
//! - *anatomy*: all groups and barriers of a graph.
//! - *scores*: one number per unit. *plan*: which units stay.
//! - *twin*: the original graph with the plan's weights and its removed units zeroed; nothing is cut.
//!
//! Letters of dimensions: B batch, N tokens, D embedding, H heads, E head width, M MLP width.
//!
//! # Modules, in the order of the data flow
//!
//! A stage has one verb and one type of result. Stages import each other's types, and [`pipeline`] alone calls them.
//! ARCHITECTURE.md has the code map, the invariants, and what is deliberately absent.
//!
//! - [`onnx`]: file to graph and back: `read`, `save`; the only place that knows protobuf.
//! - [`graph`]: the graph as a value: no operator meaning, no input or output.
//! - [`ops`]: what each operator means: one record per operator, one file per family.
//! - [`infer`]: graph to `Facts`: element types, symbolic shapes, small contents.
//! - [`axes`]: graph and facts to `Axes`: which axes must be cut together.
//! - [`anatomy`]: axes to `Anatomy`: groups with kinds and units, refusals with reasons.
//! - [`cost`]: parameters, bytes and MACs, of a graph and of a graph under any plan.
//! - [`supernet`]: graph and gates to `Supernet`: a training graph in standard operators.
//! - [`autodiff`]: gradients, losses and the optimizer's step as ONNX nodes.
//! - [`data`]: image folders and `.npz` archives to batches.
//! - [`runtime`]: the engines: ONNX Runtime and tract; no other module touches one.
//! - [`eval`]: a model on data: accuracy with its interval, distance from a reference.
//! - [`search`]: training of gates (and weights) to a run directory; fine-tuning.
//! - [`stats`]: second moments of values over images: what weights are refitted by.
//! - [`score`]: `Scores`: one number per unit, whoever made them.
//! - [`curves`]: what an edit costs on data: `Curves`, loss against width for each group.
//! - [`plan`]: anatomy, scores and budget to `Plan`: the units that stay.
//! - [`slice`](mod@slice): graph and plan to `Sliced`: the smaller graph; and the twin.
//! - [`verify`]: result against twin in every runtime that can tell, against the model on data: `Verdict`.
//! - [`bench`](mod@bench): latency of one model or of two in turn.
//! - [`pipeline`]: the whole tool, one short function per command: the file to read first.
//! - [`cli`]: the command line: the only place that prints.

pub mod anatomy;
pub mod autodiff;
pub mod axes;
pub mod basis;
pub mod bench;
pub mod cli;
pub mod compensate;
pub mod cost;
pub mod curves;
pub mod data;
pub mod eval;
pub mod exact;
pub mod fold;
pub mod graph;
pub mod infer;
pub mod onnx;
pub mod ops;
pub mod pipeline;
pub mod plan;
pub mod runtime;
pub mod score;
pub mod search;
pub mod slice;
pub mod stats;
pub mod supernet;
pub mod verify;

/// The library under its own name: what is shared with tests that see it from outside.
#[cfg(test)]
extern crate self as vitrim;

/// Deliberate faults, and the property test over each: compiled here because only unit tests can replace a record (`ops/faults.rs`).
#[cfg(test)]
#[path = "../tests/property/mutation.rs"]
mod mutation;
