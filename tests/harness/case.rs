//! Cases of tests/fixtures/ops/*.json: one operator, its inputs, and what to check.

use crate::harness::{Random, array_of};
use serde_json::Value as Json;
use vitrim::autodiff::interface::declare;
use vitrim::data::array::Array;
use vitrim::graph::build::attr;
use vitrim::graph::{AttrValue, DType, DeclaredDim, Graph, Id, NewNode, Tensor, ValueId};

/// One line of a fixture file.
pub(crate) struct Case {
    pub(crate) label: String,
    pub(crate) op: String,
    pub(crate) domain: String,
    opset: i64,
    attrs: Vec<(String, AttrValue)>,
    /// Name, content, and whether it is a constant; `None` where the input is left out.
    pub(crate) inputs: Vec<Option<Input>>,
    output_count: usize,
    /// Of the outputs, how many are the graph's; the others are unread.
    shown: usize,
    checks: Vec<String>,
    /// Shapes of the outputs, where the operator has no kernel that could be run.
    pub(crate) shapes: Option<Vec<Vec<usize>>>,
}

/// One input of a case.
pub(crate) struct Input {
    pub(crate) name: String,
    pub(crate) tensor: Tensor,
    pub(crate) constant: bool,
}

/// The first axis of the first input is a symbol, or all sizes are numbers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Batch {
    Fixed,
    Symbol,
}

impl Case {
    /// Reads one object.
    pub(crate) fn read(file: &str, number: usize, json: &Json) -> Result<Self, String> {
        let text = |key: &str| json[key].as_str().unwrap_or_default().to_string();
        let mut random = Random(number as u64 + 1);
        let inputs = json["inputs"].as_array().ok_or("no inputs")?;
        let inputs = inputs.iter().map(|i| if i.is_null() { Ok(None) } else { input(i, &mut random).map(Some) });
        let attrs = json["attrs"].as_object().into_iter().flatten().map(|(k, v)| Ok((k.clone(), attribute(v)?)));
        let checks = json["check"].as_array().into_iter().flatten().filter_map(|c| c.as_str().map(str::to_string));
        let output_count = json["outputs"].as_u64().unwrap_or(1) as usize;
        Ok(Self {
            label: format!("{file}[{number}] {}", text("op")),
            op: text("op"),
            domain: text("domain"),
            opset: json["opset"].as_i64().ok_or("no opset")?,
            attrs: attrs.collect::<Result<_, String>>()?,
            inputs: inputs.collect::<Result<_, String>>()?,
            output_count,
            shown: json["shown"].as_u64().map_or(output_count, |n| n as usize),
            shapes: json["shapes"].as_array().map(|list| list.iter().map(sizes).collect()),
            checks: checks.collect(),
        })
    }

    /// Whether the fixture asks for a check.
    pub(crate) fn asks(&self, check: &str) -> bool {
        self.checks.iter().any(|c| c == check)
    }

    /// The graph of one node; its outputs are the graph's, called `y0`, `y1`.
    pub(crate) fn graph(&self, batch: Batch) -> Graph {
        let mut opsets = vec![(String::new(), if self.domain.is_empty() { self.opset } else { self.opset.max(17) })];
        if !self.domain.is_empty() {
            opsets.push((self.domain.clone(), 1));
        }
        let ir_version = if opsets[0].1 > 20 { 11 } else { 8 };
        let mut graph = Graph::new(ir_version, opsets, Default::default());
        let mut inputs = Vec::new();
        for (number, input) in self.inputs.iter().enumerate() {
            inputs.push(input.as_ref().map(|i| add_input(&mut graph, i, batch == Batch::Symbol && number == 0)));
        }
        let outputs: Vec<ValueId> = (0..self.output_count).map(|n| graph.add_value(&format!("y{n}"))).collect();
        graph.add_node(NewNode {
            name: "node".into(),
            op: self.op.clone(),
            domain: self.domain.clone(),
            inputs,
            outputs: outputs.iter().copied().map(Some).collect(),
            attrs: self.attrs.iter().map(|(name, value)| attr(name, value.clone())).collect(),
            ..NewNode::default()
        });
        for y in outputs.into_iter().take(self.shown) {
            let nothing = vitrim::graph::Declared { dtype: None, dims: None, extra: Default::default() };
            graph.add_output(y, nothing);
        }
        graph
    }

    /// What is fed: inputs that are not constants.
    pub(crate) fn feeds(&self) -> Vec<(String, Array)> {
        let fed = self.inputs.iter().flatten().filter(|i| !i.constant);
        fed.map(|i| (i.name.clone(), array_of(&i.tensor).expect("inputs have types that the engines take"))).collect()
    }
}

fn add_input(graph: &mut Graph, input: &Input, symbol: bool) -> ValueId {
    if input.constant {
        return graph.add_initializer(&input.name, input.tensor.clone());
    }
    let id = graph.add_value(&input.name);
    let mut dims: Vec<DeclaredDim> = input.tensor.dims.iter().map(|d| DeclaredDim::Size(*d as i64)).collect();
    if let (true, Some(first)) = (symbol, dims.first_mut()) {
        *first = DeclaredDim::Symbol("batch".into());
    }
    graph.add_input(id, declare(input.tensor.dtype, dims));
    assert!(id.index() < graph.value_count());
    id
}

fn dtype(name: &str) -> Result<DType, String> {
    (1..=26).filter_map(DType::from_onnx).find(|d| d.name() == name).ok_or_else(|| format!("unknown dtype '{name}'"))
}

fn sizes(json: &Json) -> Vec<usize> {
    json.as_array().into_iter().flatten().filter_map(|d| d.as_u64().map(|d| d as usize)).collect()
}

fn number(json: &Json) -> f64 {
    match json {
        Json::Bool(b) => f64::from(u8::from(*b)),
        Json::String(s) => s.parse().unwrap_or(f64::NAN),
        other => other.as_f64().unwrap_or(f64::NAN),
    }
}

fn input(json: &Json, random: &mut Random) -> Result<Input, String> {
    let name = json["name"].as_str().ok_or("an input without name")?.to_string();
    let dtype = dtype(json["dtype"].as_str().unwrap_or("float32"))?;
    let dims = sizes(&json["shape"]);
    let count: usize = dims.iter().product();
    let tensor = if json["values"].is_array() {
        tensor(dtype, dims, &json["values"])?
    } else {
        let (low, high) = (json["low"].as_f64().unwrap_or(-1.0), json["high"].as_f64().unwrap_or(1.0));
        let draw = |random: &mut Random| match dtype {
            DType::Bool => f64::from(u8::from(random.bits() & 1 == 1)),
            d if d.is_float() => random.uniform(low, high),
            _ => random.uniform(low, high + 1.0).floor().min(high),
        };
        let values: Vec<f64> = (0..count).map(|_| draw(random)).collect();
        of_values(dtype, dims, &values)?
    };
    Ok(Input { name, tensor, constant: json["constant"].as_bool().unwrap_or(false) })
}

fn tensor(dtype: DType, dims: Vec<usize>, values: &Json) -> Result<Tensor, String> {
    let values: Vec<f64> = values.as_array().into_iter().flatten().map(number).collect();
    of_values(dtype, dims, &values)
}

fn of_values(dtype: DType, dims: Vec<usize>, values: &[f64]) -> Result<Tensor, String> {
    if dims.iter().product::<usize>() != values.len() {
        return Err(format!("{} values for shape {dims:?}", values.len()));
    }
    let bytes: Vec<u8> = match dtype {
        d if d.is_float() => {
            let floats: Vec<f32> = values.iter().map(|v| *v as f32).collect();
            return Ok(Tensor::new(dtype, dims, Default::default()).with_f32s(&floats));
        }
        DType::I64 => values.iter().flat_map(|v| (*v as i64).to_le_bytes()).collect(),
        DType::I32 => values.iter().flat_map(|v| (*v as i32).to_le_bytes()).collect(),
        DType::U8 | DType::Bool => values.iter().map(|v| *v as u8).collect(),
        DType::I8 => values.iter().flat_map(|v| (*v as i8).to_le_bytes()).collect(),
        other => return Err(format!("no values of type {}", other.name())),
    };
    Ok(Tensor::new(dtype, dims, bytes.into()))
}

fn attribute(json: &Json) -> Result<AttrValue, String> {
    let (kind, value) = json.as_object().and_then(|o| o.iter().next()).ok_or("an empty attribute")?;
    let list = || value.as_array().into_iter().flatten();
    Ok(match kind.as_str() {
        "i" => AttrValue::Int(value.as_i64().ok_or("not an integer")?),
        "f" => AttrValue::Float(number(value) as f32),
        "s" => AttrValue::Str(value.as_str().ok_or("not a string")?.as_bytes().to_vec().into()),
        "is" => AttrValue::Ints(list().filter_map(Json::as_i64).collect()),
        "fs" => AttrValue::Floats(list().map(|v| number(v) as f32).collect()),
        "ss" => AttrValue::Strs(list().filter_map(Json::as_str).map(|s| s.as_bytes().to_vec().into()).collect()),
        "t" => {
            let dims = sizes(if value["dims"].is_array() { &value["dims"] } else { &value["shape"] });
            AttrValue::Tensor(tensor(dtype(value["dtype"].as_str().unwrap_or_default())?, dims, &value["values"])?)
        }
        other => return Err(format!("unknown attribute kind '{other}'")),
    })
}
