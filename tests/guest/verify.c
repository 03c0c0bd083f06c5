// Checks on the host, from a raw image, what the guest's writer left. One JSON line, exit 0 only if ok.
//   verify disk IMAGE NUMBER    the last nb block numbers are all there, whole, in place, of one boot
//   verify same A B             two images hold the same bytes (holes read as zeroes; a longer tail counts)
#define _GNU_SOURCE
#include "block.h"
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define BLOCKS_MAX (1ull << 26) // 256 GiB of blocks: more is no disk of ours
#define CHUNK_BYTES (1u << 20)

struct found {
  uint64_t nb, blocks, max_seq, generation, bad, stale, lost;
};

static int open_or_exit(const char *path) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    perror(path);
    exit(2);
  }
  return fd;
}

static bool is_whole(const struct block *b, uint64_t disk, uint64_t index) {
  return b->magic == BLOCK_MAGIC && b->sum == block_sum(b) && b->disk == disk && b->index == index && b->nb && !(b->nb & (b->nb - 1)) &&
         b->nb <= BLOCKS_MAX && block_index(b->seq, b->nb) == index;
}

static bool is_empty(const struct block *b) {
  static const struct block empty;
  return !memcmp(b, &empty, sizeof empty);
}

// First pass: how large the written area is and which boot wrote last.
static void survey(int fd, uint64_t disk, struct found *f) {
  struct block b;
  for (uint64_t i = 0; (!f->nb || i < f->nb) && pread(fd, &b, BLOCK_BYTES, (off_t)(i * BLOCK_BYTES)) == BLOCK_BYTES; i++) {
    if (!is_whole(&b, disk, i)) continue;
    if (!f->nb) f->nb = b.nb;
    if (b.seq > f->max_seq) f->max_seq = b.seq, f->generation = b.generation;
  }
}

// Second pass: every place of the area against what must be there.
static void check(int fd, uint64_t disk, struct found *f) {
  struct block b;
  uint64_t oldest = f->max_seq >= f->nb ? f->max_seq - f->nb + 1 : 1, present = 0;
  for (uint64_t i = 0; i < f->nb; i++) {
    if (pread(fd, &b, BLOCK_BYTES, (off_t)(i * BLOCK_BYTES)) != BLOCK_BYTES || is_empty(&b)) continue;
    if (!is_whole(&b, disk, i) || b.nb != f->nb) {
      f->bad++;
      continue;
    }
    f->blocks++;
    if (b.generation != f->generation) f->stale++;
    else if (b.seq >= oldest) present++;
  }
  // Two numbers of the window never share a place, so counting them is enough.
  f->lost = f->nb ? f->max_seq - oldest + 1 - present : 0;
}

static int verify_disk(const char *path, uint64_t disk) {
  int fd = open_or_exit(path);
  struct found f = {0};
  survey(fd, disk, &f);
  check(fd, disk, &f);
  bool ok = f.blocks && !f.bad && !f.stale && !f.lost;
  printf("{\"blocks\":%llu,\"max_seq\":%llu,\"generation\":\"%016llx\",\"lost\":%llu,\"bad\":%llu,\"stale\":%llu,\"ok\":%s}\n",
         (unsigned long long)f.blocks, (unsigned long long)f.max_seq, (unsigned long long)f.generation, (unsigned long long)f.lost,
         (unsigned long long)f.bad, (unsigned long long)f.stale, ok ? "true" : "false");
  return !ok;
}

static size_t read_chunk(int fd, unsigned char *into, uint64_t at) {
  size_t got = 0;
  while (got < CHUNK_BYTES) {
    ssize_t n = pread(fd, into + got, CHUNK_BYTES - got, (off_t)(at + got));
    if (n < 0) {
      perror("read");
      exit(2);
    }
    if (!n) break;
    got += (size_t)n;
  }
  return got;
}

static int verify_same(const char *left, const char *right) {
  static unsigned char a[CHUNK_BYTES], b[CHUNK_BYTES];
  int fa = open_or_exit(left), fb = open_or_exit(right);
  for (uint64_t at = 0;; at += CHUNK_BYTES) {
    size_t na = read_chunk(fa, a, at), nb = read_chunk(fb, b, at), n = na < nb ? na : nb, i = 0;
    if (n && memcmp(a, b, n)) while (a[i] == b[i]) i++;
    else i = n;
    if (i < n || na != nb) {
      printf("{\"same\":false,\"first_difference\":%llu,\"ok\":false}\n", (unsigned long long)(at + i));
      return 1;
    }
    if (na < CHUNK_BYTES) {
      printf("{\"same\":true,\"bytes\":%llu,\"ok\":true}\n", (unsigned long long)(at + na));
      return 0;
    }
  }
}

int main(int count, char **words) {
  if (count == 4 && !strcmp(words[1], "disk")) return verify_disk(words[2], strtoull(words[3], 0, 10));
  if (count == 4 && !strcmp(words[1], "same")) return verify_same(words[2], words[3]);
  fprintf(stderr, "usage: verify disk IMAGE NUMBER | verify same A B\n");
  return 2;
}
