// Copying and filling memory: what the compiler calls for every value that is larger than a few words.
//
// In place of the compiler's own, which go word by word. Everything runs with the MMU on before the first Rust instruction and
// SCTLR_EL1.A is 0, so unaligned accesses are fine; device memory is never accessed through these (see `mmio`).
// The ends are loaded and stored wherever they lie; what lies between overlaps them, so that no length needs a loop over bytes.

// x0 = destination, x1 = source, x2 = bytes. The ranges do not overlap. Returns x0.
    .section .text.memcpy, "ax"
    .balign 16
    .global memcpy
    .type   memcpy, %function
memcpy:
    add     x4, x1, x2                   // the ends
    add     x5, x0, x2
    cmp     x2, #16
    b.lo    3f
    cmp     x2, #32
    b.hi    1f
    ldr     q0, [x1]                     // 16 to 32
    ldr     q1, [x4, #-16]
    str     q0, [x0]
    str     q1, [x5, #-16]
    ret
1:  ldp     q0, q1, [x1]
    cmp     x2, #64
    b.hi    2f
    ldp     q2, q3, [x4, #-32]           // 33 to 64
    stp     q0, q1, [x0]
    stp     q2, q3, [x5, #-32]
    ret
2:  ldp     q4, q5, [x4, #-64]
    ldp     q6, q7, [x4, #-32]
    ldp     q2, q3, [x1, #32]
    mov     x3, x0
    sub     x2, x2, #64                  // all but the last 64: none of them, up to 128 bytes, but what is in hand already
0:  stp     q0, q1, [x3]
    stp     q2, q3, [x3, #32]
    subs    x2, x2, #64
    b.ls    9f
    add     x1, x1, #64
    add     x3, x3, #64
    ldp     q0, q1, [x1]
    ldp     q2, q3, [x1, #32]
    b       0b
9:  stp     q4, q5, [x5, #-64]
    stp     q6, q7, [x5, #-32]
    ret
3:  tbz     x2, #3, 4f
    ldr     x6, [x1]                     // 8 to 15
    ldr     x7, [x4, #-8]
    str     x6, [x0]
    str     x7, [x5, #-8]
    ret
4:  tbz     x2, #2, 5f
    ldr     w6, [x1]                     // 4 to 7
    ldr     w7, [x4, #-4]
    str     w6, [x0]
    str     w7, [x5, #-4]
    ret
5:  cbz     x2, 6f
    lsr     x3, x2, #1                   // 1 to 3: first, middle and last
    ldrb    w6, [x1]
    ldrb    w7, [x1, x3]
    ldrb    w8, [x4, #-1]
    strb    w6, [x0]
    strb    w7, [x0, x3]
    strb    w8, [x5, #-1]
6:  ret
    .size   memcpy, . - memcpy

// x0 = destination, w1 = byte, x2 = bytes. Returns x0.
    .section .text.memset, "ax"
    .balign 16
    .global memset
    .type   memset, %function
memset:
    dup     v0.16b, w1
    add     x4, x0, x2
    cmp     x2, #16
    b.lo    3f
    cmp     x2, #64
    b.hi    1f
    str     q0, [x0]                     // 16 to 64
    str     q0, [x4, #-16]
    cmp     x2, #32
    b.ls    0f
    str     q0, [x0, #16]
    str     q0, [x4, #-32]
0:  ret
1:  stp     q0, q0, [x4, #-64]
    stp     q0, q0, [x4, #-32]
    mov     x3, x0
    sub     x2, x2, #64                  // all but the last 64: at least one
    subs    x2, x2, #256
    b.lo    7f
6:  stp     q0, q0, [x3]
    stp     q0, q0, [x3, #32]
    stp     q0, q0, [x3, #64]
    stp     q0, q0, [x3, #96]
    stp     q0, q0, [x3, #128]
    stp     q0, q0, [x3, #160]
    stp     q0, q0, [x3, #192]
    stp     q0, q0, [x3, #224]
    add     x3, x3, #256
    subs    x2, x2, #256
    b.hs    6b
7:  adds    x2, x2, #256                 // what is left of them, less than 256
    b.eq    0b
8:  stp     q0, q0, [x3]
    stp     q0, q0, [x3, #32]
    add     x3, x3, #64
    subs    x2, x2, #64
    b.hi    8b
    ret
3:  tbz     x2, #3, 4f
    str     d0, [x0]                     // 8 to 15
    str     d0, [x4, #-8]
    ret
4:  tbz     x2, #2, 5f
    str     s0, [x0]                     // 4 to 7
    str     s0, [x4, #-4]
    ret
5:  cbz     x2, 2f
    lsr     x3, x2, #1                   // 1 to 3
    strb    w1, [x0]
    strb    w1, [x0, x3]
    strb    w1, [x4, #-1]
2:  ret
    .size   memset, . - memset
    .text
