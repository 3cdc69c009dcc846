//! Pure: from what this node should serve, and what the kernel holds, to ordered map writes.
//!
//! Invariant after every single write, not only at the end: each slot that a frontend covers holds
//! the id of a live backend of that frontend's service. So what is referred to is written before,
//! and taken back after, what refers to it.

pub mod blocks;
pub mod ids;
pub mod planner;
mod side;
pub mod slots;
pub mod state;
pub mod writes;
