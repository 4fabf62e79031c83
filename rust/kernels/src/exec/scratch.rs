//! Memory that a thread keeps between blocks.

use crate::simd::Real;
use std::cell::Cell;
use std::slice;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

thread_local! {
    static SCRATCH: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Calls `body` with `len` elements of unspecified value, in memory that this thread reuses.
///
/// A block that allocated would pay page faults for each block of a long vector. Nested calls get memory of their own.
pub fn with_scratch<T: Real, R>(len: usize, body: impl FnOnce(&mut [T]) -> R) -> R {
    let mut memory = SCRATCH.take();
    let lines = (len * size_of::<T>()).div_ceil(size_of::<Line>());
    if memory.len() < lines {
        memory.resize(lines, Line([0; 64]));
    }
    // SAFETY: `memory` holds at least `len` elements, all written before, and any bits are a value of `f32` or `f64`,
    // the only implementors of `Real`; a line is aligned for both.
    let result = body(unsafe { slice::from_raw_parts_mut(memory.as_mut_ptr().cast::<T>(), len) });
    SCRATCH.set(memory);
    result
}
