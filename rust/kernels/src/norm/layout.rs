//! How a dense tensor is cut into channels.

use crate::KernelError;
use std::ops::Range;

/// A dense tensor as `x[outer][channel][inner]`.
///
/// `(N, C, *spatial)` is `outer = N`, `inner = prod(spatial)`; channels-last memory is `outer = N * prod(spatial)`,
/// `inner = 1`. The outer dimension is cut into `groups` equal parts, each with its own statistics: one group pools
/// the batch, `N` groups give instance statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Length of everything before the channel in memory.
    pub outer: usize,
    /// Number of channels.
    pub channels: usize,
    /// Length of everything after the channel in memory.
    pub inner: usize,
    /// Number of statistics per channel.
    pub groups: usize,
}

/// A run of elements and the coefficients that belong to it.
pub struct Span {
    /// Where the run lies in the tensor.
    pub range: Range<usize>,
    /// Index `group * channels + channel` of the run's first element.
    pub coefficient: usize,
    /// Whether the coefficient advances with the element (channels-last) or stays.
    pub per_element: bool,
}

impl Layout {
    /// Checks that `len` elements can be seen this way.
    pub fn check(&self, op: &'static str, len: usize) -> Result<(), KernelError> {
        let product = self.outer.checked_mul(self.channels).and_then(|p| p.checked_mul(self.inner));
        let groups_fit = self.groups > 0 && self.outer.is_multiple_of(self.groups);
        if product == Some(len) && groups_fit {
            return Ok(());
        }
        Err(KernelError::argument(op, "x", format!("{len} elements in layout {self:?}"), "another size"))
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.outer * self.channels * self.inner
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of (group, channel) pairs: the length of every per-channel array.
    pub fn statistics(&self) -> usize {
        self.groups * self.channels
    }

    /// Outer indices per group.
    pub fn outer_per_group(&self) -> usize {
        self.outer / self.groups
    }

    /// Elements behind each statistic.
    pub fn count(&self) -> usize {
        self.outer_per_group() * self.inner
    }

    /// A block length for element-wise passes over the flat tensor; whole rows where channels are innermost.
    pub fn block_len(&self) -> usize {
        const ELEMENTS: usize = 1 << 15;
        if self.inner == 1 { ELEMENTS.div_ceil(self.channels.max(1)) * self.channels } else { ELEMENTS }
    }

    /// Cuts a flat block (as given by [`Layout::block_len`]) into runs of at most `most` elements.
    pub fn spans(self, block: Range<usize>, most: usize) -> impl Iterator<Item = Span> {
        let per_element = self.inner == 1;
        let run = if per_element { self.channels } else { self.inner };
        let mut position = block.start;
        // Division once per block; from run to run these are counted on.
        let mut outer = position / (self.channels * self.inner).max(1);
        let mut channel = position / self.inner.max(1) % self.channels.max(1);
        let mut run_end = (position / run.max(1) + 1) * run;
        let mut group = outer / self.outer_per_group().max(1);
        std::iter::from_fn(move || {
            if position >= block.end {
                return None;
            }
            let end = run_end.min(block.end).min(position.saturating_add(most));
            let span = Span { range: position..end, coefficient: group * self.channels + channel, per_element };
            position = end;
            channel += if per_element { span.range.len() } else { usize::from(end == run_end) };
            if end == run_end {
                run_end += run;
            }
            if channel == self.channels {
                channel = 0;
                outer += 1;
                group = outer / self.outer_per_group().max(1);
            }
            Some(span)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_cover_each_element_once_with_its_own_coefficient() {
        for (outer, channels, inner, groups) in [(6, 3, 5, 1), (6, 3, 5, 3), (6, 4, 1, 2), (1, 1, 7, 1), (4, 5, 1, 4)] {
            let layout = Layout { outer, channels, inner, groups };
            let mut seen = vec![None; layout.len()];
            for start in (0..layout.len()).step_by(layout.block_len()) {
                let end = (start + layout.block_len()).min(layout.len());
                for span in layout.spans(start..end, 4) {
                    assert!(span.range.len() <= 4);
                    for (step, i) in span.range.enumerate() {
                        let coefficient = span.coefficient + if span.per_element { step } else { 0 };
                        assert_eq!(seen[i].replace(coefficient), None);
                    }
                }
            }
            for (i, coefficient) in seen.iter().enumerate() {
                let (o, c) = (i / (channels * inner), i / inner % channels);
                assert_eq!(*coefficient, Some(o / (outer / groups) * channels + c));
            }
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let layout = Layout { outer: usize::MAX, channels: 2, inner: 2, groups: 1 };
        assert!(layout.check("op", 4).is_err());
        assert!(Layout { outer: 3, channels: 1, inner: 1, groups: 2 }.check("op", 3).is_err());
        assert!(Layout { outer: 3, channels: 1, inner: 1, groups: 0 }.check("op", 3).is_err());
    }
}
