//! Giving every BAR an address, and every bridge the windows that lead to the BARs behind it.
//!
//! Sizes go up the tree, addresses come down: the layout behind a bridge is computed relative to the bridge's window, which is
//! then one item of the bus in front of it. On each bus the items with the largest alignment come first, so power-of-two items
//! leave no holes. Where something does not fit, the function with the largest BAR in question is given up (an I/O BAR alone:
//! nothing here needs I/O) and the layout is made again, so a function that asks for nonsense harms itself only.

use crate::PciError;
use crate::bar::{self, Bar, BarKind};
use crate::config::{Command, Config, reg};
use crate::scan::Node;
use crate::window::{self, Class, Space, Window, WindowKind};
use alloc::vec::Vec;
use core::cmp::Reverse;

/// What is to be placed.
#[derive(Clone, Copy, Debug)]
enum What {
    Bar(u8),
    Window(Class),
}

#[derive(Clone, Copy, Debug)]
struct Item {
    node: usize,
    what: What,
    size: u64,
    align: u64,
    prefetchable: bool,
}

/// The items of one bus and class, with offsets from the start of the bridge's window.
#[derive(Default)]
struct Layout {
    items: Vec<(Item, u64)>,
    size: u64,
    align: u64,
}

/// The layouts of the bus behind a bridge, by class.
type Layouts = [Layout; 3];

/// Assigns addresses to all BARs and bridge windows of the tree, and writes them.
pub(crate) fn assign(nodes: &mut [Node], windows: &[Window]) {
    refuse_absurd(nodes, windows);
    // Each round that does not end gives up a BAR, so there are at most as many rounds as BARs.
    while let Err(culprit) = round(nodes, windows) {
        give_up(nodes, &culprit);
    }
    for node in nodes {
        write(node);
    }
}

/// Gives up at once, without a round for each, what is larger than every window.
fn refuse_absurd(nodes: &mut [Node], windows: &[Window]) {
    let largest = |io: bool| {
        let fitting = windows.iter().filter(|window| (window.kind == WindowKind::Io) == io);
        fitting.map(|window| window.len).max().unwrap_or(0)
    };
    let (io, memory) = (largest(true), largest(false));
    for node in nodes {
        for bar in node.bars.iter().flatten() {
            if !bar.is_memory() && bar.size > io {
                node.unassigned |= 1 << bar.index;
            } else if bar.is_memory() && bar.size > memory {
                node.failure = node.failure.or(Some(PciError::NoSpace { bar: bar.index, size: bar.size }));
            }
        }
    }
}

/// The BAR to give up because something found no place.
struct Culprit {
    node: usize,
    bar: u8,
    size: u64,
    io: bool,
}

fn round(nodes: &mut [Node], windows: &[Window]) -> Result<(), Culprit> {
    let mut layouts: Vec<Layouts> = Vec::new();
    layouts.resize_with(nodes.len(), Layouts::default);
    let mut root: Vec<(Item, Class)> = Vec::new();
    // Depth-first order backwards: all that is behind a bridge has been seen when the bridge is reached.
    for (index, node) in nodes.iter().enumerate().rev() {
        for (layout, class) in layouts.get_mut(index).into_iter().flatten().zip(Class::ALL) {
            lay_out(layout, class);
        }
        for (item, wanted) in items(index, node, layouts.get(index)) {
            let Some(parent) = node.parent else {
                root.push((item, wanted));
                continue;
            };
            let class = class_behind(nodes.get(parent), &item, wanted);
            if let Some(layout) = layouts.get_mut(parent).and_then(|all| all.get_mut(class as usize)) {
                layout.items.push((item, 0));
            }
        }
    }
    let mut space = Space::new(windows);
    root.sort_by_key(|(item, _)| Reverse((item.align, item.size)));
    for (item, class) in &root {
        if let Some(address) = space.take(*class, item.prefetchable, item.size, item.align) {
            place(nodes, &layouts, windows, item, address);
        } else if let Some((node, bar, size)) = largest(&layouts, item) {
            return Err(Culprit { node, bar, size, io: *class == Class::Io });
        }
    }
    Ok(())
}

/// The largest BAR in an item: its function, number and size.
fn largest(layouts: &[Layouts], item: &Item) -> Option<(usize, u8, u64)> {
    match item.what {
        What::Bar(bar) => Some((item.node, bar, item.size)),
        What::Window(class) => {
            let layout = layouts.get(item.node)?.get(class as usize)?;
            layout.items.iter().filter_map(|(inner, _)| largest(layouts, inner)).max_by_key(|(.., size)| *size)
        }
    }
}

/// What a function asks of the bus that it is on: its BARs and, if it is a bridge, windows for what is behind it.
fn items(index: usize, node: &Node, behind: Option<&Layouts>) -> Vec<(Item, Class)> {
    let mut items = Vec::new();
    if node.failure.is_none() {
        for bar in node.bars.iter().flatten().filter(|bar| node.unassigned & 1 << bar.index == 0) {
            let class = match bar.kind {
                BarKind::Io => Class::Io,
                BarKind::Memory { wide: true, .. } => Class::High,
                BarKind::Memory { wide: false, .. } => Class::Low,
            };
            let (size, prefetchable) = (bar.size, bar.is_prefetchable());
            items.push((Item { node: index, what: What::Bar(bar.index), size, align: size, prefetchable }, class));
        }
    }
    for (layout, class) in behind.into_iter().flatten().zip(Class::ALL) {
        if layout.size != 0 {
            let prefetchable = class == Class::High;
            let (size, align) = (layout.size, layout.align);
            items.push((Item { node: index, what: What::Window(class), size, align, prefetchable }, class));
        }
    }
    items
}

/// Where an item goes behind a bridge. Only the prefetchable window reaches above 4 GiB; without one that does, everything
/// shares the window for memory below, which prefetchable memory may use too.
fn class_behind(bridge: Option<&Node>, item: &Item, wanted: Class) -> Class {
    let prefetch64 = bridge.and_then(|node| node.bridge).is_some_and(|bridge| bridge.prefetch64);
    match wanted {
        Class::High if !(prefetch64 && item.prefetchable) => Class::Low,
        other => other,
    }
}

/// The granularity of a bridge's window.
const fn granule(class: Class) -> u64 {
    match class {
        Class::Io => 0x1000,
        Class::Low | Class::High => 0x10_0000,
    }
}

fn lay_out(layout: &mut Layout, class: Class) {
    layout.items.sort_by_key(|(item, _)| Reverse((item.align, item.size)));
    let granule = granule(class);
    let mut next = 0_u64;
    layout.align = granule;
    for (item, offset) in &mut layout.items {
        layout.align = layout.align.max(item.align);
        // A sum that overflows stays at the top: it fits nowhere, and the largest item will be given up.
        let start = next.checked_next_multiple_of(item.align).unwrap_or(u64::MAX);
        *offset = start;
        next = start.saturating_add(item.size);
    }
    layout.size = next.checked_next_multiple_of(granule).unwrap_or(u64::MAX);
}

/// Notes the address of an item and of all that lies in it.
fn place(nodes: &mut [Node], layouts: &[Layouts], windows: &[Window], item: &Item, address: u64) {
    match item.what {
        What::Bar(index) => {
            if let Some(bar) = nodes.get_mut(item.node).and_then(|node| bar_mut(node, index)) {
                bar.bus = Some(address);
                bar.phys = window::translate(windows, !bar.is_memory(), address);
            }
        }
        What::Window(class) => {
            if let Some(node) = nodes.get_mut(item.node)
                && let Some(window) = node.windows.get_mut(class as usize)
            {
                *window = Some((address, item.size));
            }
            let Some(layout) = layouts.get(item.node).and_then(|all| all.get(class as usize)) else { return };
            for (inner, offset) in &layout.items {
                place(nodes, layouts, windows, inner, address + offset);
            }
        }
    }
}

fn bar_mut(node: &mut Node, index: u8) -> Option<&mut Bar> {
    node.bars.get_mut(usize::from(index)).and_then(Option::as_mut)
}

/// Gives up a BAR, and with it its function unless it is an I/O BAR; and forgets all addresses.
fn give_up(nodes: &mut [Node], culprit: &Culprit) {
    for node in nodes.iter_mut() {
        node.windows = [None; 3];
        for bar in node.bars.iter_mut().flatten() {
            (bar.bus, bar.phys) = (None, None);
        }
    }
    let Some(node) = nodes.get_mut(culprit.node) else { return };
    if !culprit.io {
        node.failure = Some(PciError::NoSpace { bar: culprit.bar, size: culprit.size });
    } else {
        node.unassigned |= 1 << culprit.bar;
    }
}

/// Writes the BARs of a function, and its windows if it is a bridge.
fn write(node: &mut Node) {
    let config = node.config.clone();
    if let Some(bridge) = &node.bridge {
        write_windows(&config, &node.windows, bridge.io);
    }
    for bar in node.bars.iter_mut().flatten() {
        let Some(address) = bar.bus.filter(|_| node.failure.is_none()) else { continue };
        if let Err(error) = bar::write(&config, bar, address) {
            node.failure = Some(error);
        }
    }
    if node.bridge.is_some() {
        // Bridges forward downstream from here on; upstream only while something behind them is a bus master.
        config.write16(reg::COMMAND, (Command::MEMORY | Command::INTX_DISABLE).bits());
    }
}

/// Programs a bridge's windows; an empty one has its limit below its base.
fn write_windows(config: &Config, windows: &[Option<(u64, u64)>; 3], io: bool) {
    let [io_window, low, high] = windows.map(|window| window.map(|(base, size)| (base, base + (size - 1))));
    if io {
        let (base, limit) = io_window.unwrap_or((0xf000, 0));
        config.write8(reg::IO_BASE, (base >> 8 & 0xf0) as u8);
        config.write8(reg::IO_LIMIT, (limit >> 8 & 0xf0) as u8);
        config.write16(reg::IO_BASE_UPPER, (base >> 16) as u16);
        config.write16(reg::IO_LIMIT_UPPER, (limit >> 16) as u16);
    }
    let (base, limit) = low.unwrap_or((0xfff0_0000, 0));
    config.write16(reg::MEMORY_BASE, (base >> 16 & 0xfff0) as u16);
    config.write16(reg::MEMORY_LIMIT, (limit >> 16 & 0xfff0) as u16);
    let (base, limit) = high.unwrap_or((0xfff0_0000, 0));
    config.write32(reg::PREFETCH_BASE_UPPER, u32::MAX);
    config.write16(reg::PREFETCH_BASE, (base >> 16 & 0xfff0) as u16);
    config.write16(reg::PREFETCH_LIMIT, (limit >> 16 & 0xfff0) as u16);
    config.write32(reg::PREFETCH_LIMIT_UPPER, (limit >> 32) as u32);
    config.write32(reg::PREFETCH_BASE_UPPER, (base >> 32) as u32);
}
