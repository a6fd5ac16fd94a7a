/* tests/kernels/test_generation.c on a device of 227 KiB of shared memory a block, whose rings are deeper. */
#include "ks_shim.h"
#include "tests/kernels/test_generation.c"

static void become_hopper(void) {
  ks_shim_set_hopper(1);
}
TestSuite(generation, .init = become_hopper);
