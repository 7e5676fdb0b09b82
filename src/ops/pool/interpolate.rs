//! Gradient of any interpolation: Resize is linear in its input and separable, so `Y = H X W^T` and `dX = H^T dY W`.
//!
//! H and W are what the same Resize makes of an identity matrix, at the size of each axis; so every mode, coordinate rule and
//! rounding is the runtime's own. Example: 4 to 8 rows, H is [8, 4].

use super::{Stretch, resize_slots};
use crate::autodiff::GradCx;
use crate::graph::build::attr;
use crate::graph::{AttrValue, NewNode, Tensor, ValueId};

/// `dX` of `[N, C, H, W]`, where only the last two axes are resized.
pub(super) fn grad(cx: &mut GradCx<'_>, axes: &[Stretch]) -> Result<ValueId, String> {
    let resized: Vec<usize> = (0..axes.len()).filter(|a| !axes[*a].whole).collect();
    if axes.len() != 4 || resized.iter().any(|a| *a < 2) {
        return Err("only the last two of four axes may be resized".to_string());
    }
    let node = cx.node();
    let special = node.attr_str("coordinate_transformation_mode") == Some("tf_crop_and_resize")
        || node.attr_str("keep_aspect_ratio_policy").is_some_and(|p| p != "stretch");
    if special {
        return Err("cropping, and keeping the aspect ratio, have no gradient".to_string());
    }
    let mut dx = cx.dy()?;
    for axis in resized {
        let matrix = matrix(cx, axis, &axes[axis])?;
        dx = if axis == 2 {
            let columns = cx.b.transpose(matrix, &[1, 0]);
            cx.b.matmul(columns, dx)
        } else {
            cx.b.matmul(dx, matrix)
        };
    }
    Ok(dx)
}

/// The interpolation along one axis: [out, in].
fn matrix(cx: &mut GradCx<'_>, axis: usize, stretch: &Stretch) -> Result<ValueId, String> {
    let identity = identity(cx, axis);
    let (scales_at, sizes_at) = resize_slots(cx.opset());
    let by_scale = cx.node().input(scales_at).is_some_and(|v| cx.shape(v).first().is_none_or(|n| !n.is(0)));
    let (slot, target) = if by_scale {
        let scale = stretch.scale.ok_or("its scales are only known at run time")?;
        (scales_at, cx.b.constant(Tensor::f32(&[4], &[1.0, 1.0, scale as f32, 1.0])))
    } else {
        (sizes_at, sizes(cx, axis))
    };
    let mut inputs = vec![None; slot + 1];
    inputs[0] = Some(identity);
    inputs[slot] = Some(target);
    let own = ["axes", "keep_aspect_ratio_policy"];
    let attrs = cx.node().attrs().iter().filter(|a| !own.contains(&a.name.as_str())).cloned().collect();
    let out = cx.b.graph.add_value("grad.Resize");
    let name = format!("grad.Resize.{}", cx.b.graph.node_capacity());
    cx.b.graph.add_node(NewNode { name, op: "Resize".into(), inputs, outputs: vec![Some(out)], attrs, ..NewNode::default() });
    Ok(cx.b.squeeze(out, &[0, 1]))
}

/// `[1, 1, n, n]`
fn identity(cx: &mut GradCx<'_>, axis: usize) -> ValueId {
    let x = cx.input(0);
    if let Some(n) = cx.shape(x)[axis].size() {
        let mut values = vec![0f32; n * n];
        (0..n).for_each(|i| values[i * n + i] = 1.0);
        return cx.b.constant(Tensor::f32(&[1, 1, n, n], &values));
    }
    let (sizes, place) = (cx.b.shape_of(x), cx.b.constant(Tensor::i64_scalar(axis as i64)));
    let count = cx.b.gather(sizes, place, 0);
    let (zero, one) = (cx.b.constant(Tensor::i64_scalar(0)), cx.b.constant(Tensor::i64_scalar(1)));
    let rows = cx.b.op("Range", &[zero, count, one], vec![]);
    let off_on = cx.b.constant(Tensor::f32(&[2], &[0.0, 1.0]));
    let square = cx.b.op("OneHot", &[rows, count, off_on], vec![attr("axis", AttrValue::Int(-1))]);
    cx.b.unsqueeze(square, &[0, 1])
}

/// `(1, 1, out, in)`
fn sizes(cx: &mut GradCx<'_>, axis: usize) -> ValueId {
    let (x, y) = (cx.input(0), cx.output(0));
    let ones = cx.b.ints(&[1, 1]);
    let parts = [y, x].map(|v| match cx.shape(v)[axis].known() {
        Some(n) => cx.b.ints(&[n]),
        None => {
            let shape = cx.b.shape_of(v);
            cx.b.slice(shape, &[axis as i64], &[axis as i64 + 1], &[0])
        }
    });
    cx.b.concat(&[ones, parts[0], parts[1]], 0)
}
