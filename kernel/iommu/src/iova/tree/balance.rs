//! Keeping the tree in order and in balance (an AVL tree), and what nodes know of their subtrees true.
//!
//! # Invariants
//!
//! Links other than `NIL` are indices of nodes; a node is either in the tree once or in the list of those not in use.

use super::{BLOCK, BLOCK_SHIFT, Link, NIL, Node, Tree, Use, order};
use core::cmp::Ordering;

impl Tree {
    /// Adds a range. There must be a node for it (see [`Tree::ensure`]).
    pub(super) fn add(&mut self, start: u64, len: u64, used: Use) {
        let link = self.unused;
        self.unused = self.node(link).right;
        self.spare -= 1;
        *self.node_mut(link) = Node { start, len, used, height: 1, max_order: 0, max_len: 0, left: NIL, right: NIL };
        self.update(link);
        self.root = self.insert(self.root, link);
    }

    /// Takes out the range that begins at `start`.
    pub(super) fn remove_range(&mut self, start: u64) {
        let (root, removed) = self.remove(self.root, start);
        self.root = root;
        if removed != NIL {
            let unused = self.unused;
            self.node_mut(removed).right = unused;
            self.unused = removed;
            self.spare += 1;
        }
    }

    /// Changes the range that begins at `start`, not its start, and brings its ancestors up to date.
    pub(super) fn change(&mut self, start: u64, change: impl FnOnce(&mut Node)) {
        self.change_below(self.root, start, change);
    }

    fn change_below(&mut self, at: Link, start: u64, change: impl FnOnce(&mut Node)) {
        if at == NIL {
            return;
        }
        self.step();
        let node = self.node_mut(at);
        let (here, left, right) = (node.start, node.left, node.right);
        match start.cmp(&here) {
            Ordering::Equal => change(node),
            Ordering::Less => self.change_below(left, start, change),
            Ordering::Greater => self.change_below(right, start, change),
        }
        self.update(at);
    }

    fn insert(&mut self, at: Link, new: Link) -> Link {
        if at == NIL {
            return new;
        }
        self.step();
        if self.node(new).start < self.node(at).start {
            let child = self.insert(self.node(at).left, new);
            self.node_mut(at).left = child;
        } else {
            let child = self.insert(self.node(at).right, new);
            self.node_mut(at).right = child;
        }
        self.balance(at)
    }

    /// Takes the range that begins at `start` out of the subtree. Returns the new subtree and the node.
    fn remove(&mut self, at: Link, start: u64) -> (Link, Link) {
        if at == NIL {
            return (NIL, NIL);
        }
        self.step();
        let Node { start: here, left, right, .. } = *self.node(at);
        let removed;
        match start.cmp(&here) {
            Ordering::Less => {
                let child;
                (child, removed) = self.remove(left, start);
                self.node_mut(at).left = child;
            }
            Ordering::Greater => {
                let child;
                (child, removed) = self.remove(right, start);
                self.node_mut(at).right = child;
            }
            Ordering::Equal if right == NIL => return (left, at),
            Ordering::Equal => {
                let (rest, heir) = self.remove_lowest(right);
                let node = self.node_mut(heir);
                (node.left, node.right) = (left, rest);
                return (self.balance(heir), at);
            }
        }
        (self.balance(at), removed)
    }

    fn remove_lowest(&mut self, at: Link) -> (Link, Link) {
        self.step();
        let Node { left, right, .. } = *self.node(at);
        if left == NIL {
            return (right, at);
        }
        let (child, lowest) = self.remove_lowest(left);
        self.node_mut(at).left = child;
        (self.balance(at), lowest)
    }

    /// Restores the AVL condition at `at`, whose children differ in height by at most two. Returns the subtree's new root.
    fn balance(&mut self, at: Link) -> Link {
        self.update(at);
        let Node { left, right, .. } = *self.node(at);
        let (left_height, right_height) = (self.height(left), self.height(right));
        if left_height > right_height + 1 {
            if self.height(self.node(left).left) < self.height(self.node(left).right) {
                let child = self.rotate_left(left);
                self.node_mut(at).left = child;
            }
            self.rotate_right(at)
        } else if right_height > left_height + 1 {
            if self.height(self.node(right).right) < self.height(self.node(right).left) {
                let child = self.rotate_right(right);
                self.node_mut(at).right = child;
            }
            self.rotate_left(at)
        } else {
            at
        }
    }

    fn rotate_left(&mut self, at: Link) -> Link {
        let up = self.node(at).right;
        self.node_mut(at).right = self.node(up).left;
        self.node_mut(up).left = at;
        self.update(at);
        self.update(up);
        up
    }

    fn rotate_right(&mut self, at: Link) -> Link {
        let up = self.node(at).left;
        self.node_mut(at).left = self.node(up).right;
        self.node_mut(up).right = at;
        self.update(at);
        self.update(up);
        up
    }

    fn height(&self, at: Link) -> u8 {
        if at == NIL { 0 } else { self.node(at).height }
    }

    /// Computes what a node knows about its subtree from its children.
    fn update(&mut self, at: Link) {
        let node = *self.node(at);
        let (mut height, mut len, mut best) = match node.used {
            Use::Free => (0, node.len, order(node.start, node.len)),
            _ => (0, 0, 0),
        };
        for child in [node.left, node.right] {
            if child != NIL {
                let child = self.node(child);
                height = child.height.max(height);
                len = child.max_len.max(len);
                best = child.max_order.max(best);
            }
        }
        let node = self.node_mut(at);
        (node.height, node.max_len, node.max_order) = (height + 1, len, best);
    }

    pub(super) fn node(&self, link: Link) -> &Node {
        &self.blocks[link as usize >> BLOCK_SHIFT][link as usize & (BLOCK - 1)]
    }

    pub(super) fn node_mut(&mut self, link: Link) -> &mut Node {
        &mut self.blocks[link as usize >> BLOCK_SHIFT][link as usize & (BLOCK - 1)]
    }
}
