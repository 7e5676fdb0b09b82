//! What can be wrong with a model file, its data files, or the place of an output.

use std::io;
use std::path::{Path, PathBuf};

use onnx_proto::Fault;

/// An error of loading or saving: which file, and why. One line.
#[derive(Debug, thiserror::Error)]
#[error("{}{cause}", prefix(file.as_deref()))]
pub struct Error {
    file: Option<PathBuf>,
    // Not a `source`: the message has it already, and a printed chain would repeat it.
    cause: Box<Cause>,
}

impl Error {
    /// `cause`, found in `file`.
    pub fn new(file: &Path, cause: Cause) -> Self {
        Self { file: Some(file.to_path_buf()), cause: Box::new(cause) }
    }

    /// `cause`, where no file is involved.
    pub fn bare(cause: Cause) -> Self {
        Self { file: None, cause: Box::new(cause) }
    }

    /// The file that it is about.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Why, without the file.
    pub fn cause(&self) -> &Cause {
        &self.cause
    }

    /// A stable code for scripts, `V01nn`.
    pub fn code(&self) -> &'static str {
        self.cause.code()
    }
}

fn prefix(file: Option<&Path>) -> String {
    const LEN: usize = 120;
    let Some(file) = file else { return String::new() };
    let name = file.to_string_lossy();
    // Of a long path the end says more.
    match name.char_indices().nth_back(LEN) {
        Some((at, _)) => format!("..{}: ", shown_to(&name[at..], LEN + 1)),
        None => format!("{}: ", shown_to(&name, LEN)),
    }
}

/// A name as messages show it: control and direction characters replaced, and cut to 64 characters.
pub fn shown(name: &str) -> String {
    shown_to(name, 64)
}

/// A name as messages show it, cut to `len` characters.
pub fn shown_to(name: &str, len: usize) -> String {
    let mut out: String = name.chars().take(len).map(|c| if is_harmful(c) { '\u{fffd}' } else { c }).collect();
    if name.chars().nth(len).is_some() {
        out.push_str("..");
    }
    out
}

fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{61c}' | '\u{feff}')
}

/// Why a model is not accepted, or an output not written. Names in fields are already fit for messages.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say it")]
pub enum Cause {
    #[error("no such file")]
    NoSuchFile,
    #[error("is a directory, expected an .onnx file{}", only.as_ref().map(|n| format!(": did you mean {n}?")).unwrap_or_default())]
    IsDirectory { only: Option<String> },
    #[error("permission denied")]
    PermissionDenied,
    #[error("file is empty")]
    Empty,
    #[error("this is a Git LFS pointer, not the model: run git lfs pull")]
    LfsPointer,
    #[error("starts like {looks_like}, not ONNX: was the download an error page?")]
    Page { looks_like: &'static str },
    #[error("this is {looks_like}, not ONNX")]
    OtherFormat { looks_like: &'static str },
    #[error("not a regular file")]
    NotRegular,
    #[error("larger than 2 GiB: store weights as external data")]
    TooLarge,
    #[error("changed while reading")]
    Changed,
    #[error("cannot be read: {source}")]
    Read { source: io::Error },
    #[error("not a valid ONNX protobuf: {fault}")]
    Protobuf { fault: Fault },
    #[error("not a valid ONNX protobuf: {0}")]
    Decode(prost::DecodeError),
    #[error("{fault}")]
    Limit { fault: Fault },

    #[error("model has no graph")]
    NoGraph,
    #[error("model has no nodes")]
    NoNodes,
    #[error("graph has no outputs")]
    NoOutputs,
    #[error("no opset for the default domain")]
    NoDefaultOpset,
    #[error("opset {version} is not supported ({oldest} to {newest})")]
    Opset { version: i64, oldest: i64, newest: i64 },
    #[error("domain '{domain}' is imported as opset {first} and as opset {second}")]
    OpsetTwice { domain: String, first: i64, second: i64 },
    #[error("ir_version is missing")]
    NoIrVersion,
    #[error("ir_version {version} is not supported ({oldest} to {newest})")]
    IrVersion { version: i64, oldest: i64, newest: i64 },
    #[error("node {node} is of domain '{domain}', which is not imported")]
    DomainNotImported { node: String, domain: String },

    #[error("graph has a cycle through node {}", through.join(" -> "))]
    Cycle { through: Vec<String> },
    #[error("value {value} is produced by {first} and {second}")]
    TwoProducers { value: String, first: String, second: String },
    #[error("initializer {name} appears twice")]
    DuplicateInitializer { name: String },
    #[error("graph input {name} appears twice")]
    DuplicateInput { name: String },
    #[error("{what} #{index} has no name")]
    NoName { what: &'static str, index: usize },
    #[error("node {node} reads '{value}', which nothing produces")]
    Dangling { node: String, value: String },
    #[error("graph output '{value}' is produced by nothing")]
    MissingOutput { value: String },
    #[error("node {node} has no operator type")]
    NoOperator { node: String },
    #[error("node {node}: attribute {attribute} {reason}")]
    BadAttribute { node: String, attribute: String, reason: String },

    #[error("function {name} is defined twice")]
    DuplicateFunction { name: String },
    #[error("function {} calls itself", through.join(" -> "))]
    FunctionRecursion { through: Vec<String> },
    #[error("function {name} is written for opset {function} of domain '{domain}', the model for {model}")]
    FunctionOpset { name: String, domain: String, function: i64, model: i64 },
    #[error("node {node} has {given} {what}, function {name} takes {taken}")]
    FunctionArity { node: String, name: String, what: &'static str, given: usize, taken: usize },
    #[error("functions expand to more than {limit} {what}")]
    FunctionSize { what: &'static str, limit: usize },

    #[error("{tensor}: {held} bytes, shape {dims} {dtype} needs {need}")]
    TensorSize { tensor: String, held: u64, dims: String, dtype: &'static str, need: usize },
    #[error("{tensor}: {held} elements in {field}, shape {dims} {dtype} needs {need}")]
    TensorElements { tensor: String, field: &'static str, held: usize, dims: String, dtype: &'static str, need: usize },
    #[error("{tensor}: shape overflows")]
    ShapeOverflow { tensor: String },
    #[error("{tensor} has the negative dimension {dim}")]
    NegativeDim { tensor: String, dim: i64 },
    #[error("{tensor} has type {number}, not supported")]
    TensorType { tensor: String, number: i32 },
    #[error("{tensor} has two data fields, {first} and {second}")]
    TwoDataFields { tensor: String, first: &'static str, second: &'static str },
    #[error("{tensor} is of type {dtype}, which {field} cannot hold")]
    WrongDataField { tensor: String, dtype: &'static str, field: &'static str },
    #[error("{tensor}: {value} in {field} is no {dtype}")]
    OutOfRange { tensor: String, value: String, field: &'static str, dtype: &'static str },
    #[error("{tensor} is a segment of a tensor, not supported")]
    Segment { tensor: String },

    #[error("external data needs a file path")]
    ExternalNeedsPath,
    #[error("{tensor}: external data location '{location}' leaves the model's directory")]
    ExternalEscapes { tensor: String, location: String },
    #[error("external data {location} of {tensor} not found beside the model")]
    ExternalMissing { tensor: String, location: String },
    #[error("external data {location} of {tensor} is not a regular file")]
    ExternalNotRegular { tensor: String, location: String },
    #[error("{tensor}: external data {location}: offset {offset} + {length} bytes is past the end ({end})")]
    ExternalPastEnd { tensor: String, location: String, offset: u64, length: u64, end: u64 },
    #[error("{tensor}: external data {key} '{value}' is not a number")]
    ExternalNumber { tensor: String, key: &'static str, value: String },
    #[error("{tensor}: external data has no location")]
    ExternalNoLocation { tensor: String },
    #[error("{tensor}: external data has two entries '{key}'")]
    ExternalTwice { tensor: String, key: String },
    #[error("external data is larger than {limit_gib} GiB in all")]
    ExternalTooLarge { limit_gib: u64 },
    #[error("external data {location} of {tensor} cannot be read: {source}")]
    ExternalRead { tensor: String, location: String, source: io::Error },
    #[error("external data {location} changed while reading")]
    ExternalChanged { location: String },

    #[error("exists: use --force")]
    Exists,
    #[error("output would overwrite the input")]
    OverwritesInput,
    #[error("the output's directory {directory} does not exist")]
    NoDirectory { directory: String },
    #[error("standard output is not supported here: give a file, or ./- for a file of that name")]
    StandardStream,
    #[error("{directory}, where the output should go, is not a directory")]
    NotADirectory { directory: String },
    #[error("the output's directory {directory} cannot be written to: {source}")]
    DirectoryNotWritable { directory: String, source: io::Error },
    #[error("output is not a regular file")]
    OutputNotRegular,
    #[error("no space left on device (needs {} MB)", needs_bytes.div_ceil(1_000_000))]
    NoSpace { needs_bytes: u64 },
    #[error("cannot be written: {source}")]
    Write { source: io::Error },
    #[error("the model is larger than 2 GiB in one piece")]
    OutputTooLarge,
    #[error("internal: {what}")]
    Internal { what: &'static str },
}

impl Cause {
    /// A stable code for scripts, `V01nn`.
    pub fn code(&self) -> &'static str {
        use Cause::*;
        match self {
            NoSuchFile => "V0101",
            IsDirectory { .. } => "V0102",
            PermissionDenied => "V0103",
            Empty => "V0104",
            LfsPointer => "V0105",
            Page { .. } => "V0106",
            OtherFormat { .. } => "V0107",
            NotRegular => "V0108",
            TooLarge => "V0109",
            Changed => "V0110",
            Read { .. } => "V0111",
            Protobuf { .. } | Decode(_) => "V0112",
            Limit { .. } => "V0113",
            NoGraph => "V0120",
            NoNodes => "V0121",
            NoOutputs => "V0122",
            NoDefaultOpset => "V0123",
            Opset { .. } => "V0124",
            OpsetTwice { .. } => "V0125",
            NoIrVersion | IrVersion { .. } => "V0126",
            DomainNotImported { .. } => "V0127",
            Cycle { .. } => "V0130",
            TwoProducers { .. } => "V0131",
            DuplicateInitializer { .. } => "V0132",
            DuplicateInput { .. } => "V0133",
            NoName { .. } => "V0134",
            Dangling { .. } => "V0135",
            MissingOutput { .. } => "V0136",
            NoOperator { .. } => "V0137",
            BadAttribute { .. } => "V0138",
            DuplicateFunction { .. } => "V0140",
            FunctionRecursion { .. } => "V0141",
            FunctionOpset { .. } => "V0142",
            FunctionArity { .. } => "V0143",
            FunctionSize { .. } => "V0144",
            TensorSize { .. } | TensorElements { .. } => "V0150",
            ShapeOverflow { .. } => "V0151",
            NegativeDim { .. } => "V0152",
            TensorType { .. } => "V0153",
            TwoDataFields { .. } => "V0154",
            WrongDataField { .. } => "V0155",
            OutOfRange { .. } => "V0156",
            Segment { .. } => "V0157",
            ExternalNeedsPath => "V0160",
            ExternalEscapes { .. } => "V0161",
            ExternalMissing { .. } => "V0162",
            ExternalNotRegular { .. } => "V0163",
            ExternalPastEnd { .. } => "V0164",
            ExternalNumber { .. } => "V0165",
            ExternalNoLocation { .. } => "V0166",
            ExternalTwice { .. } => "V0167",
            ExternalTooLarge { .. } => "V0168",
            ExternalRead { .. } | ExternalChanged { .. } => "V0169",
            Exists => "V0170",
            OverwritesInput => "V0171",
            NoDirectory { .. } => "V0172",
            NotADirectory { .. } => "V0173",
            StandardStream => "V0179",
            DirectoryNotWritable { .. } => "V0174",
            OutputNotRegular => "V0175",
            NoSpace { .. } => "V0176",
            Write { .. } => "V0177",
            OutputTooLarge => "V0178",
            Internal { .. } => "V0199",
        }
    }
}

impl From<Fault> for Cause {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::TooMany { .. } | Fault::TooDeep { .. } | Fault::LongName { .. } => Cause::Limit { fault },
            Fault::Truncated { .. }
            | Fault::BadVarint { .. }
            | Fault::UnknownField { .. }
            | Fault::WrongWireType { .. }
            | Fault::NotUtf8 { .. } => Cause::Protobuf { fault },
        }
    }
}
