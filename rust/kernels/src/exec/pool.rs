//! The private thread pool, safe to inherit through `fork`.

use std::hint::spin_loop;
use std::process;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

struct Pool {
    /// The process that owns the threads: a forked child inherits this memory but not them.
    pid: u32,
    width: usize,
    threads: rayon::ThreadPool,
}

/// The widest pool made so far by this process. A pool is never freed: another thread may be inside it, and in a forked child its
/// threads are gone, so dropping it would wait for ever. Widths only grow, so few are ever left behind.
static POOL: AtomicPtr<Pool> = AtomicPtr::new(ptr::null_mut());

fn pool(helpers: usize) -> Option<&'static rayon::ThreadPool> {
    let pid = process::id();
    loop {
        let current = POOL.load(Ordering::Acquire);
        // SAFETY: a pointer stored in POOL came from `Box::into_raw` and is never freed.
        if let Some(found) = unsafe { current.as_ref() }
            && found.pid == pid
            && found.width >= helpers
        {
            return Some(&found.threads);
        }
        let threads =
            rayon::ThreadPoolBuilder::new().num_threads(helpers).thread_name(|i| format!("shiftkern-{i}")).build();
        // When the system refuses more threads, everything still works on one.
        let threads = threads.ok()?;
        let fresh = Box::into_raw(Box::new(Pool { pid, width: helpers, threads }));
        if POOL.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: `fresh` was made above and never shared.
            drop(unsafe { Box::from_raw(fresh) });
        }
    }
}

/// Counts the loops, so that a lingering helper sees when the next one begins.
static LOOPS: AtomicUsize = AtomicUsize::new(0);
/// How long helpers stay awake after a loop. Waking one costs as much as a short loop takes, so an iterative solver
/// whose helpers fall asleep between its loops would run them alone.
const LINGER: Duration = Duration::from_micros(200);

fn linger(after: usize) {
    let start = Instant::now();
    while LOOPS.load(Ordering::Relaxed) == after && start.elapsed() < LINGER {
        for _ in 0..32 {
            spin_loop();
        }
    }
}

/// Runs `lead` on the calling thread while up to `helpers` pool threads run `help`; returns when all have ended.
pub fn run(helpers: usize, lead: impl FnOnce(), help: impl Fn() + Sync) {
    match (helpers > 0).then(|| pool(helpers)).flatten() {
        None => lead(),
        Some(threads) => {
            let count = LOOPS.fetch_add(1, Ordering::Relaxed) + 1;
            threads.in_place_scope(|scope| {
                for _ in 0..helpers {
                    scope.spawn(|_| help());
                }
                lead();
            });
            for _ in 0..helpers {
                threads.spawn(move || linger(count));
            }
        }
    }
}
