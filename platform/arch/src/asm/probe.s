// Accesses that may fault. The exception handler finds the faulting instruction in .ex_table, puts ESR and FAR into x0 and x1,
// and continues at the landing.

.macro fixup from, to
    .pushsection .ex_table, "a"
    .balign 8
    .quad   \from, \to
    .popsection
.endm

.macro probe_function name, instruction:vararg
.section .text.\name, "ax"
.global \name
\name:
0:  \instruction
    mov     x0, #0
    mov     x1, #0
1:  ret
    fixup   0b, 1b
.endm

// x0 = address, x1 = value to write; reads leave the value in x2.
probe_function probe_read8, ldrb w2, [x0]
probe_function probe_read32, ldr w2, [x0]
probe_function probe_read64, ldr x2, [x0]
probe_function probe_write8, strb w1, [x0]
probe_function probe_write32, str w1, [x0]
probe_function probe_write64, str x1, [x0]

// Calls x0. A fetch that faults has the target in ELR, so that the handler looks for the return address instead.
.section .text.probe_call, "ax"
.global probe_call
probe_call:
    stp     x29, x30, [sp, #-16]!
    mov     x29, sp
    blr     x0
0:  mov     x0, #0
    mov     x1, #0
1:  ldp     x29, x30, [sp], #16
    ret
    fixup   0b, 1b

// A semihosting call: x0 = operation, x1 = parameter. HLT is undefined where no debugger serves it.
.section .text.semihosting_call, "ax"
.global semihosting_call
semihosting_call:
0:  hlt     #0xf000
1:  ret
    fixup   0b, 1b
