//! What each operator means: one record per operator, one file per family.
//!
//! A record has five rules: `infer` (shapes and small contents), `axes` (which axes go together), `grad`, `cost` (MACs) and
//! `refit` (what changes in the node when its axes were cut). Every field must be written; "not supported" is a value with a
//! reason. An operator without a record is a barrier on every axis; nothing is treated as elementwise by default.

pub mod attention;
pub mod control;
pub mod conv;
pub mod einsum;
pub mod elementwise;
#[cfg(test)]
pub(crate) mod faults;
pub mod layout;
pub mod matmul;
pub mod microsoft;
pub mod norm;
pub mod pool;
#[cfg(test)]
pub(crate) mod probe;
pub mod quantize;
pub mod reduce;
pub mod reshape;
pub mod select;
pub mod shape;
pub mod softmax;
pub mod zeros;

use crate::autodiff::GradCx;
use crate::axes::relation::{AxesCx, Relations};
use crate::graph::{Graph, Node};
use crate::infer::{Dim, Fact, InferCx, InferError};
use crate::slice::refit::{RefitCx, RefitError};

/// Everything that is known of one operator.
pub struct OpRule {
    /// Operator type.
    pub name: &'static str,
    /// Operator domain; the default domain is the empty string.
    pub domain: &'static str,
    /// The opsets whose definitions the rules were written from, first and last.
    pub opsets: (i64, i64),
    /// Facts of the outputs.
    pub infer: fn(&InferCx<'_>) -> Result<Vec<Fact>, InferError>,
    /// Relations between axes.
    pub axes: Axes,
    /// Gradients.
    pub grad: Grad,
    /// Multiply-accumulates.
    pub cost: Cost,
    /// What must change in the node when its axes were cut.
    pub refit: Refit,
}

/// How an operator relates the axes of its inputs and outputs.
pub enum Axes {
    /// By this rule.
    Rule(fn(&AxesCx<'_>) -> Relations),
    /// Not at all: a barrier on every axis, for this reason.
    Barrier(&'static str),
    /// Its outputs depend on shapes only, never on content: no relation and no barrier (Shape).
    ShapeOnly,
}

/// Gradient of an operator.
pub enum Grad {
    /// By this rule, which appends nodes to the training graph.
    Rule(fn(&mut GradCx<'_>) -> Result<(), String>),
    /// Its outputs do not depend smoothly on its inputs: the gradient is zero (Shape, Equal).
    Zero,
    /// Unknown, for this reason.
    No(&'static str),
}

/// Multiply-accumulates of an operator, per run.
pub enum Cost {
    /// None: elementwise work and data movement are not counted.
    Free,
    /// By this rule.
    Rule(fn(&CostCx<'_>) -> Option<Dim>),
}

/// What a cut changes in the node itself.
pub enum Refit {
    /// Nothing: all sizes follow from the inputs.
    Nothing,
    /// By this rule.
    Rule(fn(&mut RefitCx<'_>) -> Result<(), RefitError>),
}

/// What a `cost` rule sees: shapes before or after a cut.
pub struct CostCx<'a> {
    /// The node.
    pub node: &'a Node,
    /// Shape of each input, where known.
    pub inputs: Vec<Option<&'a [Dim]>>,
    /// Shape of each output, where known.
    pub outputs: Vec<Option<&'a [Dim]>>,
}

/// One slice of records per family.
static FAMILIES: &[&[OpRule]] = &[
    elementwise::arithmetic::RULES,
    elementwise::activation::RULES,
    elementwise::logic::RULES,
    norm::RULES,
    reduce::RULES,
    softmax::RULES,
    matmul::RULES,
    einsum::RULES,
    conv::RULES,
    pool::RULES,
    attention::RULES,
    reshape::RULES,
    layout::RULES,
    select::gather::RULES,
    select::join::RULES,
    select::scatter::RULES,
    select::slice::RULES,
    shape::RULES,
    control::RULES,
    microsoft::activation::RULES,
    microsoft::attention::RULES,
    microsoft::bias::RULES,
    microsoft::embed::RULES,
    microsoft::grouped_query::RULES,
    microsoft::matmul::RULES,
    microsoft::multi_head::RULES,
    microsoft::norm::RULES,
    microsoft::padding::RULES,
    microsoft::position::RULES,
    microsoft::rotary::RULES,
    quantize::linear::RULES,
    quantize::matmul::RULES,
    quantize::conv::RULES,
    quantize::pointwise::RULES,
    quantize::blocks::RULES,
];

/// All records.
pub fn all() -> impl Iterator<Item = &'static OpRule> {
    FAMILIES.iter().flat_map(|f| f.iter())
}

/// The record of an operator, whatever the opset. `ai.onnx` and the empty string both mean the default domain.
pub fn lookup(domain: &str, op: &str) -> Option<&'static OpRule> {
    let domain = if domain == "ai.onnx" { "" } else { domain };
    #[cfg(test)]
    if let Some(wrong) = faults::replaced(domain, op) {
        return Some(wrong);
    }
    all().find(|r| r.name == op && r.domain == domain)
}

/// Whether what is read at an input multiplies all that comes out: a zero of the other factor stays a zero whatever it holds.
pub fn is_factor(domain: &str, op: &str, slot: usize) -> bool {
    match (domain, op) {
        ("" | "ai.onnx", "Mul") => true,
        ("" | "ai.onnx", "Div") => slot == 1,
        ("" | "ai.onnx", "RotaryEmbedding") => matches!(slot, 1 | 2),
        ("com.microsoft", "RotaryEmbedding") => matches!(slot, 2 | 3),
        _ => false,
    }
}

/// The record of a node; `None` where there is none, or none that was written from the definition in the graph's opset.
pub fn rule_of(graph: &Graph, node: &Node) -> Option<&'static OpRule> {
    let opset = opset_of(graph, node);
    lookup(node.domain(), node.op()).filter(|r| (r.opsets.0..=r.opsets.1).contains(&opset))
}

/// Opset of a node's domain; that of a domain that the graph does not import is taken for 1.
fn opset_of(graph: &Graph, node: &Node) -> i64 {
    let names: &[&str] = if matches!(node.domain(), "" | "ai.onnx") { &["", "ai.onnx"] } else { &[node.domain()] };
    names.iter().find_map(|domain| graph.opset(domain)).unwrap_or(1)
}

/// Why a node has no record.
pub fn why_unknown(graph: &Graph, node: &Node) -> String {
    let (domain, op) = (node.domain(), node.op());
    match lookup(domain, op) {
        Some(rule) => {
            let (first, last) = rule.opsets;
            format!("operator {op} of opset {} has no rule, only opsets {first} to {last} are known", opset_of(graph, node))
        }
        None if domain.is_empty() => format!("operator {op} has no rule"),
        None => format!("uses {domain}::{op}, which vitrim does not know"),
    }
}

#[cfg(test)]
mod tests {
    use super::{rule_of, why_unknown};
    use crate::graph::{Graph, NewNode, Node};

    fn node(opset: i64, domain: &str, op: &str) -> (Graph, Node) {
        let mut g = Graph::new(8, vec![(String::new(), opset)], bytes::Bytes::new());
        let y = g.add_value("y");
        let new = NewNode { op: op.into(), domain: domain.into(), outputs: vec![Some(y)], ..NewNode::default() };
        let id = g.add_node(new);
        let node = g.node(id).clone();
        (g, node)
    }

    #[test]
    fn a_record_speaks_for_its_opsets_only() {
        for (opset, op, known) in
            [(22, "RMSNormalization", false), (23, "RMSNormalization", true), (9, "Slice", false), (7, "MatMul", true)]
        {
            for domain in ["", "ai.onnx"] {
                let (g, n) = node(opset, domain, op);
                assert_eq!(rule_of(&g, &n).is_some(), known, "{domain} {op} of opset {opset}");
            }
        }
        let (g, n) = node(9, "", "Slice");
        assert_eq!(why_unknown(&g, &n), "operator Slice of opset 9 has no rule, only opsets 10 to 24 are known");
        let (g, n) = node(17, "", "Nonsense");
        assert_eq!(why_unknown(&g, &n), "operator Nonsense has no rule");
        let (g, n) = node(17, "com.example", "Nonsense");
        assert_eq!(why_unknown(&g, &n), "uses com.example::Nonsense, which vitrim does not know");
    }

    #[test]
    fn a_domain_that_is_not_imported_is_of_version_1() {
        let (g, n) = node(17, "com.microsoft", "BiasGelu");
        assert!(rule_of(&g, &n).is_some());
    }
}
