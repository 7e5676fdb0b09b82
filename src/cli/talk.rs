//! What goes to stderr while a command works: warnings, notes, progress. Nothing of it with `-q`.
//!
//! In a terminal progress is a bar; elsewhere it is a plain line every few seconds. Warnings wait until it is known that the command
//! does not fail, since a failure is one line.

use crate::onnx::shown_to;
use crate::runtime;
use crate::search::{Progress, StepProgress};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::cell::RefCell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Longest line that is shown of anything that a file or an engine says.
const LINE: usize = 298;
/// Between two plain lines of progress.
const EVERY: Duration = Duration::from_secs(5);

/// How much a command says.
pub(super) struct Talk {
    quiet: bool,
    verbose: bool,
    warnings: RefCell<Vec<String>>,
}

impl Talk {
    pub(super) fn new(quiet: bool, verbose: bool) -> Self {
        Self { quiet, verbose, warnings: RefCell::new(Vec::new()) }
    }

    /// Keeps a warning until [`Talk::flush`].
    pub(super) fn warn(&self, text: impl std::fmt::Display) {
        self.warnings.borrow_mut().push(text.to_string());
    }

    /// Shows the warnings so far.
    pub(super) fn flush(&self) {
        for warning in self.warnings.borrow_mut().drain(..) {
            if !self.quiet {
                super::tell(format_args!("warning: {}", shown_to(&warning, LINE)));
            }
        }
    }

    /// One line.
    pub(super) fn say(&self, text: impl std::fmt::Display) {
        if !self.quiet {
            super::tell(format_args!("{}", shown_to(&text.to_string(), LINE)));
        }
    }

    /// One line, with `-v` only.
    pub(super) fn detail(&self, text: impl std::fmt::Display) {
        if self.verbose {
            self.say(text);
        }
    }

    /// A step of an installation.
    pub(super) fn install(&self, step: &runtime::Progress) {
        match step {
            runtime::Progress::Present { .. } => {}
            runtime::Progress::Downloading { package } => {
                self.say(format!("ONNX Runtime is not here: fetching {package} with pip (once)"))
            }
            runtime::Progress::Checking { bytes } => self.say(format!("checking {} MB", bytes / 1_000_000)),
            runtime::Progress::Unpacking { file } => self.say(format!("unpacking {file}")),
            runtime::Progress::Done { folder } => self.say(format!("ONNX Runtime is in {}", folder.display())),
        }
    }

    /// A display of training steps, called `what`.
    pub(super) fn steps(&self, what: &'static str) -> Steps<'_> {
        Steps { talk: self, what, is_bar: self.is_bar(), bar: None, last: None }
    }

    /// A display of things that are gone through, called `what`.
    pub(super) fn counts(&self, what: &'static str) -> Counts<'_> {
        Counts { talk: self, what, is_bar: self.is_bar(), bar: None, started: Instant::now(), last: Instant::now() }
    }

    fn is_bar(&self) -> bool {
        !self.quiet && std::io::stderr().is_terminal()
    }
}

/// A bar of `of` steps.
fn bar(what: &'static str, of: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(of), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{prefix} [{bar:24}] {pos}/{len} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
    bar.set_prefix(what);
    bar
}

/// A display of things that are gone through.
pub(super) struct Counts<'a> {
    talk: &'a Talk,
    what: &'static str,
    is_bar: bool,
    bar: Option<ProgressBar>,
    started: Instant,
    last: Instant,
}

impl Counts<'_> {
    /// `done` of `of` are done.
    pub(super) fn show(&mut self, done: usize, of: usize) {
        let left = self.started.elapsed().mul_f64(of.saturating_sub(done) as f64 / done.max(1) as f64);
        let left = if done == 0 { String::new() } else { format!("{} left", clock(left)) };
        if self.is_bar {
            let bar = self.bar.get_or_insert_with(|| bar(self.what, of as u64));
            bar.set_position(done as u64);
            bar.set_message(left);
        } else if self.last.elapsed() >= EVERY {
            self.last = Instant::now();
            self.talk.say(format!("{} {done}/{of}, {left}", self.what));
        }
    }

    /// Ends the display.
    pub(super) fn done(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A display of training steps.
pub(super) struct Steps<'a> {
    talk: &'a Talk,
    what: &'static str,
    is_bar: bool,
    bar: Option<ProgressBar>,
    last: Option<Instant>,
}

impl Steps<'_> {
    /// Shows what happened.
    pub(super) fn show(&mut self, progress: &Progress) {
        match progress {
            Progress::Note(note) if note.starts_with("training on the processor") => self.talk.detail(note),
            Progress::Note(note) => match &self.bar {
                Some(bar) => bar.println(shown_to(note, LINE)),
                None => self.talk.say(note),
            },
            Progress::Step(step) if self.is_bar => self.draw(step),
            Progress::Step(step) => {
                let is_due = self.last.is_none_or(|t| t.elapsed() >= EVERY) || step.step == step.of;
                if is_due {
                    self.last = Some(Instant::now());
                    self.talk.say(format!("{} step {}/{}: {}", self.what, step.step, step.of, words(step)));
                }
            }
        }
    }

    fn draw(&mut self, step: &StepProgress) {
        let bar = self.bar.get_or_insert_with(|| bar(self.what, step.of));
        bar.set_position(step.step);
        bar.set_message(words(step));
    }

    /// Ends the display.
    pub(super) fn done(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// `epoch 1/3, loss 0.312, near zero mlp 12 % qk 3 %, 812 images/s, 1:05 left`.
fn words(step: &StepProgress) -> String {
    let mut out = format!("epoch {}/{}, loss {:.4}", step.epoch, step.epochs, step.loss);
    if !step.near_zero.is_empty() {
        let shares: Vec<String> = step.near_zero.iter().map(|(kind, share)| format!("{kind} {:.0} %", share * 100.0)).collect();
        out += &format!(", near zero {}", shares.join(" "));
    }
    format!("{out}, {:.0} images/s, {} left", step.images_per_second, clock(step.time_left))
}

/// `1:05`, `2:03:04`.
pub(super) fn clock(time: Duration) -> String {
    let s = time.as_secs();
    if s >= 3600 { format!("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60) } else { format!("{}:{:02}", s / 60, s % 60) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_one_short_line() {
        let step = StepProgress {
            step: 3,
            of: 10,
            epoch: 1,
            epochs: 2,
            loss: 0.25,
            task: 0.2,
            near_zero: [("mlp".to_string(), 0.5)].into(),
            images_per_second: 100.4,
            time_left: Duration::from_secs(3725),
        };
        assert_eq!(words(&step), "epoch 1/2, loss 0.2500, near zero mlp 50 %, 100 images/s, 1:02:05 left");
        assert_eq!(clock(Duration::from_secs(65)), "1:05");
    }
}
