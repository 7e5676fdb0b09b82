//! SIGINT and SIGTERM: training ends after its step and saves; everything else ends at once, but never in the middle of a write.
//!
//! A second signal ends training at once too. Exit code: 128 + the signal's number.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Set by the first signal while training; training looks at it after each step.
pub(super) static STOP: AtomicBool = AtomicBool::new(false);
/// Whether the work under way looks at [`STOP`].
static LOOKS: AtomicBool = AtomicBool::new(false);
/// The signal that came.
static SIGNAL: AtomicU8 = AtomicU8::new(0);
/// Held while a file is written.
static WRITING: Mutex<()> = Mutex::new(());

/// Starts to listen. Where that fails the signals do what they do anyway: end the process.
pub(super) fn listen() {
    #[cfg(unix)]
    {
        use signal_hook::consts::{SIGINT, SIGTERM};
        let Ok(mut signals) = signal_hook::iterator::Signals::new([SIGINT, SIGTERM]) else { return };
        // A thread that cannot be started leaves the signals unheard, so that the process ends as it would without.
        let _ = std::thread::Builder::new().name("vitrim-signals".into()).spawn(move || {
            for signal in signals.forever() {
                came(signal);
            }
        });
    }
}

#[cfg(unix)]
#[allow(clippy::exit, reason = "a signal ends the process; destructors hold nothing but memory")]
fn came(signal: i32) {
    SIGNAL.store(u8::try_from(signal).unwrap_or(2), Ordering::Relaxed);
    if LOOKS.load(Ordering::Relaxed) && !STOP.swap(true, Ordering::Relaxed) {
        return;
    }
    let _guard = writing();
    super::tell(format_args!("error: interrupted"));
    std::process::exit(128 + signal);
}

/// Held while a file is written, so that a signal waits for its end.
pub(super) fn writing() -> MutexGuard<'static, ()> {
    WRITING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs work that looks at [`STOP`].
pub(super) fn stoppable<T>(work: impl FnOnce(&AtomicBool) -> T) -> T {
    LOOKS.store(true, Ordering::Relaxed);
    let result = work(&STOP);
    LOOKS.store(false, Ordering::Relaxed);
    result
}

/// Exit code of an interrupted command.
pub(super) fn exit_code() -> u8 {
    128 + SIGNAL.load(Ordering::Relaxed).max(2)
}
