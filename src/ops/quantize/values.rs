//! Quantized constants as numbers: which scale and which zero point an element has.
//!
//! Example: of an int8 weight `[48, 192]` with scales `[192]` on axis 1, element 200 (row 1, column 8) has scale 8.

use super::{Part, parameter_axis, part_at};
use crate::graph::{Graph, Tensor, Use, ValueId};

/// Scales or zero points of a constant.
#[derive(Clone, Debug)]
pub struct Spread {
    /// The scales or zero points.
    pub values: Tensor,
    /// Sizes of the constant.
    dims: Vec<usize>,
    /// Positions of each axis of the constant to one of `values`; 0 where one stands for all.
    step: Vec<usize>,
}

impl Spread {
    fn of(graph: &Graph, at: Use, slot: usize, dims: &[usize]) -> Option<Self> {
        let node = graph.node(at.node);
        let values = graph.constant(node.input(slot)?)?;
        let step = match values.element_count() {
            1 => vec![0; dims.len()],
            _ if values.dims.len() == dims.len() => {
                let block = node.attr_int("block_size").and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0)?;
                let step = |(d, z): (&usize, &usize)| {
                    if *z == 1 {
                        0
                    } else if z == d {
                        1
                    } else {
                        block
                    }
                };
                dims.iter().zip(&values.dims).map(step).collect()
            }
            n => {
                let axis = parameter_axis(node, at.slot, dims).filter(|axis| dims[*axis] == n)?;
                (0..dims.len()).map(|a| usize::from(a == axis)).collect()
            }
        };
        Some(Self { values, dims: dims.to_vec(), step })
    }

    /// Number of the scale or zero point of an element.
    pub fn index(&self, element: usize) -> usize {
        let (mut rest, mut index, mut stride) = (element, 0, 1);
        for axis in (0..self.dims.len()).rev() {
            let position = rest % self.dims[axis];
            rest /= self.dims[axis];
            if let Some(at) = position.checked_div(self.step[axis]) {
                index += at * stride;
                stride *= self.dims[axis].div_ceil(self.step[axis]);
            }
        }
        index
    }
}

fn readers(graph: &Graph, v: ValueId) -> Vec<(Use, Option<Part>)> {
    let part = |at: &Use| {
        let node = graph.node(at.node);
        (*at, part_at(node.domain(), node.op(), at.slot))
    };
    graph.value(v).users().iter().map(part).collect()
}

/// Whether a constant is nothing but scales or zero points.
pub fn is_parameter(graph: &Graph, v: ValueId) -> bool {
    let readers = readers(graph, v);
    !readers.is_empty() && readers.iter().all(|(_, part)| *part == Some(Part::Parameter))
}

/// The zero points of a quantized constant, where they are constants; `None` where it is not quantized, or zero stands for 0.
pub fn zero_point(graph: &Graph, v: ValueId) -> Option<Spread> {
    let tensor = graph.constant(v)?;
    readers(graph, v).into_iter().find_map(|(at, part)| match part {
        Some(Part::Data { zero_point, .. }) => Spread::of(graph, at, zero_point, &tensor.dims),
        _ => None,
    })
}

/// A constant as the floats that it stands for: `(q - zero point) * scale`, scale 1 where its reader has none. `None` for scales and
/// zero points themselves, and for what is no number.
pub fn floats(graph: &Graph, v: ValueId) -> Option<Vec<f32>> {
    let tensor = graph.constant(v).filter(|_| !is_parameter(graph, v))?;
    let data = readers(graph, v).into_iter().find_map(|(at, part)| match part {
        Some(Part::Data { scale, .. }) => Some((at, scale)),
        _ => None,
    });
    let Some((at, scale)) = data else { return tensor.to_f32s() };
    let ints = tensor.to_i64s()?;
    let scale = scale.and_then(|slot| Spread::of(graph, at, slot, &tensor.dims));
    let scale = scale.and_then(|s| Some((s.values.to_f32s()?, s)));
    let zero = zero_point(graph, v).and_then(|z| Some((z.values.to_i64s()?, z)));
    let float = |(n, q): (usize, i64)| {
        let zero = zero.as_ref().map_or(0, |(values, z)| values[z.index(n)]);
        let scale = scale.as_ref().map_or(1.0, |(values, s)| values[s.index(n)]);
        (q - zero) as f32 * scale
    };
    Some(ints.into_iter().enumerate().map(float).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::build::attr;
    use crate::graph::{AttrValue, DType};
    use bytes::Bytes;

    fn dequantized(dims: &[usize], scale: Tensor, zero: &[i8], attrs: Vec<crate::graph::Attr>) -> (Graph, ValueId) {
        let mut graph = Graph::new(10, vec![(String::new(), 21)], Bytes::new());
        let ints: Vec<u8> = (0..dims.iter().product::<usize>()).map(|v| v as u8).collect();
        let q = graph.add_initializer("q", Tensor::new(DType::I8, dims.to_vec(), ints.into()));
        let zeros: Vec<u8> = zero.iter().map(|z| z.to_le_bytes()[0]).collect();
        let zero = Tensor::new(DType::I8, scale.dims.clone(), zeros.into());
        let (s, z) = (graph.add_initializer("s", scale), graph.add_initializer("z", zero));
        graph.add_op("DequantizeLinear", &[q, s, z], attrs, "x");
        (graph, q)
    }

    #[test]
    fn scales_and_zero_points_follow_their_axis_or_blocks() {
        let axis = |axis| attr("axis", AttrValue::Int(axis));
        let (graph, q) = dequantized(&[2, 3], Tensor::f32(&[3], &[1., 2., 3.]), &[0, 1, 2], vec![axis(1)]);
        assert_eq!(floats(&graph, q), Some(vec![0., 0., 0., 3., 6., 9.]));
        let blocks = vec![axis(0), attr("block_size", AttrValue::Int(2))];
        let (graph, q) = dequantized(&[3, 1], Tensor::f32(&[2, 1], &[1., 10.]), &[0, 1], blocks);
        assert_eq!(floats(&graph, q), Some(vec![0., 1., 10.]));
        let scale = graph.find("s").expect("made above");
        assert!(is_parameter(&graph, scale) && !is_parameter(&graph, q));
        assert_eq!(floats(&graph, scale), None);
    }
}
