//! Fixed vectors.

use super::*;

#[test]
fn allocations_avoid_reserved_pages_and_keep_their_natural_alignment() {
    let iova = IovaAllocator::new(range(0, 1 << 32), PAGE).unwrap();
    let reserved = pages(4, 100);
    iova.reserve(reserved).unwrap();
    let mut taken = alloc::vec![reserved];
    for i in 0..10 {
        let len = (i + 1) * PAGE;
        let align = 1 << len.trailing_zeros();
        let got = iova.allocate(len, align, TOP).unwrap();
        assert_eq!((got.len(), got.start().get() % align), (len, 0));
        assert!(got.start().get() != 0);
        assert!(taken.iter().all(|other| !other.overlaps(got)));
        taken.push(got);
    }
    for range in &taken[1..] {
        assert_eq!(
            iova.free(range.part(0, range.len() - 1).unwrap()),
            Err(IovaError::NotAllocated(range.part(0, range.len() - 1).unwrap()))
        );
        iova.free(*range).unwrap();
        assert_eq!(iova.free(*range), Err(IovaError::NotAllocated(*range)));
    }
    assert_eq!(iova.reserve(pages(103, 2)), Err(IovaError::InUse(pages(103, 2))));
    assert_eq!(iova.release(pages(4, 99)), Err(IovaError::NotAllocated(pages(4, 99))));
    iova.release(reserved).unwrap();
    assert_eq!(iova.allocate(((1 << 20) - 1) * PAGE, PAGE, TOP), Ok(pages(1, (1 << 20) - 1)));
}
