//! The data stage against Pillow, timm and transformers (recorded by `benches/python/preprocess_reference.py`), and against bad
//! data.

#![allow(clippy::unwrap_used, reason = "what a test cannot set up, it may fail on; the lint's own exception misses helpers")]

#[path = "data/archives.rs"]
mod archives;
#[path = "data/configs.rs"]
mod configs;
#[path = "data/folders.rs"]
mod folders;
#[path = "data/parity.rs"]
mod parity;

use std::path::{Path, PathBuf};

use vitrim::data::{ArrayKind, Batch, BatchOrder, Dataset, InputSpec, Options};

/// A fixture's path.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data").join(name)
}

/// A model input.
fn input(name: &str, dims: &[Option<usize>], kind: ArrayKind) -> InputSpec {
    InputSpec { name: name.into(), dims: dims.to_vec(), kind }
}

/// Options for images of 3 x 16 x 16, resized and normalised plainly.
fn plain_options() -> Options {
    let image = input("x", &[None, Some(3), Some(16), Some(16)], ArrayKind::F32);
    Options { inputs: vec![image], mean: Some(vec![0.5]), std: Some(vec![0.25]), ..Options::default() }
}

/// All batches of an epoch, none of which may fail.
fn all(data: &Dataset, order: BatchOrder, size: usize, threads: usize) -> Vec<Batch> {
    data.batches(order, size, threads, None).map(|b| b.expect("a batch")).collect()
}
