// Libraries found at run time: nothing of a vendor is needed to build, and none of it to start.
#pragma once

#include <string>
#include <vector>

#include "base/error.h"

namespace pyar {

// Where to look, in this order. Only one copy of such a library may be at work in a process, so one
// that is loaded already (torch's) comes before all that would be loaded anew.
struct LibrarySearch {
  std::string name;                  // for messages: "NCCL"
  std::string variable;              // environment variable that names the file
  std::string path;                  // its value; if not empty, nothing else is tried
  std::vector<std::string> sonames;  // newest first
  std::vector<std::string> folders;  // looked into before the system's
  std::string remedy;                // what to do when there is none
};

class DynamicLibrary {
 public:
  // Opens the first that can be opened; throws Error with all that was tried. Never closed: threads
  // and exit handlers of such libraries outlive their users.
  explicit DynamicLibrary(const LibrarySearch& search);

  const std::string& path() const { return path_; }  // of the file, with symbolic links as found
  const std::string& how() const { return how_; }    // "PYALLREDUCE_NCCL", "already loaded", ...
  void* symbol(const char* name) const;              // null if it is not there

 private:
  bool open(const std::string& file, int flags, std::string how, std::string& tried);

  void* handle_ = nullptr;
  std::string path_, how_;
};

// A function of such a library, which returns a status; 0 is success.
template <typename... Args>
class ForeignFunction {
 public:
  // `explain` says what a status means.
  using Explain = std::string (*)(const void* library, int status);

  explicit ForeignFunction(const char* name) : name_(name) {}
  ForeignFunction(const ForeignFunction&) = delete;
  ForeignFunction& operator=(const ForeignFunction&) = delete;

  // False if the library lacks it.
  bool find_in(const DynamicLibrary& library, Explain explain, const void* context) {
    function_ = reinterpret_cast<int (*)(Args...)>(library.symbol(name_));
    explain_ = explain;
    context_ = context;
    return function_ != nullptr;
  }
  explicit operator bool() const { return function_ != nullptr; }
  const char* name() const { return name_; }

  int status(Args... args) const { return function_(args...); }
  // Throws Error for every status but 0.
  void operator()(Args... args) const { check(function_(args...)); }
  void check(int status) const {
    if (status != 0) throw error(status);
  }
  Error error(int status) const {
    return Error(std::string(name_) + ": " + explain_(context_, status) + " (status " +
                 std::to_string(status) + ")");
  }

 private:
  const char* name_;
  int (*function_)(Args...) = nullptr;
  Explain explain_ = nullptr;
  const void* context_ = nullptr;
};

}  // namespace pyar
