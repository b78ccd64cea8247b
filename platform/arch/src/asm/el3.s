// What is left at EL3 where the image was entered there: an SMC reads or writes a word as the secure state does, until another one
// forbids SMCs. The MMU is off there: addresses are physical, and registers are accessed in order.
//
// x0 = 0: w0 = the word at x1. x0 = 1: the word at x1 becomes w2. x0 = 2: no more SMCs. Changes x3.

.macro el3_park
    .balign 0x80
    b       el3_stop
.endm

.section .text.el3, "ax"
.balign 0x800
.global el3_vectors
el3_vectors:
    .rept 8
    el3_park                             // from EL3 itself
    .endr
    .balign 0x80                         // from AArch64: only an SMC is expected
    mrs     x3, esr_el3
    lsr     x3, x3, #26
    cmp     x3, #0x17
    b.ne    el3_stop
    cbz     x0, 0f
    cmp     x0, #1
    b.eq    1f
    mrs     x3, scr_el3
    orr     x3, x3, #(1 << 7)            // SMD
    msr     scr_el3, x3
    isb
    eret
0:  ldr     w0, [x1]
    eret
1:  str     w2, [x1]
    dsb     sy
    eret
    .rept 7
    el3_park
    .endr
    .balign 0x80
el3_stop:
    wfi
    b       el3_stop
    .previous
