//! Repair without training: what is cut from a layer's input is made up for in the weight that reads it.
//!
//! In: a consumer (an operand x `[rows, F]`, the weight W `[F, O]` that contracts it, its bias), the covariance of x, the units that
//! stay. Out: W' and b' of full width, zero where units go, which come as near to x W + b as the units that stay allow
//! ([`ridge`]), and the order in which units are best removed, with the error after each ([`obs`]). Behind layers that were cut before,
//! the target is what the residual stream of the model as it was holds there ([`feedback`]).
//! Example: a MLP of 384 hidden units of which 96 stay; their rows of the second weight take over what the 288 others said.
//! Invariant: the error on rows that were kept out of the fit is never larger than that of the plain cut, or nothing was changed.

mod consumer;
pub mod feedback;
mod layer;
pub mod obs;
pub mod ridge;
mod stream;

pub use consumer::{Bias, Consumer, ConsumerError, consumers};
pub use layer::{Layer, Repair};
pub use stream::both_streams;
