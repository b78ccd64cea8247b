//! Trouble on request, for tests on hardware that does not make any by itself.

use super::Smmu;
use crate::Error;
use crate::registers::Registers;
use crate::spec::command::Command;

impl<R: Registers> Smmu<R> {
    /// Issues a command that an SMMU without stage 2 must refuse (CERROR_ILL), with a CMD_SYNC behind it. Harmless where it is
    /// taken: it invalidates what nobody uses.
    ///
    /// # Errors
    ///
    /// [`Error::CommandRefused`], as the driver reports a refused command of its own.
    pub fn provoke_illegal_command(&self) -> Result<(), Error> {
        let mut batch = self.shared.batch();
        batch.push(Command::TlbiS12Vmall { vmid: 0 })?;
        batch.complete()
    }
}
