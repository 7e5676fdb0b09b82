//! `vitrim inspect`: a table that a person reads in ten seconds, JSON for programs.

use super::failure::Failure;
use super::options::SizeArgs;
use super::talk::Talk;
use super::{Verdict, print_json, print_text};
use crate::anatomy::{Group, Kind};
use crate::onnx::shown;
use crate::pipeline::{self, GroupCost, Model};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The model
    model: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
    /// End with 1 where an attention or MLP layer is refused
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    sizes: SizeArgs,
}

pub(super) fn run(args: &Args, talk: &Talk) -> Result<Verdict, Failure> {
    let model = pipeline::load(&args.model, &args.sizes.sizes()?)?;
    model.loaded.warnings.iter().for_each(|w| talk.warn(w));
    let costs = pipeline::group_costs(&model);
    if args.json {
        print_json(&report(&model, &costs))?;
    } else {
        print_text(&table(&model, &costs))?;
    }
    let refused = model.anatomy.refused.iter().any(|r| r.kind != Kind::Token && r.kind != Kind::Channel);
    Ok(if args.strict && refused { Verdict::Negative } else { Verdict::Done })
}

fn report(model: &Model, costs: &[GroupCost]) -> Value {
    let graph = model.graph();
    let interface = |values: &[crate::graph::ValueId]| -> Vec<Value> {
        values
            .iter()
            .map(|v| {
                let fact = model.facts.get(*v);
                let dims = fact
                    .shape
                    .as_ref()
                    .map(|s| s.iter().map(|d| d.known().map_or(json!(d.to_string()), |n| json!(n))).collect::<Vec<_>>());
                json!({ "name": graph.value(*v).name(), "dtype": fact.dtype.map(|d| d.name()), "shape": dims })
            })
            .collect()
    };
    let opsets: BTreeMap<&str, i64> =
        graph.opsets().iter().map(|(d, v)| (if d.is_empty() { "ai.onnx" } else { d.as_str() }, *v)).collect();
    let cost = model.cost();
    let bases = pipeline::bases(model);
    let groups: Vec<Value> = model.anatomy.groups.iter().zip(costs).map(|(g, c)| group_json(model, g, c, &bases)).collect();
    let refused: Vec<Value> = model
        .anatomy
        .refused
        .iter()
        .map(|r| json!({ "kind": r.kind, "node": r.node, "op": r.op, "axis": r.axis, "reason": r.reason }))
        .collect();
    json!({
        "schema_version": crate::plan::SCHEMA_VERSION,
        "model": {
            "path": model.path.display().to_string(),
            "ir_version": graph.ir_version(),
            "opsets": opsets,
            "inputs": interface(graph.inputs()),
            "outputs": interface(graph.outputs()),
            "params": cost.params,
            "macs": cost.macs,
            "bytes": pipeline::file_bytes(model),
        },
        "groups": groups,
        "refused": refused,
    })
}

fn group_json(model: &Model, group: &Group, cost: &GroupCost, bases: &BTreeMap<String, Result<(), String>>) -> Value {
    let basis = bases.get(&group.id);
    let graph = model.graph();
    let sites: Vec<String> = group.sites.iter().map(|s| graph.label(s.at.node)).collect();
    let cuts: Vec<Value> =
        group.cuts.iter().map(|c| json!({ "initializer": graph.value(c.value).name(), "axis": c.axis })).collect();
    json!({
        "id": group.id,
        "kind": group.kind,
        "layer": group.layer,
        "units": group.units(),
        "heads": group.heads,
        "width": group.heads.map(|_| group.width()),
        "params_per_unit": cost.params_per_unit,
        "macs_per_unit": cost.macs_per_unit,
        "sites": sites,
        "cuts": cuts,
        "basis": if matches!(basis, Some(Ok(()))) { "rotated" } else { "original" },
        "basis_reason": basis.and_then(|b| b.as_ref().err()),
    })
}

/// One row per layer and kind, equal neighbours together.
fn table(model: &Model, costs: &[GroupCost]) -> String {
    let cost = model.cost();
    let mut out = format!(
        "{}: {} parameters, {} MACs, {} bytes\n",
        shown(&model.path.display().to_string()),
        grouped(cost.params),
        cost.macs.map_or("unknown".into(), grouped),
        grouped(pipeline::file_bytes(model)),
    );
    let mut rows: Vec<(Kind, String, String, Vec<usize>)> = Vec::new();
    for (g, c) in model.anatomy.groups.iter().zip(costs) {
        let units = match g.heads {
            Some(h) if h > 1 && h * g.width() == g.units() => format!("{} = {h} x {}", g.units(), g.width()),
            _ => g.units().to_string(),
        };
        let per_unit = c.macs_per_unit.map_or("?".into(), grouped);
        match rows.iter_mut().find(|r| r.0 == g.kind && r.1 == units && r.2 == per_unit) {
            Some(row) => row.3.push(g.layer),
            None => rows.push((g.kind, units, per_unit, vec![g.layer])),
        }
    }
    if rows.is_empty() {
        out.push_str("nothing can be cut\n");
    } else {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        table.set_header(vec!["kind", "layers", "units", "MACs per unit"]);
        for (kind, units, per_unit, layers) in rows {
            table.add_row(vec![kind.as_str().to_string(), ranges(&layers), units, per_unit]);
        }
        out.push_str(&format!("{table}\n"));
    }
    let mut reasons: BTreeMap<(Kind, &str), Vec<&str>> = BTreeMap::new();
    for r in &model.anatomy.refused {
        reasons.entry((r.kind, r.reason.as_str())).or_default().push(&r.node);
    }
    for ((kind, reason), nodes) in reasons {
        let first = if nodes[0].is_empty() { String::new() } else { format!(" at {}", shown(nodes[0])) };
        let more = if nodes.len() > 1 { format!(" and {} more", nodes.len() - 1) } else { String::new() };
        out.push_str(&format!("refused {}: {}{first}{more}\n", kind.as_str(), shown(reason)));
    }
    out
}

/// `0-3,5` for 0, 1, 2, 3, 5.
fn ranges(numbers: &[usize]) -> String {
    let mut sorted = numbers.to_vec();
    sorted.sort_unstable();
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for n in sorted {
        match parts.last_mut() {
            Some((_, last)) if n <= *last + 1 => *last = n,
            _ => parts.push((n, n)),
        }
    }
    let text = |(a, b): &(usize, usize)| if a == b { a.to_string() } else { format!("{a}-{b}") };
    parts.iter().map(text).collect::<Vec<_>>().join(",")
}

/// `1234567` as `1,234,567`.
pub(super) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, d) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(d);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_easily() {
        assert_eq!((grouped(5), grouped(1234567)), ("5".to_string(), "1,234,567".to_string()));
        assert_eq!(ranges(&[0, 1, 2, 5]), "0-2,5");
    }
}
