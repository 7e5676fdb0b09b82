//! Who reads what a group cuts: a product with one weight, and the bias added behind it.

use crate::anatomy::{Anatomy, Group, Kind, Site};
use crate::fold::{self, Source};
use crate::graph::{DType, Graph, Node, Tensor, Use, ValueId};
use crate::infer::Facts;
use faer::Mat;

/// A bias behind a product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bias {
    /// Who reads it.
    pub at: Use,
    /// The constant.
    pub constant: ValueId,
    /// What multiplies the product, divided by what multiplies the bias (`alpha / beta` of a Gemm).
    pub scale: f64,
}

/// An operand that is contracted with one weight.
#[derive(Clone, Debug)]
pub struct Consumer {
    /// The groups whose units its features are, and the unit of each feature for each of them.
    pub groups: Vec<(String, Vec<Option<usize>>)>,
    /// The operand: who reads it, and its axes.
    pub site: Site,
    /// The weight.
    pub weight: Source,
    /// The bias, where there is one.
    pub bias: Option<Bias>,
}

/// Why a group has no consumer whose weight can be refitted. One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsumerError {
    /// The group.
    pub group: String,
    /// The reason.
    pub reason: String,
}

/// The consumers of all `mlp`, `vo`, `head` and `channel` groups, in the order of the graph, and what has none.
pub fn consumers(graph: &Graph, facts: &Facts, anatomy: &Anatomy) -> (Vec<Consumer>, Vec<ConsumerError>) {
    let (mut found, mut refused): (Vec<Consumer>, Vec<ConsumerError>) = (Vec::new(), Vec::new());
    for group in anatomy.groups.iter().filter(|g| matches!(g.kind, Kind::Mlp | Kind::Vo | Kind::Head | Kind::Channel)) {
        for site in &group.sites {
            match found.iter_mut().find(|c| c.site.at == site.at && c.site.axes == site.axes) {
                Some(known) => known.groups.push((group.id.clone(), site.index.clone())),
                None => match consumer(graph, facts, group, site) {
                    Ok(consumer) => found.push(consumer),
                    Err(reason) => refused.push(ConsumerError { group: group.id.clone(), reason }),
                },
            }
        }
    }
    let place = |c: &Consumer| graph.order().iter().position(|id| *id == c.site.at.node);
    found.sort_by_key(place);
    (found, refused)
}

fn consumer(graph: &Graph, facts: &Facts, group: &Group, site: &Site) -> Result<Consumer, String> {
    let weight = fold::weight_of_sink(graph, facts, site)?;
    let tensor = graph.constant(weight.constant).ok_or("the weight is missing")?;
    if !matches!(tensor.dtype, DType::F32 | DType::F16 | DType::BF16 | DType::F64) {
        return Err(format!("'{}' is {}", graph.value(weight.constant).name(), tensor.dtype.name()));
    }
    // A convolution's kernel meets the features at several places: its outputs are no linear function of one row.
    let inner = tensor.dims.iter().enumerate().filter(|(a, _)| !weight.axes.contains(a)).map(|(_, n)| *n);
    if graph.node(site.at.node).op() == "Conv" && inner.skip(1).any(|n| n != 1) {
        return Err("the weight is a kernel of more than one position".to_string());
    }
    let bias = bias_behind(graph, facts, site, outputs(&tensor, &weight));
    Ok(Consumer { groups: vec![(group.id.clone(), site.index.clone())], site: site.clone(), weight, bias })
}

/// Elements of the weight that one feature meets.
fn outputs(tensor: &Tensor, weight: &Source) -> usize {
    tensor.dims.iter().enumerate().filter(|(a, _)| !weight.axes.contains(a)).map(|(_, n)| *n).product()
}

/// The bias of the node itself, or of the Add behind it.
fn bias_behind(graph: &Graph, facts: &Facts, site: &Site, outputs: usize) -> Option<Bias> {
    let node = graph.node(site.at.node);
    let fits = |v: ValueId| {
        graph.is_constant(v)
            && facts
                .shape(v)
                .is_some_and(|s| s.last().is_some_and(|n| n.is(outputs as i64)) && s.iter().filter(|d| !d.is(1)).count() <= 1)
            && graph.constant(v).is_some_and(|t| t.dtype.is_float())
    };
    let of = |at: Use, scale: f64| {
        let constant = graph.node(at.node).input(at.slot).filter(|v| fits(*v))?;
        Some(Bias { at, constant, scale })
    };
    match node.op() {
        "Gemm" => {
            let (alpha, beta) = (attr(node, "alpha"), attr(node, "beta"));
            if beta == 0.0 { None } else { of(Use { node: site.at.node, slot: 2 }, alpha / beta) }
        }
        "Conv" => of(Use { node: site.at.node, slot: 2 }, 1.0),
        _ => {
            let product = node.output(0)?;
            let [user] = graph.value(product).users() else { return None };
            let is_added = graph.node(user.node).op() == "Add" && !graph.outputs().contains(&product);
            is_added.then(|| of(Use { node: user.node, slot: 1 - user.slot.min(1) }, 1.0)).flatten()
        }
    }
}

fn attr(node: &Node, name: &str) -> f64 {
    f64::from(node.attr_float(name).unwrap_or(1.0))
}

impl Consumer {
    /// Number of features.
    pub fn features(&self) -> usize {
        self.site.index.len()
    }

    /// The weight as a matrix `[features, outputs]`.
    pub fn matrix(&self, graph: &Graph) -> Option<Mat<f64>> {
        let tensor = graph.constant(self.weight.constant)?;
        let values = tensor.to_f32s()?;
        let mut w = Mat::zeros(self.features(), outputs(&tensor, &self.weight));
        self.each_element(&tensor, |flat, feature, output| w[(feature, output)] = f64::from(values[flat]));
        Some(w)
    }

    /// The bias, zeros where there is none.
    pub fn bias_values(&self, graph: &Graph, outputs: usize) -> Vec<f64> {
        let values = self.bias.and_then(|b| graph.constant(b.constant)).and_then(|t| t.to_f32s());
        values.map_or_else(|| vec![0.0; outputs], |v| v.into_iter().map(f64::from).collect())
    }

    /// The weight with the elements of a matrix `[features, outputs]`.
    pub fn tensor_of(&self, graph: &Graph, w: &Mat<f64>) -> Option<Tensor> {
        let tensor = graph.constant(self.weight.constant)?;
        let mut values = tensor.to_f32s()?;
        self.each_element(&tensor, |flat, feature, output| values[flat] = w[(feature, output)] as f32);
        Some(tensor.with_f32s(&values))
    }

    /// Calls `f` with flat position, feature and output of every element.
    fn each_element(&self, tensor: &Tensor, mut f: impl FnMut(usize, usize, usize)) {
        let dims = &tensor.dims;
        for flat in 0..tensor.element_count() {
            let (mut rest, mut feature, mut output) = (flat, (0, 1), (0, 1));
            for axis in (0..dims.len()).rev() {
                let at = rest % dims[axis];
                rest /= dims[axis];
                let (place, stride) = if self.weight.axes.contains(&axis) { &mut feature } else { &mut output };
                *place += at * *stride;
                *stride *= dims[axis];
            }
            if let Some(feature) = self.weight.units[feature.0] {
                f(flat, feature, output.0);
            }
        }
    }

    /// Which features stay where groups keep these units; groups that are not named stay whole.
    pub fn kept(&self, kept: &std::collections::BTreeMap<String, Vec<usize>>) -> Vec<bool> {
        let mut stays = vec![true; self.features()];
        for (id, index) in &self.groups {
            let Some(units) = kept.get(id) else { continue };
            for (stay, unit) in stays.iter_mut().zip(index) {
                *stay &= unit.is_none_or(|u| units.binary_search(&u).is_ok());
            }
        }
        stays
    }
}
