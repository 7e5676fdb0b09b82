//! `vitrim runtime`: which ONNX Runtime is used, and bringing one.

use super::failure::Failure;
use super::talk::Talk;
use super::{Verdict, print_json, print_text};
use crate::runtime::{self, InstallOptions, LibraryChoice, Probe, RuntimeName, Surroundings};
use serde_json::json;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Option<Action>,
    /// The ONNX Runtime library, a file or its folder
    #[arg(long, value_name = "FILE")]
    ort_lib: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long, global = true)]
    pub(super) json: bool,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Fetch the pinned ONNX Runtime with pip, check its hash, and keep it in the cache
    Install {
        /// The build with CUDA
        #[arg(long)]
        cuda: bool,
        /// Never fetch anything
        #[arg(long)]
        offline: bool,
    },
}

pub(super) fn run(args: &Args, talk: &Talk) -> Result<Verdict, Failure> {
    if let Some(Action::Install { cuda, offline }) = args.action {
        let options = InstallOptions { cuda, offline };
        let folder = runtime::install(&options, &Surroundings::of_process(), &mut |step| talk.install(&step))?;
        if args.json {
            print_json(&json!({ "schema_version": crate::plan::SCHEMA_VERSION, "folder": folder.display().to_string() }))?;
        } else {
            print_text(&format!("{}\n", folder.display()))?;
        }
        return Ok(Verdict::Done);
    }
    let probe = std::env::current_exe().map_or(Probe::Thread, Probe::Child);
    let choice = LibraryChoice { file: args.ort_lib.clone(), probe };
    if !RuntimeName::Ort.is_built() {
        return Err(runtime::Error::NotBuilt { runtime: RuntimeName::Ort }.into());
    }
    let found = runtime::find(&choice)?;
    let version = runtime::preflight(&found.path, &choice.probe)?;
    let (path, source, has_tract) = (found.path.display().to_string(), found.source.to_string(), RuntimeName::Tract.is_built());
    if args.json {
        let ort = json!({ "path": path, "source": source, "version": version });
        print_json(&json!({ "schema_version": crate::plan::SCHEMA_VERSION, "ort": ort, "tract": has_tract }))?;
    } else {
        let tract = if has_tract { "built in" } else { "not built in" };
        print_text(&format!("ONNX Runtime {version}: {path} ({source})\ntract: {tract}\n"))?;
    }
    Ok(Verdict::Done)
}
