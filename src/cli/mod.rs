//! The command line: the only place that prints, reads arguments, or turns errors into exit codes.
//!
//! stdout gets the result (with `--json` exactly one object), stderr gets progress and messages.
//! Exit codes: 0 done, 1 a check was negative, 2 bad input, usage or environment, 3 a fault of vitrim, 130/143 interrupted.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "this module is where printing happens")]

mod failure;
mod inspect;
mod mask;
mod options;
mod plan;
mod slice;

use clap::{Parser, Subcommand};
use failure::Failure;
use std::process::ExitCode;

/// Makes exported vision transformers smaller, on the ONNX file itself, and proves the result.
#[derive(Debug, Parser)]
#[command(name = "vitrim", version, about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what can be cut, and why the rest cannot
    Inspect(inspect::Args),
    /// Choose the units that stay
    Plan(plan::Args),
    /// Write the twin: nothing cut, removed units zeroed
    Mask(mask::Args),
    /// Cut the weights
    Slice(slice::Args),
}

/// What a command that did its work has to say.
enum Verdict {
    /// Done.
    Done,
    /// Done, but a check was negative.
    Negative,
}

/// Parses the arguments, runs the command, and gives the exit code.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.command.wants_json();
    let result = match cli.command {
        Command::Inspect(args) => inspect::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Mask(args) => mask::run(&args),
        Command::Slice(args) => slice::run(&args),
    };
    match result {
        Ok(Verdict::Done) => ExitCode::SUCCESS,
        Ok(Verdict::Negative) => ExitCode::from(1),
        Err(failure) => failure.report(json),
    }
}

impl Command {
    fn wants_json(&self) -> bool {
        match self {
            Command::Inspect(a) => a.json,
            Command::Slice(a) => a.json,
            Command::Plan(_) | Command::Mask(_) => false,
        }
    }
}

/// Prints one JSON object, or quietly stops where nobody reads any more.
fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Failure::internal(e.to_string()))?;
    print_text(&format!("{text}\n"))
}

/// Prints text on stdout; a closed pipe is no error.
fn print_text(text: &str) -> Result<(), Failure> {
    use std::io::Write;
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::internal(e.to_string())),
        _ => Ok(()),
    }
}
