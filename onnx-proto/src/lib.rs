//! The ONNX schema as Rust types, and what can be said about a file without decoding it.
//!
//! `schema` has one struct per message of `onnx.proto` (proto2: presence of every optional scalar is kept, so that
//! decode, encode, decode is the identity). [`table`] lists the same fields as data, and [`scan`](scan()) walks raw bytes by that
//! table before anything is decoded: it allocates nothing, names what the schema does not know, and enforces limits.
//!
//! Example: `scan(&bytes, &Limits::default())?` and then `ModelProto::decode(bytes)`; decoded from [`prost::bytes::Bytes`],
//! `raw_data` shares the bytes of the file.
//!
//! Source: `onnx.proto` of ONNX 1.20, IR version 13.

mod scan;
mod schema;
pub mod table;

pub use scan::{Counts, Fault, Limits, scan};
pub use schema::*;
