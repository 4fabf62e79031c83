//! Philox-4x32-10, a generator whose draws are a function of a key and a counter (Salmon et al., 2011).

/// Draws of one counter.
const WORDS: usize = 4;
/// Counters that are turned into draws side by side.
const LANES: usize = 16;

/// Fills `out` with the draws number `offset..offset + out.len()` of the stream `key`.
#[inline(always)]
pub fn fill(key: u64, offset: u64, out: &mut [u32]) {
    let mut done = 0;
    while done < out.len() {
        let first = offset + done as u64;
        let draws = block(key, first / WORDS as u64);
        let skip = (first % WORDS as u64) as usize;
        let count = (WORDS * LANES - skip).min(out.len() - done);
        for (i, out) in out[done..done + count].iter_mut().enumerate() {
            let place = skip + i;
            *out = draws[place % WORDS][place / WORDS];
        }
        done += count;
    }
}

/// Draws of `LANES` counters from `counter` on; word by word.
#[inline(always)]
fn block(key: u64, counter: u64) -> [[u32; LANES]; WORDS] {
    const MULTIPLIERS: [u64; 2] = [0xd251_1f53, 0xcd9e_8d57];
    const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
    let mut keys = [key as u32, (key >> 32) as u32];
    let mut x = [[0_u32; LANES]; WORDS];
    let [a, b, ..] = &mut x;
    for (lane, (low, high)) in a.iter_mut().zip(b).enumerate() {
        let counter = counter.wrapping_add(lane as u64);
        (*low, *high) = (counter as u32, (counter >> 32) as u32);
    }
    for _ in 0..10 {
        let [a, b, c, d] = &mut x;
        for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
            let products = [u64::from(*a) * MULTIPLIERS[0], u64::from(*c) * MULTIPLIERS[1]];
            let high = products.map(|p| (p >> 32) as u32);
            (*a, *c) = (high[1] ^ *b ^ keys[0], high[0] ^ *d ^ keys[1]);
            (*b, *d) = (products[1] as u32, products[0] as u32);
        }
        keys = [keys[0].wrapping_add(WEYL[0]), keys[1].wrapping_add(WEYL[1])];
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_published_vectors() {
        // Known answers of the authors' library for counter and key of zeros, and of ones.
        let mut draws = [0; 4];
        fill(0, 0, &mut draws);
        assert_eq!(draws, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    }

    #[test]
    fn any_cut_of_a_stream_gives_the_same_draws() {
        let mut whole = [0; 301];
        fill(42, 7, &mut whole);
        for cut in [1, 3, 64, 65, 200] {
            let mut parts = [0; 301];
            let (a, b) = parts.split_at_mut(cut);
            fill(42, 7, a);
            fill(42, 7 + cut as u64, b);
            assert_eq!(parts, whole);
        }
    }
}
