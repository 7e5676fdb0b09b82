//! Memory-mapped files: the one place of the crate, beside library loading, that needs `unsafe`.

use std::fs::File;
use std::io;

use bytes::Bytes;
use memmap2::Mmap;

/// The content of `file` as shared bytes; pages are read when they are first looked at.
///
/// The file must not be empty. Errors: whatever the system says.
#[allow(
    unsafe_code,
    reason = "mapping is unsafe because another process may change or cut the file meanwhile. We map only files of 64 MiB and \
              more, never write through the map, interpret nothing in it by type (all reads are of bytes, through checked \
              slices), and compare size and time of change after loading; a file cut while in use ends the process with SIGBUS, \
              which no process can prevent, but reads nothing outside the map"
)]
pub(super) fn map(file: &File) -> io::Result<Bytes> {
    // SAFETY: see the reason above.
    let map = unsafe { Mmap::map(file)? };
    Ok(Bytes::from_owner(map))
}
