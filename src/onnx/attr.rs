//! `AttributeProto` to [`Attr`] and back.
//!
//! `extra` keeps what the value does not say: the doc string; `type: UNDEFINED` where the file gave no type; and, in `i`, that the
//! file left out a value because it is the type's default (writers of the proto3 schema do).

use bytes::Bytes;
use onnx_proto::{AttributeProto, GraphProto, attribute_type as kind};
use prost::Message;

use super::body::{param_count, set_fields};
use super::error::{Cause, shown};
use super::external::DataFiles;
use super::tensor::{self, Aside};
use crate::graph::{Attr, AttrValue, Subgraph};

fn kind_name(kind: i32) -> &'static str {
    const NAMES: [&str; 15] = [
        "nothing",
        "a float",
        "an int",
        "a string",
        "a tensor",
        "a graph",
        "floats",
        "ints",
        "strings",
        "tensors",
        "graphs",
        "a sparse tensor",
        "sparse tensors",
        "a type",
        "types",
    ];
    usize::try_from(kind).ok().and_then(|k| NAMES.get(k)).copied().unwrap_or("something unknown")
}

/// Decodes an attribute of the node that messages call `node`. Tensors in subgraphs must stand inside the model already.
pub(super) fn read(mut proto: AttributeProto, node: &str, files: &mut DataFiles) -> Result<Attr, Cause> {
    let name = proto.name.clone().unwrap_or_default();
    let bad = |reason: String| Cause::BadAttribute { node: node.to_string(), attribute: shown(&name), reason };
    if name.is_empty() {
        return Err(bad("has no name".into()));
    }
    if proto.ref_attr_name.as_deref().is_some_and(|r| !r.is_empty()) {
        return Err(bad("refers to an attribute of a function outside of one".into()));
    }
    let mut set = set_fields(&proto);
    let held = set.next();
    if let (Some(first), Some(second)) = (held, set.next()) {
        return Err(bad(format!("holds both {} and {}", kind_name(first), kind_name(second))));
    }
    drop(set);
    let declared = proto.r#type.filter(|t| *t != kind::UNDEFINED);
    let kind = match (declared, held) {
        (Some(d), Some(h)) if d != h => return Err(bad(format!("must be {}, holds {}", kind_name(d), kind_name(h)))),
        (Some(d), _) => d,
        (None, Some(h)) => h,
        (None, None) => return Err(bad("holds nothing".into())),
    };
    let mut extra = AttributeProto { doc_string: proto.doc_string.take(), ..Default::default() };
    if declared.is_none() {
        extra.r#type = Some(kind::UNDEFINED);
    }
    if held.is_none() {
        extra.i = Some(0);
    }
    let value = match kind {
        kind::FLOAT => AttrValue::Float(proto.f.unwrap_or_default()),
        kind::INT => AttrValue::Int(proto.i.unwrap_or_default()),
        kind::STRING => AttrValue::Str(proto.s.unwrap_or_default()),
        kind::FLOATS => AttrValue::Floats(proto.floats),
        kind::INTS => AttrValue::Ints(proto.ints),
        kind::STRINGS => AttrValue::Strs(proto.strings),
        kind::TENSOR => {
            let what = format!("tensor '{}' of node {node}", shown(&name));
            let tensor = *proto.t.ok_or_else(|| bad("holds no tensor".into()))?;
            AttrValue::Tensor(tensor::read(tensor, &what, true, files)?)
        }
        kind::GRAPH => AttrValue::Graph(subgraph(&*proto.g.ok_or_else(|| bad("holds no graph".into()))?)),
        kind::GRAPHS => AttrValue::Graphs(proto.graphs.iter().map(subgraph).collect()),
        kind::TENSORS | kind::SPARSE_TENSOR | kind::SPARSE_TENSORS | kind::TYPE_PROTO | kind::TYPE_PROTOS => {
            proto.doc_string = extra.doc_string.take();
            return Ok(Attr { name, value: AttrValue::Other(proto.encode_to_vec().into()), extra: Bytes::new() });
        }
        other => return Err(bad(format!("has type {other}, which is unknown"))),
    };
    Ok(Attr { name, value, extra: extra.encode_to_vec().into() })
}

fn subgraph(body: &GraphProto) -> Subgraph {
    Subgraph { encoded: body.encode_to_vec().into(), param_count: param_count(body) }
}

/// Encodes an attribute.
pub(super) fn write(attr: &Attr, aside: Option<&mut Aside>) -> Result<AttributeProto, Cause> {
    let broken = |_| Cause::Internal { what: "an attribute does not decode" };
    if let AttrValue::Other(encoded) = &attr.value {
        return AttributeProto::decode(encoded.clone()).map_err(broken);
    }
    let mut proto = AttributeProto::decode(attr.extra.clone()).map_err(broken)?;
    let left_out = proto.i.take().is_some();
    let untyped = proto.r#type.take().is_some();
    proto.name = Some(attr.name.clone());
    let kind = match &attr.value {
        AttrValue::Float(v) => {
            proto.f = Some(*v).filter(|v| !(left_out && v.to_bits() == 0));
            kind::FLOAT
        }
        AttrValue::Int(v) => {
            proto.i = Some(*v).filter(|v| !(left_out && *v == 0));
            kind::INT
        }
        AttrValue::Str(v) => {
            proto.s = Some(v.clone()).filter(|v| !(left_out && v.is_empty()));
            kind::STRING
        }
        AttrValue::Tensor(v) => {
            proto.t = Some(Box::new(tensor::write(v, None, aside)?));
            kind::TENSOR
        }
        AttrValue::Floats(v) => {
            proto.floats.clone_from(v);
            kind::FLOATS
        }
        AttrValue::Ints(v) => {
            proto.ints.clone_from(v);
            kind::INTS
        }
        AttrValue::Strs(v) => {
            proto.strings.clone_from(v);
            kind::STRINGS
        }
        AttrValue::Graph(v) => {
            proto.g = Some(Box::new(GraphProto::decode(v.encoded.clone()).map_err(broken)?));
            kind::GRAPH
        }
        AttrValue::Graphs(v) => {
            let bodies = v.iter().map(|b| GraphProto::decode(b.encoded.clone()).map_err(broken));
            proto.graphs = bodies.collect::<Result<_, _>>()?;
            kind::GRAPHS
        }
        AttrValue::Other(_) => kind::UNDEFINED,
    };
    let says_nothing = set_fields(&proto).next().is_none();
    proto.r#type = (!untyped || says_nothing).then_some(kind);
    Ok(proto)
}

/// Whether two attributes are equal, NaNs of equal bits included.
pub(super) fn same(a: &Attr, b: &Attr) -> bool {
    let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    a.name == b.name
        && a.extra == b.extra
        && match (&a.value, &b.value) {
            (AttrValue::Float(x), AttrValue::Float(y)) => x.to_bits() == y.to_bits(),
            (AttrValue::Floats(x), AttrValue::Floats(y)) => bits(x) == bits(y),
            (x, y) => x == y,
        }
}
