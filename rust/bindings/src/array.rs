//! Tensors as the Python side describes them, and their checks.

use half::{bf16, f16};
use pyo3::prelude::*;
use shiftkern_kernels::KernelError;
use shiftkern_kernels::exec::Io;
use std::slice;

/// Element type codes shared with `_crossing.py`.
const FLOAT32: u8 = 0;
const FLOAT64: u8 = 1;
const FLOAT16: u8 = 2;
const BFLOAT16: u8 = 3;
const BYTE: u8 = 4;
const INT64: u8 = 5;

/// A dense tensor in memory: `(address, number of elements, type code)`.
///
/// Reading the address of a torch tensor takes a tenth of the time of any exchange protocol, and small layers are
/// called thousands of times a second. The price is a contract: `_crossing.view` is the only maker of such tuples, it
/// makes them from contiguous CPU tensors, and the caller keeps those alive until the call returns.
#[derive(FromPyObject, Clone, Copy)]
pub struct View(usize, usize, u8);

/// Rust types with a code.
pub trait Coded: Copy {
    /// The code.
    const CODE: u8;
}

macro_rules! coded {
    ($($type:ty => $code:ident),*) => {
        $(impl Coded for $type {
            const CODE: u8 = $code;
        })*
    };
}

coded!(f32 => FLOAT32, f64 => FLOAT64, f16 => FLOAT16, bf16 => BFLOAT16, u8 => BYTE, i64 => INT64);

impl View {
    fn check<T: Coded>(&self, op: &'static str, argument: &'static str) -> Result<(), KernelError> {
        if self.2 != T::CODE {
            let expected = format!("element type {}", std::any::type_name::<T>());
            return Err(KernelError::argument(op, argument, expected, format!("type code {}", self.2)));
        }
        if self.1 > 0 && (self.0 == 0 || !self.0.is_multiple_of(align_of::<T>())) {
            return Err(KernelError::argument(op, argument, "aligned memory", format!("address {:#x}", self.0)));
        }
        Ok(())
    }

    /// The elements.
    pub fn read<T: Coded>(&self, op: &'static str, argument: &'static str) -> Result<&[T], KernelError> {
        self.check::<T>(op, argument)?;
        if self.1 == 0 {
            return Ok(&[]);
        }
        // SAFETY: checked above for type, alignment and null; `View`'s contract covers length and lifetime.
        Ok(unsafe { slice::from_raw_parts(self.0 as *const T, self.1) })
    }

    /// The elements, for writing.
    pub fn write<T: Coded>(&mut self, op: &'static str, argument: &'static str) -> Result<&mut [T], KernelError> {
        self.check::<T>(op, argument)?;
        if self.1 == 0 {
            return Ok(&mut []);
        }
        // SAFETY: as in `read`; a tensor that is written is passed once per call, or goes through `io`.
        Ok(unsafe { slice::from_raw_parts_mut(self.0 as *mut T, self.1) })
    }

    /// Source `self` and target `out`, which may be the same tensor but must not overlap otherwise.
    pub fn io<'a, T: Coded>(&'a self, out: &'a mut Self, op: &'static str) -> Result<Io<'a, T>, KernelError> {
        if self.0 == out.0 && self.1 == out.1 {
            return Ok(Io::in_place(out.write(op, "out")?));
        }
        let (bytes, out_bytes) = (self.1 * size_of::<T>(), out.1 * size_of::<T>());
        if self.0 < out.0 + out_bytes && out.0 < self.0 + bytes {
            return Err(KernelError::argument(op, "out", "memory apart from x, or x itself", "overlapping memory"));
        }
        let (len, found) = (self.1, out.1);
        Io::split(self.read(op, "x")?, out.write(op, "out")?)
            .ok_or_else(|| KernelError::argument(op, "out", format!("{len} elements"), found.to_string()))
    }

    /// The elements as `f64`, whatever float type they have: for per-channel arrays.
    pub fn to_f64(self, op: &'static str, argument: &'static str) -> Result<Vec<f64>, KernelError> {
        Ok(match self.2 {
            FLOAT32 => self.read::<f32>(op, argument)?.iter().map(|&v| f64::from(v)).collect(),
            FLOAT16 => self.read::<f16>(op, argument)?.iter().map(|&v| f64::from(v)).collect(),
            BFLOAT16 => self.read::<bf16>(op, argument)?.iter().map(|&v| f64::from(v)).collect(),
            _ => self.read::<f64>(op, argument)?.to_vec(),
        })
    }

    /// Writes `values` back, rounded to the tensor's float type.
    pub fn store_f64(mut self, op: &'static str, argument: &'static str, values: &[f64]) -> Result<(), KernelError> {
        KernelError::check_len(op, argument, values.len(), self.1)?;
        match self.2 {
            FLOAT32 => {
                self.write::<f32>(op, argument)?.iter_mut().zip(values).for_each(|(t, &v)| *t = v as f32);
            }
            FLOAT16 => {
                self.write::<f16>(op, argument)?.iter_mut().zip(values).for_each(|(t, &v)| *t = f16::from_f64(v));
            }
            BFLOAT16 => {
                self.write::<bf16>(op, argument)?.iter_mut().zip(values).for_each(|(t, &v)| *t = bf16::from_f64(v));
            }
            _ => self.write::<f64>(op, argument)?.copy_from_slice(values),
        }
        Ok(())
    }

    /// Nothing, of the given type: where the type alone is asked for.
    pub fn typed(code: u8) -> Self {
        Self(0, 0, code)
    }

    /// The type code.
    pub fn code(self) -> u8 {
        self.2
    }

    /// Number of elements.
    pub fn len(self) -> usize {
        self.1
    }

    /// Address of the first byte and of the first byte after the tensor.
    fn bytes(self) -> (usize, usize) {
        let size = match self.2 {
            FLOAT32 => 4,
            FLOAT16 | BFLOAT16 => 2,
            BYTE => 1,
            _ => 8,
        };
        (self.0, self.0 + self.1 * size)
    }

    /// Whether no written tensor shares memory with another one, written or read.
    pub fn apart(written: &[Self], read: &[Self]) -> bool {
        let mut spans: Vec<_> = written.iter().map(|v| (v.bytes(), true)).collect();
        spans.extend(read.iter().map(|v| (v.bytes(), false)));
        spans.retain(|((start, end), _)| start < end);
        spans.sort_unstable();
        // Ends of the written and of all spans so far: a span may reach over several that follow.
        let (mut written_end, mut any_end) = (0, 0);
        for ((start, end), writes) in spans {
            if start < written_end || (writes && start < any_end) {
                return false;
            }
            any_end = any_end.max(end);
            if writes {
                written_end = written_end.max(end);
            }
        }
        true
    }
}

/// An optional per-channel array.
pub fn optional(view: Option<View>, op: &'static str, name: &'static str) -> Result<Option<Vec<f64>>, KernelError> {
    view.map(|v| v.to_f64(op, name)).transpose()
}

/// Calls `$body` with `$T` bound to the float type of the tensor `$view`.
macro_rules! with_float {
    ($view:expr, $op:expr, $T:ident => $body:expr) => {
        match $view.code() {
            0 => {
                type $T = f32;
                $body
            }
            1 => {
                type $T = f64;
                $body
            }
            2 => {
                type $T = half::f16;
                $body
            }
            3 => {
                type $T = half::bf16;
                $body
            }
            code => {
                Err(shiftkern_kernels::KernelError::argument($op, "x", "a float tensor", format!("type code {code}")))
            }
        }
    };
}
pub(crate) use with_float;

/// As [`with_float`], for operators that know only the types that arithmetic is done in.
macro_rules! with_real {
    ($view:expr, $op:expr, $T:ident => $body:expr) => {
        match $view.code() {
            0 => {
                type $T = f32;
                $body
            }
            1 => {
                type $T = f64;
                $body
            }
            code => Err(shiftkern_kernels::KernelError::argument(
                $op,
                "dtype",
                "float32 or float64",
                format!("type code {code}"),
            )),
        }
    };
}
pub(crate) use with_real;
