//! Attention of every point of a grid over the window around it.
//!
//! Scores need no sums across lanes: keys are transposed row by row, so that a load takes one coordinate of all keys
//! of a window's row, from wherever the window begins. Weighted sums run along the values as they lie in memory.
//! A block owns some rows of the grid. In the backward pass these are queries and keys: queries of the rows around them
//! whose windows reach in are computed again, so that no two blocks add to the same key.

use crate::exec::{for_each_chunk, with_scratch};
use crate::simd::{Element, Real, Transcendental, Vectorized, dispatch};
use crate::{KernelError, Par};

const OP: &str = "neighborhood";
/// Queries whose weighted sums run side by side, to hide the latency of the additions.
const TILE: usize = 4;
/// Depths are padded to whole groups of lanes.
const GROUP: usize = 8;

/// The problem: `batch * heads` grids of `grid` points, each a row of `depth` numbers.
#[derive(Clone, Copy, Debug)]
pub struct Neighborhood {
    /// Number of instances.
    pub batch: usize,
    /// Attention heads per instance.
    pub heads: usize,
    /// Rows and columns of the grid.
    pub grid: [usize; 2],
    /// Length of a query, key and value.
    pub depth: usize,
    /// Rows and columns of a window, odd.
    pub kernel: [usize; 2],
    /// Distance between neighbours of a window.
    pub dilation: [usize; 2],
    /// Whether windows are shifted to stay inside the grid; else keys outside do not exist.
    pub clamp: bool,
    /// Factor of the inner products.
    pub scale: f64,
}

/// What attention is computed of.
#[derive(Clone, Copy)]
pub struct NeighborhoodInputs<'a, T> {
    /// Queries `(batch, heads, rows, columns, depth)`.
    pub q: &'a [T],
    /// Keys, as the queries.
    pub k: &'a [T],
    /// Values, as the queries.
    pub v: &'a [T],
    /// Added to the scores by relative position: `(heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1)`.
    pub bias: Option<&'a [T]>,
}

/// Where the gradients go.
pub struct NeighborhoodGradients<'a, T> {
    /// By the queries.
    pub q: &'a mut [T],
    /// By the keys.
    pub k: &'a mut [T],
    /// By the values.
    pub v: &'a mut [T],
    /// By the bias, where there is one.
    pub bias: Option<&'a mut [T]>,
}

/// One axis of the grid, ordered so that points that may see each other lie together.
///
/// Points at a distance that is no multiple of the dilation never meet. Ordered by residue, every window is a run, and
/// so are the points whose windows hold a given one.
struct Axis {
    /// Where the points of the order lie in the grid.
    places: Vec<usize>,
    /// First point of the window of each, and the one after its last.
    windows: Vec<(usize, usize)>,
    /// First point whose window holds each, and the one after the last.
    holders: Vec<(usize, usize)>,
    /// Length of the longest window.
    widest: usize,
    /// Relative positions run from `-reach` to `reach`.
    reach: usize,
    /// Relative positions of the bias before `-reach`, which no pair of points has.
    unused: usize,
}

impl Axis {
    fn new(size: usize, kernel: usize, dilation: usize, clamp: bool) -> Self {
        let radius = kernel / 2;
        let (mut places, mut windows) = (Vec::with_capacity(size), Vec::with_capacity(size));
        for residue in 0..dilation.min(size) {
            let first = places.len();
            places.extend((residue..size).step_by(dilation));
            let count = places.len() - first;
            windows.extend((0..count).map(|i| {
                let start = i.saturating_sub(radius);
                let (start, end) = if clamp {
                    let start = start.min(count - kernel);
                    (start, start + kernel)
                } else {
                    (start, i.saturating_add(radius + 1).min(count))
                };
                (first + start, first + end)
            }));
        }
        let holders =
            (0..size).map(|j| (windows.partition_point(|w| w.1 <= j), windows.partition_point(|w| w.0 <= j))).collect();
        let widest = windows.iter().map(|w| w.1 - w.0).max().unwrap_or(0);
        let reach = (kernel - 1).min(size.div_ceil(dilation).saturating_sub(1));
        Self { places, windows, holders, widest, reach, unused: kernel - 1 - reach }
    }

    fn len(&self) -> usize {
        self.places.len()
    }

    /// Number of relative positions that pairs of points have.
    fn relatives(&self) -> usize {
        2 * self.reach + 1
    }

    /// Number of relative positions that the bias has.
    fn table(&self) -> usize {
        self.relatives() + 2 * self.unused
    }

    /// Which of the positions that pairs have the window of a point begins at.
    fn relative(&self, point: usize) -> usize {
        self.windows[point].0 + self.reach - point
    }

    /// The smallest run that holds the windows of a run of points.
    fn seen(&self, points: (usize, usize)) -> (usize, usize) {
        (self.windows[points.0].0, self.windows[points.1 - 1].1)
    }
}

/// What all blocks of a call share.
struct Plan {
    y: Axis,
    x: Axis,
    heads: usize,
    depth: usize,
    padded: usize,
    /// Scores per row of a window, in whole groups of lanes.
    width: usize,
    /// Length of a row of transposed keys: windows read past their last key.
    stride: usize,
    /// Length of a row of the table of biases, which is read past its end as well.
    bias_stride: usize,
    scale: f64,
}

/// Lanes that scores of a window's row are computed in.
fn lanes(kernel: usize) -> usize {
    match kernel {
        0..=4 => 4,
        5..=8 => 8,
        _ => 16,
    }
}

impl Plan {
    fn new<T>(of: &Neighborhood, inputs: &NeighborhoodInputs<'_, T>) -> Result<Self, KernelError> {
        let sizes = [of.batch, of.heads, of.grid[0], of.grid[1], of.depth];
        let total = sizes.iter().try_fold(1_usize, |product, &size| product.checked_mul(size));
        let Some(total) = total.filter(|&total| total > 0) else {
            return Err(KernelError::argument(OP, "q", "sizes of at least one number", format!("{sizes:?}")));
        };
        KernelError::check_len(OP, "q", total, inputs.q.len())?;
        KernelError::check_len(OP, "k", total, inputs.k.len())?;
        KernelError::check_len(OP, "v", total, inputs.v.len())?;
        for axis in 0..2 {
            let (size, kernel, dilation) = (of.grid[axis], of.kernel[axis], of.dilation[axis]);
            if kernel.is_multiple_of(2) || kernel > 1 << 30 {
                return Err(KernelError::argument(OP, "kernel_size", "odd numbers", kernel.to_string()));
            }
            if dilation == 0 {
                return Err(KernelError::argument(OP, "dilation", "numbers >= 1", "0"));
            }
            if of.clamp && kernel.checked_mul(dilation).is_none_or(|span| span > size) {
                let expected = format!("kernel_size * dilation <= {size}, the size of the grid");
                return Err(KernelError::argument(OP, "kernel_size", expected, format!("{kernel} * {dilation}")));
            }
        }
        if !of.scale.is_finite() {
            return Err(KernelError::argument(OP, "scale", "a finite number", of.scale.to_string()));
        }
        if let Some(bias) = inputs.bias {
            let table = of.kernel.iter().try_fold(of.heads, |product, &k| product.checked_mul(2 * k - 1));
            KernelError::check_len(OP, "bias", table.unwrap_or(usize::MAX), bias.len())?;
        }
        let [y, x] = [0, 1].map(|axis| Axis::new(of.grid[axis], of.kernel[axis], of.dilation[axis], of.clamp));
        let width = x.widest.next_multiple_of(lanes(x.widest));
        Ok(Self {
            stride: x.len() + width,
            bias_stride: x.relatives() + width,
            y,
            x,
            heads: of.heads,
            depth: of.depth,
            padded: of.depth.next_multiple_of(GROUP),
            width,
            scale: of.scale,
        })
    }

    /// Points per grid.
    fn points(&self) -> usize {
        self.y.len() * self.x.len()
    }

    /// Length of the padded rows of one row of the grid.
    fn row(&self) -> usize {
        self.x.len() * self.padded
    }

    /// Scores of one query.
    fn scores(&self) -> usize {
        self.y.widest * self.width
    }

    /// Rows per block: enough blocks for all threads, but not so few rows that those around them are most of the work.
    fn band(&self, grids: usize) -> usize {
        (grids * self.y.len()).div_ceil(32).clamp(self.y.widest.max(4), 64.max(self.y.widest))
    }

    /// Numbers of the table of biases.
    fn biases(&self) -> usize {
        self.y.relatives() * self.bias_stride
    }

    /// Estimated nanoseconds of the forward pass.
    fn cost(&self, grids: usize) -> f64 {
        (grids * self.points() * self.scores()) as f64 * (1.0 + self.depth as f64 / 16.0)
    }
}

/// Some rows of one grid, and what a block writes of them.
struct Band<R> {
    /// Which grid, in order of instances and heads.
    grid: usize,
    /// The first row, in the order of the axis.
    first: usize,
    rows: Vec<R>,
}

impl<R> Band<R> {
    /// Cuts rows of grids, which come in the order of memory, into bands.
    fn cut(rows: impl Iterator<Item = R>, plan: &Plan, grids: usize) -> Vec<Self> {
        let band = plan.band(grids);
        let mut rows = rows;
        let mut bands = Vec::new();
        for grid in 0..grids {
            let mut own: Vec<Option<R>> = rows.by_ref().take(plan.y.len()).map(Some).collect();
            for first in (0..plan.y.len()).step_by(band) {
                let places = &plan.y.places[first..plan.y.len().min(first + band)];
                bands.push(Self { grid, first, rows: places.iter().filter_map(|&place| own[place].take()).collect() });
            }
        }
        bands
    }

    fn span(&self) -> (usize, usize) {
        (self.first, self.first + self.rows.len())
    }
}

/// Rows of one grid in memory.
#[derive(Clone, Copy)]
struct Source<'a, T> {
    data: &'a [T],
    plan: &'a Plan,
}

impl<'a, T: Element> Source<'a, T> {
    fn new(data: &'a [T], grid: usize, plan: &'a Plan) -> Self {
        let len = plan.points() * plan.depth;
        Self { data: &data[grid * len..][..len], plan }
    }

    /// Row `y` of the order, each point padded with zeros.
    #[inline(always)]
    fn load(&self, y: usize, out: &mut [T::Acc]) {
        let Plan { depth, padded, .. } = *self.plan;
        let row = &self.data[self.plan.y.places[y] * self.plan.x.len() * depth..];
        for (&place, out) in self.plan.x.places.iter().zip(out.chunks_exact_mut(padded)) {
            T::load(&row[place * depth..][..depth], &mut out[..depth]);
            out[depth..].fill(T::Acc::default());
        }
    }
}

/// Loaded rows with their points along memory: coordinate `d` of point `x` of row `y` lies at
/// `d * distance + y * stride + x`.
#[derive(Clone, Copy)]
struct Planes<'a, R> {
    data: &'a [R],
    distance: usize,
}

impl<R: Real> Planes<'_, R> {
    /// Distance of the planes of some rows; planes must not share few sets of a cache.
    fn distance(rows: usize, plan: &Plan) -> usize {
        (rows * plan.stride).next_multiple_of(32) + 16
    }

    /// Writes a row into memory for planes.
    fn set(data: &mut [R], distance: usize, y: usize, row: &[R], plan: &Plan) {
        for (x, point) in row.chunks_exact(plan.padded).enumerate() {
            for (&value, plane) in point[..plan.depth].iter().zip(data.chunks_exact_mut(distance)) {
                plane[y * plan.stride + x] = value;
            }
        }
    }

    /// From a column of a row on.
    #[inline(always)]
    fn from(&self, y: usize, x: usize, plan: &Plan) -> Self {
        Self { data: &self.data[y * plan.stride + x..], ..*self }
    }
}

/// Numbers of one row, which lie as the grid does, in the order of the axis.
fn load_numbers<R: Copy>(row: &[R], plan: &Plan, out: &mut [R]) {
    for (out, &place) in out.iter_mut().zip(&plan.x.places) {
        *out = row[place];
    }
}

/// The biases of a head, in units of powers of two; zeros where there are none.
#[inline(always)]
fn load_bias<T: Element>(bias: Option<&[T]>, head: usize, plan: &Plan, out: &mut [T::Acc]) {
    out.fill(T::Acc::default());
    if let Some(bias) = bias {
        let unit = T::Acc::from_f64(std::f64::consts::LOG2_E);
        let (rows, columns) = (plan.y.table(), plan.x.table());
        let table = &bias[(head * rows + plan.y.unused) * columns + plan.x.unused..];
        for (row, out) in table.chunks(columns).zip(out.chunks_exact_mut(plan.bias_stride)) {
            let used = &mut out[..plan.x.relatives()];
            T::load(&row[..used.len()], used);
            for value in used {
                *value = *value * unit;
            }
        }
    }
}

/// `acc += factor * lanes`.
#[inline(always)]
fn add<R: Real, const FMA: bool, const L: usize>(acc: &mut [R; L], lanes: &[R], factor: R) {
    let lanes = &lanes[..L];
    for lane in 0..L {
        acc[lane] = lanes[lane].mul_add_if::<FMA>(factor, acc[lane]);
    }
}

// Accumulators have names, because an array of them is not kept in registers for every number of lanes.
macro_rules! dots {
    ($name:ident, $count:literal, $($acc:ident $row:literal)+) => {
        /// Inner products of `point` with runs of `L` points in rows of planes, into rows of `plan.width`.
        #[inline(always)]
        fn $name<R: Real, const FMA: bool, const L: usize>(
            point: &[R],
            planes: Planes<'_, R>,
            plan: &Plan,
            out: &mut [R],
        ) -> usize {
            $(let mut $acc = [R::default(); L];)+
            let stride = plan.stride;
            for (d, &value) in point.iter().enumerate() {
                let runs = &planes.data[d * planes.distance..][..($count - 1) * stride + L];
                $(add::<R, FMA, L>(&mut $acc, &runs[$row * stride..$row * stride + L], value);)+
            }
            for (out, acc) in out.chunks_mut(plan.width).zip([$($acc),+]) {
                out[..L].copy_from_slice(&acc);
            }
            $count
        }
    };
}
dots!(dots_1, 1, a 0);
dots!(dots_2, 2, a 0 b 1);
dots!(dots_3, 3, a 0 b 1 c 2);
dots!(dots_4, 4, a 0 b 1 c 2 d 3);
dots!(dots_7, 7, a 0 b 1 c 2 d 3 e 4 f 5 g 6);

/// Inner products of `point` with the points from `column` on in `rows`, into rows of `plan.width`.
#[inline(always)]
fn products<R: Real, const FMA: bool, const L: usize>(
    point: &[R],
    planes: Planes<'_, R>,
    rows: (usize, usize),
    column: usize,
    plan: &Plan,
    out: &mut [R],
) {
    let point = &point[..plan.depth];
    for chunk in (0..plan.width).step_by(L) {
        let mut row = rows.0;
        while row < rows.1 {
            let out = &mut out[(row - rows.0) * plan.width + chunk..];
            let planes = planes.from(row, column + chunk, plan);
            row += match rows.1 - row {
                1 => dots_1::<R, FMA, L>(point, planes, plan, out),
                2 => dots_2::<R, FMA, L>(point, planes, plan, out),
                3 => dots_3::<R, FMA, L>(point, planes, plan, out),
                4..7 => dots_4::<R, FMA, L>(point, planes, plan, out),
                _ => dots_7::<R, FMA, L>(point, planes, plan, out),
            };
        }
    }
}

/// Inner products to scores in units of powers of two: scaled, biased, and minus infinity behind the window's keys.
///
/// Returns the largest of each lane; NaN is passed over.
#[inline(always)]
fn finish<R: Real, const FMA: bool, const L: usize>(scores: &mut [R], keys: usize, bias: &[R], plan: &Plan) -> [R; L] {
    let scale = R::from_f64(plan.scale * std::f64::consts::LOG2_E);
    let nothing = R::from_f64(f64::NEG_INFINITY);
    let (zero, one) = (R::default(), R::from_f64(1.0));
    let mut most = [nothing; L];
    for chunk in 0..plan.width / L {
        let kept: [R; L] = std::array::from_fn(|lane| if chunk * L + lane < keys { one } else { zero });
        for (row, bias) in scores.chunks_exact_mut(plan.width).zip(bias.chunks(plan.bias_stride)) {
            let (row, bias) = (&mut row[chunk * L..][..L], &bias[chunk * L..][..L]);
            for lane in 0..L {
                row[lane] = row[lane].mul_add_if::<FMA>(scale, bias[lane]);
            }
            for lane in 0..L {
                row[lane] = if kept[lane] > zero { row[lane] } else { nothing };
            }
            for lane in 0..L {
                most[lane] = if row[lane] > most[lane] { row[lane] } else { most[lane] };
            }
        }
    }
    most
}

/// A query's window among loaded rows.
#[derive(Clone, Copy)]
struct View<'a, R> {
    /// Number of rows and columns of the window.
    rows: usize,
    columns: usize,
    /// Offset of its first point.
    at: usize,
    /// Weights of its points.
    weights: &'a [R],
    /// Factor of their sum.
    factor: R,
}

macro_rules! weigh {
    ($name:ident, $lanes:ident, $count:literal, $($acc:ident)+) => {
        /// `out = factor * sum_j weights_j values_j` over the windows of queries of equal shape.
        #[inline(always)]
        fn $name<R: Real, const FMA: bool>(
            views: [View<'_, R>; $count],
            values: &[R],
            plan: &Plan,
            out: &mut [R],
        ) {
            let mut depth = 0;
            while depth < plan.padded {
                depth += match plan.padded - depth {
                    32.. => $lanes::<R, FMA, 32>(views, values, depth, plan, out),
                    16.. => $lanes::<R, FMA, 16>(views, values, depth, plan, out),
                    _ => $lanes::<R, FMA, GROUP>(views, values, depth, plan, out),
                };
            }
        }

        /// The lanes from `depth` on; returns their number.
        #[inline(always)]
        fn $lanes<R: Real, const FMA: bool, const L: usize>(
            views: [View<'_, R>; $count],
            values: &[R],
            depth: usize,
            plan: &Plan,
            out: &mut [R],
        ) -> usize {
            let View { rows, columns, .. } = views[0];
            let ([$($acc),+], points) = (views, (columns - 1) * plan.padded + L);
            $(let mut $acc = ([R::default(); L], $acc);)+
            for row in 0..rows {
                $(let $acc = (
                    &mut $acc.0,
                    &values[$acc.1.at + row * plan.row() + depth..][..points],
                    &$acc.1.weights[row * plan.width..][..columns],
                );)+
                for column in 0..columns {
                    $(add::<R, FMA, L>($acc.0, &$acc.1[column * plan.padded..], $acc.2[column]);)+
                }
            }
            for (out, (sums, of)) in out.chunks_exact_mut(plan.padded).zip([$($acc),+]) {
                for (out, sum) in out[depth..][..L].iter_mut().zip(sums) {
                    *out = sum * of.factor;
                }
            }
            L
        }
    };
}
weigh!(weigh_one, weigh_one_lanes, 1, a);
weigh!(weigh_tile, weigh_tile_lanes, 4, a b c d);

/// Weighted sums over the windows of all points of row `y`, whose weights lie `plan.scores()` apart.
///
/// `values` are the loaded rows from `origin` on.
#[inline(always)]
fn weigh_row<R: Real, const FMA: bool>(
    weights: &[R],
    values: &[R],
    (y, origin): (usize, usize),
    plan: &Plan,
    factors: &[R],
    out: &mut [R],
) {
    let (top, bottom) = plan.y.windows[y];
    let view = |x: usize| {
        let (left, right) = plan.x.windows[x];
        let (rows, columns) = (bottom - top, right - left);
        let at = (top - origin) * plan.row() + left * plan.padded;
        View { rows, columns, at, weights: &weights[x * plan.scores()..][..plan.scores()], factor: factors[x] }
    };
    for first in (0..plan.x.len()).step_by(TILE) {
        let used = TILE.min(plan.x.len() - first);
        let out = &mut out[first * plan.padded..][..used * plan.padded];
        // A short last tile repeats its last point; the surplus is not used.
        let views: [View<'_, R>; TILE] = std::array::from_fn(|i| view(first + i.min(used - 1)));
        if used == TILE && views.iter().all(|view| view.columns == views[0].columns) {
            weigh_tile::<R, FMA>(views, values, plan, out);
        } else {
            for (view, out) in views.into_iter().zip(out.chunks_exact_mut(plan.padded)) {
                weigh_one::<R, FMA>([view], values, plan, out);
            }
        }
    }
}

/// Rounds a padded row of points into the grid's row.
#[inline(always)]
fn store_row<T: Element>(row: &[T::Acc], plan: &Plan, out: &mut [T]) {
    for (&place, point) in plan.x.places.iter().zip(row.chunks_exact(plan.padded)) {
        T::store(&point[..plan.depth], &mut out[place * plan.depth..][..plan.depth]);
    }
}

/// `out_i = sum_j softmax_j(scale q_i . k_j + bias[j - i]) v_j` over the window of each point `i`, and the natural
/// logarithm of the sum of the exponentials.
///
/// Where every score is minus infinity the output is 0 and the logarithm minus infinity. Half types are computed in
/// `f32` and rounded once. A score carries an error of at most `(depth + 3) * u * (scale * sum |q k| + |bias|)`, with
/// `u` the unit roundoff, an output the errors of its scores times `2 max |v|` and `(keys + 4) * u * max |v|` more.
pub fn neighborhood<T: Element<Acc: Transcendental>>(
    inputs: NeighborhoodInputs<'_, T>,
    of: &Neighborhood,
    out: &mut [T],
    lse: &mut [T::Acc],
    par: Par<'_>,
) -> Result<(), KernelError> {
    let plan = Plan::new(of, &inputs)?;
    KernelError::check_len(OP, "out", inputs.q.len(), out.len())?;
    KernelError::check_len(OP, "lse", inputs.q.len() / of.depth, lse.len())?;
    let grids = of.batch * of.heads;
    let rows = out.chunks_exact_mut(plan.x.len() * of.depth).zip(lse.chunks_exact_mut(plan.x.len()));
    let mut bands = Band::cut(rows, &plan, grids);
    for_each_chunk(par, &mut bands, 1, plan.cost(grids), |_, bands| {
        for band in bands {
            forward(inputs, &plan, band);
        }
    })
}

/// The rows of one band.
fn forward<T: Element<Acc: Transcendental>>(
    inputs: NeighborhoodInputs<'_, T>,
    plan: &Plan,
    band: &mut Band<(&mut [T], &mut [T::Acc])>,
) {
    let (top, bottom) = plan.y.seen(band.span());
    let (loaded, points, row_len) = (bottom - top, plan.x.len(), plan.row());
    let distance = Planes::<T::Acc>::distance(loaded, plan);
    let scratch = plan.depth * distance + (loaded + 1) * row_len + plan.biases() + points * (plan.scores() + 3);
    // Around what is vectorised, not in it: closures are compiled without its instructions.
    with_scratch(scratch, |memory| {
        let (keys, memory) = memory.split_at_mut(plan.depth * distance);
        let (values, memory) = memory.split_at_mut(loaded * row_len);
        let (bias, memory) = memory.split_at_mut(plan.biases());
        let (row, memory) = memory.split_at_mut(row_len);
        let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(|data| Source::new(data, band.grid, plan));
        load_bias(inputs.bias, band.grid % plan.heads, plan, bias);
        for (i, values) in values.chunks_exact_mut(row_len).enumerate() {
            k.load(top + i, row);
            Planes::set(keys, distance, i, row, plan);
            v.load(top + i, values);
        }
        let keys = Planes { data: keys, distance };
        for (y, (out, lse)) in (band.first..).zip(&mut band.rows) {
            q.load(y, row);
            dispatch(Forward { place: (y, top), plan, keys, values, bias, row, memory });
            store_row(row, plan, out);
            for (&place, &total) in plan.x.places.iter().zip(&*memory) {
                lse[place] = total;
            }
        }
    });
}

/// One row of queries.
struct Forward<'a, R> {
    /// Which row, and which is the first of the loaded keys and values.
    place: (usize, usize),
    plan: &'a Plan,
    keys: Planes<'a, R>,
    values: &'a [R],
    bias: &'a [R],
    /// Receives the outputs.
    row: &'a mut [R],
    /// Receives the logarithms, one for each query; the rest is for three numbers and the scores of each.
    memory: &'a mut [R],
}

impl<R: Transcendental> Vectorized for Forward<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        match lanes(self.plan.x.widest) {
            4 => self.row::<FMA, 4>(),
            8 => self.row::<FMA, 8>(),
            _ => self.row::<FMA, 16>(),
        }
    }
}

impl<R: Transcendental> Forward<'_, R> {
    #[inline(always)]
    fn row<const FMA: bool, const L: usize>(self) {
        let Self { place, plan, keys, values, bias, row, memory } = self;
        let (totals, memory) = memory.split_at_mut(plan.x.len());
        let (peaks, memory) = memory.split_at_mut(plan.x.len());
        let (factors, weights) = memory.split_at_mut(plan.x.len());
        let (y, top) = place;
        let (above, below) = plan.y.windows[y];
        let bias = &bias[plan.y.relative(y) * plan.bias_stride..];
        let points = row.chunks_exact(plan.padded).zip(weights.chunks_exact_mut(plan.scores()));
        for (x, (point, scores)) in points.enumerate() {
            let (left, right) = plan.x.windows[x];
            let scores = &mut scores[..(below - above) * plan.width];
            products::<R, FMA, L>(point, keys, (above - top, below - top), left, plan, scores);
            let bias = &bias[plan.x.relative(x)..];
            (peaks[x], totals[x]) = softmax::<R, FMA, L>(scores, right - left, bias, plan);
            let (zero, one) = (R::default(), R::from_f64(1.0));
            factors[x] = if totals[x] == zero { zero } else { one / totals[x] };
        }
        weigh_row::<R, FMA>(weights, values, place, plan, factors, row);
        let unit = R::from_f64(std::f64::consts::LN_2);
        for (total, &peak) in totals.iter_mut().zip(&*peaks) {
            *total = peak.mul_add_if::<FMA>(unit, total.log_lane::<FMA>());
        }
    }
}

/// Inner products to exponentials of scores less the largest, which is returned with the sum.
#[inline(always)]
fn softmax<R: Transcendental, const FMA: bool, const L: usize>(
    scores: &mut [R],
    keys: usize,
    bias: &[R],
    plan: &Plan,
) -> (R, R) {
    let most = finish::<R, FMA, L>(scores, keys, bias, plan);
    let nothing = R::from_f64(f64::NEG_INFINITY);
    let peak = most.into_iter().fold(nothing, |a, b| if b > a { b } else { a });
    // Without any finite score the exponentials are 0, or NaN where a score is.
    let peak = if peak == nothing { R::default() } else { peak };
    let mut total = [R::default(); L];
    for group in scores.as_chunks_mut::<L>().0 {
        for lane in 0..L {
            group[lane] = (group[lane] - peak).exp2_lane::<FMA>();
            total[lane] = total[lane] + group[lane];
        }
    }
    (peak, total.into_iter().fold(R::default(), |a, b| a + b))
}

/// The gradients of [`neighborhood`] by all its inputs, from its results and the gradients by them.
///
/// Each key collects from the queries around it in order of rows; the gradient by the bias is summed in `f64`.
pub fn neighborhood_backward<T: Element<Acc: Transcendental>>(
    inputs: NeighborhoodInputs<'_, T>,
    of: &Neighborhood,
    (out, lse): (&[T], &[T::Acc]),
    (grad_out, grad_lse): (&[T], Option<&[T::Acc]>),
    grads: NeighborhoodGradients<'_, T>,
    par: Par<'_>,
) -> Result<(), KernelError> {
    let plan = Plan::new(of, &inputs)?;
    let total = inputs.q.len();
    KernelError::check_len(OP, "out", total, out.len())?;
    KernelError::check_len(OP, "lse", total / of.depth, lse.len())?;
    KernelError::check_len(OP, "grad_out", total, grad_out.len())?;
    if let Some(grad_lse) = grad_lse {
        KernelError::check_len(OP, "grad_lse", total / of.depth, grad_lse.len())?;
    }
    KernelError::check_len(OP, "grad_q", total, grads.q.len())?;
    KernelError::check_len(OP, "grad_k", total, grads.k.len())?;
    KernelError::check_len(OP, "grad_v", total, grads.v.len())?;
    let table = inputs.bias.map_or(0, <[T]>::len);
    KernelError::check_len(OP, "grad_bias", table, grads.bias.as_ref().map_or(0, |grad| grad.len()))?;
    let grids = of.batch * of.heads;
    let len = plan.x.len() * of.depth;
    let rows = grads.q.chunks_exact_mut(len).zip(grads.k.chunks_exact_mut(len)).zip(grads.v.chunks_exact_mut(len));
    let bands = Band::cut(rows.map(|((q, k), v)| [q, k, v]), &plan, grids);
    let per_head = table / of.heads;
    let mut bands: Vec<_> = bands.into_iter().map(|band| (band, vec![0.0; per_head])).collect();
    let results = Results { out, lse, grad_out, grad_lse };
    for_each_chunk(par, &mut bands, 1, 3.0 * plan.cost(grids), |_, bands| {
        for (band, by_bias) in bands {
            backward(inputs, results, &plan, band, by_bias);
        }
    })?;
    if let Some(grad) = grads.bias {
        let mut sums = vec![0.0; grad.len()];
        for (band, by_bias) in &bands {
            for (sum, part) in sums[band.grid % of.heads * per_head..].iter_mut().zip(by_bias) {
                *sum += part;
            }
        }
        let wide: Vec<_> = sums.into_iter().map(T::Acc::from_f64).collect();
        T::store(&wide, grad);
    }
    Ok(())
}

/// What the forward pass returned, and the gradients by it.
#[derive(Clone, Copy)]
struct Results<'a, T: Element> {
    out: &'a [T],
    lse: &'a [T::Acc],
    grad_out: &'a [T],
    grad_lse: Option<&'a [T::Acc]>,
}

/// The rows of one band, as queries and as keys.
fn backward<T: Element<Acc: Transcendental>>(
    inputs: NeighborhoodInputs<'_, T>,
    results: Results<'_, T>,
    plan: &Plan,
    band: &mut Band<[&mut [T]; 3]>,
    by_bias: &mut [f64],
) {
    let own = band.span();
    let (top, bottom) = plan.y.seen(own);
    let (loaded, points, row_len) = (bottom - top, plan.x.len(), plan.row());
    let distance = Planes::<T::Acc>::distance(loaded, plan);
    let (planes_len, own_len) = (plan.depth * distance, band.rows.len() * row_len);
    let rows_len = loaded * row_len + 2 * own_len + 3 * row_len;
    let scratch = 2 * planes_len + rows_len + plan.biases() + points * (2 * plan.scores() + 3);
    with_scratch(scratch, |memory| {
        let (key_planes, memory) = memory.split_at_mut(planes_len);
        let (value_planes, memory) = memory.split_at_mut(planes_len);
        let (keys, memory) = memory.split_at_mut(loaded * row_len);
        let (by_key, memory) = memory.split_at_mut(own_len);
        let (by_value, memory) = memory.split_at_mut(own_len);
        let (bias, memory) = memory.split_at_mut(plan.biases());
        let (query, memory) = memory.split_at_mut(row_len);
        let (grad, memory) = memory.split_at_mut(row_len);
        let (row, memory) = memory.split_at_mut(row_len);
        let (lse, memory) = memory.split_at_mut(points);
        let (grad_lse, memory) = memory.split_at_mut(points);
        by_key.fill(T::Acc::default());
        by_value.fill(T::Acc::default());
        grad_lse.fill(T::Acc::default());
        load_bias(inputs.bias, band.grid % plan.heads, plan, bias);
        let [q, k, v, out, grad_out] = [inputs.q, inputs.k, inputs.v, results.out, results.grad_out]
            .map(|data| Source::new(data, band.grid, plan));
        for (i, keys) in keys.chunks_exact_mut(row_len).enumerate() {
            k.load(top + i, keys);
            Planes::set(key_planes, distance, i, keys, plan);
            v.load(top + i, row);
            Planes::set(value_planes, distance, i, row, plan);
        }
        let planes = [&*key_planes, &*value_planes].map(|data| Planes { data, distance });
        for y in plan.y.holders[own.0].0..plan.y.holders[own.1 - 1].1 {
            q.load(y, query);
            grad_out.load(y, grad);
            out.load(y, row);
            let at = band.grid * plan.points() + plan.y.places[y] * points;
            load_numbers(&results.lse[at..][..points], plan, lse);
            if let Some(given) = results.grad_lse {
                load_numbers(&given[at..][..points], plan, grad_lse);
            }
            let (place, queries, sums) = ((y, top), [&*query, grad, lse, grad_lse], [&mut *by_key, by_value]);
            dispatch(Backward { place, own, plan, keys, planes, bias, queries, row, memory, sums, by_bias });
            if (own.0..own.1).contains(&y) {
                store_row(row, plan, band.rows[y - own.0][0]);
            }
        }
        let scale = T::Acc::from_f64(plan.scale);
        for value in &mut *by_key {
            *value = *value * scale;
        }
        for (i, rows) in band.rows.iter_mut().enumerate() {
            store_row(&by_key[i * row_len..][..row_len], plan, rows[1]);
            store_row(&by_value[i * row_len..][..row_len], plan, rows[2]);
        }
    });
}

/// What one row of queries sends to the keys and values of a band, and receives itself if it belongs to it.
struct Backward<'a, R> {
    /// Which row, and which is the first of the loaded keys and values.
    place: (usize, usize),
    /// The rows of the band.
    own: (usize, usize),
    plan: &'a Plan,
    keys: &'a [R],
    /// Of keys and values.
    planes: [Planes<'a, R>; 2],
    bias: &'a [R],
    /// Queries, gradients by outputs, logarithms, and gradients by those.
    queries: [&'a [R]; 4],
    /// The outputs, which become the gradients by the queries.
    row: &'a mut [R],
    /// For the scores of all queries, twice, and a number for each.
    memory: &'a mut [R],
    /// Gradients by the band's keys and values.
    sums: [&'a mut [R]; 2],
    by_bias: &'a mut [f64],
}

impl<R: Transcendental> Vectorized for Backward<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run<const FMA: bool>(self) {
        match lanes(self.plan.x.widest) {
            4 => self.row::<FMA, 4>(),
            8 => self.row::<FMA, 8>(),
            _ => self.row::<FMA, 16>(),
        }
    }
}

impl<R: Transcendental> Backward<'_, R> {
    #[inline(always)]
    fn row<const FMA: bool, const L: usize>(self) {
        let Self { place, own, plan, keys, planes, bias, queries, row, memory, sums, by_bias } = self;
        let [query, grad, lse, grad_lse] = queries;
        let [by_key, by_value] = sums;
        let (p, memory) = memory.split_at_mut(plan.x.len() * plan.scores());
        let (ds, scales) = memory.split_at_mut(plan.x.len() * plan.scores());
        scales.fill(R::from_f64(plan.scale));
        let (y, top) = place;
        let (above, below) = plan.y.windows[y];
        // Of the window's rows, a query of another band needs those that are keys of this one.
        let mine = own.0 <= y && y < own.1;
        let first = if mine { above } else { above.max(own.0) };
        let last = if mine { below } else { below.min(own.1) };
        let span = (first - above) * plan.width..(last - above) * plan.width;
        let bias = &bias[(plan.y.relative(y) + first - above) * plan.bias_stride..];
        for x in 0..plan.x.len() {
            let (left, right) = plan.x.windows[x];
            let point = x * plan.padded..(x + 1) * plan.padded;
            let (query, grad, out) = (&query[point.clone()], &grad[point.clone()], &row[point]);
            let p = &mut p[x * plan.scores()..][span.clone()];
            let ds = &mut ds[x * plan.scores()..][span.clone()];
            let rows = (first - top, last - top);
            products::<R, FMA, L>(query, planes[0], rows, left, plan, p);
            products::<R, FMA, L>(grad, planes[1], rows, left, plan, ds);
            let delta = R::from_f64(dot(grad, out)) - grad_lse[x];
            let bias = &bias[plan.x.relative(x)..];
            differentiate::<R, FMA, L>(p, ds, (lse[x], delta), right - left, bias, plan);
        }
        if mine {
            weigh_row::<R, FMA>(ds, keys, place, plan, scales, row);
            if !by_bias.is_empty() {
                add_to_bias(ds, y, plan, by_bias);
            }
        }
        for key in first.max(own.0)..last.min(own.1) {
            let sums = (key - own.0) * plan.row()..(key + 1 - own.0) * plan.row();
            let weights = (&ds[(key - above) * plan.width..], &p[(key - above) * plan.width..]);
            collect_all::<R, FMA>(weights, (query, grad), plan, &mut by_key[sums.clone()], &mut by_value[sums]);
        }
    }
}

/// Sum of the products of two padded points.
#[inline(always)]
fn dot<R: Real>(a: &[R], b: &[R]) -> f64 {
    let mut acc = [R::default(); GROUP];
    for (a, b) in a.as_chunks::<GROUP>().0.iter().zip(b.as_chunks::<GROUP>().0) {
        for lane in 0..GROUP {
            acc[lane] = acc[lane] + a[lane] * b[lane];
        }
    }
    acc.iter().map(|v| v.to_f64()).sum()
}

/// `p`: inner products to probabilities; `ds`: gradients by probabilities to those by scores.
#[inline(always)]
fn differentiate<R: Transcendental, const FMA: bool, const L: usize>(
    p: &mut [R],
    ds: &mut [R],
    (lse, delta): (R, R),
    keys: usize,
    bias: &[R],
    plan: &Plan,
) {
    // Without any finite score the probabilities are 0.
    let lse = if lse == R::from_f64(f64::NEG_INFINITY) { R::default() } else { lse };
    let lse = lse * R::from_f64(std::f64::consts::LOG2_E);
    finish::<R, FMA, L>(p, keys, bias, plan);
    for (p, ds) in p.as_chunks_mut::<L>().0.iter_mut().zip(ds.as_chunks_mut::<L>().0) {
        for value in p.iter_mut() {
            *value = (*value - lse).exp2_lane::<FMA>();
        }
        for lane in 0..L {
            ds[lane] = p[lane] * (ds[lane] - delta);
        }
    }
}

/// Adds the gradients by the scores of row `y` to those of the relative positions.
#[inline(always)]
fn add_to_bias<R: Real>(ds: &[R], y: usize, plan: &Plan, by_bias: &mut [f64]) {
    let columns = plan.x.table();
    let (above, below) = plan.y.windows[y];
    for (x, ds) in ds.chunks_exact(plan.scores()).enumerate() {
        let (left, right) = plan.x.windows[x];
        let table = by_bias[(plan.y.unused + plan.y.relative(y)) * columns..].chunks_exact_mut(columns);
        for (ds, table) in ds.chunks_exact(plan.width).take(below - above).zip(table) {
            for (sum, ds) in table[plan.x.unused + plan.x.relative(x)..].iter_mut().zip(&ds[..right - left]) {
                *sum += ds.to_f64();
            }
        }
    }
}

/// Adds to the gradients of one row of keys and values what one row of queries sends them, for lanes from `depth` on.
///
/// `weights` are the gradients by the scores and the probabilities, from the keys' row of the first window on.
#[inline(always)]
fn collect<R: Real, const FMA: bool, const L: usize>(
    weights: (&[R], &[R]),
    (query, grad): (&[R], &[R]),
    depth: usize,
    plan: &Plan,
    by_key: &mut [R],
    by_value: &mut [R],
) {
    let scores = plan.scores();
    for (x, &(first, last)) in plan.x.holders.iter().enumerate() {
        let at = x * plan.padded + depth;
        let (by_key, by_value) = (&mut by_key[at..at + L], &mut by_value[at..at + L]);
        let (mut of_key, mut of_value) = ([R::default(); L], [R::default(); L]);
        of_key.copy_from_slice(by_key);
        of_value.copy_from_slice(by_value);
        for (i, window) in (first..last).zip(&plan.x.windows[first..last]) {
            let weight = i * scores + x - window.0;
            let (ds, p) = (weights.0[weight], weights.1[weight]);
            let point = i * plan.padded + depth;
            let (query, grad) = (&query[point..], &grad[point..]);
            add::<R, FMA, L>(&mut of_key, query, ds);
            add::<R, FMA, L>(&mut of_value, grad, p);
        }
        by_key.copy_from_slice(&of_key);
        by_value.copy_from_slice(&of_value);
    }
}

/// [`collect`] over all lanes.
#[inline(always)]
fn collect_all<R: Real, const FMA: bool>(
    weights: (&[R], &[R]),
    points: (&[R], &[R]),
    plan: &Plan,
    by_key: &mut [R],
    by_value: &mut [R],
) {
    let mut depth = 0;
    while depth < plan.padded {
        match plan.padded - depth {
            32.. => {
                collect::<R, FMA, 32>(weights, points, depth, plan, by_key, by_value);
                depth += 32;
            }
            16.. => {
                collect::<R, FMA, 16>(weights, points, depth, plan, by_key, by_value);
                depth += 16;
            }
            _ => {
                collect::<R, FMA, GROUP>(weights, points, depth, plan, by_key, by_value);
                depth += GROUP;
            }
        }
    }
}
