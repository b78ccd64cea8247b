// Exception vectors.
//
// The kernel runs on SP_EL0, so an exception that interrupts it comes through the first group and finds SP_EL1 at the top of
// this core's exception stack, whatever has become of the main stack. An exception in a handler comes through the second group
// and continues on the core's emergency stack; one more, while that stack is in use, is the end.
//
// The frame (`exception::Frame`) holds all general and SIMD registers: handlers are compiled Rust, which may use any of them.
// The kernel uses TPIDR_EL0 and TPIDRRO_EL0 as scratch registers; a process's TPIDR_EL0 is in its context (`user.s`).
//
// An exception from EL0 is no call: it comes through the third group, saves the process's registers in its context, and goes on
// in the kernel where `user_enter` was called, on the main stack.

.set FRAME_SIZE, 832

// `STACKS[index]`: `percore::Stacks`.
.set STACKS_SHIFT, 6
.set STACKS_EMERGENCY, 16
.set STACKS_BUSY, 24
.set STACKS_SCRATCH, 32

.macro vector kind, group
    .balign 0x80
    msr     tpidrro_el0, x0
    msr     tpidr_el0, x1
    mov     x0, #\kind
    b       enter_\group
.endm

.macro user_vector kind
    .balign 0x80
    stp     x0, x1, [sp, #-16]!
    mov     x1, #\kind
    b       user_leave
.endm

.section .text.vectors, "ax"
.balign 0x800
.global exception_vectors
exception_vectors:
    vector  0, main                      // current EL with SP_EL0: the kernel
    vector  1, main
    vector  2, main
    vector  3, main
    vector  0, nested                    // current EL with SP_ELx: an exception handler
    vector  1, nested
    vector  2, nested
    vector  3, nested
    user_vector 0                        // EL0
    user_vector 1
    user_vector 2
    user_vector 3
    vector  4, main                      // EL0 in AArch32: nothing runs so
    vector  4, main
    vector  4, main
    vector  4, main
    .balign 0x80

// Fills the frame at SP. x0 and x1 are in the scratch registers, x2 and x3 in the frame; x2 = the interrupted stack pointer.
.macro save_frame
    stp     x4, x5, [sp, #(16 * 2)]
    stp     x6, x7, [sp, #(16 * 3)]
    stp     x8, x9, [sp, #(16 * 4)]
    stp     x10, x11, [sp, #(16 * 5)]
    stp     x12, x13, [sp, #(16 * 6)]
    stp     x14, x15, [sp, #(16 * 7)]
    stp     x16, x17, [sp, #(16 * 8)]
    stp     x18, x19, [sp, #(16 * 9)]
    stp     x20, x21, [sp, #(16 * 10)]
    stp     x22, x23, [sp, #(16 * 11)]
    stp     x24, x25, [sp, #(16 * 12)]
    stp     x26, x27, [sp, #(16 * 13)]
    stp     x28, x29, [sp, #(16 * 14)]
    mrs     x3, tpidrro_el0
    mrs     x4, tpidr_el0
    stp     x3, x4, [sp]
    mrs     x3, elr_el1
    mrs     x4, spsr_el1
    mrs     x5, esr_el1
    mrs     x6, far_el1
    stp     x30, x2, [sp, #(16 * 15)]
    stp     x3, x4, [sp, #(16 * 16)]
    stp     x5, x6, [sp, #(16 * 17)]
    mrs     x7, fpsr
    mrs     x8, fpcr
    stp     x7, x8, [sp, #(16 * 18)]
    // A frame record, so that a backtrace from the handler goes on into the interrupted code.
    stp     x29, x3, [sp, #(16 * 19)]
    add     x29, sp, #(16 * 19)
    stp     q0, q1, [sp, #(16 * 20)]
    stp     q2, q3, [sp, #(16 * 22)]
    stp     q4, q5, [sp, #(16 * 24)]
    stp     q6, q7, [sp, #(16 * 26)]
    stp     q8, q9, [sp, #(16 * 28)]
    stp     q10, q11, [sp, #(16 * 30)]
    stp     q12, q13, [sp, #(16 * 32)]
    stp     q14, q15, [sp, #(16 * 34)]
    stp     q16, q17, [sp, #(16 * 36)]
    stp     q18, q19, [sp, #(16 * 38)]
    stp     q20, q21, [sp, #(16 * 40)]
    stp     q22, q23, [sp, #(16 * 42)]
    stp     q24, q25, [sp, #(16 * 44)]
    stp     q26, q27, [sp, #(16 * 46)]
    stp     q28, q29, [sp, #(16 * 48)]
    stp     q30, q31, [sp, #(16 * 50)]
.endm

// Undoes `save_frame`, but for x0 to x3 and x30.
.macro restore_frame
    ldp     q0, q1, [sp, #(16 * 20)]
    ldp     q2, q3, [sp, #(16 * 22)]
    ldp     q4, q5, [sp, #(16 * 24)]
    ldp     q6, q7, [sp, #(16 * 26)]
    ldp     q8, q9, [sp, #(16 * 28)]
    ldp     q10, q11, [sp, #(16 * 30)]
    ldp     q12, q13, [sp, #(16 * 32)]
    ldp     q14, q15, [sp, #(16 * 34)]
    ldp     q16, q17, [sp, #(16 * 36)]
    ldp     q18, q19, [sp, #(16 * 38)]
    ldp     q20, q21, [sp, #(16 * 40)]
    ldp     q22, q23, [sp, #(16 * 42)]
    ldp     q24, q25, [sp, #(16 * 44)]
    ldp     q26, q27, [sp, #(16 * 46)]
    ldp     q28, q29, [sp, #(16 * 48)]
    ldp     q30, q31, [sp, #(16 * 50)]
    ldp     x7, x8, [sp, #(16 * 18)]
    msr     fpsr, x7
    msr     fpcr, x8
    ldp     x3, x4, [sp, #(16 * 16)]
    msr     elr_el1, x3
    msr     spsr_el1, x4
    ldp     x4, x5, [sp, #(16 * 2)]
    ldp     x6, x7, [sp, #(16 * 3)]
    ldp     x8, x9, [sp, #(16 * 4)]
    ldp     x10, x11, [sp, #(16 * 5)]
    ldp     x12, x13, [sp, #(16 * 6)]
    ldp     x14, x15, [sp, #(16 * 7)]
    ldp     x16, x17, [sp, #(16 * 8)]
    ldp     x18, x19, [sp, #(16 * 9)]
    ldp     x20, x21, [sp, #(16 * 10)]
    ldp     x22, x23, [sp, #(16 * 11)]
    ldp     x24, x25, [sp, #(16 * 12)]
    ldp     x26, x27, [sp, #(16 * 13)]
    ldp     x28, x29, [sp, #(16 * 14)]
.endm

enter_main:
    sub     sp, sp, #FRAME_SIZE
    stp     x2, x3, [sp, #16]
    mrs     x2, sp_el0
    save_frame
    mov     x1, sp
    bl      exception_rust
    restore_frame
    ldr     x30, [sp, #(16 * 15)]
    ldp     x2, x3, [sp, #16]
    ldp     x0, x1, [sp]
    add     sp, sp, #FRAME_SIZE
    eret

enter_nested:
    mrs     x1, tpidr_el1
    orr     x0, x0, x1, lsl #(8 + STACKS_SHIFT)
    adrp    x1, STACKS
    add     x1, x1, #:lo12:STACKS
    add     x1, x1, x0, lsr #8
    stp     x2, x3, [x1, #STACKS_SCRATCH]
    ldp     x3, x2, [x1, #STACKS_EMERGENCY]
    cbnz    x2, enter_again
    mov     x2, #1
    str     x2, [x1, #STACKS_BUSY]
    mov     x2, sp
    sub     x3, x3, #FRAME_SIZE
    mov     sp, x3
    ldr     x3, [x1, #STACKS_SCRATCH]
    str     x3, [sp, #16]
    ldr     x3, [x1, #(STACKS_SCRATCH + 8)]
    str     x3, [sp, #24]
    and     x0, x0, #0xff
    save_frame
    mov     x1, sp
    bl      exception_rust
    restore_frame
    mrs     x0, tpidr_el1
    adrp    x1, STACKS
    add     x1, x1, #:lo12:STACKS
    add     x1, x1, x0, lsl #STACKS_SHIFT
    str     xzr, [x1, #STACKS_BUSY]
    ldr     x30, [sp, #(16 * 15)]
    ldp     x2, x3, [sp, #16]
    ldp     x0, x1, [sp]
    msr     tpidrro_el0, x0
    ldr     x0, [sp, #(16 * 15 + 8)]
    mov     sp, x0
    mrs     x0, tpidrro_el0
    eret

enter_again:
    mov     sp, x3
    b       fault_while_reporting

