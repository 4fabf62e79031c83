//! How work is cut into blocks and spread over threads.
//!
//! Three rules keep results equal to the bit for any number of threads: block boundaries depend on the problem
//! alone, each block writes only its own part of the output, and partial results are combined by the caller in block
//! order. Which thread takes which block is then free, so blocks are handed out dynamically.

mod io;
mod pool;
mod scratch;

pub use io::{Block, Io};
pub use scratch::with_scratch;

use crate::KernelError;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Waking a helper thread costs tens of microseconds: below this much work (in nanoseconds) one thread is faster.
const SERIAL_BELOW_NS: f64 = 100_000.0;
/// How often a long call asks whether it should stop.
const INTERRUPT_EVERY: Duration = Duration::from_millis(20);

thread_local! {
    /// When this thread last asked. It outlives the single loop: many short loops make a long call, too.
    static ASKED: Cell<Instant> = Cell::new(Instant::now());
}

/// How a kernel may run: on how many threads, and whom to ask whether to stop.
#[derive(Clone, Copy)]
pub struct Par<'a> {
    threads: usize,
    interrupted: Option<&'a dyn Fn() -> bool>,
}

impl<'a> Par<'a> {
    /// At most `threads` threads, the calling one included; zero counts as one.
    pub fn threads(threads: usize) -> Self {
        Self { threads: threads.max(1), interrupted: None }
    }

    /// Asks `interrupted` now and then, always on the calling thread; `true` stops the kernel.
    #[must_use]
    pub fn with_interrupt(self, interrupted: &'a dyn Fn() -> bool) -> Self {
        Self { interrupted: Some(interrupted), ..self }
    }
}

/// The number of blocks of `size` that cover `len`.
pub fn block_count(len: usize, size: usize) -> usize {
    len.div_ceil(size.max(1))
}

/// Runs `body(block)` for every block in `0..blocks`, in any order, on the calling thread and its helpers.
///
/// `cost_ns` is the estimated time of the whole loop on one thread. `body` must confine its writes to the block.
pub fn for_each_block(
    par: Par<'_>,
    blocks: usize,
    cost_ns: f64,
    body: impl Fn(usize) + Sync,
) -> Result<(), KernelError> {
    let stop = AtomicBool::new(false);
    let next = AtomicUsize::new(0);
    let take = || {
        if stop.load(Ordering::Relaxed) {
            return None;
        }
        let block = next.fetch_add(1, Ordering::Relaxed);
        (block < blocks).then_some(block)
    };
    let lead = || {
        while let Some(block) = take() {
            body(block);
            if let Some(interrupted) = par.interrupted
                && ASKED.get().elapsed() >= INTERRUPT_EVERY
            {
                if interrupted() {
                    stop.store(true, Ordering::Relaxed);
                }
                ASKED.set(Instant::now());
            }
        }
    };
    let help = || {
        while let Some(block) = take() {
            body(block);
        }
    };
    let helpers = if cost_ns < SERIAL_BELOW_NS { 0 } else { par.threads.min(blocks).saturating_sub(1) };
    pool::run(helpers, lead, help);
    if stop.load(Ordering::Relaxed) { Err(KernelError::Interrupted) } else { Ok(()) }
}

/// Runs `body(block, chunk)` for consecutive chunks of `out`, each `chunk_len` long but for the last.
pub fn for_each_chunk<T: Send + Sync>(
    par: Par<'_>,
    out: &mut [T],
    chunk_len: usize,
    cost_ns: f64,
    body: impl Fn(usize, &mut [T]) + Sync,
) -> Result<(), KernelError> {
    let len = out.len();
    let io = Io::in_place(out);
    for_each_block(par, block_count(len, chunk_len), cost_ns, |block| {
        let start = block * chunk_len;
        io.block(start, chunk_len.min(len - start), |chunk| body(block, chunk.into_in_place()));
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_runs_once_at_any_width() {
        for threads in [1, 2, 3, 7] {
            let mut out = vec![0_u32; 1003];
            for_each_chunk(Par::threads(threads), &mut out, 10, 1e9, |block, chunk| {
                for value in chunk {
                    *value += block as u32 + 1;
                }
            })
            .unwrap();
            assert!(out.iter().enumerate().all(|(i, &v)| v as usize == i / 10 + 1));
        }
    }

    #[test]
    fn an_interrupt_stops_the_loop() {
        let asked = Cell::new(0);
        let interrupted = || {
            asked.set(asked.get() + 1);
            true
        };
        let done = AtomicUsize::new(0);
        let par = Par::threads(2).with_interrupt(&interrupted);
        let result = for_each_block(par, 1000, 1e9, |_| {
            std::thread::sleep(Duration::from_millis(5));
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(result, Err(KernelError::Interrupted));
        assert!(asked.get() == 1 && done.load(Ordering::Relaxed) < 100);
    }

    #[test]
    fn a_panic_in_a_block_reaches_the_caller_and_the_pool_survives() {
        for _ in 0..3 {
            let caught = std::panic::catch_unwind(|| {
                for_each_block(Par::threads(3), 64, 1e9, |block| assert!(block != 33, "planted"))
            });
            assert!(caught.is_err());
        }
        for_each_block(Par::threads(3), 64, 1e9, |_| ()).unwrap();
    }
}
