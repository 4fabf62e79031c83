//! Queries, keys and values as they lie in memory.

use crate::KernelError;

/// A tensor `(batch, heads, tokens, channels)` whose channels lie side by side.
#[derive(Clone, Copy)]
pub struct Tokens<'a, T> {
    data: &'a [T],
    shape: [usize; 4],
    strides: [usize; 3],
}

impl<'a, T> Tokens<'a, T> {
    /// `strides` are those of batches, heads and tokens, in elements.
    pub fn new(
        op: &'static str,
        argument: &'static str,
        data: &'a [T],
        shape: [usize; 4],
        strides: [usize; 3],
    ) -> Result<Self, KernelError> {
        if shape.contains(&0) {
            // Nothing is stored, so there are no places to step to.
            return Ok(Self { data, shape, strides: [0; 3] });
        }
        let steps = shape.iter().zip(strides).try_fold(shape[3], |sum, (size, stride)| {
            (size - 1).checked_mul(stride).and_then(|step| sum.checked_add(step))
        });
        if steps.is_none_or(|span| span > data.len()) {
            let expected = format!("memory for shape {shape:?} and strides {strides:?}");
            return Err(KernelError::argument(op, argument, expected, format!("{} elements", data.len())));
        }
        Ok(Self { data, shape, strides })
    }

    /// A tensor without gaps.
    pub fn dense(data: &'a [T], shape: [usize; 4]) -> Self {
        let [_, heads, tokens, channels] = shape;
        Self { data, shape, strides: [heads * tokens * channels, tokens * channels, channels] }
    }

    /// All of the memory.
    pub fn data(&self) -> &'a [T] {
        self.data
    }

    /// `(batch, heads, tokens, channels)`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Channels.
    pub fn width(&self) -> usize {
        self.shape[3]
    }

    /// Where a token begins in the memory.
    pub fn offset(&self, batch: usize, head: usize, token: usize) -> usize {
        batch * self.strides[0] + head * self.strides[1] + token * self.strides[2]
    }

    /// The channels of a token.
    pub fn token(&self, batch: usize, head: usize, token: usize) -> &'a [T] {
        &self.data[self.offset(batch, head, token)..][..self.width()]
    }
}
