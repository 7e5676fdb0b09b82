//! Prints docs/operators.md: `cargo run --example operators > docs/operators.md`. tests/tidy.rs checks that it was done.

#![allow(clippy::print_stdout, reason = "it prints the page")]

#[path = "../tests/tidy/operators.rs"]
mod operators;

fn main() {
    print!("{}", operators::page());
}
