//! Interrupts by wire: INTA to INTD, signalled by level and shared.
//!
//! A wire is shared by functions that know nothing of each other. Whose interrupt it is, each function says itself, in its Status
//! register (PCI Local Bus 3.0, 6.2.3; PCI Express Base, 7.5.1.1.4), so a driver's handler is called for its own device only and
//! need not be able to tell. Reading that register also pushes what the function wrote to memory before it interrupted.
//!
//! # Storms
//!
//! A level that nobody takes back interrupts again as soon as the handler is done, for ever. A function that still asserts its wire
//! after [`PATIENCE`] calls of its handler, one after the other, is cut off from the wire: its neighbours keep theirs. A wire that
//! has interrupted [`PATIENCE`] times in a row with none of its functions asserting it is masked, until all of them have given it
//! up. Both are errors that the line keeps ([`Line::trouble`]) and that are logged; waiters run into their deadlines.
//!
//! # Gates
//!
//! Whoever answers to an interrupt outside its handler, and may never do so, connects by [`Line::connect_gated`]: then the handler
//! of the line itself shuts the function's gate (Interrupt Disable, in its Command register) before anybody is told. So the function
//! interrupts once for each [`Wire::open`], whatever it does, and its neighbours go on. The Status register says that it asserts its
//! wire behind a shut gate too; such a function is not the one that interrupts. A level that is gone before anybody has looked is
//! nobody's; where that is all that comes, for [`PATIENCE`] interrupts in a row, the functions with gates are cut off first, and the
//! line is masked only if it was none of them.
//!
//! # Locking
//!
//! `claims` is held while the handlers run, so that one that was taken away does not run any more; whoever connects or disconnects
//! takes it without any lock that a handler takes. Inside it: the function's own lock, and what handlers take. Connecting
//! allocates; handling does not.

use crate::config::{Command, reg};
use crate::{Function, InterruptPin, PciError};
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::IrqMutex;
use base::irq::Handler;

/// How often in a row a line may interrupt without any progress.
pub const PATIENCE: u32 = 10_000;

const STATUS_INTERRUPT: u16 = 1 << 3;

impl Function {
    /// Where the function's wire comes out: the device number on the root bus and the pin there. Each bridge on the way passes the
    /// pins of the devices behind it on by turns (PCI-to-PCI Bridge 1.2, 9.1). `None` for a function without a pin.
    pub fn wire(&self) -> Option<(u8, InterruptPin)> {
        let mut pin = self.interrupt_pin()?;
        let (mut device, mut bridge) = (self.bdf().device(), self.parent());
        while let Some(above) = bridge {
            pin = pin.behind(device);
            (device, bridge) = (above.bdf().device(), above.parent());
        }
        Some((device, pin))
    }

    /// Whether the function asserts its wire, or would if it were let. False where no function answers.
    pub fn asserts_wire(&self) -> bool {
        let status = self.read_config16(reg::STATUS);
        status != u16::MAX && status & STATUS_INTERRUPT != 0
    }

    /// Whether the function may use its wire, from its Command register.
    pub fn may_use_wire(&self) -> bool {
        !Command::from_bits_retain(self.read_config16(reg::COMMAND)).contains(Command::INTX_DISABLE)
    }
}

impl InterruptPin {
    /// The pin of a bridge that the pin of the device number `device` behind it comes out at.
    const fn behind(self, device: u8) -> Self {
        match (self.number() - 1 + device % 4) % 4 {
            0 => Self::A,
            1 => Self::B,
            2 => Self::C,
            _ => Self::D,
        }
    }
}

/// A function that uses the line.
struct Claim {
    function: Arc<Function>,
    handler: Arc<dyn Handler>,
    /// Its gate is shut before its handler is called.
    gated: bool,
    /// How often in a row it still asserted the line after its handler; [`PATIENCE`] for one that was cut off.
    stuck: u32,
    /// How often its handler was called.
    served: u64,
}

#[derive(Default)]
struct State {
    claims: Vec<Claim>,
    /// How often in a row the line interrupted for none of them.
    unclaimed: u32,
    masked: bool,
    trouble: Option<PciError>,
}

/// The interrupt that a line is, at the interrupt controller. Both are called with the line's lock held, and with interrupts masked.
pub trait LineControl: Send + Sync {
    /// Lets it interrupt no more.
    fn mask(&self);
    /// Lets it interrupt again.
    fn unmask(&self);
}

/// A line of the interrupt controller that functions share: the handler of that interrupt.
pub struct Line {
    control: Arc<dyn LineControl>,
    state: IrqMutex<State>,
}

impl Line {
    /// A line that nobody uses yet, and that is not masked.
    pub fn new(control: Arc<dyn LineControl>) -> Self {
        Self { control, state: IrqMutex::default() }
    }

    /// Has `handler` serve the wire of `function`, which is let use it, until the result is dropped. The handler has to make the
    /// function take its interrupt back.
    ///
    /// # Errors
    ///
    /// [`PciError::LineMasked`] if the line is masked and others use it; [`PciError::OutOfMemory`]; what is wrong with the function.
    pub fn connect(self: &Arc<Self>, function: &Arc<Function>, handler: Arc<dyn Handler>) -> Result<Wire, PciError> {
        self.add(function, handler, false)
    }

    /// As [`Line::connect`], for a handler that only says that there was an interrupt: the function's gate is shut before it is
    /// called, and stays so until [`Wire::open`].
    ///
    /// # Errors
    ///
    /// As there; [`PciError::NoGate`] for a function whose gate does not keep what is written to it.
    pub fn connect_gated(
        self: &Arc<Self>,
        function: &Arc<Function>,
        handler: Arc<dyn Handler>,
    ) -> Result<Wire, PciError> {
        // It is shut as long as the wire is nobody's.
        if function.may_use_wire() {
            return Err(PciError::NoGate);
        }
        let wire = self.add(function, handler, true)?;
        // Where it is open, an interrupt has shut it already.
        let passes = || function.may_use_wire() || wire.served() != 0;
        if passes() { Ok(wire) } else { Err(PciError::NoGate) }
    }

    fn add(
        self: &Arc<Self>,
        function: &Arc<Function>,
        handler: Arc<dyn Handler>,
        gated: bool,
    ) -> Result<Wire, PciError> {
        function.check()?;
        {
            let mut state = self.state.lock();
            if state.masked && !state.claims.is_empty() {
                return Err(PciError::LineMasked);
            }
            state.claims.try_reserve(1).map_err(|_| PciError::OutOfMemory)?;
            if state.claims.is_empty() {
                // Whoever made trouble may be gone with the last of the line's users.
                (state.trouble, state.unclaimed) = (None, 0);
                if core::mem::take(&mut state.masked) {
                    self.control.unmask();
                }
            }
            state.claims.push(Claim { function: function.clone(), handler, gated, stuck: 0, served: 0 });
        }
        function.set_wired_interrupt(true);
        Ok(Wire { line: self.clone(), function: function.clone() })
    }

    /// What went wrong on the line last, since it had no users: [`PciError::LineMasked`] or [`PciError::WireStuck`].
    pub fn trouble(&self) -> Option<PciError> {
        self.state.lock().trouble
    }

    /// How many functions use the line.
    pub fn users(&self) -> usize {
        self.state.lock().claims.len()
    }
}

impl Handler for Line {
    fn handle(&self) {
        let mut state = self.state.lock();
        let State { claims, unclaimed, masked, trouble } = &mut *state;
        let mut served = false;
        for Claim { function, handler, gated, stuck, served: count } in &mut *claims {
            if *stuck >= PATIENCE || !function.asserts_wire() || *gated && !function.may_use_wire() {
                continue;
            }
            served = true;
            *count += 1;
            if *gated {
                function.set_wired_interrupt(false);
                handler.handle();
                continue;
            }
            handler.handle();
            *stuck = if function.asserts_wire() { *stuck + 1 } else { 0 };
            if *stuck >= PATIENCE {
                cut_off(function, trouble);
            }
        }
        *unclaimed = if served { 0 } else { unclaimed.saturating_add(1) };
        if *unclaimed < PATIENCE || *masked {
            return;
        }
        let mut suspects = claims.iter_mut().filter(|claim| claim.gated && claim.stuck < PATIENCE).peekable();
        if suspects.peek().is_some() {
            // It may be a level that comes and goes before anybody looks; those that answer in their handlers do not do that.
            suspects.for_each(|claim| {
                claim.stuck = PATIENCE;
                cut_off(&claim.function, trouble);
            });
            *unclaimed = 0;
        } else {
            self.control.mask();
            *masked = true;
            log::error!("{}", PciError::LineMasked);
            *trouble = Some(PciError::LineMasked);
        }
    }
}

fn cut_off(function: &Function, trouble: &mut Option<PciError>) {
    function.set_wired_interrupt(false);
    let error = PciError::WireStuck(function.bdf());
    log::error!("{error}");
    *trouble = Some(error);
}

/// A function's use of a line. When it is dropped the function may not use its wire any more, and its handler does not run and will
/// not run again. Not to be dropped in a handler.
pub struct Wire {
    line: Arc<Line>,
    function: Arc<Function>,
}

impl Wire {
    /// The line.
    pub fn line(&self) -> &Arc<Line> {
        &self.line
    }

    /// How many interrupts of the function's were served.
    pub fn served(&self) -> u64 {
        let state = self.line.state.lock();
        let own = state.claims.iter().find(|claim| Arc::ptr_eq(&claim.function, &self.function));
        own.map_or(0, |claim| claim.served)
    }

    /// Opens the gate, if the function has one ([`Line::connect_gated`]) and was not cut off.
    pub fn open(&self) {
        let state = self.line.state.lock();
        let own = state.claims.iter().find(|claim| Arc::ptr_eq(&claim.function, &self.function));
        if own.is_some_and(|claim| claim.gated && claim.stuck < PATIENCE) {
            self.function.set_wired_interrupt(true);
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.function.set_wired_interrupt(false);
        let mut state = self.line.state.lock();
        let own = state.claims.iter().position(|claim| Arc::ptr_eq(&claim.function, &self.function));
        let claim = own.map(|index| state.claims.swap_remove(index));
        drop(state);
        drop(claim);
    }
}

#[cfg(test)]
mod tests {
    //! Seen red: with the swizzle left out, or made at the first bridge only; with the claim left in the list at the end. Seen not to
    //! end: with handlers called whether or not their function asserts the wire; without either of the two ends of a storm.

    use super::*;
    use crate::fake::{FakeEnv, FakeFunction, FakeSpace};
    use crate::{Bdf, Host};
    use alloc::vec;
    use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    fn endpoint(device: u8, function: u8, pin: u8) -> FakeFunction {
        FakeFunction::endpoint(device, function, 0x1234, 1).with(0x3d, &[pin])
    }

    fn enumerate(root: Vec<FakeFunction>) -> (Host, Arc<FakeSpace>) {
        let space = FakeSpace::new(0, root);
        let host = Host::with_space(space.clone(), 0, 0..=255, &[], Arc::new(FakeEnv::default())).unwrap();
        (host, space)
    }

    fn at(bus: u8, device: u8, function: u8) -> Bdf {
        Bdf::new(bus, device, function).unwrap()
    }

    #[test]
    fn a_wire_comes_out_turned_by_every_bridge_on_the_way() {
        let legacy = FakeFunction::bridge(5, 0, None).child(endpoint(3, 0, 2)).child(endpoint(4, 0, 1));
        let switch = FakeFunction::bridge(0, 0, Some(5)).child(
            FakeFunction::bridge(1, 0, Some(6)).child(FakeFunction::bridge(0, 0, Some(7)).child(endpoint(2, 0, 4))),
        );
        let port = FakeFunction::bridge(6, 0, Some(4)).child(switch);
        let (host, _) = enumerate(vec![endpoint(1, 0, 3), endpoint(2, 0, 0), endpoint(7, 0, 9), legacy, port]);
        let wire = |bus, device| host.find(at(bus, device, 0)).unwrap().wire().map(|(at, pin)| (at, pin.number()));
        assert_eq!(wire(0, 1), Some((1, 3)));
        assert_eq!((wire(0, 2), wire(0, 7)), (None, None), "no pin, and one that there is not");
        // INTB of slot 3 behind slot 5: (1 + 3) % 4.
        assert_eq!((wire(1, 3), wire(1, 4)), (Some((5, 1)), Some((5, 1))));
        // INTD of slot 2: (3 + 2) % 4 = INTB; through slots 0, 1 and 0: INTC.
        assert_eq!(wire(5, 2), Some((6, 3)));
    }

    /// A function that takes its interrupt back when its handler runs, or not.
    struct Device {
        space: Arc<FakeSpace>,
        bdf: Bdf,
        calls: AtomicUsize,
        stuck: AtomicBool,
    }

    impl Device {
        fn assert(&self, level: bool) {
            self.space.poke(self.bdf, reg::STATUS, if level { 8 } else { 0 });
        }
        fn calls(&self) -> usize {
            self.calls.load(Ordering::SeqCst)
        }
    }

    impl Handler for Device {
        fn handle(&self) {
            self.calls.fetch_add(1, Ordering::SeqCst);
            self.assert(self.stuck.load(Ordering::SeqCst));
        }
    }

    #[derive(Default)]
    struct Masked(AtomicBool);

    impl LineControl for Masked {
        fn mask(&self) {
            self.0.store(true, Ordering::SeqCst);
        }
        fn unmask(&self) {
            self.0.store(false, Ordering::SeqCst);
        }
    }

    struct Rig {
        line: Arc<Line>,
        masked: Arc<Masked>,
        devices: Vec<Arc<Device>>,
        functions: Vec<Arc<Function>>,
        wires: Vec<Wire>,
    }

    fn rig(count: u8) -> Rig {
        let (host, space) = enumerate((0..count).map(|device| endpoint(device, 0, 1)).collect());
        let masked = Arc::new(Masked::default());
        let line = Arc::new(Line::new(masked.clone()));
        let functions: Vec<_> = host.functions().to_vec();
        let devices: Vec<_> = functions
            .iter()
            .map(|function| {
                let (space, bdf) = (space.clone(), function.bdf());
                Arc::new(Device { space, bdf, calls: AtomicUsize::new(0), stuck: AtomicBool::new(false) })
            })
            .collect();
        let wires = functions
            .iter()
            .zip(&devices)
            .map(|(function, device)| line.connect(function, device.clone()).unwrap())
            .collect();
        Rig { line, masked, devices, functions, wires }
    }

    #[test]
    fn only_the_handlers_of_those_that_assert_the_line_run() {
        let rig = rig(3);
        assert!(rig.functions.iter().all(|function| function.may_use_wire()));
        rig.devices[0].assert(true);
        rig.devices[2].assert(true);
        rig.line.handle();
        let calls: Vec<_> = rig.devices.iter().map(|device| device.calls()).collect();
        assert_eq!(calls, [1, 0, 1]);
        assert_eq!(rig.wires.iter().map(Wire::served).collect::<Vec<_>>(), [1, 0, 1]);
        rig.line.handle();
        assert_eq!(rig.devices[0].calls(), 1);
        assert_eq!(rig.line.trouble(), None);
    }

    #[test]
    fn a_wire_that_is_dropped_is_silent_and_its_handler_gone() {
        let mut rig = rig(2);
        let first = rig.wires.remove(0);
        drop(first);
        assert!(!rig.functions[0].may_use_wire() && rig.functions[1].may_use_wire());
        assert_eq!((Arc::strong_count(&rig.devices[0]), rig.line.users()), (1, 1));
        rig.devices[0].assert(true);
        rig.devices[1].assert(true);
        rig.line.handle();
        assert_eq!((rig.devices[0].calls(), rig.devices[1].calls()), (0, 1));
    }

    #[test]
    fn a_line_that_nobody_claims_is_masked_until_all_its_users_are_gone() {
        let mut rig = rig(2);
        let mut interrupts = 0;
        // As hardware would: again and again until it is masked.
        while !rig.masked.0.load(Ordering::SeqCst) {
            rig.line.handle();
            interrupts += 1;
        }
        assert_eq!(interrupts, PATIENCE);
        assert_eq!(rig.line.trouble(), Some(PciError::LineMasked));
        assert_eq!(rig.line.connect(&rig.functions[0], Arc::new(|| {})).err(), Some(PciError::LineMasked));
        rig.wires.clear();
        let wire = rig.line.connect(&rig.functions[0], rig.devices[0].clone()).unwrap();
        rig.devices[0].assert(true);
        rig.line.handle();
        assert!(rig.devices[0].calls() == 1 && !rig.masked.0.load(Ordering::SeqCst));
        drop(wire);
    }

    #[test]
    fn now_and_then_an_interrupt_of_nobodys_is_no_storm() {
        let rig = rig(1);
        for _ in 0..3 {
            (0..PATIENCE - 1).for_each(|_| rig.line.handle());
            rig.devices[0].assert(true);
            rig.line.handle();
        }
        assert!(!rig.masked.0.load(Ordering::SeqCst) && rig.line.trouble().is_none());
    }

    #[test]
    fn a_function_that_does_not_take_its_interrupt_back_is_cut_off_and_its_neighbour_is_not() {
        let rig = rig(2);
        rig.devices[0].stuck.store(true, Ordering::SeqCst);
        rig.devices[0].assert(true);
        let mut interrupts = 0;
        while rig.functions[0].may_use_wire() {
            rig.line.handle();
            interrupts += 1;
        }
        assert_eq!(interrupts, PATIENCE);
        assert_eq!(rig.line.trouble(), Some(PciError::WireStuck(rig.functions[0].bdf())));
        rig.devices[1].assert(true);
        rig.line.handle();
        assert_eq!((rig.devices[0].calls(), rig.devices[1].calls()), (PATIENCE as usize, 1));
        assert!(rig.functions[1].may_use_wire() && !rig.masked.0.load(Ordering::SeqCst));
    }

    /// A rig whose first function has a gate, behind which somebody only counts.
    fn gated_rig() -> (Rig, Wire, Arc<AtomicUsize>) {
        let mut rig = rig(2);
        rig.wires.remove(0);
        let told = Arc::new(AtomicUsize::new(0));
        let count = told.clone();
        let handler = Arc::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let wire = rig.line.connect_gated(&rig.functions[0], handler).unwrap();
        (rig, wire, told)
    }

    /// Red without the gate (it is told of every interrupt of its neighbour's, and cut off), and where a shut gate is no reason to
    /// pass a function over.
    #[test]
    fn a_function_with_a_gate_interrupts_once_for_each_time_it_is_opened() {
        let (rig, wire, told) = gated_rig();
        rig.devices[0].assert(true);
        for round in 1..4 {
            assert!(rig.functions[0].may_use_wire());
            rig.line.handle();
            assert!(!rig.functions[0].may_use_wire(), "the level is still there");
            // Its neighbour goes on.
            for _ in 0..2 * PATIENCE {
                rig.devices[1].assert(true);
                rig.line.handle();
            }
            assert_eq!((told.load(Ordering::SeqCst), wire.served()), (round, round as u64));
            wire.open();
        }
        assert_eq!((rig.devices[1].calls(), rig.line.trouble()), (6 * PATIENCE as usize, None));
        drop(wire);
        assert!(!rig.functions[0].may_use_wire() && rig.functions[1].may_use_wire());
    }

    /// Whoever has the device's registers can raise and lower its level before a handler looks. Red when the line is masked.
    #[test]
    fn pulses_of_a_function_with_a_gate_cost_it_its_wire_and_its_neighbour_nothing() {
        let (rig, wire, told) = gated_rig();
        (0..PATIENCE).for_each(|_| rig.line.handle());
        assert_eq!(rig.line.trouble(), Some(PciError::WireStuck(rig.functions[0].bdf())));
        wire.open();
        rig.devices[0].assert(true);
        rig.line.handle();
        assert!(!rig.functions[0].may_use_wire() && told.load(Ordering::SeqCst) == 0, "it is cut off for good");
        rig.devices[1].assert(true);
        rig.line.handle();
        assert!(rig.devices[1].calls() == 1 && !rig.masked.0.load(Ordering::SeqCst));
        // It was not that one.
        (0..PATIENCE).for_each(|_| rig.line.handle());
        assert!(rig.masked.0.load(Ordering::SeqCst));
    }

    /// Before PCI 2.3 there was none. Red without the looks at the Command register.
    #[test]
    fn a_function_without_a_gate_is_refused_one() {
        for stuck in [0, 0x400_u16] {
            let function = endpoint(1, 0, 1).with_writable(4, &[7, 0]).with(4, &stuck.to_le_bytes());
            let (host, _) = enumerate(vec![function]);
            let line = Arc::new(Line::new(Arc::new(Masked::default())));
            let refused = line.connect_gated(&host.functions()[0], Arc::new(|| {}));
            assert_eq!(refused.err(), Some(PciError::NoGate), "{stuck:#x}");
            assert_eq!(line.users(), 0);
        }
    }

    #[test]
    fn a_function_that_is_gone_claims_nothing() {
        let rig = rig(1);
        rig.devices[0].space.poke(rig.devices[0].bdf, reg::STATUS, 0xffff);
        rig.line.handle();
        assert_eq!(rig.devices[0].calls(), 0);
    }
}
