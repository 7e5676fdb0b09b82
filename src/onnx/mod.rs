//! Load and save: the only place that knows protobuf.
//!
//! In: the path of an ONNX file. Out: a [`Graph`](crate::graph::Graph), and from a graph an ONNX file again. A graph that nobody
//! changed is written back as the file was: names, order, attributes, metadata, documentation, spelling of domains, kind of
//! storage. What the graph has no place for is kept encoded beside it (its shell, and `extra` of nodes, attributes and tensors).
//! Only `value_info` is dropped: it would be stale after a cut.
//!
//! Example: `read(path)?.graph`, then `save(&graph, out, Overwrite::Refuse)?`.
//!
//! Invariants: no bytes make reading panic; no file is read outside the model's directory; an output appears complete or not at
//! all; equal graphs give equal bytes.

#![deny(clippy::as_conversions, reason = "numbers come from files: every conversion is checked")]

mod attr;
mod body;
mod branch;
mod error;
mod external;
mod function;
mod map;
mod order;
mod read;
mod save;
mod source;
mod stream;
mod tensor;
mod value_info;
mod write;

pub use branch::open_branches;
pub use error::{Cause, Error, shown, shown_to};
pub use read::{Limits, Loaded, read, read_bytes, read_with};
pub use save::{Overwrite, bytes_of_file, check_output, data_path, save, save_if, sha256_of_file, write_file, write_file_with};
pub use write::{to_bytes, to_parts};
