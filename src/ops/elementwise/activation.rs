//! Activations: smooth and piecewise linear functions of one input, most of them with parameters in attributes.

use super::arithmetic::bell;
use super::{first_axes, give_slope, is_positive, numeric, one_minus, scaled, select, shifted};
use crate::autodiff::GradCx;
use crate::graph::ValueId;
use crate::ops::{Axes, Grad, OpRule};

/// The records of this family.
pub static RULES: &[OpRule] = &[
    numeric("Tanh", 11, Grad::Rule(tanh_grad)),
    numeric("Sigmoid", 11, Grad::Rule(sigmoid_grad)),
    numeric("Relu", 11, Grad::Rule(relu_grad)),
    numeric("LeakyRelu", 11, Grad::Rule(leaky_relu_grad)),
    numeric("PRelu", 11, Grad::Rule(prelu_grad)),
    numeric("Elu", 11, Grad::Rule(elu_grad)),
    numeric("HardSigmoid", 11, Grad::Rule(hard_sigmoid_grad)),
    numeric("HardSwish", 14, Grad::Rule(hard_swish_grad)),
    numeric("Softplus", 11, Grad::Rule(softplus_grad)),
    numeric("Mish", 18, Grad::Rule(mish_grad)),
    numeric("Gelu", 20, Grad::Rule(gelu_grad)),
    numeric("Swish", 24, Grad::Rule(swish_grad)),
    OpRule { axes: Axes::Rule(first_axes), ..numeric("Clip", 11, Grad::Rule(clip_grad)) },
];

/// `dx = dy * (1 - y^2)`
fn tanh_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let y = cx.output(0);
    let square = cx.b.mul(y, y);
    let slope = one_minus(cx, square, y);
    give_slope(cx, slope)
}

/// `dx = dy * y * (1 - y)`
fn sigmoid_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let y = cx.output(0);
    let rest = one_minus(cx, y, y);
    let slope = cx.b.mul(y, rest);
    give_slope(cx, slope)
}

/// `dx = dy * sign(y)`: `y` is never negative, so this is the mask.
fn relu_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let mask = cx.b.op("Sign", &[cx.output(0)], vec![]);
    give_slope(cx, mask)
}

/// `dx = x > 0 ? dy : alpha * dy`
fn leaky_relu_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x) = (cx.dy()?, cx.input(0));
    let positive = is_positive(cx, x);
    let small = scaled(cx, dy, cx.node().attr_float("alpha").unwrap_or(0.01), x);
    let dx = select(cx, positive, dy, small);
    cx.give(0, dx);
    Ok(())
}

/// `dx = x > 0 ? dy : slope * dy`, `dslope = dy * min(x, 0)`
fn prelu_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x) = (cx.dy()?, cx.input(0));
    if cx.wants(0) {
        let positive = is_positive(cx, x);
        let small = cx.b.mul(dy, cx.input(1));
        let dx = select(cx, positive, dy, small);
        cx.give(0, dx);
    }
    if cx.wants(1) {
        let zero = cx.scalar(0.0, x);
        let negative = cx.b.op("Min", &[x, zero], vec![]);
        let product = cx.b.mul(dy, negative);
        let dslope = cx.sum_to(product, 1);
        cx.give(1, dslope);
    }
    Ok(())
}

/// `dx = dy * (x > 0 ? 1 : y + alpha)`
fn elu_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (x, y) = (cx.input(0), cx.output(0));
    let positive = is_positive(cx, x);
    let raised = shifted(cx, y, cx.node().attr_float("alpha").unwrap_or(1.0), x);
    let one = cx.scalar(1.0, x);
    let slope = select(cx, positive, one, raised);
    give_slope(cx, slope)
}

/// `dx = dy * alpha * sign(y * (1 - y))`: the sign is 1 between the bends and 0 outside.
fn hard_sigmoid_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let y = cx.output(0);
    let rest = one_minus(cx, y, y);
    let inside = cx.b.mul(y, rest);
    let mask = cx.b.op("Sign", &[inside], vec![]);
    let slope = scaled(cx, mask, cx.node().attr_float("alpha").unwrap_or(0.2), y);
    give_slope(cx, slope)
}

/// `dx = dy * (|x| < 3 ? x/3 + 1/2 : (x > 0 ? 1 : 0))`
fn hard_swish_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let x = cx.input(0);
    let (zero, three) = (cx.scalar(0.0, x), cx.scalar(3.0, x));
    let size = cx.b.op("Abs", &[x], vec![]);
    let inside = cx.b.op("Less", &[size, three], vec![]);
    let third = scaled(cx, x, 1.0 / 3.0, x);
    let middle = shifted(cx, third, 0.5, x);
    let sign = cx.b.op("Sign", &[x], vec![]);
    let outside = cx.b.op("Max", &[sign, zero], vec![]);
    let slope = select(cx, inside, middle, outside);
    give_slope(cx, slope)
}

/// `dx = dy * sigmoid(x)`
fn softplus_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let slope = cx.b.op("Sigmoid", &[cx.input(0)], vec![]);
    give_slope(cx, slope)
}

/// `dx = dy * (t + x * (1 - t^2) * (1 - m))` with `m = sigmoid(-x)` and `t = tanh(softplus(x)) = (1 - m^2) / (1 + m^2)`,
/// a form that never overflows.
fn mish_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let x = cx.input(0);
    let minus = cx.b.neg(x);
    let m = cx.b.op("Sigmoid", &[minus], vec![]);
    let square = cx.b.mul(m, m);
    let (above, below) = (one_minus(cx, square, x), shifted(cx, square, 1.0, x));
    let t = cx.b.div(above, below);
    let t_square = cx.b.mul(t, t);
    let (steep, share) = (one_minus(cx, t_square, x), one_minus(cx, m, x));
    let product = cx.b.mul(steep, share);
    let product = cx.b.mul(product, x);
    let slope = cx.b.add(t, product);
    give_slope(cx, slope)
}

/// By the `approximate` attribute.
fn gelu_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    match cx.node().attr_str("approximate").unwrap_or("none") {
        "none" => gelu_exact_grad(cx),
        "tanh" => gelu_tanh_grad(cx),
        other => Err(format!("approximation '{other}' of Gelu is not known")),
    }
}

/// `dx = dy/2 * (1 + erf(u) + u * exp(ln(2/sqrt(pi)) - u^2))` with `u = x / sqrt(2)`
fn gelu_exact_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (dy, x) = (cx.dy()?, cx.input(0));
    let u = scaled(cx, x, std::f32::consts::FRAC_1_SQRT_2, x);
    let erf = cx.b.op("Erf", &[u], vec![]);
    let raised = shifted(cx, erf, 1.0, x);
    let bell = bell(cx, u, std::f32::consts::FRAC_2_SQRT_PI.ln(), x);
    let product = cx.b.mul(u, bell);
    let sum = cx.b.add(raised, product);
    let half = scaled(cx, dy, 0.5, x);
    let dx = cx.b.mul(half, sum);
    cx.give(0, dx);
    Ok(())
}

/// `y = x * s` with `s = sigmoid(x * (2k + 2ka * x^2))`, `k = sqrt(2/pi)`, `a = 0.044715`:
/// `dx = dy * (s + y * (1 - s) * (2k + 6ka * x^2))`
fn gelu_tanh_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (x, y) = (cx.input(0), cx.output(0));
    let k = (2.0 / std::f32::consts::PI).sqrt();
    let cubic = 0.044_715;
    let square = cx.b.mul(x, x);
    let polynomial = |cx: &mut GradCx<'_>, factor: f32| {
        let product = scaled(cx, square, factor * k * cubic, x);
        shifted(cx, product, 2.0 * k, x)
    };
    let (inner, slope_of_inner) = (polynomial(cx, 2.0), polynomial(cx, 6.0));
    let z = cx.b.mul(x, inner);
    let s = cx.b.op("Sigmoid", &[z], vec![]);
    give_gated_slope(cx, s, y, slope_of_inner)
}

/// `dx = dy * (s + y * (1 - s) * dz)` for `y = x * s`, `s = sigmoid(z)`, `dz` the slope of `z`.
fn give_gated_slope(cx: &mut GradCx<'_>, s: ValueId, y: ValueId, dz: ValueId) -> Result<(), String> {
    let rest = one_minus(cx, s, y);
    let product = cx.b.mul(y, rest);
    let product = cx.b.mul(product, dz);
    let slope = cx.b.add(s, product);
    give_slope(cx, slope)
}

/// `y = x * s`, `s = sigmoid(alpha * x)`: `dx = dy * (s + y * (1 - s) * alpha)`
fn swish_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    let (x, y) = (cx.input(0), cx.output(0));
    let alpha = cx.node().attr_float("alpha").unwrap_or(1.0);
    let z = if alpha == 1.0 { x } else { scaled(cx, x, alpha, x) };
    let s = cx.b.op("Sigmoid", &[z], vec![]);
    let dz = cx.scalar(alpha, x);
    give_gated_slope(cx, s, y, dz)
}

/// `dx = dy where y = x`: whatever bounds there are, they did not bite.
fn clip_grad(cx: &mut GradCx<'_>) -> Result<(), String> {
    if cx.wants(1) || cx.wants(2) {
        return Err("the gradient towards the bounds of Clip is not written".to_string());
    }
    let (dy, x, y) = (cx.dy()?, cx.input(0), cx.output(0));
    let inside = cx.b.op("Equal", &[x, y], vec![]);
    let zero = cx.scalar(0.0, x);
    let dx = select(cx, inside, dy, zero);
    cx.give(0, dx);
    Ok(())
}
