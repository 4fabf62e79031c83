//! The one gate between Python and the kernels.

use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;
use shiftkern_kernels::{KernelError, Par};
use std::cell::RefCell;

/// Runs `kernel` with the interpreter released, on `threads` threads; Ctrl-C stops it; errors become Python's.
pub fn run<R: Send>(
    py: Python<'_>,
    threads: usize,
    kernel: impl FnOnce(Par<'_>) -> Result<R, KernelError> + Send,
) -> PyResult<R> {
    py.detach(|| {
        let signal: RefCell<Option<PyErr>> = RefCell::new(None);
        // Signal handlers run here, so an exception they raise is the one the user sees.
        #[allow(clippy::redundant_closure_for_method_calls, reason = "the method itself is bound to one lifetime")]
        let interrupted = || match Python::attach(|py| py.check_signals()) {
            Ok(()) => false,
            Err(error) => {
                signal.replace(Some(error));
                true
            }
        };
        let result = kernel(Par::threads(threads).with_interrupt(&interrupted));
        match signal.take() {
            Some(error) => Err(error),
            None => result.map_err(|error| Python::attach(|py| to_python(py, &error))),
        }
    })
}

fn to_python(py: Python<'_>, error: &KernelError) -> PyErr {
    static ARGUMENT_ERROR: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    match error {
        KernelError::Interrupted => PyKeyboardInterrupt::new_err(()),
        KernelError::Argument { .. } => match ARGUMENT_ERROR.import(py, "shiftkern.errors", "ArgumentError") {
            Ok(class) => PyErr::from_type(class.clone(), error.to_string()),
            Err(import_error) => import_error,
        },
    }
}
