/* Answers the CPUID instructions of a patched library without AVX-512, VNNI and AMX: see without_avx512.py.
 *
 * Each `cpuid` there has become a trap (int3; nop). This handler runs the real instruction and takes the
 * bits away, so the library chooses the kernels of a processor that stops at AVX2. */
#define _GNU_SOURCE
#include <signal.h>
#include <ucontext.h>

#define BIT(n) (1u << (n))

static void answer(int number, siginfo_t *info, void *context) {
  (void)number;
  (void)info;
  greg_t *at = ((ucontext_t *)context)->uc_mcontext.gregs;
  unsigned leaf = at[REG_RAX], part = at[REG_RCX];
  unsigned a = leaf, b, c = part, d;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  if (leaf == 7 && part == 0) {
    b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31)); /* AVX-512 */
    c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));            /* VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
    d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25)); /* 4VNNIW .. FP16, AMX */
  } else if (leaf == 7 && part == 1) {
    a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23)); /* AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA */
    d &= ~(BIT(4) | BIT(5) | BIT(10) | BIT(19)); /* AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16, AVX10 */
  }
  at[REG_RAX] = a;
  at[REG_RBX] = b;
  at[REG_RCX] = c;
  at[REG_RDX] = d;
}

__attribute__((constructor)) static void install(void) {
  struct sigaction action = {0};
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGTRAP, &action, 0);
}
