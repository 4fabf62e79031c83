//! Input and output of an element-wise kernel, which may be the same memory.

use std::marker::PhantomData;
use std::slice;

/// A source and a destination of equal length: two slices, or one that is updated in place.
pub struct Io<'a, T> {
    source: *const T,
    target: *mut T,
    len: usize,
    memory: PhantomData<&'a mut [T]>,
}

// SAFETY: shared references give out `&[T]`, fine for `T: Sync`, and mutable blocks through `block` alone, whose callers
// in this module's parent pass disjoint ones, fine for `T: Send`.
unsafe impl<T: Send + Sync> Sync for Io<'_, T> {}

/// One block of an [`Io`].
pub enum Block<'b, T> {
    /// Read from the first slice, write to the second.
    Split(&'b [T], &'b mut [T]),
    /// Read and write one slice.
    InPlace(&'b mut [T]),
}

impl<'b, T> Block<'b, T> {
    /// The block of an [`Io`] that is known to be in place.
    pub(super) fn into_in_place(self) -> &'b mut [T] {
        match self {
            Self::Split(_, target) | Self::InPlace(target) => target,
        }
    }
}

impl<'a, T> Io<'a, T> {
    /// Distinct source and target; `None` when the lengths differ.
    pub fn split(source: &'a [T], target: &'a mut [T]) -> Option<Self> {
        (source.len() == target.len()).then(|| {
            advise_huge_pages(target);
            Self { source: source.as_ptr(), target: target.as_mut_ptr(), len: source.len(), memory: PhantomData }
        })
    }

    /// One slice, updated in place.
    pub fn in_place(data: &'a mut [T]) -> Self {
        let target = data.as_mut_ptr();
        Self { source: target.cast_const(), target, len: data.len(), memory: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The source as it is before anything is written.
    pub fn source(&self) -> &[T] {
        // SAFETY: `source` and `len` came from one slice that outlives `self`; nothing is written while the returned
        // borrow lives, because writing goes through `for_each`, which takes `&mut self`.
        unsafe { slice::from_raw_parts(self.source, self.len) }
    }

    /// Calls `body` with the block `start..start + len`. Concurrent calls must name disjoint blocks.
    pub(super) fn block<R>(&self, start: usize, len: usize, body: impl FnOnce(Block<'_, T>) -> R) -> R {
        assert!(start + len <= self.len, "block outside the data");
        if self.source == self.target.cast_const() {
            // SAFETY: inside the slice given to `in_place`, and no other block overlaps this one.
            return body(Block::InPlace(unsafe { slice::from_raw_parts_mut(self.target.add(start), len) }));
        }
        // SAFETY: inside the slices given to `split`, which do not overlap each other, and no other block overlaps.
        let (source, target) = unsafe {
            (slice::from_raw_parts(self.source.add(start), len), slice::from_raw_parts_mut(self.target.add(start), len))
        };
        body(Block::Split(source, target))
    }
}

impl<T: Send + Sync> Io<'_, T> {
    /// Runs `body(start, block)` over consecutive blocks of `block_len` elements, in any order.
    pub fn for_each(
        &mut self,
        par: super::Par<'_>,
        block_len: usize,
        cost_ns: f64,
        body: impl Fn(usize, Block<'_, T>) + Sync,
    ) -> Result<(), crate::KernelError> {
        let this = &*self;
        super::for_each_block(par, super::block_count(this.len, block_len), cost_ns, |index| {
            let start = index * block_len;
            this.block(start, block_len.min(this.len - start), |block| body(start, block));
        })
    }
}

/// Asks for huge pages under a large output that is about to be touched for the first time.
///
/// The first write to fresh memory costs a page fault per 4 KiB, on some machines more time than the whole kernel;
/// with 2 MiB pages there are 512 times fewer. A refusal by the system changes nothing but the speed.
fn advise_huge_pages<T>(target: &mut [T]) {
    #[cfg(target_os = "linux")]
    {
        const HUGE: usize = 2 << 20;
        let bytes = size_of_val(target);
        if bytes < 2 * HUGE {
            return;
        }
        let start = target.as_mut_ptr() as usize;
        let first = start.next_multiple_of(HUGE);
        let last = (start + bytes) / HUGE * HUGE;
        // Memory that the allocator hands out again is there already; advising it anew would only cost.
        let mut resident = 0_u8;
        let middle = first + (last - first) / HUGE / 2 * HUGE;
        // SAFETY: asks about one page inside `target` and writes one byte, `resident`.
        let asked = unsafe { libc::mincore(middle as *mut libc::c_void, 1, &raw mut resident) };
        if asked == 0 && resident & 1 == 1 {
            return;
        }
        // SAFETY: the range lies inside `target`, and MADV_HUGEPAGE does not change what the memory holds.
        unsafe { libc::madvise(first as *mut libc::c_void, last - first, libc::MADV_HUGEPAGE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = target;
}
