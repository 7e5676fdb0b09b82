//! How a command fails: one line on stderr, an exit code, and one JSON object where it was asked for.

use crate::onnx::{shown, shown_to};
use crate::{pipeline, runtime};
use std::path::Path;
use std::process::ExitCode;

/// Longest message.
const LINE: usize = 298;

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

    /// As [`Failure::bad`], of a file that the message need not name.
    pub(super) fn of_file(code: &str, file: &Path, reason: impl std::fmt::Display) -> Self {
        let name = file.display().to_string();
        let reason = reason.to_string();
        let message = if reason.contains(&name) { reason } else { format!("{}: {reason}", shown_to(&name, 120)) };
        Self { exit: 2, code: code.into(), file: Some(name), message }
    }

    /// A fault of vitrim.
    pub(super) fn internal(message: impl Into<String>) -> Self {
        Self { exit: 3, code: "V9999".into(), file: None, message: format!("internal fault: {}", message.into()) }
    }

    /// A signal ended the work; what it says how to go on.
    pub(super) fn interrupted(message: impl Into<String>) -> Self {
        Self { exit: super::interrupt::exit_code(), code: "V0900".into(), file: None, message: message.into() }
    }

    /// Says what went wrong, and gives the exit code.
    pub(super) fn report(self, json: bool) -> ExitCode {
        super::tell(format_args!("error: {}", shown_to(&self.message, LINE)));
        self.report_json_only(json)
    }

    /// As [`Failure::report`] where stderr has been told.
    pub(super) fn report_json_only(self, json: bool) -> ExitCode {
        let line = shown_to(&self.message, LINE);
        if json {
            let error = serde_json::json!({ "code": self.code, "file": self.file.map(|f| shown_to(&f, 4096)), "message": line });
            let object = serde_json::json!({ "schema_version": 1, "ok": false, "error": error });
            // Nobody may be reading any more; the exit code still tells.
            let _ = super::print_text(&format!("{object}\n"));
        }
        ExitCode::from(self.exit)
    }

    /// A usage error of the command line, in one line: what is wrong, then the parser's tips.
    pub(super) fn usage(error: &clap::Error) -> Self {
        let text = error.render().to_string();
        let lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
        let told: Vec<&str> = lines.take_while(|l| !l.starts_with("Usage:") && !l.starts_with("For more")).collect();
        let message = told.join(" ");
        Self::bad("V0000", None, message.strip_prefix("error: ").unwrap_or(&message))
    }
}

impl From<pipeline::Error> for Failure {
    fn from(error: pipeline::Error) -> Self {
        let (exit, code, file) = error.class();
        let file = file.map(|f| f.display().to_string());
        Self { exit, code: code.to_string(), file, message: error.to_string() }
    }
}

impl From<crate::onnx::Error> for Failure {
    fn from(error: crate::onnx::Error) -> Self {
        pipeline::Error::from(error).into()
    }
}

impl From<runtime::Error> for Failure {
    fn from(error: runtime::Error) -> Self {
        pipeline::Error::from(error).into()
    }
}

/// The one line of a panic: where it was, never a trace.
pub(super) fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        let what = info.payload().downcast_ref::<&str>().map(|s| (*s).to_string());
        let what = what.or_else(|| info.payload().downcast_ref::<String>().cloned()).unwrap_or_default();
        let place = info.location().map(|l| format!(" at {}:{}", l.file(), l.line())).unwrap_or_default();
        super::tell(format_args!("error: internal fault{place}: {}; please report it", shown(&what)));
    }));
}
