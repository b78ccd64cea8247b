//! Tests of the tree by itself: its shape, and how many steps it takes.

use super::*;
use proptest::prelude::*;

impl Tree {
    /// Checks order, balance, what nodes know of their subtrees, and that ranges tile the window with no two free ones
    /// touching.
    fn check(&self, start: u64, end: u64) {
        let mut ranges = Vec::new();
        self.check_below(self.root, &mut ranges);
        let mut at = start;
        for (index, (from, len, used)) in ranges.iter().enumerate() {
            assert_eq!(*from, at, "a gap or an overlap");
            assert!(*len != 0);
            at += len;
            let merged = *used == Use::Free && ranges.get(index + 1).is_some_and(|next| next.2 == Use::Free);
            assert!(!merged, "two free ranges touch at {at}");
        }
        assert_eq!(at, end);
        assert_eq!(self.spare + ranges.len(), self.blocks.len() * BLOCK, "a node was lost");
    }

    fn check_below(&self, at: Link, ranges: &mut Vec<(u64, u64, Use)>) -> (u8, u64, u8) {
        if at == NIL {
            return (0, 0, 0);
        }
        let node = self.node(at);
        let left = self.check_below(node.left, ranges);
        ranges.push((node.start, node.len, node.used));
        let right = self.check_below(node.right, ranges);
        assert!(left.0.abs_diff(right.0) <= 1, "unbalanced");
        let own = match node.used {
            Use::Free => (node.len, (0..=63).rev().find(|k| holds(node.start, node.len, *k)).map_or(0, |k| k + 1)),
            _ => (0, 0),
        };
        let known = (left.0.max(right.0) + 1, left.1.max(right.1).max(own.0), left.2.max(right.2).max(own.1));
        assert_eq!((node.height, node.max_len, node.max_order), known);
        known
    }
}

/// Whether a range contains an aligned block of 2^k pages.
fn holds(start: u64, len: u64, k: u8) -> bool {
    let size = 1_u128 << k;
    u128::from(start).next_multiple_of(size) + size <= u128::from(start) + u128::from(len)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Red with: a rotation that does not update what it moves; a free range that is not merged with the one before it.
    #[test]
    fn the_tree_stays_balanced_and_exact(
        steps in prop::collection::vec((0..3_u8, 1..40_u64, 0..6_u32, any::<prop::sample::Index>()), 1..300),
    ) {
        let (start, end) = (1, 5000);
        let mut tree = Tree::new(start, end).unwrap();
        let mut live: Vec<(u64, u64)> = Vec::new();
        for (what, len, align, which) in steps {
            if what == 0 && !live.is_empty() {
                let (at, len) = live.swap_remove(which.index(live.len()));
                prop_assert!(!tree.give_back(at, len + 1, Use::Allocated));
                prop_assert!(!tree.give_back(at, len, Use::Reserved));
                prop_assert!(tree.give_back(at, len, Use::Allocated));
            } else if let Some(at) = tree.allocate(len, 1 << align, end, Use::Allocated).unwrap() {
                live.push((at, len));
            }
            tree.check(start, end);
        }
        for (at, len) in live {
            prop_assert!(tree.give_back(at, len, Use::Allocated));
        }
        tree.check(start, end);
        prop_assert_eq!(tree.node(tree.root).len, end - start);
    }
}

/// Most steps that one of `operations` takes.
fn most(tree: &mut Tree, operations: impl Iterator<Item = u64>, mut operate: impl FnMut(&mut Tree, u64)) -> u64 {
    let mut most = 0;
    for operation in operations {
        tree.steps.set(0);
        operate(tree, operation);
        most = most.max(tree.steps.get());
    }
    most
}

/// Red with a tree that is not balanced.
#[test]
fn a_million_live_ranges_cost_no_more_steps_than_their_logarithm() {
    const MANY: u64 = 1_000_000;
    let end = 1 << 36;
    let mut tree = Tree::new(1, end).unwrap();
    let mut bounds = Vec::new();
    let mut made = 0;
    for count in [1_000, MANY] {
        let allocate = |tree: &mut Tree, n: u64| {
            let len = n % 7 + 1;
            tree.allocate(len, 1, end, Use::Allocated).unwrap().unwrap();
        };
        let filling = most(&mut tree, made..count, allocate);
        made = count;
        // Every third range goes, so that there are holes of all small sizes; then come requests that fit in none of them.
        let at = |n: u64| 1 + n / 7 * 28 + (n % 7) * (n % 7 + 1) / 2;
        let freeing = most(&mut tree, (0..count).step_by(3), |tree, n| {
            assert!(tree.give_back(at(n), n % 7 + 1, Use::Allocated), "{n}");
        });
        let mut start = 0;
        let large = most(&mut tree, 0..400, |tree, n| match n % 4 {
            0 => start = tree.allocate(8, 8, end, Use::Allocated).unwrap().unwrap(),
            1 => assert!(tree.give_back(start, 8, Use::Allocated)),
            2 => start = tree.allocate(9, 4, end, Use::Allocated).unwrap().unwrap(),
            _ => assert!(tree.give_back(start, 9, Use::Allocated)),
        });
        let refilling = most(&mut tree, (0..count).step_by(3), |tree, n| {
            assert!(tree.take(at(n), n % 7 + 1, Use::Allocated).unwrap());
        });
        bounds.push([filling, freeing, large, refilling]);
    }
    tree.check(1, end);
    // An AVL tree of n nodes is at most 1.44 log2 n high; an operation goes down a handful of times.
    let height = |count: u64| 1.44 * (2.0 * count as f64).log2() + 1.0;
    for (steps, count) in bounds.iter().zip([1_000, MANY]) {
        for most in steps {
            assert!(*most as f64 <= 8.0 * height(count), "{steps:?} steps with {count} ranges");
        }
    }
}

#[test]
fn an_alignment_is_met_even_where_only_an_exact_fit_is_left() {
    let mut tree = Tree::new(1, 64).unwrap();
    assert!(tree.take(1, 15, Use::Reserved).unwrap() && tree.take(19, 45, Use::Reserved).unwrap());
    // Pages 16 to 18 are free: a run of three at a multiple of four, and no longer one.
    assert_eq!(tree.allocate(4, 4, 64, Use::Allocated), Ok(None));
    assert_eq!(tree.allocate(3, 4, 18, Use::Allocated), Ok(None), "the limit");
    assert_eq!(tree.allocate(3, 4, 64, Use::Allocated), Ok(Some(16)));
}
