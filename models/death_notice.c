/* How soon does a process learn that another one was killed?
 *
 *   gcc -O2 -pthread -o death_notice death_notice.c
 *   ./death_notice METHOD RESIDENT_MIB BUSY_PROCESSES ROUNDS
 *
 *   lock     a robust mutex in shared memory, held by a thread of the victim; the watcher blocks on it (EOWNERDEAD)
 *   word     the same mutex; the watcher reads its word every 50 us and looks for FUTEX_OWNER_DIED
 *   pidfd    poll on a process descriptor of the victim
 *   socket   hang-up of a socket pair
 *
 * The kernel marks robust mutexes when a thread begins to exit; process descriptors and sockets report only after the
 * memory of the process has been given back, which takes tens of milliseconds per GiB of resident 4 KiB pages.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define OWNER_DIED 0x40000000u

static double now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static int ascending(const void* a, const void* b) {
  double d = *(const double*)a - *(const double*)b;
  return d < 0 ? -1 : d > 0;
}

static void check(int ok, const char* what) {
  if (!ok) {
    perror(what);
    exit(1);
  }
}

static pthread_mutex_t* alive;

static void* hold(void* fd) {
  pthread_mutex_lock(alive);
  check(write(*(int*)fd, "x", 1) == 1, "write");
  for (;;) pause();
  return NULL;
}

static void spin(void) {
  for (volatile long i = 0;; i++) {
  }
}

static void victim(size_t mib, int ready) {
  /* volatile: the compiler must not drop the stores that make the memory resident */
  volatile char* p = malloc(mib << 20);
  for (size_t i = 0; i < mib << 20; i += 4096) p[i] = 1;
  pthread_t t;
  check(pthread_create(&t, NULL, hold, &ready) == 0, "pthread_create");
  spin();
}

int main(int argc, char** argv) {
  if (argc != 5) {
    fprintf(stderr, "usage: %s lock|word|pidfd|socket RESIDENT_MIB BUSY_PROCESSES ROUNDS\n", argv[0]);
    return 2;
  }
  const char* method = argv[1];
  size_t mib = (size_t)atol(argv[2]);
  int busy = atoi(argv[3]), rounds = atoi(argv[4]);
  if (busy < 0 || busy > 64 || rounds < 1 || rounds > 1000) {
    fprintf(stderr, "0..64 busy processes, 1..1000 rounds\n");
    return 2;
  }
  pid_t burners[64];
  double took[1000];
  for (int i = 0; i < busy; i++)
    if ((burners[i] = fork()) == 0) spin();

  for (int r = 0; r < rounds; r++) {
    alive = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    check(alive != MAP_FAILED, "mmap");
    pthread_mutexattr_t a;
    pthread_mutexattr_init(&a);
    pthread_mutexattr_setpshared(&a, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(alive, &a);
    int ready[2], link[2];
    check(pipe(ready) == 0, "pipe");
    check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, link) == 0, "socketpair");
    pid_t pid = fork();
    check(pid >= 0, "fork");
    if (pid == 0) {
      close(link[0]);
      victim(mib, ready[1]);
    }
    close(link[1]);
    char c;
    check(read(ready[0], &c, 1) == 1, "read");
    usleep(10000);
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    check(pidfd >= 0, "pidfd_open");

    double t0 = now_us();
    kill(pid, SIGKILL);
    if (!strcmp(method, "lock")) {
      check(pthread_mutex_lock(alive) == EOWNERDEAD, "lock");
    } else if (!strcmp(method, "word")) {
      struct timespec nap = {0, 50000};
      while (!(__atomic_load_n((unsigned*)alive, __ATOMIC_ACQUIRE) & OWNER_DIED)) nanosleep(&nap, NULL);
    } else {
      struct pollfd p = {!strcmp(method, "pidfd") ? pidfd : link[0], POLLIN, 0};
      check(poll(&p, 1, 60000) == 1, "poll");
    }
    took[r] = now_us() - t0;

    waitpid(pid, NULL, 0);
    close(pidfd);
    close(link[0]);
    close(ready[0]);
    close(ready[1]);
    munmap(alive, 4096);
  }
  for (int i = 0; i < busy; i++) {
    kill(burners[i], SIGKILL);
    waitpid(burners[i], NULL, 0);
  }
  qsort(took, (size_t)rounds, sizeof took[0], ascending);
  printf("%-6s resident %5zu MiB, %d busy: us min %.0f median %.0f max %.0f\n", method, mib, busy, took[0],
         took[rounds / 2], took[rounds - 1]);
  return 0;
}
