// To EL0 and back.
//
// `user_enter` is called by the kernel as a function and returns when the process has taken an exception. Meanwhile the main
// stack's pointer, which is SP_EL0, lies on the exception stack, next to the context; SP_EL0 is the process's. An interrupt at
// EL0 is not served here: it is still pending when `user_enter` has returned, and comes again as one of the kernel.

// `user::Context`.
.set USER_SP,     248
.set USER_PC,     256
.set USER_ESR,    272
.set USER_FPSR,   288
.set USER_TPIDR,  304
.set USER_Q,      320

// x0 = context. Interrupts are masked, TTBR0 is the process's. Returns what came (`exception::Kind`), with interrupts masked.
.section .text.user_enter, "ax"
.global user_enter
.type   user_enter, %function
user_enter:
    stp     x29, x30, [sp, #-160]!
    mov     x29, sp
    stp     x19, x20, [sp, #16]
    stp     x21, x22, [sp, #32]
    stp     x23, x24, [sp, #48]
    stp     x25, x26, [sp, #64]
    stp     x27, x28, [sp, #80]
    stp     d8, d9, [sp, #96]
    stp     d10, d11, [sp, #112]
    stp     d12, d13, [sp, #128]
    stp     d14, d15, [sp, #144]
    mov     x1, sp
    msr     spsel, #1
    stp     x0, x1, [sp, #-16]!
    ldp     x2, x3, [x0, #USER_SP]       // sp, pc
    ldr     x4, [x0, #(USER_PC + 8)]     // spsr
    msr     sp_el0, x2
    msr     elr_el1, x3
    msr     spsr_el1, x4
    ldp     x2, x3, [x0, #USER_FPSR]
    msr     fpsr, x2
    msr     fpcr, x3
    ldr     x2, [x0, #USER_TPIDR]
    msr     tpidr_el0, x2
    msr     tpidrro_el0, xzr             // the vectors have left a register of the kernel's there
    add     x1, x0, #USER_Q
    ldp     q0, q1, [x1]
    ldp     q2, q3, [x1, #32]
    ldp     q4, q5, [x1, #64]
    ldp     q6, q7, [x1, #96]
    ldp     q8, q9, [x1, #128]
    ldp     q10, q11, [x1, #160]
    ldp     q12, q13, [x1, #192]
    ldp     q14, q15, [x1, #224]
    ldp     q16, q17, [x1, #256]
    ldp     q18, q19, [x1, #288]
    ldp     q20, q21, [x1, #320]
    ldp     q22, q23, [x1, #352]
    ldp     q24, q25, [x1, #384]
    ldp     q26, q27, [x1, #416]
    ldp     q28, q29, [x1, #448]
    ldp     q30, q31, [x1, #480]
    ldp     x2, x3, [x0, #(8 * 2)]
    ldp     x4, x5, [x0, #(8 * 4)]
    ldp     x6, x7, [x0, #(8 * 6)]
    ldp     x8, x9, [x0, #(8 * 8)]
    ldp     x10, x11, [x0, #(8 * 10)]
    ldp     x12, x13, [x0, #(8 * 12)]
    ldp     x14, x15, [x0, #(8 * 14)]
    ldp     x16, x17, [x0, #(8 * 16)]
    ldp     x18, x19, [x0, #(8 * 18)]
    ldp     x20, x21, [x0, #(8 * 20)]
    ldp     x22, x23, [x0, #(8 * 22)]
    ldp     x24, x25, [x0, #(8 * 24)]
    ldp     x26, x27, [x0, #(8 * 26)]
    ldp     x28, x29, [x0, #(8 * 28)]
    ldr     x30, [x0, #(8 * 30)]
    ldp     x0, x1, [x0]
    eret
    dsb     nsh                          // nothing is speculated past the return
    isb
.size   user_enter, . - user_enter

// From the vectors: x0 and x1 are on the exception stack, above them context and the main stack's pointer; x1 = what came.
.section .text.user_leave, "ax"
.type   user_leave, %function
user_leave:
    ldr     x0, [sp, #16]
    stp     x2, x3, [x0, #(8 * 2)]
    stp     x4, x5, [x0, #(8 * 4)]
    stp     x6, x7, [x0, #(8 * 6)]
    stp     x8, x9, [x0, #(8 * 8)]
    stp     x10, x11, [x0, #(8 * 10)]
    stp     x12, x13, [x0, #(8 * 12)]
    stp     x14, x15, [x0, #(8 * 14)]
    stp     x16, x17, [x0, #(8 * 16)]
    stp     x18, x19, [x0, #(8 * 18)]
    stp     x20, x21, [x0, #(8 * 20)]
    stp     x22, x23, [x0, #(8 * 22)]
    stp     x24, x25, [x0, #(8 * 24)]
    stp     x26, x27, [x0, #(8 * 26)]
    stp     x28, x29, [x0, #(8 * 28)]
    str     x30, [x0, #(8 * 30)]
    ldp     x2, x3, [sp]
    stp     x2, x3, [x0]
    mrs     x2, sp_el0
    mrs     x3, elr_el1
    mrs     x4, spsr_el1
    stp     x2, x3, [x0, #USER_SP]
    str     x4, [x0, #(USER_PC + 8)]
    mrs     x2, esr_el1
    mrs     x3, far_el1
    stp     x2, x3, [x0, #USER_ESR]
    mrs     x2, fpsr
    mrs     x3, fpcr
    stp     x2, x3, [x0, #USER_FPSR]
    mrs     x2, tpidr_el0
    str     x2, [x0, #USER_TPIDR]
    add     x2, x0, #USER_Q
    stp     q0, q1, [x2]
    stp     q2, q3, [x2, #32]
    stp     q4, q5, [x2, #64]
    stp     q6, q7, [x2, #96]
    stp     q8, q9, [x2, #128]
    stp     q10, q11, [x2, #160]
    stp     q12, q13, [x2, #192]
    stp     q14, q15, [x2, #224]
    stp     q16, q17, [x2, #256]
    stp     q18, q19, [x2, #288]
    stp     q20, q21, [x2, #320]
    stp     q22, q23, [x2, #352]
    stp     q24, q25, [x2, #384]
    stp     q26, q27, [x2, #416]
    stp     q28, q29, [x2, #448]
    stp     q30, q31, [x2, #480]
    msr     fpcr, xzr                    // the kernel's: rounding to nearest, no traps
    ldr     x2, [sp, #24]
    add     sp, sp, #32
    msr     spsel, #0
    mov     sp, x2
    mov     x0, x1
    ldp     x19, x20, [sp, #16]
    ldp     x21, x22, [sp, #32]
    ldp     x23, x24, [sp, #48]
    ldp     x25, x26, [sp, #64]
    ldp     x27, x28, [sp, #80]
    ldp     d8, d9, [sp, #96]
    ldp     d10, d11, [sp, #112]
    ldp     d12, d13, [sp, #128]
    ldp     d14, d15, [sp, #144]
    ldp     x29, x30, [sp], #160
    ret
.size   user_leave, . - user_leave
