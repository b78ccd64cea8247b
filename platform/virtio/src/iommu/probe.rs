//! What the device says of an endpoint's address space \[5.13.6.7\].

use crate::spec::iommu::property;
use ::iommu::domain::{Reserved, ReservedKind};
use ::iommu::{Iova, IovaRange, OutOfMemory};
use alloc::vec::Vec;

/// Reads the reserved regions out of a list of properties. What makes no sense ends the list.
pub(super) fn reserved(mut list: &[u8]) -> Result<Vec<Reserved>, OutOfMemory> {
    let mut found = Vec::new();
    while let Some((head, rest)) = list.split_at_checked(property::HEAD) {
        let half = |at: usize| Some(u16::from_le_bytes(head.get(at..at + 2)?.try_into().ok()?));
        let (Some(kind), Some(len)) = (half(0), half(2)) else { break };
        let Some((body, rest)) = rest.split_at_checked(usize::from(len)) else { break };
        list = rest;
        match kind & property::TYPE_MASK {
            property::NONE => break,
            property::RESV_MEM => {
                if let Some(region) = region(body) {
                    found.try_reserve(1).map_err(|_| OutOfMemory)?;
                    found.push(region);
                }
            }
            // A later version's.
            _ => {}
        }
    }
    Ok(found)
}

fn region(body: &[u8]) -> Option<Reserved> {
    let body = body.get(..property::RESV_MEM_LEN)?;
    let wide = |at: usize| Some(u64::from_le_bytes(body.get(at..at + 8)?.try_into().ok()?));
    let (start, last) = (wide(4)?, wide(12)?);
    let kind = match *body.first()? {
        property::RESV_MEM_MSI => ReservedKind::MsiDoorbell,
        // Subtypes that are not known are to be treated as reserved.
        _ => ReservedKind::Firmware,
    };
    let end = last.checked_add(1).unwrap_or(last);
    let range = IovaRange::between(Iova::new(start), Iova::new(end)).filter(|range| !range.is_empty())?;
    Some(Reserved { range, kind })
}
