//! The command `vitrim`.

fn main() -> std::process::ExitCode {
    vitrim::cli::run()
}
