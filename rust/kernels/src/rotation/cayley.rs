//! The Cayley transform of many small skew matrices.

use crate::exec::{for_each_chunk, with_scratch};
use crate::simd::{Real, Vectorized, dispatch};
use crate::{KernelError, Par};

const OP: &str = "cayley";

/// `R = (I + Q)(I - Q)^-1` for matrices `Q = upper - upper^T` of side `block`, given by their strict upper triangles by
/// rows.
///
/// Solved in `f64` by elimination with partial pivoting, whatever type the matrices are stored in. `R` is orthogonal to
/// `u` times a small multiple of `block` times `1 + |Q|`, the condition of `I - Q`.
pub fn cayley(skew: &[f64], block: usize, rotations: &mut [f64], par: Par<'_>) -> Result<(), KernelError> {
    let (triangle, square) = (block * block.saturating_sub(1) / 2, block.saturating_mul(block));
    if block == 0 || !rotations.len().is_multiple_of(square) {
        let expected = format!("matrices of {block} x {block}");
        return Err(KernelError::argument(OP, "rotations", expected, format!("{} numbers", rotations.len())));
    }
    let count = rotations.len() / square;
    KernelError::check_len(OP, "skew", count * triangle, skew.len())?;
    let cost = (rotations.len() * block) as f64 * 1.5;
    for_each_chunk(par, rotations, square, cost, |number, rotation| {
        let skew = &skew[number * triangle..][..triangle];
        with_scratch(2 * square, |system: &mut [f64]| dispatch(Solve { skew, block, system, rotation }));
    })
}

struct Solve<'a> {
    skew: &'a [f64],
    block: usize,
    /// Rows of `I - Q` with the same row of `I + Q` beside them.
    system: &'a mut [f64],
    rotation: &'a mut [f64],
}

impl Vectorized for Solve<'_> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { skew, block, system, rotation } = self;
        let row = 2 * block;
        system.fill(0.0);
        let mut entries = skew.iter();
        for i in 0..block {
            system[i * row + i] = 1.0;
            system[i * row + block + i] = 1.0;
            for j in i + 1..block {
                let q = *entries.next().expect("one entry above the diagonal each");
                system[i * row + j] = -q;
                system[j * row + i] = q;
                system[i * row + block + j] = q;
                system[j * row + block + i] = -q;
            }
        }
        for k in 0..block {
            // The factors commute, so that (I - Q) R = I + Q has the same solution.
            let peak = (k..block).max_by(|&a, &b| system[a * row + k].abs().total_cmp(&system[b * row + k].abs()));
            if let Some(peak) = peak.filter(|&peak| peak != k) {
                let (upper, lower) = system.split_at_mut(peak * row);
                upper[k * row..][..row].swap_with_slice(&mut lower[..row]);
            }
            let scale = 1.0 / system[k * row + k];
            for value in &mut system[k * row + k..(k + 1) * row] {
                *value *= scale;
            }
            let (above, rest) = system.split_at_mut(k * row);
            let (pivot, below) = rest.split_at_mut(row);
            for other in above.chunks_exact_mut(row).chain(below.chunks_exact_mut(row)) {
                let factor = -other[k];
                for (value, &pivot) in other[k..].iter_mut().zip(&pivot[k..]) {
                    *value = pivot.mul_add_if::<FMA>(factor, *value);
                }
            }
        }
        for (solved, out) in system.chunks_exact(row).zip(rotation.chunks_exact_mut(block)) {
            out.copy_from_slice(&solved[block..]);
        }
    }
}
