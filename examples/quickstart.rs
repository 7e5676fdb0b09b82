//! The library in one minute: what can be cut, half of the MLP units by the size of their weights, a smaller file.
//!
//! `cargo run --example quickstart`

#![allow(clippy::print_stdout, reason = "an example shows what it finds")]

use std::path::Path;
use vitrim::anatomy::Kind;
use vitrim::cost::Sizes;
use vitrim::onnx::{self, Overwrite};
use vitrim::plan::{Ask, Limits};
use vitrim::{pipeline, score};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/digits/vit-digits.onnx");
    let model = pipeline::load(&path, &Sizes::new())?;
    for group in &model.anatomy.groups {
        println!("{:8} {:3} units, cuts {} constants", group.id, group.units(), group.cuts.len());
    }
    for refusal in &model.anatomy.refused {
        println!("not cut: {} at {}: {}", refusal.kind.as_str(), refusal.node, refusal.reason);
    }

    let scores = score::magnitude(model.graph(), &model.anatomy);
    let ask = Ask::Fractions([(Kind::Mlp, 0.5)].into());
    let plan = pipeline::make_plan(&model, &scores, &ask, "mlp=0.5", &Limits::default())?;
    let sliced = pipeline::cut(&model, &path, &plan, None, false)?.sliced;

    let folder = tempfile::tempdir()?;
    let out = folder.path().join("half-mlp.onnx");
    onnx::save(&sliced.graph, &out, Overwrite::Refuse)?;
    let params = plan.budget.promised.params;
    println!(
        "{} of {} parameters left, {} constants cut, {} bytes",
        params.after,
        params.before,
        sliced.cuts.len(),
        std::fs::metadata(&out)?.len()
    );
    Ok(())
}
