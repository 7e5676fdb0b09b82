//! vitrim makes an exported vision transformer smaller, on the ONNX file itself, and proves the result.

pub mod anatomy;
pub mod autodiff;
pub mod axes;
pub mod bench;
pub mod cli;
pub mod cost;
pub mod data;
pub mod eval;
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
pub mod verify;
pub mod supernet;
