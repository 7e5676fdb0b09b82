//! docs/operators.md: what is known of each operator, from the records themselves.

use vitrim::ops::{self, Axes, Cost, Grad, OpRule, Refit};

const HEAD: &str = "# Operators

Written by `cargo run --example operators > docs/operators.md`; tests/tidy.rs fails where it is out of date.

An operator that is not here is a barrier on every axis: nothing is cut through it, and `vitrim inspect` names the node. `opsets`
are those whose definitions the record was written from. `infer`: shapes and small contents. `axes`: which axes go together, so that
cuts pass through it (`shape only`: its outputs depend on shapes, never on content). `grad`: gradient in training graphs (`zero`:
it has none by nature). `cost`: how many MACs are counted (`none`: no products are summed). `refit`: what changes in the node itself
when its axes are cut (`nothing`: its sizes follow from its inputs).

";

/// The whole page.
pub(crate) fn page() -> String {
    let mut rules: Vec<&OpRule> = ops::all().collect();
    rules.sort_by_key(|r| (r.domain, r.name));
    let mut page =
        format!("{HEAD}| operator | domain | opsets | infer | axes | grad | cost | refit |\n|---|---|---|---|---|---|---|---|\n");
    for r in &rules {
        let domain = if r.domain.is_empty() { "ai.onnx" } else { r.domain };
        page += &format!(
            "| {} | {domain} | {} to {} | yes | {} | {} | {} | {} |\n",
            r.name,
            r.opsets.0,
            r.opsets.1,
            axes(&r.axes),
            grad(&r.grad),
            cost(&r.cost),
            refit(&r.refit)
        );
    }
    page + &format!("\n{} operators.\n", rules.len())
}

fn axes(rule: &Axes) -> String {
    match rule {
        Axes::Rule(_) => "yes".into(),
        Axes::Barrier(reason) => format!("no: {reason}"),
        Axes::ShapeOnly => "shape only".into(),
    }
}

fn grad(rule: &Grad) -> String {
    match rule {
        Grad::Rule(_) => "yes".into(),
        Grad::Zero => "zero".into(),
        Grad::No(reason) => format!("no: {reason}"),
    }
}

fn cost(rule: &Cost) -> &'static str {
    match rule {
        Cost::Rule(_) => "yes",
        Cost::Free => "none",
    }
}

fn refit(rule: &Refit) -> &'static str {
    match rule {
        Refit::Rule(_) => "yes",
        Refit::Nothing => "nothing",
    }
}
