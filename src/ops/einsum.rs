//! Einsum (opset 12 to 24): a product of operands, its axes named by letters.
//!
//! Shape: as the equation says. Example: `bnhd,bmhd->bhnm` is `q k^T`: `d` is contracted, `b` and `h` are parallel in all three,
//! and the cost is `B * N * M * H * D` MACs. An ellipsis is expanded to axes of its own, aligned at the end; a letter that
//! occurs twice in one operand (a diagonal) is refused.

use super::matmul::broadcast_dim;
use super::{Axes, Cost, CostCx, Grad, OpRule, Refit};
use crate::autodiff::GradCx;
use crate::axes::relation::{At, AxesCx, Relations, Slot};
use crate::graph::build::attr;
use crate::graph::{AttrValue, Node, ValueId};
use crate::infer::{Dim, Fact, InferCx, InferError};
use bytes::Bytes;
use std::collections::BTreeMap;

/// The records of this family.
pub static RULES: &[OpRule] = &[OpRule {
    name: "Einsum",
    domain: "",
    opsets: (12, 24),
    infer: einsum_infer,
    axes: Axes::Rule(einsum_axes),
    grad: Grad::Rule(einsum_grad),
    cost: Cost::Rule(einsum_cost),
    refit: Refit::Nothing,
}];

/// A parsed equation without ellipsis: the letters of each operand and of the output.
#[derive(Debug, PartialEq)]
struct Equation {
    operands: Vec<Vec<char>>,
    output: Vec<char>,
}

impl Equation {
    /// Parses the equation of `node` for operands of the given ranks.
    fn of(node: &Node, ranks: &[usize]) -> Result<Self, String> {
        let text: String = node.attr_str("equation").unwrap_or("").chars().filter(|c| !c.is_whitespace()).collect();
        let (left, right) = match text.split_once("->") {
            Some((left, right)) => (left, Some(right)),
            None => (text.as_str(), None),
        };
        let terms: Vec<&str> = left.split(',').collect();
        if terms.len() != ranks.len() {
            return Err(format!("the equation has {} operands, the node {}", terms.len(), ranks.len()));
        }
        let free: Vec<char> = ('a'..='z').chain('A'..='Z').filter(|c| !text.contains(*c)).collect();
        let mut operands = Vec::new();
        let mut widest = 0;
        for (term, rank) in terms.iter().zip(ranks) {
            let hidden = rank.checked_sub(term.replace("...", "").chars().count());
            let hidden = if term.contains("...") { hidden } else { hidden.filter(|h| *h == 0) };
            let hidden = hidden.ok_or_else(|| format!("the term \"{term}\" does not fit an operand of rank {rank}"))?;
            widest = widest.max(hidden);
            operands.push(expand(term, hidden, &free)?);
        }
        let output = match right {
            Some(right) => expand(right, widest, &free)?,
            None => implicit_output(&operands, widest, &free)?,
        };
        let known = |c: &char| operands.iter().any(|o| o.contains(c));
        if let Some(c) = output.iter().find(|c| !known(c)) {
            return Err(format!("the output letter \"{c}\" is in no operand"));
        }
        Ok(Self { operands, output })
    }

    /// All letters, each once, in order.
    fn letters(&self) -> Vec<char> {
        let set: std::collections::BTreeSet<char> = self.operands.iter().flatten().copied().collect();
        set.into_iter().collect()
    }

    /// Size of each letter under the operands' shapes; `None` where they contradict.
    fn sizes(&self, shapes: &[&[Dim]]) -> Option<BTreeMap<char, Dim>> {
        let mut sizes: BTreeMap<char, Dim> = BTreeMap::new();
        for (letters, shape) in self.operands.iter().zip(shapes) {
            for (letter, dim) in letters.iter().zip(*shape) {
                let size = match sizes.get(letter) {
                    Some(old) => broadcast_dim(old, dim)?,
                    None => dim.clone(),
                };
                sizes.insert(*letter, size);
            }
        }
        Some(sizes)
    }

    /// Whether a letter occurs twice in one operand.
    fn has_diagonal(&self) -> bool {
        self.operands.iter().chain([&self.output]).any(|o| o.iter().enumerate().any(|(i, c)| o[..i].contains(c)))
    }
}

/// The letters of a term, whose ellipsis stands for `hidden` axes: the last `hidden` of the free letters, aligned at the end.
fn expand(term: &str, hidden: usize, free: &[char]) -> Result<Vec<char>, String> {
    let Some((before, after)) = term.split_once("...") else { return Ok(term.chars().collect()) };
    let start = free.len().checked_sub(hidden).ok_or("an ellipsis of too many axes")?;
    Ok(before.chars().chain(free[start..].iter().copied()).chain(after.chars()).collect())
}

/// Without an arrow: the ellipsis, then the letters that occur exactly once, in alphabetical order.
fn implicit_output(operands: &[Vec<char>], hidden: usize, free: &[char]) -> Result<Vec<char>, String> {
    let start = free.len().checked_sub(hidden).ok_or("an ellipsis of too many axes")?;
    let mut output = free[start..].to_vec();
    let mut count: BTreeMap<char, usize> = BTreeMap::new();
    for c in operands.iter().flatten().filter(|c| !free[start..].contains(c)) {
        *count.entry(*c).or_insert(0) += 1;
    }
    output.extend(count.into_iter().filter(|(_, n)| *n == 1).map(|(c, _)| c));
    Ok(output)
}

fn einsum_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let shapes: Option<Vec<&[Dim]>> = (0..cx.input_count()).map(|i| cx.shape(i)).collect();
    let Some(shapes) = shapes else { return Ok(vec![Fact::new(cx.dtype(0), None)]) };
    let ranks: Vec<usize> = shapes.iter().map(|s| s.len()).collect();
    let equation = Equation::of(cx.node, &ranks).map_err(|e| cx.error(e))?;
    let sizes = equation.sizes(&shapes).ok_or_else(|| cx.error("a letter has two sizes"))?;
    let out = equation.output.iter().map(|c| sizes[c].clone()).collect();
    Ok(vec![Fact::new(cx.dtype(0), Some(out))])
}

/// A letter of the output is parallel; any other is contracted between its operands, or summed where it has only one.
fn einsum_axes(cx: &AxesCx<'_>) -> Relations {
    let mut relations = Relations::default();
    let slots: Vec<Slot> = (0..cx.node.inputs().len()).map(Slot::In).collect();
    let shapes: Vec<&[Dim]> = slots.iter().map(|s| cx.shape(*s)).collect();
    let ranks: Vec<usize> = shapes.iter().map(|s| s.len()).collect();
    let equation = Equation::of(cx.node, &ranks).ok().filter(|e| !e.has_diagonal());
    let Some((equation, sizes)) = equation.and_then(|e| e.sizes(&shapes).map(|s| (e, s))) else {
        for slot in slots.into_iter().chain([Slot::Out(0)]) {
            (0..cx.shape(slot).len()).for_each(|a| relations.barrier((slot, a), "an equation that takes a diagonal"));
        }
        return relations;
    };
    for letter in equation.letters() {
        let size = &sizes[&letter];
        let mut at: Vec<At> = Vec::new();
        for (i, letters) in equation.operands.iter().enumerate() {
            let Some(axis) = letters.iter().position(|c| *c == letter) else { continue };
            if shapes[i][axis] == *size {
                at.push((Slot::In(i), axis));
            } else if !shapes[i][axis].is(1) {
                relations.barrier((Slot::In(i), axis), "broadcast between sizes that are not known to be equal");
            }
        }
        match equation.output.iter().position(|c| *c == letter) {
            Some(axis) => at.iter().for_each(|a| relations.same(*a, (Slot::Out(0), axis))),
            None if at.len() == 1 => relations.sum(at[0]),
            None => at.windows(2).for_each(|w| relations.contract(w[0], w[1])),
        }
    }
    relations
}

/// The product of all letters' sizes, once per product of two operands. One operand alone costs nothing.
fn einsum_cost(cx: &CostCx<'_>) -> Option<Dim> {
    let shapes: Vec<&[Dim]> = cx.inputs.iter().copied().collect::<Option<_>>()?;
    let ranks: Vec<usize> = shapes.iter().map(|s| s.len()).collect();
    let sizes = Equation::of(cx.node, &ranks).ok()?.sizes(&shapes)?;
    Some(&sizes.values().product::<Dim>() * &Dim::from(shapes.len().saturating_sub(1)))
}

/// `dX = einsum(dY, the other operands -> letters of X)`; a letter that only X has is put back by stretching.
fn einsum_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let dy = cx.dy()?;
    let inputs: Vec<ValueId> = (0..cx.node().inputs().len()).map(|i| cx.input(i)).collect();
    let shapes: Vec<&[Dim]> = inputs.iter().map(|v| cx.shape(*v)).collect();
    let ranks: Vec<usize> = shapes.iter().map(|s| s.len()).collect();
    let equation = Equation::of(cx.node(), &ranks)?;
    if equation.has_diagonal() {
        return Err("the equation takes a diagonal".to_string());
    }
    let sizes = equation.sizes(&shapes).ok_or("a letter has two sizes")?;
    for (letters, shape) in equation.operands.iter().zip(&shapes) {
        if letters.iter().zip(*shape).any(|(c, d)| sizes[c] != *d) {
            return Err("an operand is broadcast along a letter".to_string());
        }
    }
    for slot in (0..inputs.len()).filter(|s| cx.wants(*s)).collect::<Vec<_>>() {
        let others = (0..inputs.len()).filter(|i| *i != slot);
        let (mut terms, mut values) = (vec![&equation.output], vec![dy]);
        for i in others {
            terms.push(&equation.operands[i]);
            values.push(inputs[i]);
        }
        let wanted = &equation.operands[slot];
        let found: Vec<char> = wanted.iter().copied().filter(|c| terms.iter().any(|t| t.contains(c))).collect();
        let text = |letters: &[char]| letters.iter().collect::<String>();
        let left: Vec<String> = terms.iter().map(|t| text(t)).collect();
        let equation_text = format!("{}->{}", left.join(","), text(&found));
        let mut grad = cx.b.op("Einsum", &values, vec![attr("equation", AttrValue::Str(Bytes::from(equation_text)))]);
        if found.len() < wanted.len() {
            let missing = |i: &usize| !found.contains(&wanted[*i]);
            let axes: Vec<i64> = (0..wanted.len()).filter(missing).map(|a| a as i64).collect();
            let shape = cx.b.shape_of(inputs[slot]);
            grad = cx.b.unsqueeze(grad, &axes);
            grad = cx.b.op("Expand", &[grad, shape], vec![]);
        }
        cx.give(slot, grad);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Graph;
    use crate::ops::matmul::one_node::{graph, links, macs, shapes};

    fn einsum(equation: &'static str, inputs: &[&str]) -> Graph {
        graph("Einsum", 13, inputs, vec![attr("equation", AttrValue::Str(Bytes::from_static(equation.as_bytes())))], 1)
    }

    #[test]
    fn letters_give_shapes() {
        for (equation, inputs, out) in [
            ("bnhd,bmhd->bhnm", vec!["b 4 2 8", "b 5 2 8"], "b 2 4 5"),
            ("ij,jk", vec!["2 3", "3 4"], "2 4"),
            ("ba", vec!["2 3"], "3 2"),
            ("...ij,...jk->...ik", vec!["b 1 2 3", "7 3 4"], "b 7 2 4"),
            ("i,i->", vec!["3", "3"], ""),
        ] {
            assert_eq!(shapes(&einsum(equation, &inputs)), Ok(vec![out.to_string()]), "{equation}");
        }
        assert!(shapes(&einsum("ij,jk->ik", &["2 3", "4 5"])).is_err());
        assert!(shapes(&einsum("ijk->i", &["2 3"])).is_err());
        assert!(shapes(&einsum("ij->q", &["2 3"])).is_err());
    }

    #[test]
    fn letters_relate_axes() {
        let g = einsum("bnhd,bmhd->bhnm", &["b 4 2 8", "b 5 2 8"]);
        let expected =
            ["in0.0=out0.0", "in1.0=out0.0", "in0.3*in1.3", "in0.2=out0.1", "in1.2=out0.1", "in1.1=out0.3", "in0.1=out0.2"];
        assert_eq!(links(&g), expected);
        assert_eq!(macs(&g), "320*b");
        assert_eq!(links(&einsum("ij->j", &["2 3"])), ["+in0.0", "in0.1=out0.0"]);
        assert_eq!(macs(&einsum("ij->j", &["2 3"])), "0");
        assert_eq!(links(&einsum("ii->i", &["3 3"])), ["!in0.0", "!in0.1", "!out0.0"]);
    }
}
