// The Image header and everything that runs at its physical address, before the MMU is on.
//
// The image is linked at IMAGE_VA and runs here from wherever the loader put it; all addresses are formed relative to the
// program counter, so they are physical until the jump to the upper half. All of this section lies in the image's first page,
// and the identity tables map the image's first 2 MiB.
//
// Boot protocol: Linux Documentation/arch/arm64/booting. Registers: Arm DDI 0487.

.set MAIR,           0x000444ff          // 0 Normal write-back, 1 Normal non-cacheable, 2 Device-nGnRE, 3 Device-nGnRnE
.set TCR_BASE,       0x00000000b5103510  // 48-bit halves, 4 KiB granules, walks inner-shareable write-back
.set SCTLR_MMU_OFF,  0x30d00800          // RES1 bits only
.set SCTLR_EL2_MMU_OFF, 0x30c50830       // likewise
.set SCTLR_MMU_ON,   0x30d0180d          // and M, C, SA, I
.set BLOCK_RWX,      0x0040000000000701  // UXN, AF, inner-shareable, Normal, block
.set BLOCK_RX,       0x0040000000000781  // the same, read-only
.set BLOCK_R,        0x0060000000000781  // the same, never executable
.set STACKS_SHIFT_,   6                   // log2 of the size of `percore::Stacks`

.section .head.text, "ax"
.global _start
_start:
    b       primary_entry
    nop
    .quad   0                            // text_offset
    .quad   __image_size
    .quad   0xa                          // little-endian, 4 KiB pages, anywhere in memory
    .quad   0
    .quad   0
    .quad   0
    .ascii  "ARM\x64"
    .long   0

// x0 = physical address of the device tree.
primary_entry:
    msr     daifset, #0xf
    mov     x20, x0
    bl      to_el1
    mov     x21, x0

    // Zero the early tables.
    adrp    x0, __boot_tables
    adrp    x1, __boot_tables_end
0:  stp     xzr, xzr, [x0], #16
    cmp     x0, x1
    b.lo    0b

    adrp    x10, __boot_tables           // identity: L0, L1, L2
    add     x11, x10, #0x1000
    add     x12, x10, #0x2000
    add     x13, x10, #0x3000            // upper half: L0, L1, L2 of the image, L2 of the device tree
    add     x14, x10, #0x4000
    add     x15, x10, #0x5000
    add     x16, x10, #0x6000
    adrp    x17, _start                  // where the image is

    // Identity: one block, the image's first.
    orr     x2, x11, #3
    ubfx    x3, x17, #39, #9
    str     x2, [x10, x3, lsl #3]
    orr     x2, x12, #3
    ubfx    x3, x17, #30, #9
    str     x2, [x11, x3, lsl #3]
    ldr     x2, =BLOCK_RX
    orr     x2, x2, x17
    ubfx    x3, x17, #21, #9
    str     x2, [x12, x3, lsl #3]

    // The image in the upper half: IMAGE_VA has L0 index 511 and its own L1 index; all of it read, write and execute until
    // the final tables take over.
    orr     x2, x14, #3
    str     x2, [x13, #(511 * 8)]
    orr     x2, x15, #3
    ldr     x4, =_start
    ubfx    x3, x4, #30, #9
    str     x2, [x14, x3, lsl #3]
    ldr     x2, =BLOCK_RWX
    orr     x2, x2, x17
    ldr     x3, =__image_size
    mov     x4, x15
    mov     x5, #0x200000
1:  str     x2, [x4], #8
    add     x2, x2, x5
    subs    x3, x3, x5
    b.hi    1b

    // The device tree, at FDT_VA (L1 index 511): the block in which it starts.
    cbz     x20, 2f
    orr     x2, x16, #3
    str     x2, [x14, #(511 * 8)]
    ldr     x2, =BLOCK_R
    and     x3, x20, #0xffffffe00000
    orr     x2, x2, x3
    str     x2, [x16]

    // The tables went to memory past the caches: drop the stale lines that may lie there.
2:  adrp    x0, __boot_tables
    adrp    x1, __boot_tables_end
    dmb     sy
    bl      invalidate

    adrp    x0, __boot_tables
    add     x1, x0, #0x3000
    ldr     x2, =primary_upper
    b       mmu_on

// Starts the calling core's MMU and jumps to the upper half. x0 = TTBR0, x1 = TTBR1, x2 = where to.
mmu_on:
    ldr     x3, =MAIR
    msr     mair_el1, x3
    ldr     x3, =TCR_BASE
    mrs     x4, id_aa64mmfr0_el1
    and     x4, x4, #0xf                 // PARange; more than 48 bits needs other tables
    mov     x5, #5
    cmp     x4, x5
    csel    x4, x4, x5, lo
    orr     x3, x3, x4, lsl #32          // IPS
    msr     tcr_el1, x3
    msr     ttbr0_el1, x0
    msr     ttbr1_el1, x1
    isb
    tlbi    vmalle1
    ic      iallu
    dsb     nsh
    isb
    ldr     x3, =SCTLR_MMU_ON
    msr     sctlr_el1, x3
    isb
    br      x2

// Invalidates the data cache lines of [x0, x1). Changes x2, x3.
invalidate:
    mrs     x2, ctr_el0
    ubfx    x2, x2, #16, #4
    mov     x3, #4
    lsl     x3, x3, x2
0:  dc      ivac, x0
    add     x0, x0, x3
    cmp     x0, x1
    b.lo    0b
    dsb     sy
    ret

// Sets \to to 0b11 where the core has pointer authentication, whose instructions and keys trap to EL2 and EL3 unless these allow
// them: EL1 cannot keep EL0 from one of them (PACGA). Else 0. Changes \other.
.macro authentication to, other
    mrs     \to, id_aa64isar1_el1        // APA, API, GPA, GPI
    ldr     \other, =0xff000ff0
    tst     \to, \other
    mrs     \to, s3_0_c0_c6_2            // ID_AA64ISAR2_EL1: GPA3, APA3
    ubfx    \to, \to, #8, #8
    ccmp    \to, #0, #0, eq
    cset    \to, ne
    orr     \to, \to, \to, lsl #1
.endm

// Leaves EL3 or EL2 if entered there. Returns the exception level of entry in x0. Changes x1, x2, x3.
to_el1:
    ldr     x1, =SCTLR_MMU_OFF
    mrs     x0, currentel
    lsr     x0, x0, #2
    cmp     x0, #3
    b.eq    leave_el3
    cmp     x0, #2
    b.eq    0f
    msr     sctlr_el1, x1
    isb
    ret
leave_el2:
0:  adrp    x2, el2_vectors
    add     x2, x2, #:lo12:el2_vectors
    msr     vbar_el2, x2
    authentication x2, x3
    lsl     x2, x2, #40                  // HCR_EL2.APK and API, with RW: EL1 is AArch64; nothing is trapped, no stage 2
    orr     x2, x2, #(1 << 31)
    msr     hcr_el2, x2
    isb
    msr     sctlr_el1, x1
    mov     x2, #3                       // EL1 may read the physical counter and use its timer
    msr     cnthctl_el2, x2
    msr     cntvoff_el2, xzr
    mov     x2, #0x33ff                  // no trap of FP and SIMD
    msr     cptr_el2, x2
    msr     hstr_el2, xzr
    msr     vttbr_el2, xzr
    mrs     x2, midr_el1
    msr     vpidr_el2, x2
    mrs     x2, mpidr_el1
    msr     vmpidr_el2, x2

    mrs     x1, id_aa64dfr0_el1          // the PMU, where there is one: all its counters belong to EL1
    ubfx    x2, x1, #8, #4
    cbz     x2, 1f
    cmp     x2, #0xf
    b.eq    1f
    mrs     x2, pmcr_el0
    ubfx    x2, x2, #11, #5
    msr     mdcr_el2, x2
    b       2f
1:  msr     mdcr_el2, xzr
2:  mrs     x1, id_aa64pfr0_el1          // the GIC's system registers
    ubfx    x2, x1, #24, #4
    cbz     x2, 3f
    mrs     x2, s3_4_c12_c9_5            // ICC_SRE_EL2: SRE, and Enable for EL1
    mov     x1, #9
    orr     x2, x2, x1
    msr     s3_4_c12_c9_5, x2
    isb
    msr     s3_4_c12_c11_0, xzr          // ICH_HCR_EL2
3:  mrs     x1, id_aa64mmfr0_el1         // fine-grained traps: none
    ubfx    x2, x1, #56, #4
    cbz     x2, 4f
    msr     s3_4_c1_c1_4, xzr            // HFGRTR_EL2
    msr     s3_4_c1_c1_5, xzr            // HFGWTR_EL2
    msr     s3_4_c1_c1_6, xzr            // HFGITR_EL2
    msr     s3_4_c3_c1_4, xzr            // HDFGRTR_EL2
    msr     s3_4_c3_c1_5, xzr            // HDFGWTR_EL2
4:  mov     x2, #0x3c5                   // EL1h, everything masked
    msr     spsr_el2, x2
    msr     elr_el2, x30
    eret

// There was no firmware: what it would have done at EL3 is done here, and by `el3` once the device tree is known. For the non-secure
// state, with nothing trapped and HVC and SMC allowed; then as if entered at EL2, or straight to EL1 where there is no EL2.
leave_el3:
    adrp    x2, el3_vectors
    add     x2, x2, #:lo12:el3_vectors
    msr     vbar_el3, x2
    msr     cptr_el3, xzr
    msr     mdcr_el3, xzr
    mrs     x2, id_aa64pfr0_el1          // the GIC's system registers
    ubfx    x2, x2, #24, #4
    cbz     x2, 1f
    mov     x2, #0xf                     // ICC_SRE_EL3: SRE, no bypass, and Enable for lower levels
    msr     s3_6_c12_c12_5, x2
    isb
1:  authentication x2, x3
    lsl     x2, x2, #16                  // SCR_EL3.APK and API, with
    mov     x3, #0xd31                   // NS, RES1, HCE, RW, ST
    orr     x2, x2, x3
    mrs     x3, id_aa64mmfr0_el1         // fine-grained traps: EL2 may write their registers
    ubfx    x3, x3, #56, #4
    cbz     x3, 2f
    orr     x2, x2, #(1 << 27)
2:  msr     scr_el3, x2
    isb
    mrs     x2, id_aa64pfr0_el1
    ubfx    x2, x2, #8, #4               // is there an EL2?
    cbnz    x2, 3f
    msr     sctlr_el1, x1
    mov     x2, #0x3c5                   // EL1h, everything masked
    msr     spsr_el3, x2
    msr     elr_el3, x30
    eret
3:  ldr     x2, =SCTLR_EL2_MMU_OFF
    msr     sctlr_el2, x2
    mov     x2, #0x3c9                   // EL2h, everything masked
    msr     spsr_el3, x2
    adr     x2, leave_el2
    msr     elr_el3, x2
    eret

// Where PSCI CPU_ON starts a core. x0 = its logical index.
.global secondary_entry
secondary_entry:
    msr     daifset, #0xf
    mov     x20, x0
    bl      to_el1
    adrp    x0, __boot_tables
    adrp    x1, SECONDARY_TTBR1
    ldr     x1, [x1, #:lo12:SECONDARY_TTBR1]
    ldr     x2, =secondary_upper
    b       mmu_on

// Replaces this core's TTBR1 by x0, from the identity mapping: between the two tables nothing in the upper half is mapped, so
// no translation of the old ones can meet one of the new. x1 = an empty table. Interrupts are masked.
.global switch_ttbr1
switch_ttbr1:
    msr     ttbr1_el1, x1
    isb
    tlbi    vmalle1
    dsb     nsh
    isb
    msr     ttbr1_el1, x0
    isb
    ret

    .ltorg

.section .text.upper, "ax"

// Sets what every core needs before its first Rust instruction. x20 = logical index; x22, x23 = tops of its main and exception
// stacks. The main stack is SP_EL0: exceptions then always find their own stack in SP_EL1, even when the main one has overflowed.
.macro enter_rust
    msr     spsel, #1
    mov     sp, x23
    msr     spsel, #0
    mov     sp, x22
    adrp    x0, exception_vectors
    add     x0, x0, #:lo12:exception_vectors
    msr     vbar_el1, x0
    mov     x0, #(3 << 20)               // CPACR_EL1.FPEN: FP and SIMD are not trapped
    msr     cpacr_el1, x0
    isb
    mov     x29, #0
    mov     x30, #0
.endm

primary_upper:
    adrp    x0, __bss_start
    add     x0, x0, #:lo12:__bss_start
    adrp    x1, __bss_end
    add     x1, x1, #:lo12:__bss_end
0:  cmp     x0, x1
    b.hs    1f
    stp     xzr, xzr, [x0], #16
    b       0b
1:  msr     tpidr_el1, xzr
    adrp    x22, __boot_main_stack_top
    add     x22, x22, #:lo12:__boot_main_stack_top
    adrp    x23, __boot_exception_stack_top
    add     x23, x23, #:lo12:__boot_exception_stack_top
    enter_rust
    mov     x0, x20
    mov     x1, x21
    bl      primary_rust
    b       .

secondary_upper:
    msr     tpidr_el1, x20
    adrp    x0, STACKS
    add     x0, x0, #:lo12:STACKS
    add     x0, x0, x20, lsl #STACKS_SHIFT_
    ldp     x22, x23, [x0]
    enter_rust
    bl      secondary_rust
    b       .

.section .boot_tables, "aw", @nobits
    .zero   0x7000
