//! Arithmetic: sums, products, powers, roots, exponentials, rounding, and the greatest or smallest of several.

use super::{give_slope, numeric, scaled, select, shifted};
use crate::autodiff::GradCx;
use crate::graph::ValueId;
use crate::ops::{Grad, OpRule};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    numeric("Add", 11, Grad::Rule(sum_grad)),
    numeric("Sub", 11, Grad::Rule(sub_grad)),
    numeric("Mul", 11, Grad::Rule(mul_grad)),
    numeric("Div", 11, Grad::Rule(div_grad)),
    numeric("Pow", 11, Grad::Rule(pow_grad)),
    numeric("Mod", 11, Grad::Rule(mod_grad)),
    numeric("Sum", 11, Grad::Rule(sum_grad)),
    numeric("Mean", 11, Grad::Rule(mean_grad)),
    numeric("Max", 11, Grad::Rule(extreme_grad)),
    numeric("Min", 11, Grad::Rule(extreme_grad)),
    numeric("Neg", 11, Grad::Rule(neg_grad)),
    numeric("Abs", 11, Grad::Rule(abs_grad)),
    numeric("Sqrt", 11, Grad::Rule(sqrt_grad)),
    numeric("Exp", 11, Grad::Rule(exp_grad)),
    numeric("Log", 11, Grad::Rule(log_grad)),
    numeric("Reciprocal", 11, Grad::Rule(reciprocal_grad)),
    numeric("Erf", 11, Grad::Rule(erf_grad)),
    numeric("Sin", 11, Grad::Rule(sin_grad)),
    numeric("Cos", 11, Grad::Rule(cos_grad)),
    numeric("Sign", 11, Grad::Zero),
    numeric("Floor", 11, Grad::Zero),
    numeric("Ceil", 11, Grad::Zero),
    numeric("Round", 11, Grad::Zero),
];

/// Sums `grad` to the shape of input `slot` and gives it.
fn give_summed(cx: &mut GradCx<'_>, slot: usize, grad: ValueId) {
    let grad = cx.sum_to(grad, slot);
    cx.give(slot, grad);
}

/// `dx_i = dy`
fn sum_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let dy = cx.dy()?;
    for slot in (0..cx.node().inputs().len()).filter(|slot| cx.wants(*slot)).collect::<Vec<_>>() {
        give_summed(cx, slot, dy);
    }
    Ok(())
}

/// `dx_i = dy / n`
fn mean_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, y, n) = (cx.dy()?, cx.output(0), cx.node().inputs().len());
    let share = scaled(cx, dy, 1.0 / n as f32, y);
    for slot in (0..n).filter(|slot| cx.wants(*slot)).collect::<Vec<_>>() {
        give_summed(cx, slot, share);
    }
    Ok(())
}

/// `da = dy`, `db = -dy`
fn sub_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let dy = cx.dy()?;
    if cx.wants(0) {
        give_summed(cx, 0, dy);
    }
    if cx.wants(1) {
        let sum = cx.sum_to(dy, 1);
        let db = cx.b.neg(sum);
        cx.give(1, db);
    }
    Ok(())
}

/// `da = dy * b`, `db = dy * a`
fn mul_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let dy = cx.dy()?;
    for (slot, other) in [(0, 1), (1, 0)] {
        if cx.wants(slot) {
            let product = cx.b.mul(dy, cx.input(other));
            give_summed(cx, slot, product);
        }
    }
    Ok(())
}

/// `da = dy / b`, `db = -dy * y / b`
fn div_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, b) = (cx.dy()?, cx.input(1));
    let quotient = cx.b.div(dy, b);
    if cx.wants(0) {
        give_summed(cx, 0, quotient);
    }
    if cx.wants(1) {
        let product = cx.b.mul(quotient, cx.output(0));
        let sum = cx.sum_to(product, 1);
        let db = cx.b.neg(sum);
        cx.give(1, db);
    }
    Ok(())
}

/// The one number that a constant holds.
fn constant_number(cx: &GradCx<'_>, value: ValueId) -> Option<f32> {
    let tensor = cx.b.graph.constant(value).filter(|t| t.element_count() == 1)?;
    match tensor.to_i64s() {
        Some(ints) => ints.first().map(|v| *v as f32),
        None => tensor.to_f32s()?.first().copied(),
    }
}

/// `dx = dy * p * x^(p-1)`, `dp = dy * y * ln(x)` (so an exponent that wants a gradient needs `x > 0`).
///
/// Constant exponents that models use have cheaper forms: `x^2`, `x^0.5`.
fn pow_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x, y) = (cx.dy()?, cx.input(0), cx.output(0));
    if cx.wants(0) {
        let slope = match constant_number(cx, cx.input(1)) {
            Some(0.5) => {
                let half = cx.scalar(0.5, x);
                cx.b.div(half, y)
            }
            Some(1.0) => cx.scalar(1.0, x),
            Some(2.0) => scaled(cx, x, 2.0, x),
            Some(3.0) => {
                let square = cx.b.mul(x, x);
                scaled(cx, square, 3.0, x)
            }
            Some(p) => {
                let less = cx.scalar(p - 1.0, x);
                let power = cx.b.op("Pow", &[x, less], vec![]);
                scaled(cx, power, p, x)
            }
            None => {
                let p = exponent_as_base(cx);
                let less = shifted(cx, p, -1.0, x);
                let power = cx.b.op("Pow", &[x, less], vec![]);
                cx.b.mul(power, p)
            }
        };
        let product = cx.b.mul(dy, slope);
        give_summed(cx, 0, product);
    }
    if cx.wants(1) {
        let log = cx.b.op("Log", &[x], vec![]);
        let slope = cx.b.mul(y, log);
        let product = cx.b.mul(dy, slope);
        let sum = cx.sum_to(product, 1);
        let dp = if cx.dtype(cx.input(1)) == cx.dtype(x) { sum } else { cx.b.cast(sum, cx.dtype(cx.input(1))) };
        cx.give(1, dp);
    }
    Ok(())
}

/// The exponent of a `Pow` node in the element type of its base.
fn exponent_as_base(cx: &mut GradCx<'_>) -> ValueId {
    let (base, exponent) = (cx.dtype(cx.input(0)), cx.input(1));
    if cx.dtype(exponent) == base { exponent } else { cx.b.cast(exponent, base) }
}

/// `da = dy`; of integers there is no gradient.
fn mod_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    if !cx.dtype(cx.input(0)).is_float() {
        return Ok(());
    }
    if cx.wants(1) {
        return Err("the gradient towards the divisor of Mod is not written".to_string());
    }
    let dy = cx.dy()?;
    give_summed(cx, 0, dy);
    Ok(())
}

/// `dx_i = dy where x_i is the extreme`. Of two equal operands the first has it; of more than two, each that is equal.
fn extreme_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, y) = (cx.dy()?, cx.output(0));
    let zero = cx.scalar(0.0, y);
    let inputs: Vec<ValueId> = (0..cx.node().inputs().len()).map(|slot| cx.input(slot)).collect();
    let second_wins = match inputs[..] {
        [a, b] => Some(cx.b.op(if cx.node().op() == "Max" { "Less" } else { "Greater" }, &[a, b], vec![])),
        _ => None,
    };
    for slot in (0..inputs.len()).filter(|slot| cx.wants(*slot)).collect::<Vec<_>>() {
        let part = match second_wins {
            Some(cond) if slot == 0 => select(cx, cond, zero, dy),
            Some(cond) => select(cx, cond, dy, zero),
            None => {
                let cond = cx.b.op("Equal", &[inputs[slot], y], vec![]);
                select(cx, cond, dy, zero)
            }
        };
        give_summed(cx, slot, part);
    }
    Ok(())
}

/// `dx = -dy`
fn neg_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let dy = cx.dy()?;
    let dx = cx.b.neg(dy);
    cx.give(0, dx);
    Ok(())
}

/// `dx = dy * sign(x)`
fn abs_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let x = cx.input(0);
    // CUDA has Sign from opset 13 on; before, the sign is (x > 0) - (x < 0).
    let sign = if cx.b.opset() >= 13 {
        cx.b.op("Sign", &[x], vec![])
    } else {
        let (zero, dtype) = (cx.scalar(0.0, x), cx.dtype(x));
        let [above, below] = ["Greater", "Less"].map(|op| cx.b.op(op, &[x, zero], vec![]));
        let (above, below) = (cx.b.cast(above, dtype), cx.b.cast(below, dtype));
        cx.b.sub(above, below)
    };
    give_slope(cx, sign)
}

/// `dx = dy * 0.5 / y`
fn sqrt_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let y = cx.output(0);
    let half = cx.scalar(0.5, y);
    let slope = cx.b.div(half, y);
    give_slope(cx, slope)
}

/// `dx = dy * y`
fn exp_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    give_slope(cx, cx.output(0))
}

/// `dx = dy / x`
fn log_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let dy = cx.dy()?;
    let dx = cx.b.div(dy, cx.input(0));
    cx.give(0, dx);
    Ok(())
}

/// `dx = -dy * y^2`
fn reciprocal_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let y = cx.output(0);
    let square = cx.b.mul(y, y);
    let slope = cx.b.neg(square);
    give_slope(cx, slope)
}

/// `dx = dy * exp(ln(2/sqrt(pi)) - x^2)`: the factor of the bell curve costs no pass of its own.
fn erf_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let slope = bell(cx, cx.input(0), std::f32::consts::FRAC_2_SQRT_PI.ln(), cx.input(0));
    give_slope(cx, slope)
}

/// `exp(shift - u^2)`; `like` is a forward value of the same element type.
pub(super) fn bell(cx: &mut GradCx<'_>, u: ValueId, shift: f32, like: ValueId) -> ValueId {
    let square = cx.b.mul(u, u);
    let shift = cx.scalar(shift, like);
    let exponent = cx.b.sub(shift, square);
    cx.b.op("Exp", &[exponent], vec![])
}

/// `dx = dy * cos(x)`
fn sin_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let slope = cx.b.op("Cos", &[cx.input(0)], vec![]);
    give_slope(cx, slope)
}

/// `dx = -dy * sin(x)`
fn cos_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let sin = cx.b.op("Sin", &[cx.input(0)], vec![]);
    let slope = cx.b.neg(sin);
    give_slope(cx, slope)
}
