//! The PCI transport against capabilities and registers that say anything.

use crate::Error;
use crate::spec::pci::{CAP_VENDOR, cfg_type, common};
use crate::transport::{PciTransport, QueueSetup, Transport};
use arch::mmio::Mmio;
use iommu::{Iova, PhysAddr};
use pci::fake::{FakeEnv, FakeFunction, FakeSpace};
use pci::{Bdf, Function, Host, Window, WindowKind};
use proptest::prelude::*;
use std::sync::Arc;

const BAR_SIZE: u64 = 0x4000;

/// The body of a virtio capability.
fn cap(kind: u8, bar: u8, offset: u32, length: u32) -> Vec<u8> {
    let notify = kind == cfg_type::NOTIFY;
    let mut body = vec![if notify { 20 } else { 16 }, kind, bar, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(length.to_le_bytes());
    if notify {
        body.extend(4_u32.to_le_bytes());
    }
    body
}

/// The capabilities of an ordinary device.
fn ordinary() -> Vec<Vec<u8>> {
    vec![
        cap(cfg_type::COMMON, 4, 0, 0x1000),
        cap(cfg_type::ISR, 4, 0x1000, 0x1000),
        cap(cfg_type::DEVICE, 4, 0x2000, 0x1000),
        cap(cfg_type::NOTIFY, 4, 0x3000, 0x1000),
    ]
}

/// A function with these capabilities, and its BAR with two queues of 256 entries.
fn function(id: u16, caps: &[Vec<u8>]) -> (Arc<Function>, Mmio) {
    let endpoint = FakeFunction::endpoint(1, 0, 0x1af4, id).bar64(4, BAR_SIZE, true);
    let endpoint = caps.iter().fold(endpoint, |endpoint, body| endpoint.capability(CAP_VENDOR, body));
    let window = Window {
        kind: WindowKind::Memory { prefetchable: false },
        bus: 0x1000_0000,
        phys: PhysAddr::new(0x1000_0000),
        len: 0x1000_0000,
    };
    let env = Arc::new(FakeEnv::default());
    let host = Host::with_space(FakeSpace::new(0, vec![endpoint]), 0, 0..=255, &[window], env).unwrap();
    let function = host.find(Bdf::new(0, 1, 0).unwrap()).unwrap().clone();
    let bar = function.bar(4).unwrap();
    bar.write16(common::NUM_QUEUES, 2);
    bar.write16(common::QUEUE_SIZE, 256);
    (function, bar)
}

fn open(caps: &[Vec<u8>]) -> Result<PciTransport, Error> {
    PciTransport::new(function(0x1042, caps).0)
}

const SETUP: QueueSetup = QueueSetup {
    size: 64,
    descriptors: Iova::new(0x1_2345_6000),
    driver: Iova::new(0x2_2345_7000),
    device: Iova::new(0x3_2345_8000),
    vector: Some(1),
};

#[test]
fn registers_are_where_the_capabilities_say() {
    let (function, bar) = function(0x1042, &ordinary());
    let transport = PciTransport::new(function).unwrap();
    assert_eq!(transport.device_type(), 2);
    transport.set_status(3);
    assert_eq!(bar.read8(common::DEVICE_STATUS), 3);
    bar.write16(common::QUEUE_NOTIFY_OFF, 7);
    transport.notify(1);
    assert_eq!(bar.read16(0x3000 + 28), 0, "a queue that has not been set up has no doorbell");
    transport.set_up_queue(1, &SETUP).unwrap();
    assert_eq!(bar.read16(common::QUEUE_SELECT), 1);
    assert_eq!(bar.read64(common::QUEUE_DESC), 0x1_2345_6000);
    assert_eq!(bar.read64(common::QUEUE_DRIVER), 0x2_2345_7000);
    assert_eq!(bar.read64(common::QUEUE_DEVICE), 0x3_2345_8000);
    assert_eq!((bar.read16(common::QUEUE_SIZE), bar.read16(common::QUEUE_ENABLE)), (64, 1));
    assert_eq!(bar.read16(common::QUEUE_MSIX_VECTOR), 1);
    transport.notify(1);
    assert_eq!(bar.read16(0x3000 + 28), 1);
    bar.write32(0x2004, 0xabcd);
    assert_eq!(transport.config_read(4), Some(0xabcd));
    assert_eq!(
        (transport.config_read(0x1000), transport.config_read(2), transport.config_read(usize::MAX)),
        (None, None, None)
    );
    transport.config_write(8, 5);
    transport.config_write(0x1000, 6);
    assert_eq!((bar.read32(0x2008), bar.read32(0x3000)), (5, 0));
    transport.set_config_vector(None).unwrap();
    assert_eq!(bar.read16(common::CONFIG_MSIX_VECTOR), 0xffff);
}

#[test]
fn queues_that_the_device_does_not_have_are_refused() {
    let transport = open(&ordinary()).unwrap();
    assert_eq!((transport.queue_size(0), transport.queue_size(2)), (256, 0));
    assert_eq!(transport.set_up_queue(2, &SETUP), Err(Error::NoSuchQueue(2)));
    transport.notify(2);
}

#[test]
fn a_doorbell_outside_its_window_is_refused() {
    let (function, bar) = function(0x1042, &ordinary());
    let transport = PciTransport::new(function).unwrap();
    for offset in [0x400, 0x1000, u16::MAX] {
        bar.write16(common::QUEUE_NOTIFY_OFF, offset);
        assert_eq!(transport.set_up_queue(0, &SETUP), Err(Error::BadNotifyOffset { queue: 0, offset }));
        assert_eq!(bar.read16(common::QUEUE_ENABLE), 0);
    }
    bar.write16(common::QUEUE_NOTIFY_OFF, 0x3ff);
    transport.set_up_queue(0, &SETUP).unwrap();
    transport.notify(0);
}

#[test]
fn functions_that_are_not_modern_virtio_are_refused() {
    for id in [0x1000, 0x1001, 0x103f, 0x1040, 0x1080, 0] {
        let refused = PciTransport::new(function(id, &ordinary()).0).map(drop);
        assert_eq!(refused, Err(Error::WrongDevice { expected: 0, found: id }));
    }
}

#[test]
fn missing_capabilities_are_named() {
    for (index, name) in [(0, "common configuration"), (3, "notification")] {
        let mut caps = ordinary();
        caps.remove(index);
        assert_eq!(open(&caps).map(drop), Err(Error::MissingCapability(name)));
    }
    let mut caps = ordinary();
    caps.remove(2);
    assert_eq!(open(&caps).unwrap().config_read(0), None, "not every device has a configuration");
}

#[test]
fn malformed_capabilities_are_refused() {
    let bad = |index: usize, body: Vec<u8>| {
        let mut caps = ordinary();
        caps[index] = body;
        let error = open(&caps).map(drop).unwrap_err();
        assert!(matches!(error, Error::BadCapability { .. }), "{error}");
    };
    bad(0, cap(cfg_type::COMMON, 4, 2, 0x1000));
    bad(0, cap(cfg_type::COMMON, 4, 0, 55));
    bad(0, cap(cfg_type::COMMON, 4, 0x4000, 0x1000));
    bad(0, cap(cfg_type::COMMON, 4, u32::MAX - 3, 0x1000));
    bad(0, cap(cfg_type::COMMON, 1, 0, 0x1000));
    bad(0, cap(cfg_type::COMMON, 5, 0, 0x1000));
    bad(2, cap(cfg_type::DEVICE, 4, 0x2001, 0x100));
    bad(2, cap(cfg_type::DEVICE, 4, 0x2000, 0));
    bad(3, cap(cfg_type::NOTIFY, 4, 0x3001, 0x100));
    bad(3, cap(cfg_type::NOTIFY, 4, 0x3000, 1));
    let mut short = cap(cfg_type::NOTIFY, 4, 0x3000, 0x1000);
    short[0] = 16;
    bad(3, short);
    for multiplier in [1_u32, 3, 6, u32::MAX] {
        let mut odd = cap(cfg_type::NOTIFY, 4, 0x3000, 0x1000);
        odd[14..].copy_from_slice(&multiplier.to_le_bytes());
        bad(3, odd);
    }
}

#[test]
fn a_capability_for_a_reserved_bar_is_skipped_and_the_next_is_taken() {
    let mut caps = ordinary();
    caps.insert(0, cap(cfg_type::COMMON, 6, 0, 0x1000));
    assert!(open(&caps).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_capabilities_and_no_registers_make_the_transport_panic(
        caps in proptest::collection::vec(
            (0_u8..6, 0_u8..8, prop_oneof![0_u32..0x5000, any::<u32>()], prop_oneof![0_u32..0x2000, any::<u32>()], any::<u32>()),
            0..6,
        ),
        registers in any::<[u64; 7]>(),
        queue in 0_u16..4,
    ) {
        let bodies: Vec<_> = caps.iter().map(|(kind, bar, offset, length, multiplier)| {
            let mut body = cap(*kind, *bar, *offset, *length);
            if let Some(place) = body.get_mut(14..18) {
                place.copy_from_slice(&(multiplier & 6).to_le_bytes());
            }
            body
        }).collect();
        let (function, bar) = function(0x1042, &bodies);
        for (index, value) in registers.iter().enumerate() {
            bar.write64(8 * index, *value);
        }
        if let Ok(transport) = PciTransport::new(function) {
            transport.device_features();
            transport.set_driver_features(u64::MAX);
            let _ = transport.set_up_queue(queue, &SETUP);
            transport.notify(queue);
            transport.config_generation();
            transport.config_read(queue.into());
            transport.config_write(0, 1);
            transport.status();
        }
    }
}
