//! How a command fails: one line on stderr, an exit code, and one JSON object where it was asked for.

use crate::onnx::shown_to;
use crate::pipeline;
use std::process::ExitCode;

/// A failed command.
#[derive(Debug)]
pub(super) struct Failure {
    exit: u8,
    code: String,
    file: Option<String>,
    message: String,
}

impl Failure {
    /// Bad input, usage or environment.
    pub(super) fn bad(code: &str, file: Option<&str>, message: impl Into<String>) -> Self {
        Self { exit: 2, code: code.into(), file: file.map(str::to_string), message: message.into() }
    }

    /// A fault of vitrim.
    pub(super) fn internal(message: impl Into<String>) -> Self {
        Self { exit: 3, code: "V9999".into(), file: None, message: message.into() }
    }

    /// Says what went wrong, and gives the exit code.
    pub(super) fn report(self, json: bool) -> ExitCode {
        let line = shown_to(&self.message, 298);
        eprintln!("error: {line}");
        if json {
            let error = serde_json::json!({ "code": self.code, "file": self.file, "message": line });
            println!("{}", serde_json::json!({ "schema_version": 1, "ok": false, "error": error }));
        }
        ExitCode::from(self.exit)
    }
}

impl From<pipeline::Error> for Failure {
    fn from(error: pipeline::Error) -> Self {
        let message = error.to_string();
        let (exit, code, file) = match &error {
            pipeline::Error::Onnx(e) => (2, e.code(), e.file().map(|f| f.display().to_string())),
            pipeline::Error::Infer { file, .. } => (2, "V0301", Some(file.display().to_string())),
            pipeline::Error::Choose { file, .. } => (2, "V0401", Some(file.display().to_string())),
            pipeline::Error::PlanFile(_) => (2, "V0402", None),
            pipeline::Error::Slice { file, cause } => {
                let exit = if matches!(cause, crate::slice::SliceError::Cut(_)) { 2 } else { 3 };
                (exit, "V0501", Some(file.display().to_string()))
            }
        };
        Self { exit, code: code.to_string(), file, message }
    }
}

impl From<crate::onnx::Error> for Failure {
    fn from(error: crate::onnx::Error) -> Self {
        pipeline::Error::from(error).into()
    }
}
