//! Encoding a model as a list of pieces, in which large tensors are the elements that the graph already shares: nothing of them is copied,
//! or gathered, before it is written.
//!
//! Invariant: the pieces one after the other are what prost's `encode` gives (the test compares them).

use super::tensor::Late;
use crate::graph::Elements;
use bytes::{BufMut, Bytes};
use onnx_proto::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};

/// Unit: bytes. Smaller ones are copied into the piece before them.
const LARGE: usize = 4096;

/// An encoded message.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    list: Vec<Elements>,
    /// What is not in the list yet.
    tail: Vec<u8>,
    len: usize,
}

impl Pieces {
    /// Unit: bytes of all pieces.
    pub(super) fn len(&self) -> usize {
        self.len + self.tail.len()
    }

    /// The pieces in order.
    pub(super) fn into_list(mut self) -> Vec<Elements> {
        self.cut();
        self.list
    }

    /// One piece of all.
    pub(super) fn into_bytes(self) -> Bytes {
        let mut all = Vec::with_capacity(self.len());
        self.into_list().iter().for_each(|piece| all.put_slice(piece));
        all.into()
    }

    /// Ends the piece that is being written.
    fn cut(&mut self) {
        if !self.tail.is_empty() {
            self.len += self.tail.len();
            self.list.push(std::mem::take(&mut self.tail).into());
        }
    }

    fn message(&mut self, message: &impl Message) {
        message.encode_raw(&mut self.tail);
    }

    fn bytes(&mut self, bytes: Elements) {
        if bytes.len() < LARGE {
            self.tail.put_slice(&bytes);
        } else {
            self.cut();
            self.len += bytes.len();
            self.list.push(bytes);
        }
    }

    /// A field whose content has this length, which follows.
    fn field(&mut self, tag: u32, len: usize) {
        encode_key(tag, WireType::LengthDelimited, &mut self.tail);
        encode_varint(u64::try_from(len).unwrap_or(u64::MAX), &mut self.tail);
    }

    fn nested(&mut self, tag: u32, inner: Self) {
        self.field(tag, inner.len());
        inner.into_list().into_iter().for_each(|piece| self.bytes(piece));
    }
}

/// Encodes a model. Each message is its fields before the one that may be large, that field, and the rest, as protobuf's order of
/// fields has them.
pub(super) fn model(mut m: ModelProto, late: &Late) -> Pieces {
    let graph = m.graph.take();
    let before = ModelProto {
        ir_version: m.ir_version.take(),
        producer_name: m.producer_name.take(),
        producer_version: m.producer_version.take(),
        domain: m.domain.take(),
        model_version: m.model_version.take(),
        doc_string: m.doc_string.take(),
        ..ModelProto::default()
    };
    let mut out = Pieces::default();
    out.message(&before);
    if let Some(g) = graph {
        out.nested(7, self::graph(g, late));
    }
    out.message(&m);
    out
}

fn graph(mut g: GraphProto, late: &Late) -> Pieces {
    let mut out = Pieces::default();
    for n in std::mem::take(&mut g.node) {
        out.nested(1, node(n, late));
    }
    out.message(&GraphProto { name: g.name.take(), ..GraphProto::default() });
    for t in std::mem::take(&mut g.initializer) {
        out.nested(5, tensor(t, late));
    }
    out.message(&g);
    out
}

fn node(mut n: NodeProto, late: &Late) -> Pieces {
    let attributes = std::mem::take(&mut n.attribute);
    let before = NodeProto {
        input: std::mem::take(&mut n.input),
        output: std::mem::take(&mut n.output),
        name: n.name.take(),
        op_type: n.op_type.take(),
        ..NodeProto::default()
    };
    let mut out = Pieces::default();
    out.message(&before);
    for a in attributes {
        out.nested(5, attribute(a, late));
    }
    out.message(&n);
    out
}

fn attribute(mut a: AttributeProto, late: &Late) -> Pieces {
    let held = a.t.take();
    let before = AttributeProto { name: a.name.take(), f: a.f.take(), i: a.i.take(), s: a.s.take(), ..AttributeProto::default() };
    let mut out = Pieces::default();
    out.message(&before);
    if let Some(t) = held {
        out.nested(5, tensor(*t, late));
    }
    out.message(&a);
    out
}

fn tensor(mut t: TensorProto, late: &Late) -> Pieces {
    let raw = t.raw_data.take().map(|raw| late.elements(raw));
    let before = TensorProto {
        dims: std::mem::take(&mut t.dims),
        data_type: t.data_type.take(),
        segment: t.segment.take(),
        float_data: std::mem::take(&mut t.float_data),
        int32_data: std::mem::take(&mut t.int32_data),
        string_data: std::mem::take(&mut t.string_data),
        int64_data: std::mem::take(&mut t.int64_data),
        name: t.name.take(),
        ..TensorProto::default()
    };
    let mut out = Pieces::default();
    out.message(&before);
    if let Some(raw) = raw {
        out.field(9, raw.len());
        out.bytes(raw);
    }
    out.message(&t);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn same(m: &ModelProto) {
        let pieces = model(m.clone(), &Late::default());
        assert_eq!(pieces.len(), m.encoded_len());
        assert_eq!(pieces.into_bytes(), Bytes::from(m.encode_to_vec()));
    }

    #[test]
    fn pieces_are_what_prost_encodes() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        for file in ["exported", "external", "functions", "kinds"] {
            let path = folder.join(format!("tests/fixtures/onnx/{file}.onnx"));
            same(&ModelProto::decode(Bytes::from(std::fs::read(path).unwrap())).unwrap());
        }
        same(&ModelProto::decode(Bytes::from(std::fs::read(folder.join("models/digits/vit-digits.onnx")).unwrap())).unwrap());
    }

    #[test]
    fn large_bytes_are_shared_wherever_they_stand() {
        let raw = Bytes::from(vec![7; LARGE]);
        let t = TensorProto {
            name: Some("w".into()),
            raw_data: Some(raw.clone()),
            doc_string: Some("d".into()),
            double_data: vec![1.0],
            ..TensorProto::default()
        };
        let a =
            AttributeProto { name: Some("value".into()), t: Some(Box::new(t.clone())), r#type: Some(4), ..Default::default() };
        let n = NodeProto { output: vec!["y".into()], attribute: vec![a], domain: Some("d".into()), ..NodeProto::default() };
        let g = GraphProto { node: vec![n], name: Some("g".into()), initializer: vec![t], ..GraphProto::default() };
        let m = ModelProto { ir_version: Some(8), graph: Some(g), ..ModelProto::default() };
        same(&m);
        let shared = model(m, &Late::default()).into_list().iter().filter(|p| p.as_ptr() == raw.as_ptr()).count();
        assert_eq!(shared, 2);
    }
}
