//! Normalization statistics: measured in one pass, mixed, applied in one pass.
//!
//! All kernels see a dense tensor through a [`Layout`] (outer, channels, inner). Statistics are `f64` whatever the
//! tensor's type is; the element-wise pass runs in `f32` (`f64` for `f64` tensors) and rounds once.

mod batch_norm;
mod ema;
mod layout;
mod moments;
mod pointwise;
mod reduce;
mod style;
mod unmix;

pub use batch_norm::{MixedParams, Source, mixed_batch_norm};
pub use ema::ema_update;
pub use layout::Layout;
pub use moments::{Moments, channel_moments};
pub use pointwise::{Affine, channel_affine, channel_combine};
pub use reduce::channel_dot;
pub use style::{StyleOutput, StyleParams, style_shift};
pub use unmix::{Components, UnmixOutput, UnmixParams, unmix_norm, unmix_update};
