//! Which functions an IOMMU cannot tell or keep apart.
//!
//! An IOMMU sees what reaches the root complex, under the name it arrives with. Functions share a group where that is not
//! enough:
//!
//! - behind a bridge to conventional PCI, whose bus lets everybody talk to everybody and whose bridge speaks for all;
//! - below a switch whose downstream ports may send requests straight from one to another, because they lack Access Control
//!   Services (ACS) or do not let them be enabled;
//! - below a root port without ACS;
//! - in one multi-function device whose functions lack ACS.
//!
//! A group goes by the name of the function at its top.

use crate::Bdf;
use crate::caps::PortType;
use crate::config::Config;
use crate::scan::Node;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

const CAPABILITY: u16 = 4;
const CONTROL: u16 = 6;

/// Source Validation, P2P Request Redirect, P2P Completion Redirect, Upstream Forwarding.
const PORT: u16 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4;
/// What a function that is no port can have of these.
const FUNCTION: u16 = 1 << 2 | 1 << 3;

/// Enables what keeps functions apart in an ACS capability, and tells whether all of it is enabled.
pub(crate) fn enable_access_control(config: &Config, acs: u16, port: Option<PortType>) -> bool {
    let wanted = if port.is_some_and(PortType::has_link_below) { PORT } else { FUNCTION };
    let able = config.read16(acs + CAPABILITY) & wanted;
    config.write16(acs + CONTROL, able);
    let enabled = config.read16(acs + CONTROL) & wanted;
    // What a function that is no port does not implement of ACS, it cannot do to its neighbours either.
    enabled == if wanted == PORT { PORT } else { able }
}

/// What is known of one device number: its functions, whether all keep apart, and the first of them.
struct Slot {
    count: usize,
    apart: bool,
    first: Bdf,
}

/// The device numbers of all buses.
type Slots = BTreeMap<(u8, u8), Slot>;

/// Names the group of each function.
pub(crate) fn groups(nodes: &[Node]) -> Vec<Bdf> {
    let mut slots = Slots::new();
    for node in nodes {
        let bdf = node.config.bdf();
        let slot = slots.entry((bdf.bus(), bdf.device())).or_insert(Slot { count: 0, apart: true, first: bdf });
        slot.count += 1;
        slot.apart &= node.access_control;
        slot.first = slot.first.min(bdf);
    }
    nodes.iter().map(|node| group(nodes, &slots, node)).collect()
}

fn group(nodes: &[Node], slots: &Slots, node: &Node) -> Bdf {
    let mut group = top(slots, node);
    let mut above = node.parent;
    // The highest place on the way to the root that does not keep functions apart decides.
    while let Some(bridge) = above.and_then(|index| nodes.get(index)) {
        match bridge.port {
            None | Some(PortType::ToPci | PortType::FromPci) => group = top(slots, bridge),
            Some(PortType::Downstream) if !bridge.access_control => {
                let switch = bridge.parent.and_then(|index| nodes.get(index)).unwrap_or(bridge);
                group = top(slots, switch);
            }
            Some(PortType::RootPort) if !bridge.access_control => group = top(slots, bridge),
            // One function of several: what is behind its neighbours is not kept apart from what is behind it.
            Some(_) if is_shared(slots, bridge) => group = top(slots, bridge),
            Some(_) => {}
        }
        above = bridge.parent;
    }
    group
}

fn shared<'a>(slots: &'a Slots, node: &Node) -> Option<&'a Slot> {
    let bdf = node.config.bdf();
    slots.get(&(bdf.bus(), bdf.device())).filter(|slot| slot.count > 1 && !slot.apart)
}

/// Whether the function's device has others that are not kept apart from it.
fn is_shared(slots: &Slots, node: &Node) -> bool {
    shared(slots, node).is_some()
}

/// The function itself, or the first of its device if that has several functions which are not kept apart.
fn top(slots: &Slots, node: &Node) -> Bdf {
    shared(slots, node).map_or(node.config.bdf(), |slot| slot.first)
}
