#include "fault/failing_calls.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdarg>
#include <cstdlib>
#include <new>
#include <string_view>

namespace anyep::test {
namespace {

struct Call {
  std::string_view name;
  int error;
};
constexpr std::array kCalls = {Call{"open", EMFILE},         Call{"socket", EMFILE},         Call{"bind", ENOSPC},
                               Call{"listen", EADDRINUSE},   Call{"connect", ENOMEM},        Call{"accept4", EMFILE},
                               Call{"mkdtemp", EACCES},      Call{"flock", ENOLCK},          Call{"getrandom", ENOSYS},
                               Call{"memfd_create", ENFILE}, Call{"ftruncate", ENOSPC},      Call{"fcntl", EPERM},
                               Call{"mmap", ENOMEM},         Call{"epoll_create1", EMFILE},  Call{"eventfd", EMFILE},
                               Call{"epoll_ctl", ENOSPC},    Call{"pthread_create", EAGAIN}, Call{"new", 0}};

// Plain data: they are looked at before anything in this process is constructed.
thread_local const char* wanted = nullptr;
thread_local int left = 0;
thread_local bool failed = false;

/// True: the caller fails, with errno set.
[[maybe_unused]] bool fails(std::string_view name) {
  if (wanted == nullptr || name != wanted || --left != 0) return false;
  failed = true;
  for (const Call& call : kCalls) {
    if (call.name == name) errno = call.error;
  }
  return true;
}

template <class Function>
Function real(const char* name) {
  return reinterpret_cast<Function>(::dlsym(RTLD_NEXT, name));
}

}  // namespace

std::vector<std::string> failing_calls() {
  std::vector<std::string> names;
  for (const Call& call : kCalls) {
    if (call.name != "new" || kNewCanFail) names.emplace_back(call.name);
  }
  return names;
}

void fail_call(const std::string& name, int nth) {
  for (const Call& call : kCalls) {
    if (call.name != name) continue;
    failed = false;
    left = nth;
    wanted = call.name.data();
  }
}

bool stop_failing() {
  wanted = nullptr;
  return failed;
}

}  // namespace anyep::test

#if !defined(__SANITIZE_THREAD__)

using anyep::test::fails;
using anyep::test::real;

// The signatures are the C library's.
extern "C" {

int open(const char* path, int flags, ...) {
  mode_t mode = 0;
  if ((flags & (O_CREAT | O_TMPFILE)) != 0) {
    va_list arguments;
    va_start(arguments, flags);
    mode = va_arg(arguments, mode_t);
    va_end(arguments);
  }
  static const auto next = real<int (*)(const char*, int, ...)>("open");
  return fails("open") ? -1 : next(path, flags, mode);
}

int fcntl(int fd, int command, ...) {
  va_list arguments;
  va_start(arguments, command);
  const long argument = va_arg(arguments, long);
  va_end(arguments);
  static const auto next = real<int (*)(int, int, ...)>("fcntl");
  return fails("fcntl") ? -1 : next(fd, command, argument);
}

int socket(int domain, int type, int protocol) noexcept {
  static const auto next = real<int (*)(int, int, int)>("socket");
  return fails("socket") ? -1 : next(domain, type, protocol);
}

int bind(int fd, const sockaddr* address, socklen_t length) noexcept {
  static const auto next = real<int (*)(int, const sockaddr*, socklen_t)>("bind");
  return fails("bind") ? -1 : next(fd, address, length);
}

int listen(int fd, int backlog) noexcept {
  static const auto next = real<int (*)(int, int)>("listen");
  return fails("listen") ? -1 : next(fd, backlog);
}

int connect(int fd, const sockaddr* address, socklen_t length) {
  static const auto next = real<int (*)(int, const sockaddr*, socklen_t)>("connect");
  return fails("connect") ? -1 : next(fd, address, length);
}

int accept4(int fd, sockaddr* address, socklen_t* length, int flags) {
  static const auto next = real<int (*)(int, sockaddr*, socklen_t*, int)>("accept4");
  return fails("accept4") ? -1 : next(fd, address, length, flags);
}

char* mkdtemp(char* name) noexcept {
  static const auto next = real<char* (*)(char*)>("mkdtemp");
  return fails("mkdtemp") ? nullptr : next(name);
}

int flock(int fd, int operation) noexcept {
  static const auto next = real<int (*)(int, int)>("flock");
  return fails("flock") ? -1 : next(fd, operation);
}

ssize_t getrandom(void* data, size_t bytes, unsigned flags) {
  static const auto next = real<ssize_t (*)(void*, size_t, unsigned)>("getrandom");
  return fails("getrandom") ? -1 : next(data, bytes, flags);
}

int memfd_create(const char* name, unsigned flags) noexcept {
  static const auto next = real<int (*)(const char*, unsigned)>("memfd_create");
  return fails("memfd_create") ? -1 : next(name, flags);
}

int ftruncate(int fd, off_t length) noexcept {
  static const auto next = real<int (*)(int, off_t)>("ftruncate");
  return fails("ftruncate") ? -1 : next(fd, length);
}

void* mmap(void* address, size_t length, int protection, int flags, int fd, off_t offset) noexcept {
  static const auto next = real<void* (*)(void*, size_t, int, int, int, off_t)>("mmap");
  return fails("mmap") ? MAP_FAILED : next(address, length, protection, flags, fd, offset);
}

int epoll_create1(int flags) noexcept {
  static const auto next = real<int (*)(int)>("epoll_create1");
  return fails("epoll_create1") ? -1 : next(flags);
}

int eventfd(unsigned value, int flags) noexcept {
  static const auto next = real<int (*)(unsigned, int)>("eventfd");
  return fails("eventfd") ? -1 : next(value, flags);
}

int epoll_ctl(int epoll, int operation, int fd, epoll_event* event) noexcept {
  static const auto next = real<int (*)(int, int, int, epoll_event*)>("epoll_ctl");
  return fails("epoll_ctl") ? -1 : next(epoll, operation, fd, event);
}

// Visible: std::thread calls it from the C++ library.
__attribute__((visibility("default"))) int pthread_create(pthread_t* thread, const pthread_attr_t* attributes,
                                                          void* (*body)(void*), void* argument) noexcept {
  static const auto next = real<int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*)>("pthread_create");
  return fails("pthread_create") ? errno : next(thread, attributes, body, argument);
}

}  // extern "C"

#if !defined(__SANITIZE_ADDRESS__)

void* operator new(std::size_t bytes) {
  void* const memory = fails("new") ? nullptr : std::malloc(bytes == 0 ? 1 : bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}

#endif
#endif
