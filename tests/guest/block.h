// One 4 KiB block as the guest writes it, little endian: what writer.c and verify.c agree on.
// Every byte of a block follows from (disk, seq, nb, generation, host, marker), so that a lost, torn,
// old or misplaced block is told from a good one by reading it alone. tests/support/block.rs reads
// the same, to follow the guest while it runs.
#ifndef BLOCK_H
#define BLOCK_H
#include <stdint.h>
#include <string.h>

#define BLOCK_BYTES 4096u
#define BLOCK_MAGIC 0x32304b4c42594656ull /* "VFYBLK02" */
#define MARKER_BYTES 64u                  /* with its final zero */
#define MARKER_COPIES 8u

struct block {
  uint64_t magic, disk, seq, index, nb, generation;
  uint64_t host; // first letter of the host on whose QEMU the writer ran when it made this block, or 0
  char marker[MARKER_COPIES][MARKER_BYTES];
  uint64_t body[(BLOCK_BYTES - 8 * 8 - MARKER_COPIES * MARKER_BYTES) / 8];
  uint64_t sum; // of everything before it
};
_Static_assert(sizeof(struct block) == BLOCK_BYTES, "a block is one page");

static inline uint64_t block_sum(const struct block *b) {
  uint64_t words[BLOCK_BYTES / 8], sum = 1469598103934665603ull;
  memcpy(words, b, sizeof words);
  for (unsigned i = 0; i < BLOCK_BYTES / 8 - 1; i++) {
    sum = (sum ^ words[i]) * 1099511628211ull;
    sum ^= sum >> 29;
  }
  return sum;
}

// Where block `seq` lies. The factor is odd and `nb` a power of two: any `nb` numbers in a row fill
// each place exactly once, in an order that looks random to a copier.
static inline uint64_t block_index(uint64_t seq, uint64_t nb) { return (seq * 2654435761ull) & (nb - 1); }

static inline void block_fill(struct block *b, uint64_t disk, uint64_t seq, uint64_t nb, uint64_t generation, uint64_t host, const char *marker) {
  memset(b, 0, sizeof *b);
  b->magic = BLOCK_MAGIC;
  b->disk = disk;
  b->seq = seq;
  b->index = block_index(seq, nb);
  b->nb = nb;
  b->generation = generation;
  b->host = host;
  for (unsigned i = 0; i < MARKER_COPIES; i++) strncpy(b->marker[i], marker, MARKER_BYTES - 1);
  uint64_t x = seq * 0x9e3779b97f4a7c15ull + disk + 1;
  for (unsigned i = 0; i < sizeof b->body / 8; i++) {
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    b->body[i] = x;
  }
  b->sum = block_sum(b);
}
#endif
