//! Pure: from objects to what this node should serve. No kernel, no clock, no I/O.

pub mod object;
