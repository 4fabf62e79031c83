//! Element types and the types they are computed in.

use super::reduce::{Reductions, fold};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::ops::{Add, Div, Mul, Sub};

/// Rows of a register tile of inner products.
pub const TILE_ROWS: usize = 4;

/// A type that arithmetic is done in: `f32` or `f64`.
pub trait Real:
    Copy
    + Default
    + Send
    + Sync
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Element<Acc = Self>
    + Reductions
    + 'static
{
    /// Width of a packed panel: two 512-bit registers.
    const PANEL: usize;
    /// One row of a register tile of inner products.
    type Panel: AsRef<[Self]> + AsMut<[Self]> + Copy;
    /// A panel row of zeros.
    const ZERO_PANEL: Self::Panel;
    /// Numbers as panel rows; what is left over at the end is not among them.
    fn panels(numbers: &[Self]) -> &[Self::Panel];
    /// As [`Real::panels`].
    fn panels_mut(numbers: &mut [Self]) -> &mut [Self::Panel];
    /// Inner products of `TILE_ROWS` rows with the columns of a packed panel.
    fn tile_products<const FMA: bool>(rows: [&[Self]; TILE_ROWS], panel: &[Self]) -> [Self::Panel; TILE_ROWS];
    /// Squared Euclidean distances of `TILE_ROWS` rows to the columns of a packed panel, from the differences.
    fn tile_distances<const FMA: bool>(rows: [&[Self]; TILE_ROWS], panel: &[Self]) -> [Self::Panel; TILE_ROWS];
    /// Inner products of `TILE_ROWS` rows with one vector, all of one length in whole panels.
    fn row_products<const FMA: bool>(rows: [&[Self]; TILE_ROWS], vector: &[Self]) -> [f64; TILE_ROWS];
    /// `sums += sum_r factors_r * rows_r`, all of one length in whole panels.
    fn add_rows<const FMA: bool>(rows: [&[Self]; TILE_ROWS], factors: [Self; TILE_ROWS], sums: &mut [Self]);
    /// Sum of a panel row, in `f64` and in a fixed order.
    fn sum_panel(panel: &Self::Panel) -> f64;
    /// Sum of a panel row in its own type, by halves.
    fn add_lanes(panel: Self::Panel) -> Self;
    /// Square root.
    fn root(self) -> Self;
    /// Absolute value.
    fn magnitude(self) -> Self;
    /// 0 but for NaN and infinities, which give NaN: sums of it tell whether there were any.
    fn unless_finite(self) -> Self;
    /// Bits of the type.
    const BITS: u32;
    /// Its bits, those of a narrow type at the low end; in the order of the numbers where they are not negative.
    fn bits(self) -> u64;
    /// The number of such bits.
    fn of_bits(bits: u64) -> Self;
    /// Rounds to nearest.
    fn from_f64(value: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// `self * a + b`, in one rounding when `FMA`.
    fn mul_add_if<const FMA: bool>(self, a: Self, b: Self) -> Self;
}

macro_rules! real {
    ($type:ident, $panel:literal) => {
        impl Real for $type {
            const PANEL: usize = $panel;
            type Panel = [$type; $panel];
            const ZERO_PANEL: Self::Panel = [0.0; $panel];
            #[inline(always)]
            fn panels(numbers: &[$type]) -> &[Self::Panel] {
                numbers.as_chunks().0
            }
            #[inline(always)]
            fn panels_mut(numbers: &mut [$type]) -> &mut [Self::Panel] {
                numbers.as_chunks_mut().0
            }
            #[inline(always)]
            fn tile_products<const FMA: bool>(
                rows: [&[$type]; TILE_ROWS],
                panel: &[$type],
            ) -> [Self::Panel; TILE_ROWS] {
                // Arrays of constant size and plain indices: the accumulators stay in registers.
                let mut acc = [[0.0 as $type; $panel]; TILE_ROWS];
                let depth = rows[0].len();
                let rows = rows.map(|row| &row[..depth]);
                for (k, column) in panel.as_chunks::<$panel>().0.iter().take(depth).enumerate() {
                    for r in 0..TILE_ROWS {
                        let a = rows[r][k];
                        for lane in 0..$panel {
                            acc[r][lane] = a.mul_add_if::<FMA>(column[lane], acc[r][lane]);
                        }
                    }
                }
                acc
            }
            #[inline(always)]
            fn tile_distances<const FMA: bool>(
                rows: [&[$type]; TILE_ROWS],
                panel: &[$type],
            ) -> [Self::Panel; TILE_ROWS] {
                let mut acc = [[0.0 as $type; $panel]; TILE_ROWS];
                let depth = rows[0].len();
                let rows = rows.map(|row| &row[..depth]);
                for (k, column) in panel.as_chunks::<$panel>().0.iter().take(depth).enumerate() {
                    for r in 0..TILE_ROWS {
                        let a = rows[r][k];
                        for lane in 0..$panel {
                            let difference = a - column[lane];
                            acc[r][lane] = difference.mul_add_if::<FMA>(difference, acc[r][lane]);
                        }
                    }
                }
                acc
            }
            #[inline(always)]
            fn row_products<const FMA: bool>(rows: [&[$type]; TILE_ROWS], vector: &[$type]) -> [f64; TILE_ROWS] {
                let mut acc = [[0.0 as $type; $panel]; TILE_ROWS];
                let vector = vector.as_chunks::<$panel>().0;
                let rows = rows.map(|row| &row.as_chunks::<$panel>().0[..vector.len()]);
                for (k, v) in vector.iter().enumerate() {
                    for r in 0..TILE_ROWS {
                        for lane in 0..$panel {
                            acc[r][lane] = rows[r][k][lane].mul_add_if::<FMA>(v[lane], acc[r][lane]);
                        }
                    }
                }
                acc.map(|acc| fold(acc.map(f64::from)))
            }
            #[inline(always)]
            fn add_rows<const FMA: bool>(rows: [&[$type]; TILE_ROWS], factors: [$type; TILE_ROWS], sums: &mut [$type]) {
                let sums = sums.as_chunks_mut::<$panel>().0;
                let rows = rows.map(|row| &row.as_chunks::<$panel>().0[..sums.len()]);
                for (k, sums) in sums.iter_mut().enumerate() {
                    let mut acc = *sums;
                    for r in 0..TILE_ROWS {
                        for lane in 0..$panel {
                            acc[lane] = rows[r][k][lane].mul_add_if::<FMA>(factors[r], acc[lane]);
                        }
                    }
                    *sums = acc;
                }
            }
            #[inline(always)]
            fn sum_panel(panel: &Self::Panel) -> f64 {
                fold(panel.map(f64::from))
            }
            #[inline(always)]
            fn add_lanes(panel: Self::Panel) -> Self {
                let mut eight = [0.0; 8];
                for row in panel.as_chunks::<8>().0 {
                    for lane in 0..8 {
                        eight[lane] += row[lane];
                    }
                }
                let [a, b, c, d, e, f, g, h] = eight;
                ((a + e) + (c + g)) + ((b + f) + (d + h))
            }
            #[inline(always)]
            fn root(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn magnitude(self) -> Self {
                self.abs()
            }
            #[inline(always)]
            fn unless_finite(self) -> Self {
                self * 0.0
            }
            const BITS: u32 = 8 * size_of::<$type>() as u32;
            #[inline(always)]
            fn bits(self) -> u64 {
                self.to_bits().into()
            }
            #[inline(always)]
            fn of_bits(bits: u64) -> Self {
                <$type>::from_bits(bits as _)
            }
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as $type
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn mul_add_if<const FMA: bool>(self, a: Self, b: Self) -> Self {
                if FMA { self.mul_add(a, b) } else { self * a + b }
            }
        }

        impl Element for $type {
            type Acc = $type;
            const SAME: bool = true;
            #[inline(always)]
            fn load(source: &[Self], target: &mut [$type]) {
                target.copy_from_slice(source);
            }
            #[inline(always)]
            fn store(source: &[$type], target: &mut [Self]) {
                target.copy_from_slice(source);
            }
            #[inline(always)]
            fn as_acc(source: &[Self]) -> Option<&[$type]> {
                Some(source)
            }
            #[inline(always)]
            fn as_acc_mut(target: &mut [Self]) -> Option<&mut [$type]> {
                Some(target)
            }
        }
    };
}

real!(f32, 32);
real!(f64, 16);

/// A type that tensors are stored in.
pub trait Element: Copy + Send + Sync + 'static {
    /// The type it is computed in; statistics are always combined in `f64`.
    type Acc: Real;
    /// Whether `Acc` is this type itself.
    const SAME: bool;
    /// Widens `source` into `target` of equal length.
    fn load(source: &[Self], target: &mut [Self::Acc]);
    /// Rounds `source` to nearest even into `target` of equal length.
    fn store(source: &[Self::Acc], target: &mut [Self]);
    /// The slice itself where no widening is needed.
    fn as_acc(source: &[Self]) -> Option<&[Self::Acc]>;
    /// The slice itself where no rounding is needed.
    fn as_acc_mut(target: &mut [Self]) -> Option<&mut [Self::Acc]>;
}

macro_rules! half {
    ($type:ident) => {
        impl Element for $type {
            type Acc = f32;
            const SAME: bool = false;
            #[inline(always)]
            fn load(source: &[Self], target: &mut [f32]) {
                source.convert_to_f32_slice(target);
            }
            #[inline(always)]
            fn store(source: &[f32], target: &mut [Self]) {
                target.convert_from_f32_slice(source);
            }
            #[inline(always)]
            fn as_acc(_: &[Self]) -> Option<&[f32]> {
                None
            }
            #[inline(always)]
            fn as_acc_mut(_: &mut [Self]) -> Option<&mut [f32]> {
                None
            }
        }
    };
}

half!(f16);
half!(bf16);
