// The guest's work: writes block 1, 2, 3, ... to every disk in lock step (O_DIRECT|O_DSYNC), re-reads
// old ones, keeps some RAM dirty if asked, and says on the serial line how far it is:
//   READY                  once per boot: it waits for its words
//   START nb=N disks=N generation=HEX dirty=MIB ms=MS    once per boot
//   C <seq> <ms> [<host>]  at most every 100 ms; every disk has durably acknowledged block <seq>
//   BAD ...          anything that is not as the guest left it
// A `generation` drawn at boot tells a second boot from a resumed one.
// Two things are read from the host, items that QEMU was given by `-fw_cfg name=NAME,string=VALUE`. Such
// an item is no part of a migration; each QEMU answers with its own.
//   opt/vmferry/words    once: what to do, NAME=VALUE with blanks between. While it is `wait`, the guest
//                        waits. A state saved then starts as any guest with these disks (saved.rs).
//   opt/vmferry/host     before each block, one letter: the host whose QEMU executes the guest at
//                        this very moment.
// Words: vf_blocks (a power of two), vf_rate (blocks/s, 0 = full speed), vf_disks, vf_dirty (MiB of RAM
// rewritten and checked in a loop), vf_dirty_rest (ms between its rounds), vf_marker (text put into
// every block and into RAM), vf_seed (of the generation). The kernel's command line may have them, too.
#define _GNU_SOURCE
#include "block.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#define DISKS_MAX 8u
#define REPORT_EVERY_MS 100u
#define RE_READ_EVERY 64u
#define RESIDENT_BYTES (1u << 20) // RAM that holds the marker even when no RAM is to be dirtied
#define PAGE_BYTES 4096u
// QEMU's docs/specs/fw_cfg.rst: the ports, and the directory's key. All numbers are big endian.
#define FW_CFG_SELECTOR 0x510
#define FW_CFG_DATA 0x511
#define FW_CFG_DIRECTORY 0x19
#define FW_CFG_NAME_BYTES 56
#define WORDS_BYTES 1024
#define WAIT_US 20000

static const char *marker = "";
static uint64_t generation;
static uint16_t host_key; // of the item that names the host, or 0

static uint64_t now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static uint64_t number(const char *name, uint64_t otherwise) {
  const char *text = getenv(name);
  return text ? strtoull(text, 0, 10) : otherwise;
}

static uint64_t draw_generation(void) {
  uint64_t drawn = 0;
  // Not for secrets, so an unseeded pool will do; the clock is mixed in for the same reason.
  if (getrandom(&drawn, sizeof drawn, GRND_INSECURE) != sizeof drawn) drawn = 0;
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  // Two guests from one saved state differ by the seed alone.
  return drawn ^ number("vf_seed", 0) ^ ((uint64_t)t.tv_nsec * 0x9e3779b97f4a7c15ull + (uint64_t)t.tv_sec);
}

static uint32_t fw_cfg_number(unsigned bytes) {
  uint32_t number = 0;
  while (bytes--) number = number << 8 | inb(FW_CFG_DATA);
  return number;
}

// The key of an item, or 0.
static uint16_t find_key(const char *wanted) {
  uint16_t found = 0;
  outw(FW_CFG_DIRECTORY, FW_CFG_SELECTOR);
  for (uint32_t items = fw_cfg_number(4); items && !found; items--) {
    char name[FW_CFG_NAME_BYTES] = "";
    fw_cfg_number(4); // its size
    uint16_t key = (uint16_t)fw_cfg_number(2);
    fw_cfg_number(2); // reserved
    insb(FW_CFG_DATA, name, sizeof name);
    if (!strncmp(name, wanted, sizeof name)) found = key;
  }
  return found;
}

// Asks by one byte only: the state that is saved meanwhile goes on in a QEMU with other words.
static void take_words(void) {
  static char words[WORDS_BYTES];
  uint16_t key = find_key("opt/vmferry/words");
  if (!key) return;
  printf("READY\n");
  for (outw(key, FW_CFG_SELECTOR); inb(FW_CFG_DATA) == 'w'; outw(key, FW_CFG_SELECTOR)) usleep(WAIT_US);
  outw(key, FW_CFG_SELECTOR);
  insb(FW_CFG_DATA, words, sizeof words - 1); // zeros after its end
  for (char *word = strtok(words, " "); word; word = strtok(0, " ")) putenv(word);
}

// One byte only, so that no migration can come between two of them.
static uint64_t host_now(void) {
  if (!host_key) return 0;
  outw(host_key, FW_CFG_SELECTOR);
  return inb(FW_CFG_DATA);
}

static unsigned char *map_ram(size_t bytes) {
  unsigned char *ram = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (ram == MAP_FAILED) {
    printf("BAD ram cannot map %zu bytes: %s\n", bytes, strerror(errno));
    return 0;
  }
  return ram;
}

// A page holds its round's number and then the marker over and over.
static uint64_t page_stamp(size_t page, uint64_t round) { return round * 0x9e3779b97f4a7c15ull + page * PAGE_BYTES + generation; }

static void mark_page(unsigned char *page) {
  for (size_t at = 64; at + MARKER_BYTES <= PAGE_BYTES; at += MARKER_BYTES) strncpy((char *)page + at, marker, MARKER_BYTES);
}

// Each round first checks what the round before left, so a page lost on the way shows as BAD.
static void *dirty_ram(void *argument) {
  size_t pages = (size_t)argument;
  unsigned char *ram = map_ram(pages * PAGE_BYTES);
  if (!ram) return 0;
  for (size_t page = 0; page < pages; page++) mark_page(ram + page * PAGE_BYTES);
  useconds_t rest = (useconds_t)number("vf_dirty_rest", 0) * 1000;
  for (uint64_t round = 1;; round++, usleep(rest))
    for (size_t page = 0; page < pages; page++) {
      volatile uint64_t *stamp = (void *)(ram + page * PAGE_BYTES);
      if (round > 1 && *stamp != page_stamp(page, round - 1))
        printf("BAD ram page=%zu round=%llu\n", page, (unsigned long long)round);
      *stamp = page_stamp(page, round);
    }
}

static void start_dirtying(uint64_t mib) {
  pthread_t thread;
  if (mib && pthread_create(&thread, 0, dirty_ram, (void *)(size_t)(mib << 20 >> 12))) printf("BAD ram cannot start the dirtier\n");
}

static int open_disk(unsigned disk) {
  char path[16];
  snprintf(path, sizeof path, "/dev/vd%c", 'a' + (int)disk);
  // The drivers probe in their own time.
  for (int tries = 0; tries < 200 && access(path, F_OK); tries++) usleep(50000);
  int fd = open(path, O_RDWR | O_DIRECT | O_DSYNC | O_CLOEXEC);
  if (fd < 0) printf("BAD open %s: %s\n", path, strerror(errno));
  return fd;
}

static void write_block(int fd, struct block *b) {
  ssize_t n = pwrite(fd, b, BLOCK_BYTES, (off_t)(b->index * BLOCK_BYTES));
  if (n == BLOCK_BYTES) return;
  printf("BAD write disk=%llu seq=%llu got=%zd: %s\n", (unsigned long long)b->disk, (unsigned long long)b->seq, n, strerror(errno));
  sleep(1);
}

static void check_block(int fd, struct block *b, uint64_t disk, uint64_t seq, uint64_t nb) {
  ssize_t n = pread(fd, b, BLOCK_BYTES, (off_t)(block_index(seq, nb) * BLOCK_BYTES));
  if (n == BLOCK_BYTES && b->seq == seq && b->disk == disk && b->generation == generation && b->sum == block_sum(b)) return;
  printf("BAD read disk=%llu seq=%llu found=%llu got=%zd\n", (unsigned long long)disk, (unsigned long long)seq, (unsigned long long)b->seq, n);
}

// Sleeps until `seq` is due; work that fell behind by over a second is not caught up with.
static void keep_rate(uint64_t rate, uint64_t seq, uint64_t *start) {
  if (!rate) return;
  uint64_t now = now_ms(), due = *start + seq * 1000 / rate;
  if (due > now + 2) usleep((useconds_t)((due - now) * 1000));
  else if (now > due + 1000) *start = now - seq * 1000 / rate;
}

static void write_for_ever(const int *fd, unsigned disks, uint64_t nb, uint64_t rate) {
  struct block *out = aligned_alloc(BLOCK_BYTES, BLOCK_BYTES), *in = aligned_alloc(BLOCK_BYTES, BLOCK_BYTES);
  uint64_t reported = 0, start = now_ms();
  for (uint64_t seq = 1;; seq++) {
    uint64_t host = host_now();
    for (unsigned disk = 0; disk < disks; disk++) {
      block_fill(out, disk, seq, nb, generation, host, marker);
      write_block(fd[disk], out);
      if (seq % RE_READ_EVERY == 0 && seq > nb / 2) check_block(fd[disk], in, disk, seq - nb / 2, nb);
    }
    uint64_t now = now_ms();
    if (now - reported >= REPORT_EVERY_MS) {
      reported = now;
      printf("C %llu %llu%s%.*s\n", (unsigned long long)seq, (unsigned long long)now, host ? " " : "", host ? 1 : 0, (const char *)&host);
    }
    keep_rate(rate, seq, &start);
  }
}

int main(void) {
  setvbuf(stdout, 0, _IOLBF, 0);
  if (ioperm(FW_CFG_SELECTOR, 2, 1)) printf("BAD ioperm: %s\n", strerror(errno));
  take_words();
  if (getenv("vf_marker")) marker = getenv("vf_marker");
  generation = draw_generation();
  host_key = find_key("opt/vmferry/host");
  uint64_t nb = number("vf_blocks", 4096), disks = number("vf_disks", 2), dirty = number("vf_dirty", 0);
  if (!nb || nb & (nb - 1) || disks > DISKS_MAX) printf("BAD arguments\n");
  int fd[DISKS_MAX];
  for (unsigned disk = 0; disk < disks; disk++) fd[disk] = open_disk(disk);
  unsigned char *resident = map_ram(RESIDENT_BYTES);
  for (size_t at = 0; resident && at < RESIDENT_BYTES; at += PAGE_BYTES) mark_page(resident + at);
  start_dirtying(dirty);
  printf("START nb=%llu disks=%llu generation=%016llx dirty=%llu ms=%llu\n", (unsigned long long)nb, (unsigned long long)disks,
         (unsigned long long)generation, (unsigned long long)dirty, (unsigned long long)now_ms());
  write_for_ever(fd, (unsigned)disks, nb, number("vf_rate", 0));
}
