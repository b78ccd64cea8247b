//! Tests of groups, with an IOMMU that writes down what it is told.

use super::*;
use crate::testing::{Call, FakeIommu, FakeSpace};
use crate::{Iova, IovaRange, PhysAddr, PhysRange, Prot};
use alloc::string::ToString;
use alloc::vec;
use std::sync::mpsc;

fn domain(kind: DomainKind, name: u32) -> Arc<Domain> {
    let window = IovaRange::new(Iova::new(0), 1 << 32).unwrap();
    Arc::new(Domain::new(kind, FakeSpace::new(name, 48), window).unwrap())
}

fn group(iommu: &Arc<FakeIommu>) -> Group {
    Group::new(iommu.clone(), vec![StreamId::new(1), StreamId::new(2), StreamId::new(3)])
}

fn spaces(iommu: &FakeIommu) -> Vec<Option<alloc::string::String>> {
    (1..=3).map(|stream| iommu.space_of(stream)).collect()
}

fn all(name: &str) -> Vec<Option<alloc::string::String>> {
    vec![Some(name.to_string()); 3]
}

fn attach(name: &str) -> Vec<Call> {
    (1..=3).map(|stream| Call::Attach(stream, name.to_string())).collect()
}

#[test]
fn a_group_starts_blocked_without_a_word_to_the_iommu() {
    let iommu = FakeIommu::new();
    let group = group(&iommu);
    assert_eq!(group.current(), AttachmentState::Blocked);
    assert!(group.domain().is_none() && iommu.calls().is_empty());
    assert_eq!(group.detach_owned(), Err(AttachError::NotOwned));
}

/// Red when `attach_owned` blocked the streams before attaching them: calls to block appeared.
#[test]
fn an_owner_replaces_the_default_domain_without_a_gap_and_gives_it_back() {
    let iommu = FakeIommu::new();
    let group = group(&iommu);
    let default = domain(DomainKind::Dma, 1);
    group.attach_default(default.clone()).unwrap();
    assert_eq!((iommu.calls(), group.current()), (attach("space 1"), AttachmentState::Default));
    assert!(Arc::ptr_eq(&group.domain().unwrap(), &default));

    group.attach_owned(domain(DomainKind::Owned, 2)).unwrap();
    assert_eq!((iommu.calls(), group.current()), (attach("space 2"), AttachmentState::Owned));
    assert!(group.domain().is_none(), "the DMA-API must refuse");
    assert_eq!(group.attach_default(default.clone()), Err(AttachError::Owned));
    assert_eq!(group.attach_owned(domain(DomainKind::Owned, 3)), Err(AttachError::Owned));
    assert!(iommu.calls().is_empty());

    group.detach_owned().unwrap();
    assert_eq!((iommu.calls(), group.current()), (attach("space 1"), AttachmentState::Default));
    assert!(Arc::ptr_eq(&group.domain().unwrap(), &default));
}

#[test]
#[allow(unsafe_code)]
fn what_the_dma_api_has_mapped_survives_an_owner() {
    let iommu = FakeIommu::new();
    let group = group(&iommu);
    let default = domain(DomainKind::Dma, 1);
    group.attach_default(default.clone()).unwrap();
    let range = default.iova().allocate(4096, 4096, Iova::new(u64::MAX)).unwrap();
    let run = PhysRange::new(PhysAddr::new(0x4000_0000), 4096).unwrap();
    // SAFETY: no device exists that could reach anything.
    unsafe { default.space().map(range, &[run], Prot::READ) }.unwrap();
    drop(default);

    group.attach_owned(domain(DomainKind::Owned, 2)).unwrap();
    group.detach_owned().unwrap();
    let default = group.domain().unwrap();
    assert_eq!(default.space().translate(range.start()), Some((run.start(), Prot::READ)));
    assert_eq!(default.iova().reserve(range), Err(crate::IovaError::InUse(range)));
    default.space().revoke(&[range]).unwrap();
    default.iova().free(range).unwrap();
}

#[test]
fn an_owner_of_a_group_without_a_default_domain_leaves_it_blocked() {
    let iommu = FakeIommu::new();
    let group = group(&iommu);
    group.attach_owned(domain(DomainKind::Owned, 2)).unwrap();
    group.detach_owned().unwrap();
    assert_eq!((spaces(&iommu), group.current()), (vec![None; 3], AttachmentState::Blocked));
}

#[test]
fn only_the_owner_can_swap_its_address_space() {
    let iommu = FakeIommu::new();
    let group = group(&iommu);
    group.attach_default(domain(DomainKind::Dma, 1)).unwrap();
    let (one, two) = (domain(DomainKind::Owned, 2), domain(DomainKind::Owned, 3));
    assert_eq!(group.swap_owned(&one, two.clone()), Err(AttachError::NotOwned));
    group.attach_owned(one.clone()).unwrap();
    assert_eq!(group.swap_owned(&two, one.clone()), Err(AttachError::NotOwned));
    iommu.calls();
    group.swap_owned(&one, two.clone()).unwrap();
    assert_eq!((iommu.calls(), group.current()), (attach("space 3"), AttachmentState::Owned));
    group.detach_owned().unwrap();
    assert_eq!(spaces(&iommu), all("space 1"));
}

#[test]
fn a_domain_is_attached_only_as_what_it_is() {
    let iommu = FakeIommu::new();
    let group = group(&iommu);
    let (dma, owned) = (domain(DomainKind::Dma, 1), domain(DomainKind::Owned, 2));
    assert_eq!(group.attach_owned(dma), Err(AttachError::WrongKind(DomainKind::Dma)));
    assert_eq!(group.attach_default(owned.clone()), Err(AttachError::WrongKind(DomainKind::Owned)));
    assert_eq!(group.swap_owned(&owned, domain(DomainKind::Dma, 3)), Err(AttachError::WrongKind(DomainKind::Dma)));
    assert!(iommu.calls().is_empty());
}

#[test]
fn several_groups_share_one_domain() {
    let iommu = FakeIommu::new();
    let shared = domain(DomainKind::Dma, 1);
    let (one, two) = (group(&iommu), Group::new(iommu.clone(), vec![StreamId::new(9)]));
    one.attach_default(shared.clone()).unwrap();
    two.attach_default(shared).unwrap();
    one.attach_owned(domain(DomainKind::Owned, 2)).unwrap();
    assert_eq!((spaces(&iommu), iommu.space_of(9)), (all("space 2"), Some("space 1".to_string())));
}

/// Red when the streams before the failing one were left where they had been moved to.
#[test]
fn when_one_stream_is_refused_the_others_are_moved_back() {
    for failing in 0..3 {
        for error in [AttachError::ForeignSpace, AttachError::TimedOut] {
            let iommu = FakeIommu::new();
            let group = group(&iommu);
            iommu.fail(&[(failing, error)]);
            assert_eq!(group.attach_default(domain(DomainKind::Dma, 1)), Err(error));
            assert_eq!((spaces(&iommu), group.current()), (vec![None; 3], AttachmentState::Blocked));

            iommu.fail(&[]);
            group.attach_default(domain(DomainKind::Dma, 1)).unwrap();
            iommu.fail(&[(failing, error)]);
            assert_eq!(group.attach_owned(domain(DomainKind::Owned, 2)), Err(error));
            assert_eq!((spaces(&iommu), group.current()), (all("space 1"), AttachmentState::Default));
            assert!(group.domain().is_some());

            iommu.fail(&[]);
            group.attach_owned(domain(DomainKind::Owned, 2)).unwrap();
            iommu.fail(&[(failing, error)]);
            assert_eq!(group.detach_owned(), Err(error));
            assert_eq!((spaces(&iommu), group.current()), (all("space 2"), AttachmentState::Owned));
            iommu.fail(&[]);
            group.detach_owned().unwrap();
            assert_eq!(spaces(&iommu), all("space 1"));
        }
    }
}

/// Red when a failed way back was ignored: the group claimed to be in its default domain with a stream elsewhere.
#[test]
fn when_there_is_no_way_back_everything_is_blocked_and_stays_so() {
    let iommu = FakeIommu::new();
    let group = group(&iommu);
    group.attach_default(domain(DomainKind::Dma, 1)).unwrap();
    // The third stream is refused, and the way back of the second.
    iommu.fail(&[(2, AttachError::NoIdentifier), (4, AttachError::TimedOut)]);
    assert_eq!(group.attach_owned(domain(DomainKind::Owned, 2)), Err(AttachError::Stranded(StreamId::new(2))));
    assert_eq!((spaces(&iommu), group.current()), (vec![None; 3], AttachmentState::Stranded));
    assert!(group.domain().is_none());
    iommu.fail(&[]);
    let stranded = Err(AttachError::Stranded(StreamId::new(2)));
    assert_eq!(group.attach_default(domain(DomainKind::Dma, 1)), stranded);
    assert_eq!(group.attach_owned(domain(DomainKind::Owned, 2)), stranded);
    assert_eq!(group.detach_owned(), stranded);
    assert!(iommu.calls().is_empty());
    group.block().unwrap();
    group.attach_default(domain(DomainKind::Dma, 1)).unwrap();
    assert_eq!(spaces(&iommu), all("space 1"));
}

#[test]
fn blocking_blocks_every_stream_that_can_be_blocked() {
    let iommu = FakeIommu::new();
    let group = group(&iommu);
    group.attach_default(domain(DomainKind::Dma, 1)).unwrap();
    iommu.fail(&[(0, AttachError::TimedOut)]);
    assert_eq!(group.block(), Err(AttachError::Stranded(StreamId::new(1))));
    assert_eq!(spaces(&iommu), [Some("space 1".to_string()), None, None]);
    assert_eq!(group.current(), AttachmentState::Stranded);
    iommu.fail(&[]);
    group.block().unwrap();
    assert_eq!((spaces(&iommu), group.current()), (vec![None; 3], AttachmentState::Blocked));
}

/// Hangs when the group's lock is held across a call to the IOMMU (seen), and is red when changes are not kept apart.
#[test]
fn while_the_iommu_works_the_group_can_be_asked_and_not_changed() {
    let iommu = FakeIommu::new();
    let group = Arc::new(group(&iommu));
    let (asked, answers) = mpsc::channel();
    let asked = std::sync::Mutex::new(asked);
    let same = Arc::downgrade(&group);
    iommu.meanwhile(move || {
        let Some(group) = same.upgrade() else { return };
        let answer = (group.current(), group.domain().is_none(), group.block(), group.detach_owned());
        asked.lock().unwrap().send(answer).unwrap();
    });
    let busy = (AttachmentState::Changing, true, Err(AttachError::Busy), Err(AttachError::Busy));
    group.attach_default(domain(DomainKind::Dma, 1)).unwrap();
    group.attach_owned(domain(DomainKind::Owned, 2)).unwrap();
    assert_eq!(answers.try_iter().collect::<Vec<_>>(), vec![busy; 6]);
    assert_eq!(spaces(&iommu), all("space 2"));
}

#[test]
fn a_group_that_is_given_up_is_blocked() {
    let iommu = FakeIommu::new();
    let group = group(&iommu);
    group.attach_default(domain(DomainKind::Dma, 1)).unwrap();
    drop(group);
    assert_eq!(spaces(&iommu), vec![None; 3]);
}

#[test]
fn a_detached_owner_holds_no_part_of_the_group() {
    let iommu = FakeIommu::new();
    let group = group(&iommu);
    let owned = domain(DomainKind::Owned, 2);
    group.attach_owned(owned.clone()).unwrap();
    assert_eq!(Arc::strong_count(&owned), 2);
    group.detach_owned().unwrap();
    assert_eq!(Arc::strong_count(&owned), 1, "the group lets go of the owner's domain");
}

/// Red when `leave` blocked whoever left.
#[test]
fn a_group_is_blocked_when_its_last_user_leaves_and_not_before() {
    let iommu = FakeIommu::new();
    let group = group(&iommu);
    group.attach_default(domain(DomainKind::Dma, 1)).unwrap();
    group.enter();
    group.enter();
    iommu.calls();
    assert_eq!((group.leave(), group.users()), (Ok(false), 1));
    assert_eq!((iommu.calls(), group.current()), (vec![], AttachmentState::Default));
    assert_eq!((group.leave(), group.users()), (Ok(true), 0));
    assert_eq!((spaces(&iommu), group.current()), (vec![None; 3], AttachmentState::Blocked));
    // Who leaves too often does no harm.
    assert_eq!((group.leave(), group.users()), (Ok(true), 0));
}

#[allow(unsafe_code)]
fn let_through(iommu: &dyn Iommu, stream: StreamId) -> Result<(), AttachError> {
    // SAFETY: no device exists that could reach anything.
    unsafe { iommu.bypass(stream) }
}

/// Red without the check of `users`.
#[test]
#[allow(unsafe_code)]
fn a_group_with_several_users_belongs_to_none_of_them() {
    let iommu = FakeIommu::new();
    let group = group(&iommu);
    group.attach_default(domain(DomainKind::Dma, 1)).unwrap();
    group.enter();
    group.enter();
    let refused = Err(AttachError::Shared(2));
    assert_eq!(group.attach_owned(domain(DomainKind::Owned, 2)), refused);
    // SAFETY: no device exists that could reach anything.
    assert_eq!(group.attach_identity(unsafe { IdentityCapability::vouch(let_through) }), refused);
    assert_eq!(spaces(&iommu), all("space 1"));
    group.leave().unwrap();
    group.attach_owned(domain(DomainKind::Owned, 2)).unwrap();
}

#[test]
#[allow(unsafe_code)]
fn identity_replaces_the_default_domain_and_gives_it_back() {
    let iommu = FakeIommu::new();
    let group = group(&iommu);
    group.attach_default(domain(DomainKind::Dma, 1)).unwrap();
    // SAFETY: no device exists that could reach anything.
    group.attach_identity(unsafe { IdentityCapability::vouch(let_through) }).unwrap();
    assert_eq!((spaces(&iommu), group.current()), (all("bypass"), AttachmentState::Identity));
    assert!(group.domain().is_none(), "the DMA-API must refuse");
    assert_eq!(group.attach_owned(domain(DomainKind::Owned, 2)), Err(AttachError::Owned));
    assert_eq!(group.attach_default(domain(DomainKind::Dma, 3)), Err(AttachError::Owned));
    iommu.calls();
    group.detach_owned().unwrap();
    assert_eq!((iommu.calls(), group.current()), (attach("space 1"), AttachmentState::Default));
}
