//! The programs of the crate `user`, as an image carries them: the bytes of their ELFs.
//!
//! There is one way from a program's source into a kernel image: this crate's build script builds the crate `user` for the target,
//! in release, and what is linked with this crate has the files among its constants. On a host they are empty.

#![no_std]
#![forbid(unsafe_code)]

macro_rules! programs {
    ($($(#[$doc:meta])* $name:ident = $file:literal;)*) => {
        $(
            $(#[$doc])*
            #[cfg(target_os = "none")]
            pub static $name: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/", $file));
            $(#[$doc])*
            #[cfg(not(target_os = "none"))]
            pub static $name: &[u8] = &[];
        )*
    };
}

programs! {
    /// Does one thing, well or badly.
    TRIAL = "trial";
    /// A driver of edu.
    EDU = "edu";
    /// A driver of virtio-blk.
    BLK = "blk";
    /// A driver of an NVMe controller.
    NVME = "nvme";
    /// Asks for whatever comes to its mind.
    HOSTILE = "hostile";
    /// Draws into a picture that is on the screen.
    PAINTER = "painter";
    /// Does not, or wrongly.
    BUNGLER = "bungler";
}
