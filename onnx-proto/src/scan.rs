//! A walk over the bytes of a model before anything is decoded.
//!
//! It follows the [`table`](crate::table) and steps over the content of tensors, so a file of a gigabyte takes about as long as its
//! graph alone. It allocates nothing and never panics. After it has passed, decoding cannot fail on the wire format, drops no
//! field, and needs memory in proportion to the limits.

use crate::table::{self, Field, Kind, Message};

/// What a file may hold at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Nodes, those of subgraphs and functions included.
    pub node_count: u64,
    /// Initializers, those of subgraphs included.
    pub initializer_count: u64,
    /// Attributes of nodes.
    pub attribute_count: u64,
    /// Messages and texts of all kinds: decoding one costs up to 200 bytes of memory for two bytes of file.
    pub record_count: u64,
    /// Levels of subgraphs inside the main graph.
    pub subgraph_depth: u32,
    /// Unit: bytes of a name.
    pub name_len: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            node_count: 200_000,
            initializer_count: 100_000,
            attribute_count: 1_000_000,
            record_count: 8_000_000,
            subgraph_depth: 8,
            name_len: 4096,
        }
    }
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Nodes, those of subgraphs and functions included.
    pub nodes: u64,
    /// Initializers, those of subgraphs included.
    pub initializers: u64,
    /// Attributes of nodes.
    pub attributes: u64,
    /// Messages and texts of all kinds.
    pub records: u64,
}

/// Why the bytes are not a model, or not one that is accepted. `at` counts bytes from the start of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A length or number runs past the end of what contains it.
    Truncated {
        /// Where it starts.
        at: usize,
    },
    /// A number is longer than a number can be.
    BadVarint {
        /// Where it starts.
        at: usize,
    },
    /// A field that the schema lacks.
    UnknownField {
        /// The message.
        message: &'static str,
        /// Its number.
        number: u32,
        /// Where it starts.
        at: usize,
    },
    /// A field in a form other than the schema's, or field number 0.
    WrongWireType {
        /// The message.
        message: &'static str,
        /// The field, where the number is known.
        field: Option<&'static str>,
        /// Where it starts.
        at: usize,
    },
    /// A text that is not UTF-8.
    NotUtf8 {
        /// The field.
        what: What,
        /// Where the text starts.
        at: usize,
    },
    /// A name above the limit.
    LongName {
        /// The field.
        what: What,
        /// Unit: bytes.
        len: usize,
        /// Unit: bytes.
        limit: usize,
    },
    /// More than a limit allows.
    TooMany {
        /// `nodes`, `initializers`, `attributes` or `records`.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// Subgraphs in subgraphs, or types in types, beyond the limit.
    TooDeep {
        /// The limit.
        limit: u32,
    },
}

/// A field, and the node of its graph that it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct What {
    /// The message.
    pub message: &'static str,
    /// The field.
    pub field: &'static str,
    /// Number of the node inside its graph, where there is one.
    pub node: Option<u64>,
}

impl std::fmt::Display for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.node {
            Some(n) if self.message == "NodeProto" => write!(f, "{} of node #{n}", self.field),
            Some(n) => write!(f, "{} of {} in node #{n}", self.field, self.message),
            None => write!(f, "{} of {}", self.field, self.message),
        }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Fault::Truncated { at } => write!(f, "truncated at byte {at}"),
            Fault::BadVarint { at } => write!(f, "bad number at byte {at}"),
            Fault::UnknownField { message, number, at } => {
                write!(f, "unexpected field or wire type at byte {at}: {message} field {number} is unknown")
            }
            Fault::WrongWireType { message, field: Some(field), at } => {
                write!(f, "unexpected field or wire type at byte {at}, in {field} of {message}")
            }
            Fault::WrongWireType { message, field: None, at } => {
                write!(f, "unexpected field or wire type at byte {at}, in {message}")
            }
            Fault::NotUtf8 { what, at } => write!(f, "{what} is not valid UTF-8 at byte {at}"),
            Fault::LongName { what, len, limit } => write!(f, "{what} is {len} bytes long, the limit is {limit}"),
            Fault::TooMany { what, limit } => write!(f, "more than {limit} {what}"),
            Fault::TooDeep { limit } => write!(f, "nested deeper than {limit}"),
        }
    }
}

impl std::error::Error for Fault {}

/// Walks `bytes` as a `ModelProto`.
///
/// Errors: the first [`Fault`] found.
pub fn scan(bytes: &[u8], limits: &Limits) -> Result<Counts, Fault> {
    let mut scan = Scan { bytes, limits, counts: Counts::default() };
    scan.message(&table::MODEL, 0, bytes.len(), Place::default())?;
    Ok(scan.counts)
}

/// Levels of messages of any kind, so that the walk itself and the decoder (whose limit is 100) stay inside their stacks.
const MESSAGE_DEPTH: u32 = 90;

/// Where in the file a message is.
#[derive(Clone, Copy, Default)]
struct Place {
    /// Levels of messages above.
    depth: u32,
    /// Graphs above and at it.
    graphs: u32,
    /// Number of the node that it belongs to.
    node: Option<u64>,
}

struct Scan<'a> {
    bytes: &'a [u8],
    limits: &'a Limits,
    counts: Counts,
}

impl Scan<'_> {
    /// Walks the message in `bytes[at..end]`.
    fn message(&mut self, message: &'static Message, mut at: usize, end: usize, place: Place) -> Result<(), Fault> {
        let mut nodes_here = 0;
        while at < end {
            let start = at;
            let key = self.varint(&mut at, end)?;
            let number = u32::try_from(key >> 3).ok().filter(|n| (1..=0x1fff_ffff).contains(n));
            let Some(number) = number else {
                return Err(Fault::WrongWireType { message: message.name, field: None, at: start });
            };
            let Some(field) = message.field(number) else {
                return Err(match key & 7 {
                    0 | 1 | 2 | 5 => Fault::UnknownField { message: message.name, number, at: start },
                    _ => Fault::WrongWireType { message: message.name, field: None, at: start },
                });
            };
            let wrong = Fault::WrongWireType { message: message.name, field: Some(field.name), at: start };
            match (key & 7, field.kind) {
                (0, Kind::Varint | Kind::Varints) => {
                    self.varint(&mut at, end)?;
                }
                (1, Kind::Fixed64s) => at = step(at, 8, end, start)?,
                (5, Kind::Fixed32 | Kind::Fixed32s) => at = step(at, 4, end, start)?,
                (2, kind) => {
                    let len = self.varint(&mut at, end)?;
                    let next = usize::try_from(len).map_err(|_| Fault::Truncated { at: start });
                    let next = step(at, next?, end, start)?;
                    let mut inside = place;
                    if std::ptr::eq(message, &table::GRAPH) || std::ptr::eq(message, &table::FUNCTION) {
                        inside.node = matches!(kind, Kind::Message(m) if std::ptr::eq(m, &table::NODE)).then_some(nodes_here);
                        nodes_here += u64::from(inside.node.is_some());
                    }
                    self.content(message, field, at, next, inside, wrong)?;
                    at = next;
                }
                _ => return Err(wrong),
            }
        }
        Ok(())
    }

    /// Walks the length-delimited field in `bytes[at..end]`.
    fn content(
        &mut self,
        message: &'static Message,
        field: &'static Field,
        mut at: usize,
        end: usize,
        place: Place,
        wrong: Fault,
    ) -> Result<(), Fault> {
        let what = || What { message: message.name, field: field.name, node: place.node };
        match field.kind {
            Kind::Varint | Kind::Fixed32 => return Err(wrong),
            Kind::Varints => {
                while at < end {
                    self.varint(&mut at, end)?;
                }
            }
            Kind::Fixed32s if (end - at).is_multiple_of(4) => {}
            Kind::Fixed64s if (end - at).is_multiple_of(8) => {}
            Kind::Fixed32s | Kind::Fixed64s => return Err(Fault::Truncated { at }),
            Kind::Bytes => self.count_record()?,
            Kind::Text | Kind::Name => {
                self.count_record()?;
                let text = &self.bytes[at..end];
                if matches!(field.kind, Kind::Name) && text.len() > self.limits.name_len {
                    return Err(Fault::LongName { what: what(), len: text.len(), limit: self.limits.name_len });
                }
                if std::str::from_utf8(text).is_err() {
                    return Err(Fault::NotUtf8 { what: what(), at });
                }
            }
            Kind::Message(inner) => {
                self.count(message, field, inner)?;
                let mut place = Place { depth: place.depth + 1, ..place };
                if std::ptr::eq(inner, &table::GRAPH) {
                    place.graphs += 1;
                }
                if place.graphs > self.limits.subgraph_depth + 1 || place.depth > MESSAGE_DEPTH {
                    return Err(Fault::TooDeep { limit: self.limits.subgraph_depth });
                }
                self.message(inner, at, end, place)?;
            }
        }
        Ok(())
    }

    fn count(&mut self, message: &'static Message, field: &'static Field, inner: &'static Message) -> Result<(), Fault> {
        self.count_record()?;
        let (counter, limit, what) = if std::ptr::eq(inner, &table::NODE) {
            (&mut self.counts.nodes, self.limits.node_count, "nodes")
        } else if std::ptr::eq(inner, &table::ATTRIBUTE) {
            (&mut self.counts.attributes, self.limits.attribute_count, "attributes")
        } else if std::ptr::eq(message, &table::GRAPH) && matches!(field.number, 5 | 15) {
            (&mut self.counts.initializers, self.limits.initializer_count, "initializers")
        } else {
            return Ok(());
        };
        *counter += 1;
        if *counter > limit { Err(Fault::TooMany { what, limit }) } else { Ok(()) }
    }

    fn count_record(&mut self) -> Result<(), Fault> {
        self.counts.records += 1;
        let limit = self.limits.record_count;
        if self.counts.records > limit { Err(Fault::TooMany { what: "records", limit }) } else { Ok(()) }
    }

    /// Reads a base-128 number of up to 64 bits at `at` and moves `at` behind it.
    fn varint(&self, at: &mut usize, end: usize) -> Result<u64, Fault> {
        let start = *at;
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let Some(byte) = self.bytes[..end].get(*at) else { return Err(Fault::Truncated { at: start }) };
            *at += 1;
            if shift == 63 && *byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Fault::BadVarint { at: start })
    }
}

fn step(at: usize, len: usize, end: usize, start: usize) -> Result<usize, Fault> {
    if len > end - at { Err(Fault::Truncated { at: start }) } else { Ok(at + len) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::*;
    use prost::Message as _;

    fn tag(number: u32, wire: u32) -> Vec<u8> {
        let mut out = Vec::new();
        prost::encoding::encode_varint(u64::from(number << 3 | wire), &mut out);
        out
    }

    #[test]
    fn the_schema_knows_every_field_of_the_table_and_no_more() {
        let in_schema = include_str!("schema.rs").matches(" tag = \"").count();
        let in_table: usize = table::ALL.iter().map(|m| m.fields.len()).sum();
        assert_eq!(in_table, in_schema + 2, "the two variants of Dim are fields of two messages");
    }

    #[test]
    fn decoding_keeps_every_field_of_the_table() {
        for message in table::ALL {
            assert!(message.fields.windows(2).all(|w| w[0].number < w[1].number), "{}", message.name);
            for field in message.fields {
                let mut bytes = match field.kind {
                    Kind::Varint | Kind::Varints => [tag(field.number, 0), vec![1]].concat(),
                    Kind::Fixed32 | Kind::Fixed32s => [tag(field.number, 5), vec![1, 2, 3, 4]].concat(),
                    Kind::Fixed64s => [tag(field.number, 1), vec![1; 8]].concat(),
                    Kind::Bytes | Kind::Text | Kind::Name => [tag(field.number, 2), vec![1, 65]].concat(),
                    Kind::Message(_) => [tag(field.number, 2), vec![0]].concat(),
                };
                let kept = recoded(message.name, &bytes);
                // Packed fields come back packed: one more byte of length.
                if matches!(field.kind, Kind::Varints | Kind::Fixed32s | Kind::Fixed64s) && kept.len() == bytes.len() + 1 {
                    bytes = [tag(field.number, 2), vec![u8::try_from(bytes.len() - 1).unwrap()], bytes[1..].to_vec()].concat();
                }
                assert_eq!(kept, bytes, "{} {}", message.name, field.name);
            }
        }
    }

    fn recoded(message: &str, bytes: &[u8]) -> Vec<u8> {
        fn go<M: prost::Message + Default>(bytes: &[u8]) -> Vec<u8> {
            M::decode(bytes).expect("one field of the right form").encode_to_vec()
        }
        match message {
            "ModelProto" => go::<ModelProto>(bytes),
            "GraphProto" => go::<GraphProto>(bytes),
            "NodeProto" => go::<NodeProto>(bytes),
            "AttributeProto" => go::<AttributeProto>(bytes),
            "TensorProto" => go::<TensorProto>(bytes),
            "TensorProto.Segment" => go::<Segment>(bytes),
            "SparseTensorProto" => go::<SparseTensorProto>(bytes),
            "ValueInfoProto" => go::<ValueInfoProto>(bytes),
            "TypeProto" => go::<TypeProto>(bytes),
            "TypeProto.Tensor" => go::<TensorType>(bytes),
            "TypeProto.Sequence" => go::<SequenceType>(bytes),
            "TypeProto.Map" => go::<MapType>(bytes),
            "TypeProto.Optional" => go::<OptionalType>(bytes),
            "TypeProto.Opaque" => go::<OpaqueType>(bytes),
            "TensorShapeProto" => go::<TensorShapeProto>(bytes),
            "TensorShapeProto.Dimension" => go::<Dimension>(bytes),
            "OperatorSetIdProto" => go::<OperatorSetIdProto>(bytes),
            "FunctionProto" => go::<FunctionProto>(bytes),
            "TrainingInfoProto" => go::<TrainingInfoProto>(bytes),
            "StringStringEntryProto" => go::<StringStringEntryProto>(bytes),
            "TensorAnnotation" => go::<TensorAnnotation>(bytes),
            "DeviceConfigurationProto" => go::<DeviceConfigurationProto>(bytes),
            "NodeDeviceConfigurationProto" => go::<NodeDeviceConfigurationProto>(bytes),
            "ShardingSpecProto" => go::<ShardingSpecProto>(bytes),
            "IntIntListEntryProto" => go::<IntIntListEntryProto>(bytes),
            "ShardedDimProto" => go::<ShardedDimProto>(bytes),
            "SimpleShardedDimProto" => go::<SimpleShardedDimProto>(bytes),
            other => panic!("{other} has no type in this test"),
        }
    }

    #[test]
    fn faults_name_message_field_and_place() {
        let says = |bytes: &[u8]| scan(bytes, &Limits::default()).map_err(|f| f.to_string()).unwrap_err();
        assert_eq!(
            says(&[0x08, 8, 0xca, 0x03, 1, 65]),
            "unexpected field or wire type at byte 2: ModelProto field 57 is unknown"
        );
        assert_eq!(says(&[0x38, 1]), "unexpected field or wire type at byte 0, in graph of ModelProto");
        assert_eq!(says(&[0x3a, 5, 0]), "truncated at byte 0");
        assert_eq!(says(&[0x08, 0xff]), "truncated at byte 1");
        assert_eq!(says(&[0x08, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2]), "bad number at byte 1");
        assert_eq!(
            says(&[0x3a, 10, 0x0a, 0, 0x0a, 6, 0x1a, 4, 0xff, 0xfe, 65, 65]),
            "name of node #1 is not valid UTF-8 at byte 8"
        );
        let long = NodeProto { name: Some("x".repeat(5000)), ..Default::default() };
        let graph = GraphProto { node: vec![long], ..Default::default() };
        let model = ModelProto { graph: Some(graph), ..Default::default() };
        assert_eq!(says(&model.encode_to_vec()), "name of node #0 is 5000 bytes long, the limit is 4096");
    }

    #[test]
    fn ten_million_empty_nodes_are_counted_and_refused() {
        let empty = [0x0au8, 0].repeat(10_000_000);
        let mut model = tag(7, 2);
        prost::encoding::encode_varint(u64::try_from(empty.len()).unwrap(), &mut model);
        model.extend(empty);
        let fault = scan(&model, &Limits::default()).unwrap_err();
        assert_eq!(fault.to_string(), "more than 200000 nodes");
    }

    #[test]
    fn subgraphs_nest_eight_deep_and_no_deeper() {
        let nested = |levels: usize| {
            let mut graph = GraphProto::default();
            for _ in 0..levels {
                let attr = AttributeProto { g: Some(Box::new(graph)), ..Default::default() };
                let node = NodeProto { attribute: vec![attr], ..Default::default() };
                graph = GraphProto { node: vec![node], ..Default::default() };
            }
            ModelProto { graph: Some(graph), ..Default::default() }.encode_to_vec()
        };
        let limits = Limits::default();
        assert_eq!(scan(&nested(8), &limits).map(|c| c.nodes), Ok(8));
        for levels in [9, 30, 400] {
            assert_eq!(scan(&nested(levels), &limits), Err(Fault::TooDeep { limit: 8 }), "{levels}");
        }
    }
}
