/* How ks_sha256_add works through whole blocks: two ways with the same result. For core/base/ and its tests.
 */
#ifndef KS_SHA256_BLOCKS_H
#define KS_SHA256_BLOCKS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Compresses n_blocks blocks of 64 bytes into state (FIPS 180-4, section 6.2.2). */
typedef void (*ks_sha256_blocks_function)(uint32_t state[8], const unsigned char *blocks, size_t n_blocks);

void ks_sha256_blocks_plain(uint32_t state[8], const unsigned char *blocks, size_t n_blocks);
#ifdef __x86_64__
/* Whether this machine has the instructions that ks_sha256_blocks_x86 uses: SHA, SSSE3, SSE4.1. */
bool ks_sha256_x86_supported(void);
void ks_sha256_blocks_x86(uint32_t state[8], const unsigned char *blocks, size_t n_blocks);
#endif

#endif
