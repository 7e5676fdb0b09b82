//! The command line: the only place that prints, reads arguments, or turns errors into exit codes.
//!
//! stdout gets the result (with `--json` exactly one object), stderr gets progress and messages.
//! Exit codes: 0 done, 1 a check was negative, 2 bad input, usage or environment, 3 a fault of vitrim, 130/143 interrupted.

mod augment;
mod bench;
mod eval;
mod failure;
mod finetune;
mod inspect;
mod interrupt;
mod mask;
mod options;
mod plan;
mod repair;
mod runtime;
mod score;
mod search;
mod slice;
mod slim;
mod talk;
mod train;
mod verify;

use clap::{Parser, Subcommand};
use failure::Failure;
use std::ffi::OsString;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use talk::Talk;

/// Makes exported vision transformers smaller, on the ONNX file itself, and proves the result.
#[derive(Debug, Parser)]
#[command(name = "vitrim", version, about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Say nothing but errors
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Say more
    #[arg(short, long, global = true, conflicts_with = "quiet")]
    verbose: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Do it all: search, cut, fine-tune, verify, measure
    Slim(Box<slim::Args>),
    /// Show what can be cut, and why the rest cannot
    Inspect(inspect::Args),
    /// Write a training graph with gates and gradients
    Augment(augment::Args),
    /// Find out by training which units can go
    Search(Box<search::Args>),
    /// Score units without training
    Score(score::Args),
    /// Choose the units that stay
    Plan(plan::Args),
    /// Write the twin: nothing cut, removed units zeroed
    Mask(mask::Args),
    /// Cut the weights
    Slice(slice::Args),
    /// Prove a sliced model equal to its twin
    Verify(verify::Args),
    /// Measure accuracy on data
    Eval(eval::Args),
    /// Train a cut model towards the original
    Finetune(Box<finetune::Args>),
    /// Measure latency
    Bench(bench::Args),
    /// Show or fetch ONNX Runtime
    Runtime(runtime::Args),
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
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if let Some(code) = crate::runtime::answer_probe(arguments.get(1..).unwrap_or_default(), &mut std::io::stdout()) {
        return ExitCode::from(u8::try_from(code).unwrap_or(3));
    }
    failure::install_panic_hook();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => {
            let _ = print_text(&error.render().to_string());
            return ExitCode::SUCCESS;
        }
        Err(error) => return Failure::usage(&error).report(arguments.iter().any(|a| a == "--json")),
    };
    let json = cli.command.wants_json();
    let talk = Talk::new(cli.quiet, cli.verbose);
    interrupt::listen();
    let result = std::panic::catch_unwind(AssertUnwindSafe(|| cli.command.run(&talk)));
    match result {
        Ok(Ok(verdict)) => {
            talk.flush();
            ExitCode::from(if matches!(verdict, Verdict::Negative) { 1 } else { 0 })
        }
        Ok(Err(failure)) => {
            if cli.verbose {
                talk.flush();
            }
            failure.report(json)
        }
        // The hook has said so.
        Err(_) => Failure::internal("a panic").report_json_only(json),
    }
}

impl Command {
    fn run(&self, talk: &Talk) -> Result<Verdict, Failure> {
        match self {
            Command::Slim(args) => slim::run(args, talk),
            Command::Search(args) => search::run(args, talk),
            Command::Score(args) => score::run(args, talk),
            Command::Eval(args) => eval::run(args, talk),
            Command::Finetune(args) => finetune::run(args, talk),
            Command::Bench(args) => bench::run(args, talk),
            Command::Runtime(args) => runtime::run(args, talk),
            Command::Inspect(args) => inspect::run(args, talk),
            Command::Augment(args) => augment::run(args, talk),
            Command::Plan(args) => plan::run(args, talk),
            Command::Mask(args) => mask::run(args, talk),
            Command::Slice(args) => slice::run(args, talk),
            Command::Verify(args) => verify::run(args, talk),
        }
    }

    fn wants_json(&self) -> bool {
        match self {
            Command::Slim(a) => a.json,
            Command::Search(a) => a.json,
            Command::Score(a) => a.json,
            Command::Eval(a) => a.json,
            Command::Finetune(a) => a.json,
            Command::Bench(a) => a.json,
            Command::Runtime(a) => a.json,
            Command::Inspect(a) => a.json,
            Command::Augment(a) => a.json,
            Command::Plan(a) => a.json,
            Command::Mask(a) => a.json,
            Command::Slice(a) => a.json,
            Command::Verify(a) => a.json,
        }
    }
}

/// One line on stderr; where nobody reads it, there is nothing to be done about that.
fn tell(line: impl std::fmt::Display) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Prints one JSON object, or quietly stops where nobody reads any more.
fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Failure::internal(e.to_string()))?;
    print_text(&format!("{text}\n"))
}

/// Prints text on stdout; a closed pipe is no error.
fn print_text(text: &str) -> Result<(), Failure> {
    use std::io::Write;
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::bad("V0004", None, format!("stdout: {e}"))),
        _ => Ok(()),
    }
}
