//! Convolutions of integers: ConvInteger (opset 10) and QLinearConv (opset 10).
//!
//! Shapes as Conv has them. Scales and zero points of a weight are one number or one per output channel.

use super::{NO_GRAD, quantized};
use crate::axes::relation::{AxesCx, Relations, Slot};
use crate::graph::DType;
use crate::infer::{Dim, Fact, InferCx, InferError};
use crate::ops::conv::{conv_macs, conv_shape, refit_group, relate_conv};
use crate::ops::{Axes, Cost, CostCx, OpRule, Refit};
use crate::slice::refit::{RefitCx, RefitError};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    OpRule {
        name: "ConvInteger",
        domain: "",
        opsets: (10, 24),
        infer: integer_infer,
        axes: Axes::Rule(integer_axes),
        grad: NO_GRAD,
        cost: Cost::Rule(integer_cost),
        refit: Refit::Rule(integer_refit),
    },
    OpRule {
        name: "QLinearConv",
        domain: "",
        opsets: (10, 24),
        infer: linear_infer,
        axes: Axes::Rule(linear_axes),
        grad: NO_GRAD,
        cost: Cost::Rule(linear_cost),
        refit: Refit::Rule(linear_refit),
    },
];

/// Relations with the weight at `weight`, whose scales and zero points are at `parameters`.
fn relate(cx: &AxesCx<'_>, weight: usize, bias: Option<usize>, parameters: &[usize]) -> Relations {
    let mut relations = Relations::default();
    relate_conv(cx, &mut relations, weight, bias);
    let weight = Slot::In(weight);
    for slot in parameters.iter().map(|s| Slot::In(*s)).filter(|s| cx.has(*s)) {
        if cx.shape(slot).len() == 1 && cx.shape(weight).first() == cx.shape(slot).first() {
            relations.same((slot, 0), (weight, 0));
        }
    }
    relations
}

/// Channels that remain of the input, and how many there were.
fn refit(cx: &mut RefitCx<'_>, weight: usize) -> Result<(), RefitError> {
    let kept = cx.kept_input(0, 1).map(<[usize]>::len);
    refit_group(cx, weight, kept, cx.old_input(0).get(1).and_then(Dim::size))
}

/// Inputs: x, w, and their zero points.
fn integer_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    Ok(vec![Fact::new(Some(DType::I32), conv_shape(cx, 1)?)])
}

fn integer_axes(cx: &AxesCx<'_>) -> Relations {
    relate(cx, 1, None, &[3])
}

fn integer_cost(cx: &CostCx<'_>) -> Option<Dim> {
    conv_macs(cx, 1)
}

fn integer_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    refit(cx, 1)
}

/// Inputs: x, scale, zero point, w, scale, zero point, scale and zero point of the output, bias.
fn linear_infer(cx: &InferCx<'_>) -> Result<Vec<Fact>, InferError> {
    let shape = conv_shape(cx, 3)?;
    Ok(quantized(cx, 7, Fact::new(cx.dtype(0), shape)))
}

fn linear_axes(cx: &AxesCx<'_>) -> Relations {
    relate(cx, 3, Some(8), &[4, 5])
}

fn linear_cost(cx: &CostCx<'_>) -> Option<Dim> {
    conv_macs(cx, 3)
}

fn linear_refit(cx: &mut RefitCx<'_>) -> Result<(), RefitError> {
    refit(cx, 3)
}
