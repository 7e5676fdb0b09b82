//! Placeholder for the kernel table.
