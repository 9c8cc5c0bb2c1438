// What the C++ tests need of a framework. A check that fails ends the program, so that the
// sanitizer's stack and the core dump show where.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <typeinfo>
#include <unistd.h>

namespace pyar::test {

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  std::abort();
}

// Throws nothing, also in threads.
#define CHECK(condition) \
  ((condition) ? void() : pyar::test::fail(__FILE__, __LINE__, "failed: " #condition))

// Runs `body`, which must throw an Expected itself and no other of the family (an Error of the
// operating system is no TimeoutError); returns what it has thrown.
template <typename Expected, typename Body>
Expected error_of(Body body) {
  try {
    body();
  } catch (const Expected& error) {
    if (typeid(error) == typeid(Expected)) return error;
    fail(__FILE__, __LINE__, std::string("a more special error than expected: ") + error.what());
  } catch (const std::exception& error) {
    fail(__FILE__, __LINE__, std::string("another error than expected: ") + error.what());
  }
  fail(__FILE__, __LINE__, "no error");
}

// SIGALRM ends a program that hangs, whoever has started it.
inline void give_up_after(unsigned seconds) { alarm(seconds); }

}  // namespace pyar::test
