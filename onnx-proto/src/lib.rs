//! ONNX schema.
