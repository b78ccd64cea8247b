// What is left at EL2 where the image was entered there, or at EL3: nothing should come here. Whatever does is EL1's: it gets it as
// an instruction that does not exist, from where it happened, so that a process can do no more by it than end. What EL2 does itself
// stops the core.

.macro el2_park
    .balign 0x80
    b       el2_stop
.endm

.section .text.el2, "ax"
.balign 0x800
.global el2_vectors
el2_vectors:
    .rept 8
    el2_park                             // from EL2 itself
    .endr
    .balign 0x80                         // from AArch64
    msr     tpidr_el2, x0
    mrs     x0, elr_el2
    msr     elr_el1, x0
    mov     x0, #(1 << 25)               // ESR_EL1: EC 0, IL
    msr     esr_el1, x0
    mrs     x0, spsr_el2
    msr     spsr_el1, x0
    tst     x0, #0xc                     // the vector by where it comes from: EL0, or EL1 with its own stack pointer
    mrs     x0, vbar_el1
    b.eq    0f
    add     x0, x0, #0x200
    b       1f
0:  add     x0, x0, #0x400
1:  msr     elr_el2, x0
    ldr     x0, =0x4003c5                // EL1h, everything masked, PAN as any exception sets it
    msr     spsr_el2, x0
    mrs     x0, tpidr_el2
    eret
    .rept 7
    el2_park
    .endr
    .balign 0x80
el2_stop:
    wfi
    b       el2_stop
    .ltorg
    .previous
