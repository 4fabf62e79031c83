//! The one error type of all kernels.

/// Why a kernel refused its input or stopped early.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// An argument does not have the value or shape the operator needs.
    #[error("{op}: argument '{argument}': expected {expected}, got {got}")]
    Argument {
        /// Operator as the user knows it.
        op: &'static str,
        /// Argument as the user knows it.
        argument: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// The caller asked to stop (Ctrl-C); outputs hold unspecified values.
    #[error("interrupted")]
    Interrupted,
}

impl KernelError {
    /// An [`KernelError::Argument`] from anything printable.
    pub fn argument(
        op: &'static str,
        argument: &'static str,
        expected: impl Into<String>,
        got: impl Into<String>,
    ) -> Self {
        Self::Argument { op, argument, expected: expected.into(), got: got.into() }
    }

    /// Refuses a slice whose length is not the one the problem's shape asks for.
    pub fn check_len(op: &'static str, argument: &'static str, expected: usize, got: usize) -> Result<(), Self> {
        if expected == got {
            return Ok(());
        }
        Err(Self::argument(op, argument, format!("{expected} elements"), format!("{got}")))
    }
}
