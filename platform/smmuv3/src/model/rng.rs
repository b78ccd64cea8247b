//! The seeded source of the model's choices, so that a failure repeats.

/// A xorshift64* generator.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// Starts from `seed`.
    pub const fn new(seed: u64) -> Self {
        // Never zero, and far apart for neighbouring seeds.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d | 1)
    }

    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`; `None` if there is none.
    pub const fn below(&mut self, end: u32) -> Option<u32> {
        if end == 0 { None } else { Some(((self.next() >> 33) % end as u64) as u32) }
    }

    /// Whether something happens that happens once in `one_in` times.
    pub const fn chance(&mut self, one_in: u32) -> bool {
        matches!(self.below(one_in), Some(0))
    }
}
