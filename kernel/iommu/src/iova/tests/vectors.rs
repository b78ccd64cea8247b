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

#[test]
fn page_0_is_never_given_out_whatever_the_window_says() {
    let window = range(0, PAGE);
    assert_eq!(IovaAllocator::new(window, PAGE).unwrap_err(), IovaError::OutOfWindow(window));
    let iova = IovaAllocator::new(range(0, 2 * PAGE), PAGE).unwrap();
    assert_eq!(iova.allocate(PAGE, PAGE, TOP), Ok(pages(1, 1)));
    assert!(iova.allocate(PAGE, PAGE, TOP).is_err());
    assert_eq!(iova.reserve(pages(0, 1)), Err(IovaError::OutOfWindow(pages(0, 1))));
}

#[test]
fn addresses_below_4_gib_go_first_and_a_limit_is_the_last_byte() {
    let iova = IovaAllocator::new(range(0, 1 << 48), PAGE).unwrap();
    for len in [1, 64, 65, 512, 1 << 18] {
        assert!(iova.allocate(len * PAGE, PAGE, TOP).unwrap().end().get() <= 1 << 32);
    }
    let iova = IovaAllocator::new(range(0, 1 << 48), PAGE).unwrap();
    let allocate = |limit| iova.allocate(3 * PAGE, PAGE, Iova::new(limit)).map(IovaRange::start);
    assert!(matches!(allocate(4 * PAGE - 2), Err(IovaError::NoSpace { .. })));
    assert!(matches!(allocate(0), Err(IovaError::NoSpace { .. })));
    assert_eq!(allocate(4 * PAGE - 1), Ok(Iova::new(PAGE)));
    assert!(matches!(allocate(7 * PAGE - 2), Err(IovaError::NoSpace { .. })));
}

#[test]
fn larger_pages_and_any_window_work_alike() {
    let page = 1 << 16;
    let iova = IovaAllocator::new(range(0x1234, 1 << 40), page).unwrap();
    assert_eq!(iova.window(), range(page, (1 << 40) - page));
    assert_eq!(iova.allocate(PAGE, PAGE, TOP), Err(IovaError::Misaligned(page)));
    let got = iova.allocate(3 * page, PAGE, TOP).unwrap();
    assert!(got.is_aligned(page));
    iova.free(got).unwrap();
    assert_eq!(IovaAllocator::new(range(0, 1 << 32), 3000).unwrap_err(), IovaError::Misaligned(3000));
    let top = range(u64::MAX - 0x2_ffff, 0x2_ffff);
    let iova = IovaAllocator::new(top, page).unwrap();
    assert_eq!(iova.allocate(2 * page, page, TOP), Ok(range(u64::MAX - 0x2_ffff, 2 * page)));
    assert!(iova.allocate(page, page, TOP).is_err());
}

#[test]
fn what_makes_no_sense_is_refused() {
    let iova = IovaAllocator::new(range(0, 1 << 32), PAGE).unwrap();
    for (len, align) in [(0, PAGE), (PAGE / 2, PAGE), (PAGE, 0), (PAGE, 3 * PAGE)] {
        assert_eq!(iova.allocate(len, align, TOP), Err(IovaError::Misaligned(PAGE)));
    }
    let huge = 1 << 63;
    assert_eq!(iova.allocate(huge, huge, TOP), Err(IovaError::NoSpace { len: huge, align: huge, limit: TOP }));
    assert_eq!(iova.allocate(PAGE, huge, TOP), Err(IovaError::NoSpace { len: PAGE, align: huge, limit: TOP }));
    assert_eq!(iova.reserve(range(PAGE, 0)), Err(IovaError::Misaligned(PAGE)));
    assert_eq!(iova.reserve(range(PAGE + 1, PAGE)), Err(IovaError::Misaligned(PAGE)));
    assert_eq!(iova.reserve(range(1 << 31, 1 << 32)), Err(IovaError::OutOfWindow(range(1 << 31, 1 << 32))));
    let nothing = range(1 << 40, PAGE);
    assert_eq!(iova.free(nothing), Err(IovaError::NotAllocated(nothing)));
    assert_eq!(iova.release(nothing), Err(IovaError::NotAllocated(nothing)));
}

/// Red when the guard was not part of what is taken.
#[test]
fn a_guard_stays_free_behind_every_allocation() {
    let iova = IovaAllocator::with_guard(range(0, 1 << 32), PAGE, PAGE).unwrap();
    let mut taken: alloc::vec::Vec<IovaRange> = alloc::vec::Vec::new();
    for len in [1, 1, 2, 3, 4, 63, 64, 64, 100] {
        let got = iova.allocate(len * PAGE, PAGE, TOP).unwrap();
        let guarded = range(got.start().get(), got.len() + PAGE);
        assert!(taken.iter().all(|other| !other.overlaps(guarded)));
        assert_eq!(iova.free(guarded), Err(IovaError::NotAllocated(guarded)));
        taken.push(guarded);
    }
    for guarded in taken {
        iova.free(guarded.part(0, guarded.len() - PAGE).unwrap()).unwrap();
    }
}
