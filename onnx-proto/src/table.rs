//! The schema as data: message, field number, wire form. What [`crate::scan`](crate::scan()) walks by.

/// How a field stands on the wire.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// A varint.
    Varint,
    /// A repeated varint, packed or not.
    Varints,
    /// Four bytes.
    Fixed32,
    /// Repeated four bytes, packed or not.
    Fixed32s,
    /// Repeated eight bytes, packed or not.
    Fixed64s,
    /// Bytes of any content.
    Bytes,
    /// UTF-8 text of any length: documentation, metadata.
    Text,
    /// UTF-8 text that names something; its length is limited.
    Name,
    /// A message.
    Message(&'static Message),
}

/// A field of a message.
#[derive(Debug)]
pub struct Field {
    /// Field number.
    pub number: u32,
    /// Name in `onnx.proto`.
    pub name: &'static str,
    /// Wire form.
    pub kind: Kind,
}

/// A message and its fields.
#[derive(Debug)]
pub struct Message {
    /// Name in `onnx.proto`.
    pub name: &'static str,
    /// Fields by ascending number.
    pub fields: &'static [Field],
}

impl Message {
    /// The field with this number.
    pub fn field(&self, number: u32) -> Option<&'static Field> {
        // Most messages number their fields 1, 2, 3: look there first.
        let guess = usize::try_from(number).ok()?.checked_sub(1)?;
        match self.fields.get(guess) {
            Some(field) if field.number == number => Some(field),
            _ => self.fields.iter().find(|f| f.number == number),
        }
    }
}

macro_rules! messages {
    ($($const:ident $name:literal { $($number:literal $field:literal $kind:expr;)* })*) => {
        $(
            #[doc = concat!("`", $name, "`.")]
            pub static $const: Message = Message {
                name: $name,
                fields: &[$(Field { number: $number, name: $field, kind: $kind }),*],
            };
        )*
        /// All messages.
        pub static ALL: &[&Message] = &[$(&$const),*];
    };
}

use Kind::{Bytes, Fixed32, Fixed32s, Fixed64s, Name, Text, Varint, Varints};

const fn of(message: &'static Message) -> Kind {
    Kind::Message(message)
}

messages! {
    MODEL "ModelProto" {
        1 "ir_version" Varint;
        2 "producer_name" Text;
        3 "producer_version" Text;
        4 "domain" Name;
        5 "model_version" Varint;
        6 "doc_string" Text;
        7 "graph" of(&GRAPH);
        8 "opset_import" of(&OPSET);
        14 "metadata_props" of(&ENTRY);
        20 "training_info" of(&TRAINING);
        25 "functions" of(&FUNCTION);
        26 "configuration" of(&CONFIGURATION);
    }
    GRAPH "GraphProto" {
        1 "node" of(&NODE);
        2 "name" Name;
        5 "initializer" of(&TENSOR);
        10 "doc_string" Text;
        11 "input" of(&VALUE_INFO);
        12 "output" of(&VALUE_INFO);
        13 "value_info" of(&VALUE_INFO);
        14 "quantization_annotation" of(&ANNOTATION);
        15 "sparse_initializer" of(&SPARSE);
        16 "metadata_props" of(&ENTRY);
    }
    NODE "NodeProto" {
        1 "input" Name;
        2 "output" Name;
        3 "name" Name;
        4 "op_type" Name;
        5 "attribute" of(&ATTRIBUTE);
        6 "doc_string" Text;
        7 "domain" Name;
        8 "overload" Name;
        9 "metadata_props" of(&ENTRY);
        10 "device_configurations" of(&NODE_DEVICE);
    }
    ATTRIBUTE "AttributeProto" {
        1 "name" Name;
        2 "f" Fixed32;
        3 "i" Varint;
        4 "s" Bytes;
        5 "t" of(&TENSOR);
        6 "g" of(&GRAPH);
        7 "floats" Fixed32s;
        8 "ints" Varints;
        9 "strings" Bytes;
        10 "tensors" of(&TENSOR);
        11 "graphs" of(&GRAPH);
        13 "doc_string" Text;
        14 "tp" of(&TYPE);
        15 "type_protos" of(&TYPE);
        20 "type" Varint;
        21 "ref_attr_name" Name;
        22 "sparse_tensor" of(&SPARSE);
        23 "sparse_tensors" of(&SPARSE);
    }
    TENSOR "TensorProto" {
        1 "dims" Varints;
        2 "data_type" Varint;
        3 "segment" of(&SEGMENT);
        4 "float_data" Fixed32s;
        5 "int32_data" Varints;
        6 "string_data" Bytes;
        7 "int64_data" Varints;
        8 "name" Name;
        9 "raw_data" Bytes;
        10 "double_data" Fixed64s;
        11 "uint64_data" Varints;
        12 "doc_string" Text;
        13 "external_data" of(&ENTRY);
        14 "data_location" Varint;
        16 "metadata_props" of(&ENTRY);
    }
    SEGMENT "TensorProto.Segment" {
        1 "begin" Varint;
        2 "end" Varint;
    }
    SPARSE "SparseTensorProto" {
        1 "values" of(&TENSOR);
        2 "indices" of(&TENSOR);
        3 "dims" Varints;
    }
    VALUE_INFO "ValueInfoProto" {
        1 "name" Name;
        2 "type" of(&TYPE);
        3 "doc_string" Text;
        4 "metadata_props" of(&ENTRY);
    }
    TYPE "TypeProto" {
        1 "tensor_type" of(&TENSOR_TYPE);
        4 "sequence_type" of(&SEQUENCE_TYPE);
        5 "map_type" of(&MAP_TYPE);
        6 "denotation" Text;
        7 "opaque_type" of(&OPAQUE_TYPE);
        8 "sparse_tensor_type" of(&TENSOR_TYPE);
        9 "optional_type" of(&OPTIONAL_TYPE);
    }
    TENSOR_TYPE "TypeProto.Tensor" {
        1 "elem_type" Varint;
        2 "shape" of(&SHAPE);
    }
    SEQUENCE_TYPE "TypeProto.Sequence" {
        1 "elem_type" of(&TYPE);
    }
    MAP_TYPE "TypeProto.Map" {
        1 "key_type" Varint;
        2 "value_type" of(&TYPE);
    }
    OPTIONAL_TYPE "TypeProto.Optional" {
        1 "elem_type" of(&TYPE);
    }
    OPAQUE_TYPE "TypeProto.Opaque" {
        1 "domain" Name;
        2 "name" Name;
    }
    SHAPE "TensorShapeProto" {
        1 "dim" of(&DIMENSION);
    }
    DIMENSION "TensorShapeProto.Dimension" {
        1 "dim_value" Varint;
        2 "dim_param" Name;
        3 "denotation" Text;
    }
    OPSET "OperatorSetIdProto" {
        1 "domain" Name;
        2 "version" Varint;
    }
    FUNCTION "FunctionProto" {
        1 "name" Name;
        4 "input" Name;
        5 "output" Name;
        6 "attribute" Name;
        7 "node" of(&NODE);
        8 "doc_string" Text;
        9 "opset_import" of(&OPSET);
        10 "domain" Name;
        11 "attribute_proto" of(&ATTRIBUTE);
        12 "value_info" of(&VALUE_INFO);
        13 "overload" Name;
        14 "metadata_props" of(&ENTRY);
    }
    TRAINING "TrainingInfoProto" {
        1 "initialization" of(&GRAPH);
        2 "algorithm" of(&GRAPH);
        3 "initialization_binding" of(&ENTRY);
        4 "update_binding" of(&ENTRY);
    }
    ENTRY "StringStringEntryProto" {
        1 "key" Text;
        2 "value" Text;
    }
    ANNOTATION "TensorAnnotation" {
        1 "tensor_name" Name;
        2 "quant_parameter_tensor_names" of(&ENTRY);
    }
    CONFIGURATION "DeviceConfigurationProto" {
        1 "name" Name;
        2 "num_devices" Varint;
        3 "device" Name;
    }
    NODE_DEVICE "NodeDeviceConfigurationProto" {
        1 "configuration_id" Name;
        2 "sharding_spec" of(&SHARDING);
        3 "pipeline_stage" Varint;
    }
    SHARDING "ShardingSpecProto" {
        1 "tensor_name" Name;
        2 "device" Varints;
        3 "index_to_device_group_map" of(&INT_LIST_ENTRY);
        4 "sharded_dim" of(&SHARDED_DIM);
    }
    INT_LIST_ENTRY "IntIntListEntryProto" {
        1 "key" Varint;
        2 "value" Varints;
    }
    SHARDED_DIM "ShardedDimProto" {
        1 "axis" Varint;
        2 "simple_sharding" of(&SIMPLE_SHARDED_DIM);
    }
    SIMPLE_SHARDED_DIM "SimpleShardedDimProto" {
        1 "dim_value" Varint;
        2 "dim_param" Name;
        3 "num_shards" Varint;
    }
}
