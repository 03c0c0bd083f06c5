// The guest's first process: loads the drivers and becomes the writer. Unknown NAME=VALUE words of
// the kernel's command line arrive here as environment variables and are left for the writer.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <dirent.h>

static void say_bad(const char *what, const char *object) { printf("BAD %s %s: %s\n", what, object, strerror(errno)); }

static void load_module(const char *name) {
  char path[300];
  snprintf(path, sizeof path, "/modules/%s", name);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0 || syscall(SYS_finit_module, fd, "", 0)) say_bad("module", name);
  if (fd >= 0) close(fd);
}

static int no_dots(const struct dirent *entry) { return entry->d_name[0] != '.'; }

static void load_modules(void) {
  struct dirent **entries;
  int n = scandir("/modules", &entries, no_dots, alphasort);
  if (n < 0) say_bad("open", "/modules");
  for (int i = 0; i < n; i++) load_module(entries[i]->d_name);
}

int main(void) {
  mount("proc", "/proc", "proc", 0, 0);
  mount("sys", "/sys", "sysfs", 0, 0);
  mount("dev", "/dev", "devtmpfs", 0, 0);
  int console = open("/dev/console", O_RDWR);
  for (int fd = 0; console >= 0 && fd < 3; fd++) dup2(console, fd);
  setvbuf(stdout, 0, _IOLBF, 0);
  load_modules();
  char *arguments[] = {"/writer", 0};
  execv(arguments[0], arguments);
  say_bad("exec", arguments[0]);
  for (;;) pause();
}
