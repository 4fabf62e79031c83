//! Where costs come from: a matrix, or two sets of points between which they are computed on the fly.

use crate::packed::{PackedRows, unit_rows};
use crate::simd::{Real, TILE_ROWS, Transcendental, Vectorized, dispatch};
use crate::{KernelError, Par, exec};

/// Columns whose log-sums are taken together: wide enough that a matrix is read in long pieces.
pub const STRIP: usize = 256;
/// Rows that one step of a strip reads while they stay in the first-level cache.
const STRIP_ROWS: usize = 16;

/// The number of columns with padding: whole panels.
pub fn padded<T: Real>(columns: usize) -> usize {
    columns.div_ceil(T::PANEL) * T::PANEL
}

/// Some rows, at most `TILE_ROWS`, and their potentials.
#[derive(Clone, Copy)]
pub struct Rows<T> {
    /// The first row.
    pub first: usize,
    /// How many.
    pub count: usize,
    /// Their potentials.
    pub shift: [T; TILE_ROWS],
}

/// The potentials of all columns, padded with `-inf`, and `c = 1 / kappa`.
#[derive(Clone, Copy)]
pub struct Columns<'a, T> {
    /// Potentials, through [`Cost::prepare`] for the same `c`.
    pub g: &'a [T],
    /// Factor of the costs.
    pub c: T,
}

/// Cells of a cost matrix, `TILE_ROWS` rows at a time.
///
/// Rows of cells have `padded(columns)` entries.
pub trait Cost<T: Transcendental>: Sync {
    /// Rows and columns.
    fn shape(&self) -> (usize, usize);
    /// Nanoseconds per cell of one pass, roughly.
    fn cost_ns(&self) -> f64;
    /// Takes the part of the costs that depends on the column alone into its potential.
    fn prepare(&self, _g: &mut [T], _c: T) {}
    /// `cells = shift_i + g_j - c M_ij`.
    fn logits<const FMA: bool>(&self, rows: Rows<T>, columns: Columns<'_, T>, cells: &mut [T]);
    /// As [`Cost::logits`], then `2^`; returns the sums of the rows.
    fn powers<const FMA: bool>(&self, rows: Rows<T>, columns: Columns<'_, T>, cells: &mut [T]) -> [f64; TILE_ROWS];
    /// The costs of `count` rows from `first` on, unscaled.
    fn costs<const FMA: bool>(&self, first: usize, count: usize, cells: &mut [T]);
    /// `out_j = log2 sum_i 2^(f_i - c M_ij)` for the columns of one strip; `-inf` where all are.
    fn column_log_sums<const FMA: bool>(&self, first: usize, f: &[T], c: T, out: &mut [f64]);
}

/// A cost matrix in memory.
pub struct Dense<'a, T> {
    cells: &'a [T],
    rows: usize,
    columns: usize,
    stride: usize,
    /// -1 where the matrix holds scores instead of costs.
    sign: T,
}

impl<'a, T: Transcendental> Dense<'a, T> {
    /// The leading `rows` x `columns` corner of a matrix whose rows lie `stride` apart.
    pub fn new(cells: &'a [T], rows: usize, columns: usize, stride: usize) -> Self {
        Self { cells, rows, columns, stride, sign: T::from_f64(1.0) }
    }

    /// A matrix of scores: costs with the opposite sign.
    pub fn scores(cells: &'a [T], rows: usize, columns: usize) -> Self {
        Self { cells, rows, columns, stride: columns, sign: T::from_f64(-1.0) }
    }

    /// `count` columns from `first` on.
    pub fn columns(&self, first: usize, count: usize) -> Self {
        Self { cells: &self.cells[first.min(self.cells.len())..], columns: count, ..*self }
    }

    fn row(&self, i: usize) -> &'a [T] {
        &self.cells[i * self.stride..][..self.columns]
    }

    /// Refuses NaN and `-inf`, and costs that overflow when they are multiplied by `c`. A cost of `+inf` forbids a cell;
    /// a score of `+inf` is refused.
    pub fn check(&self, op: &'static str, argument: &'static str, c: f64, par: Par<'_>) -> Result<(), KernelError> {
        const ROWS: usize = 64;
        let forbidding = self.sign > T::default();
        let mut largest = vec![0.0_f64; exec::block_count(self.rows, ROWS)];
        let cost = (self.rows * self.columns) as f64 * 0.2;
        exec::for_each_chunk(par, &mut largest, 1, cost, |block, out| {
            let last = self.rows.min((block + 1) * ROWS);
            out[0] = (block * ROWS..last).map(|i| dispatch(Largest(self.row(i), forbidding))).fold(0.0, nan_max);
        })?;
        let largest = largest.into_iter().fold(0.0, nan_max);
        if largest.is_nan() {
            let (row, column, value) = self.first_bad();
            let got = format!("{value} in row {row}, column {column}");
            return Err(KernelError::argument(op, argument, "finite values", got));
        }
        if !T::from_f64(largest * c.abs()).to_f64().is_finite() {
            let expected = format!("|{argument}| / reg within the range of its dtype");
            return Err(KernelError::argument(op, argument, expected, format!("{argument} up to {largest:e}")));
        }
        Ok(())
    }

    fn first_bad(&self) -> (usize, usize, f64) {
        let forbidding = self.sign > T::default();
        let refused = |v: &T| !(v.to_f64().is_finite() || (forbidding && v.to_f64() == f64::INFINITY));
        (0..self.rows)
            .find_map(|i| self.row(i).iter().position(refused).map(|j| (i, j, self.row(i)[j].to_f64())))
            .unwrap_or((0, 0, f64::NAN))
    }
}

fn nan_max(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// The largest finite magnitude of a row; NaN where there is a NaN, `-inf`, or (unless it may forbid cells) `+inf`.
struct Largest<'a, T>(&'a [T], bool);

impl<T: Real> Vectorized for Largest<'_, T> {
    type Output = f64;
    #[inline(always)]
    fn run<const FMA: bool>(self) -> f64 {
        let lowest = T::from_f64(f64::NEG_INFINITY);
        let infinity = T::from_f64(f64::INFINITY);
        let mut largest = T::ZERO_PANEL;
        let mut bad = false;
        for chunk in self.0.chunks(T::PANEL) {
            for (largest, &v) in largest.as_mut().iter_mut().zip(chunk) {
                bad |= !(v > lowest && (v < infinity || self.1));
                let magnitude = if v < T::default() { T::default() - v } else { v };
                *largest = if magnitude > *largest && magnitude < infinity { magnitude } else { *largest };
            }
        }
        let largest = largest.as_ref().iter().fold(0.0, |m: f64, v| m.max(v.to_f64()));
        if bad { f64::NAN } else { largest }
    }
}

impl<T: Transcendental> Cost<T> for Dense<'_, T> {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    fn cost_ns(&self) -> f64 {
        0.1 * size_of::<T>() as f64
    }

    #[inline(always)]
    fn logits<const FMA: bool>(&self, rows: Rows<T>, columns: Columns<'_, T>, cells: &mut [T]) {
        let slope = T::default() - columns.c * self.sign;
        for ((r, cells), shift) in cells.chunks_exact_mut(columns.g.len()).take(rows.count).enumerate().zip(rows.shift)
        {
            for_each_chunk_of_row(self.row(rows.first + r), columns.g, cells, |m, g, z| {
                for ((z, &m), &g) in z.iter_mut().zip(m).zip(g) {
                    *z = slope.mul_add_if::<FMA>(m, g + shift);
                }
            });
        }
    }

    #[inline(always)]
    fn powers<const FMA: bool>(&self, rows: Rows<T>, columns: Columns<'_, T>, cells: &mut [T]) -> [f64; TILE_ROWS] {
        let slope = T::default() - columns.c * self.sign;
        let mut sums = [0.0; TILE_ROWS];
        for ((r, cells), shift) in cells.chunks_exact_mut(columns.g.len()).take(rows.count).enumerate().zip(rows.shift)
        {
            let mut sum = T::ZERO_PANEL;
            for_each_chunk_of_row(self.row(rows.first + r), columns.g, cells, |m, g, e| {
                let sum = sum.as_mut();
                for lane in 0..T::PANEL {
                    let power = slope.mul_add_if::<FMA>(m[lane], g[lane] + shift).exp2_lane::<FMA>();
                    e[lane] = power;
                    sum[lane] = sum[lane] + power;
                }
            });
            sums[r] = T::sum_panel(&sum);
        }
        sums
    }

    #[inline(always)]
    fn costs<const FMA: bool>(&self, first: usize, count: usize, cells: &mut [T]) {
        for (r, cells) in cells.chunks_exact_mut(padded::<T>(self.columns)).take(count).enumerate() {
            let row = self.row(first + r);
            for (cell, &m) in cells.iter_mut().zip(row) {
                *cell = m * self.sign;
            }
            cells[row.len()..].fill(T::default());
        }
    }

    #[inline(always)]
    fn column_log_sums<const FMA: bool>(&self, first: usize, f: &[T], c: T, out: &mut [f64]) {
        let (slope, lowest) = (T::default() - c * self.sign, T::from_f64(f64::NEG_INFINITY));
        let width = out.len();
        let (mut peak, mut sum) = ([lowest; STRIP], [T::default(); STRIP]);
        let (peak, sum) = (&mut peak[..width], &mut sum[..width]);
        let mut next = [lowest; STRIP];
        let next = &mut next[..width];
        for block in (0..self.rows).step_by(STRIP_ROWS) {
            let rows = block..self.rows.min(block + STRIP_ROWS);
            next.copy_from_slice(peak);
            for i in rows.clone() {
                let m = &self.row(i)[first..first + width];
                for (peak, &m) in next.iter_mut().zip(m) {
                    let z = slope.mul_add_if::<FMA>(m, f[i]);
                    *peak = if z > *peak { z } else { *peak };
                }
            }
            for ((sum, old), &new) in sum.iter_mut().zip(peak.iter_mut()).zip(next.iter()) {
                // While nothing but -inf was seen the sum is zero, and -inf minus itself would be NaN.
                let factor = if *old > lowest { (*old - new).exp2_lane::<FMA>() } else { T::default() };
                *sum = *sum * factor;
                *old = new;
            }
            for i in rows {
                let m = &self.row(i)[first..first + width];
                for ((sum, &peak), &m) in sum.iter_mut().zip(peak.iter()).zip(m) {
                    let z = slope.mul_add_if::<FMA>(m, f[i]) - peak;
                    *sum = *sum + if peak > lowest { z.exp2_lane::<FMA>() } else { T::default() };
                }
            }
        }
        for ((out, &peak), &sum) in out.iter_mut().zip(peak.iter()).zip(sum.iter()) {
            *out = peak.to_f64() + sum.to_f64().log2();
        }
    }
}

/// Runs `body` over whole panels of a row; the last one sees zeros beyond the row's end.
#[inline(always)]
fn for_each_chunk_of_row<T: Real>(row: &[T], g: &[T], out: &mut [T], mut body: impl FnMut(&[T], &[T], &mut [T])) {
    let whole = row.len() / T::PANEL * T::PANEL;
    let panels = row.chunks_exact(T::PANEL).zip(g.chunks_exact(T::PANEL)).zip(out.chunks_exact_mut(T::PANEL));
    for ((row, g), out) in panels {
        body(row, g, out);
    }
    if whole < row.len() {
        let mut last = T::ZERO_PANEL;
        let last = last.as_mut();
        last[..row.len() - whole].copy_from_slice(&row[whole..]);
        body(last, &g[whole..][..T::PANEL], &mut out[whole..][..T::PANEL]);
    }
}

/// How far two points are apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// `|x - y|^2`
    SqEuclidean,
    /// `|x - y|`
    Euclidean,
    /// `1 - <x, y> / (|x| |y|)`
    Cosine,
}

/// Costs between two sets of points, never stored.
///
/// Squared distances come from inner products of centred points, so their absolute error is about `u` times the squared
/// distance from the centre; Euclidean ones from differences, because the root would magnify that error near zero.
pub struct Samples<T> {
    x: PackedRows<T>,
    y: PackedRows<T>,
    x_lengths: Vec<T>,
    y_lengths: Vec<T>,
    metric: Metric,
}

impl<T: Transcendental> Samples<T> {
    /// Points `x` of shape `(n, width)` and `y` of shape `(m, width)`.
    pub fn new(x: &[T], y: &[T], width: usize, metric: Metric, par: Par<'_>) -> Result<Self, KernelError> {
        let (n, m) = (x.len() / width.max(1), y.len() / width.max(1));
        let (x, y) = match metric {
            Metric::Cosine => (unit_rows(&scaled(x, width), width, par)?, unit_rows(&scaled(y, width), width, par)?),
            Metric::SqEuclidean | Metric::Euclidean => {
                let centre = centre(x, y, width);
                (shifted(x, &centre), shifted(y, &centre))
            }
        };
        let (x, y) = (PackedRows::new(x, n, par)?, PackedRows::new(y, m, par)?);
        let (x_lengths, mut y_lengths) = (x.squared_lengths(), y.squared_lengths());
        y_lengths.resize(padded::<T>(m), T::default());
        Ok(Self { x, y, x_lengths, y_lengths, metric })
    }

    /// The part of `-c M` in the potentials of the rows.
    #[inline(always)]
    fn row_part(&self, i: usize, c: T) -> T {
        match self.metric {
            Metric::SqEuclidean => T::default() - c * self.x_lengths[i],
            Metric::Euclidean => T::default(),
            Metric::Cosine => T::default() - c,
        }
    }

    /// The potentials of some rows with their part of `-c M`.
    #[inline(always)]
    fn shifts(&self, rows: Rows<T>, c: T) -> [T; TILE_ROWS] {
        std::array::from_fn(|r| rows.shift[r] + self.row_part(rows.first + r.min(rows.count - 1), c))
    }

    /// The part of `-c M` in the potentials of the columns.
    #[inline(always)]
    fn column_part(&self, j: usize, c: T) -> T {
        if self.metric == Metric::SqEuclidean { T::default() - c * self.y_lengths[j] } else { T::default() }
    }

    /// Calls `body(row of the tile, panel, what the tile holds)`: inner products, or squared distances.
    #[inline(always)]
    fn tiles<const FMA: bool>(&self, first: usize, count: usize, mut body: impl FnMut(usize, usize, &T::Panel)) {
        // A short last tile repeats its last row; the surplus results are not used.
        let rows: [&[T]; TILE_ROWS] = std::array::from_fn(|r| self.x.row(first + r.min(count - 1)));
        for panel in 0..self.y.padded() / T::PANEL {
            let columns = self.y.panel(panel);
            let tile = match self.metric {
                Metric::Euclidean => T::tile_distances::<FMA>(rows, columns),
                Metric::SqEuclidean | Metric::Cosine => T::tile_products::<FMA>(rows, columns),
            };
            for (r, row) in tile.iter().take(count).enumerate() {
                body(r, panel, row);
            }
        }
    }

    /// What a tile's entry is multiplied by; Euclidean distances need their root first.
    #[inline(always)]
    fn slope(&self, c: T) -> T {
        match self.metric {
            Metric::SqEuclidean => c + c,
            Metric::Euclidean => T::default() - c,
            Metric::Cosine => c,
        }
    }
}

fn centre<T: Real>(x: &[T], y: &[T], width: usize) -> Vec<f64> {
    let mut centre = vec![0.0; width];
    for row in x.chunks_exact(width.max(1)).chain(y.chunks_exact(width.max(1))) {
        for (c, v) in centre.iter_mut().zip(row) {
            *c += v.to_f64();
        }
    }
    let count = (x.len() + y.len()) as f64 / width as f64;
    for c in &mut centre {
        *c /= count;
    }
    centre
}

/// Rows over their largest magnitude, so that no square overflows or vanishes; rows of zeros stay.
fn scaled<T: Real>(x: &[T], width: usize) -> Vec<T> {
    x.chunks_exact(width.max(1))
        .flat_map(|row| {
            let largest = row.iter().fold(0.0, |m: f64, v| m.max(v.to_f64().abs()));
            let divisor = if largest > 0.0 { largest } else { 1.0 };
            row.iter().map(move |v| T::from_f64(v.to_f64() / divisor))
        })
        .collect()
}

fn shifted<T: Real>(x: &[T], centre: &[f64]) -> Vec<T> {
    x.chunks_exact(centre.len().max(1))
        .flat_map(|row| row.iter().zip(centre).map(|(v, c)| T::from_f64(v.to_f64() - c)))
        .collect()
}

impl<T: Transcendental> Cost<T> for Samples<T> {
    fn shape(&self) -> (usize, usize) {
        (self.x.count(), self.y.count())
    }

    fn cost_ns(&self) -> f64 {
        (0.15 + 0.01 * self.x.width() as f64) * size_of::<T>() as f64
    }

    fn prepare(&self, g: &mut [T], c: T) {
        for (j, g) in g.iter_mut().take(self.y.count()).enumerate() {
            *g = *g + self.column_part(j, c);
        }
    }

    #[inline(always)]
    fn logits<const FMA: bool>(&self, rows: Rows<T>, columns: Columns<'_, T>, cells: &mut [T]) {
        let (shift, slope) = (self.shifts(rows, columns.c), self.slope(columns.c));
        let root = self.metric == Metric::Euclidean;
        self.tiles::<FMA>(rows.first, rows.count, |r, panel, tile| {
            let (tile, g) = (tile.as_ref(), &columns.g[panel * T::PANEL..][..T::PANEL]);
            let cells = &mut cells[r * self.y.padded() + panel * T::PANEL..][..T::PANEL];
            for lane in 0..T::PANEL {
                let value = if root { tile[lane].root() } else { tile[lane] };
                cells[lane] = slope.mul_add_if::<FMA>(value, g[lane] + shift[r]);
            }
        });
    }

    #[inline(always)]
    fn powers<const FMA: bool>(&self, rows: Rows<T>, columns: Columns<'_, T>, cells: &mut [T]) -> [f64; TILE_ROWS] {
        let (shift, slope) = (self.shifts(rows, columns.c), self.slope(columns.c));
        let root = self.metric == Metric::Euclidean;
        let mut sums = [T::ZERO_PANEL; TILE_ROWS];
        self.tiles::<FMA>(rows.first, rows.count, |r, panel, tile| {
            let (tile, g) = (tile.as_ref(), &columns.g[panel * T::PANEL..][..T::PANEL]);
            let cells = &mut cells[r * self.y.padded() + panel * T::PANEL..][..T::PANEL];
            let sum = sums[r].as_mut();
            for lane in 0..T::PANEL {
                let value = if root { tile[lane].root() } else { tile[lane] };
                let power = slope.mul_add_if::<FMA>(value, g[lane] + shift[r]).exp2_lane::<FMA>();
                cells[lane] = power;
                sum[lane] = sum[lane] + power;
            }
        });
        std::array::from_fn(|r| T::sum_panel(&sums[r]))
    }

    #[inline(always)]
    fn costs<const FMA: bool>(&self, first: usize, count: usize, cells: &mut [T]) {
        let one = T::from_f64(1.0);
        self.tiles::<FMA>(first, count, |r, panel, tile| {
            let (tile, y) = (tile.as_ref(), &self.y_lengths[panel * T::PANEL..][..T::PANEL]);
            let cells = &mut cells[r * self.y.padded() + panel * T::PANEL..][..T::PANEL];
            for lane in 0..T::PANEL {
                cells[lane] = match self.metric {
                    Metric::SqEuclidean => {
                        let square = self.x_lengths[first + r] + y[lane] - (tile[lane] + tile[lane]);
                        // Rounding may leave a little on either side of zero.
                        if square > T::default() { square } else { T::default() }
                    }
                    Metric::Euclidean => tile[lane].root(),
                    Metric::Cosine => one - tile[lane],
                };
            }
        });
    }

    #[inline(always)]
    fn column_log_sums<const FMA: bool>(&self, first: usize, f: &[T], c: T, out: &mut [f64]) {
        let (slope, root) = (self.slope(c), self.metric == Metric::Euclidean);
        let lowest = T::from_f64(f64::NEG_INFINITY);
        let (n, m) = self.shape();
        let length = padded::<T>(n);
        exec::with_scratch::<T, _>((TILE_ROWS + 1) * length, |scratch| {
            let (rows, cells) = scratch.split_at_mut(length);
            rows.fill(lowest);
            for i in 0..n {
                rows[i] = f[i] + self.row_part(i, c);
            }
            for (tile, out) in out.chunks_mut(TILE_ROWS).enumerate() {
                let first = first + tile * TILE_ROWS;
                let columns: [&[T]; TILE_ROWS] = std::array::from_fn(|r| self.y.row((first + r).min(m - 1)));
                for panel in 0..length / T::PANEL {
                    let tile = match self.metric {
                        Metric::Euclidean => T::tile_distances::<FMA>(columns, self.x.panel(panel)),
                        Metric::SqEuclidean | Metric::Cosine => T::tile_products::<FMA>(columns, self.x.panel(panel)),
                    };
                    for (r, tile) in tile.iter().enumerate() {
                        let (tile, f) = (tile.as_ref(), &rows[panel * T::PANEL..][..T::PANEL]);
                        let cells = &mut cells[r * length + panel * T::PANEL..][..T::PANEL];
                        for lane in 0..T::PANEL {
                            let value = if root { tile[lane].root() } else { tile[lane] };
                            cells[lane] = slope.mul_add_if::<FMA>(value, f[lane]);
                        }
                    }
                }
                for ((r, out), cells) in out.iter_mut().enumerate().zip(cells.chunks_exact_mut(length)) {
                    *out = log_sum::<T, FMA>(cells) + self.column_part(first + r, c).to_f64();
                }
            }
        });
    }
}

/// The largest entry of whole panels; NaN entries are passed over.
#[inline(always)]
pub fn largest<T: Real>(z: &[T]) -> T {
    let mut peak = T::ZERO_PANEL;
    peak.as_mut().fill(T::from_f64(f64::NEG_INFINITY));
    for z in z.chunks_exact(T::PANEL) {
        let peak = peak.as_mut();
        for lane in 0..T::PANEL {
            peak[lane] = if z[lane] > peak[lane] { z[lane] } else { peak[lane] };
        }
    }
    peak.as_ref().iter().fold(T::from_f64(f64::NEG_INFINITY), |m, &v| if v > m { v } else { m })
}

/// `z <- 2^(z - peak)`, in whole panels; returns the sum.
#[inline(always)]
pub fn powers_in_place<T: Transcendental, const FMA: bool>(z: &mut [T], peak: T) -> f64 {
    let mut sum = T::ZERO_PANEL;
    for z in z.chunks_exact_mut(T::PANEL) {
        let sum = sum.as_mut();
        for lane in 0..T::PANEL {
            z[lane] = (z[lane] - peak).exp2_lane::<FMA>();
            sum[lane] = sum[lane] + z[lane];
        }
    }
    T::sum_panel(&sum)
}

/// `log2 sum 2^z`, in whole panels; writes over `z`.
#[inline(always)]
fn log_sum<T: Transcendental, const FMA: bool>(z: &mut [T]) -> f64 {
    let peak = largest(z);
    if peak.to_f64() == f64::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    powers_in_place::<T, FMA>(z, peak).log2() + peak.to_f64()
}
