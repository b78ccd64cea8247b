// From reset to `primary` or `secondary`, at EL3, and from there to the kernel; SMC from the kernel to `smc`.
//
// All cores leave reset here, at the same time, with the MMU off. Registers: Arm DDI 0487.

.set STACK_SHIFT,    15                  // log2 of STACK in linker/sbsa.ld
.set MAIR,           0xff00              // 0 Device-nGnRnE, 1 Normal write-back
.set TCR,            0x80843510          // 48-bit input, 44-bit output, 4 KiB granules, walks inner-shareable write-back
.set SCTLR_MMU_OFF,  0x30c50830          // RES1 bits only
.set SCTLR_MMU_ON,   0x30c51835          // and M, C, I
.set SCR,            0x30535             // the kernel's world is the normal one, AArch64, with HVC and pointer authentication; FIQ to EL3
.set SPSR_EL2H,      0x3c9               // EL2 with its own stack pointer, everything masked

// x19 = this core's index; changes x0 to x2. Cores that the board has not are parked.
.macro core_index
    mrs     x1, mpidr_el1
    ubfx    x2, x1, #8, #8
    and     x1, x1, #0xff
    cmp     x1, #8
    b.hs    park
    add     x19, x1, x2, lsl #3
    cmp     x19, #512
    b.hs    park
.endm

// Sets sp to the top of the stack of the core x19; changes x0, x1.
.macro own_stack
    ldr     x0, =__stacks
    add     x1, x19, #1
    add     x0, x0, x1, lsl #STACK_SHIFT
    mov     sp, x0
.endm

.section .text.entry, "ax"
.global _start
_start:
    msr     daifset, #0xf
    ldr     x0, =SCTLR_MMU_OFF
    msr     sctlr_el3, x0
    ldr     x0, =vectors
    msr     vbar_el3, x0
    isb
    core_index
    own_stack

    // Secure memory is zero at reset, so that a core that comes here first finds nothing to do yet.
    cbnz    x19, 1f
    ldr     x0, =__bss_start
    ldr     x1, =__bss_end
0:  cmp     x0, x1
    b.hs    1f
    stp     xzr, xzr, [x0], #16
    b       0b

1:  ldr     x0, =MAIR
    msr     mair_el3, x0
    ldr     x0, =TCR
    msr     tcr_el3, x0
    ldr     x0, =table_0
    msr     ttbr0_el3, x0
    isb
    tlbi    alle3
    ic      iallu
    dsb     nsh
    isb
    ldr     x0, =SCTLR_MMU_ON
    msr     sctlr_el3, x0
    isb

    msr     cptr_el3, xzr                // no trap of FP and SIMD,
    msr     mdcr_el3, xzr                // nor of the PMU and debug registers
    // The GIC by system registers, at lower levels too. The normal world sees the upper half of the priorities, and may change
    // the mask only while it is there.
    mov     x0, #0xf
    msr     S3_6_C12_C12_5, x0           // ICC_SRE_EL3
    isb
    mov     x0, #0xff
    msr     S3_0_C4_C6_0, x0             // ICC_PMR_EL1
    ldr     x0, =SCR
    mrs     x1, id_aa64mmfr0_el1         // what newer processors have at EL2 is the kernel's, where there is such a thing
    ubfx    x2, x1, #56, #4              // FGT
    cbz     x2, 0f
    orr     x0, x0, #(1 << 27)           // FGTEn
0:  ubfx    x2, x1, #60, #4              // ECV
    cbz     x2, 0f
    orr     x0, x0, #(1 << 28)           // ECVEn
0:  mrs     x1, id_aa64mmfr1_el1
    ubfx    x2, x1, #40, #4              // HCX
    cbz     x2, 0f
    orr     x0, x0, #(1 << 38)           // HXEn
0:  msr     scr_el3, x0
    isb
    msr     S3_4_C12_C9_5, x0            // ICC_SRE_EL2, for when the kernel is entered: SRE and Enable
    isb

    mov     x0, x19
    cbnz    x19, 2f
    bl      primary
2:  bl      secondary
park:
    wfe
    b       park

// enter(entry, argument): leaves for the kernel at EL2, with a stack that is empty again. Interrupt controller, tables and FP are
// as the boot protocol wants them: MMU off, caches clean, everything masked.
.global enter
enter:
    mov     x20, x0
    mov     x21, x1
    core_index
    own_stack
    msr     elr_el3, x20
    mov     x0, #SPSR_EL2H
    msr     spsr_el3, x0
    ldr     x0, =SCTLR_MMU_OFF
    msr     sctlr_el2, x0
    msr     hcr_el2, xzr
    isb
    ic      iallu
    dsb     nsh
    mov     x0, x21
    mov     x1, xzr
    mov     x2, xzr
    mov     x3, xzr
    eret

// clean(start, end): writes the data cache lines of [start, end) back to memory.
.global clean
clean:
    mrs     x2, ctr_el0
    ubfx    x2, x2, #16, #4
    mov     x3, #4
    lsl     x3, x3, x2
    sub     x2, x3, #1
    bic     x0, x0, x2
0:  cmp     x0, x1
    b.hs    1f
    dc      cvac, x0
    add     x0, x0, x3
    b       0b
1:  dsb     sy
    ret

// wait(): until another core has something to say.
.global wait
wait:
    wfe
    ret

// wake(): the others from `wait`.
.global wake
wake:
    dsb     ish
    sev
    ret

// cause(which): 0 ESR_EL3, 1 ELR_EL3, 2 FAR_EL3.
.global cause
cause:
    cbz     x0, 0f
    cmp     x0, #1
    b.eq    1f
    mrs     x0, far_el3
    ret
0:  mrs     x0, esr_el3
    ret
1:  mrs     x0, elr_el3
    ret

.macro vector target
    .balign 0x80
    b       \target
.endm

.balign 0x800
vectors:
    .rept 8                              // from EL3 itself
    vector  surprise
    .endr
    .balign 0x80                         // from AArch64 below, synchronous
    stp     x29, x30, [sp, #-16]!
    mrs     x29, esr_el3
    ubfx    x29, x29, #26, #6
    cmp     x29, #0x17                   // SMC in AArch64
    b.eq    from_smc
    b       surprise
    .rept 7
    vector  surprise
    .endr
    .balign 0x80

// The caller keeps all registers but x0 (SMCCC 1.1 lets x0 to x3 change); compiled code may use any.
from_smc:
    stp     x1, x2, [sp, #-16]!
    stp     x3, x4, [sp, #-16]!
    stp     x5, x6, [sp, #-16]!
    stp     x7, x8, [sp, #-16]!
    stp     x9, x10, [sp, #-16]!
    stp     x11, x12, [sp, #-16]!
    stp     x13, x14, [sp, #-16]!
    stp     x15, x16, [sp, #-16]!
    stp     x17, x18, [sp, #-16]!
    mrs     x4, fpsr
    mrs     x5, fpcr
    stp     x4, x5, [sp, #-16]!
    .irp    pair, "q0, q1", "q2, q3", "q4, q5", "q6, q7", "q8, q9", "q10, q11", "q12, q13", "q14, q15", "q16, q17", "q18, q19", "q20, q21", "q22, q23", "q24, q25", "q26, q27", "q28, q29", "q30, q31"
    stp     \pair, [sp, #-32]!
    .endr
    bl      smc
    .irp    pair, "q30, q31", "q28, q29", "q26, q27", "q24, q25", "q22, q23", "q20, q21", "q18, q19", "q16, q17", "q14, q15", "q12, q13", "q10, q11", "q8, q9", "q6, q7", "q4, q5", "q2, q3", "q0, q1"
    ldp     \pair, [sp], #32
    .endr
    ldp     x4, x5, [sp], #16
    msr     fpsr, x4
    msr     fpcr, x5
    ldp     x17, x18, [sp], #16
    ldp     x15, x16, [sp], #16
    ldp     x13, x14, [sp], #16
    ldp     x11, x12, [sp], #16
    ldp     x9, x10, [sp], #16
    ldp     x7, x8, [sp], #16
    ldp     x5, x6, [sp], #16
    ldp     x3, x4, [sp], #16
    ldp     x1, x2, [sp], #16
    ldp     x29, x30, [sp], #16
    eret

// Identity tables. Flash and secure memory are secure, devices too, as the interrupt controller has secure registers and the
// controller is secure; memory of the normal world is mapped as such, for its first GiB: the kernel and the tree go there.
.section .rodata.tables, "a"
.balign 0x1000
table_0:
    .quad   table_low + 3
    .quad   0
    .quad   table_ram + 3
    .fill   509, 8, 0
table_low:
    .quad   0x745                        // read, write, execute: flash is never written, secure memory never executed
    .quad   0x0040000040000441           // Device, never executed
    .fill   510, 8, 0
table_ram:
    .quad   0x0040010000000765           // normal world, never executed
    .fill   511, 8, 0
