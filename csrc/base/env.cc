#include "base/env.h"

#include <charconv>
#include <cstdlib>
#include <string_view>
#include <unistd.h>

#include "base/error.h"

namespace pyar {
namespace {

constexpr std::string_view kPrefix = "PYALLREDUCE_";

template <typename Number>
Number parse(std::string_view name, std::string_view text, Number least, Number most) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() ||
      !(value >= least && value <= most))
    throw UsageError(std::string(name) + "=" + std::string(text) + ": expected a number from " +
                     std::to_string(least) + " to " + std::to_string(most));
  return value;
}

struct Variable {
  std::string_view name;
  void (*read)(Env&, std::string_view name, std::string_view text);
};

constexpr Variable kVariables[] = {
    {"PYALLREDUCE_ISA", [](Env& env, std::string_view, std::string_view text) { env.isa = text; }},
    {"PYALLREDUCE_CUDART",
     [](Env& env, std::string_view, std::string_view text) { env.cudart = text; }},
    {"PYALLREDUCE_NCCL",
     [](Env& env, std::string_view, std::string_view text) { env.nccl = text; }},
    {"PYALLREDUCE_PORT", [](Env& env, std::string_view name,
                            std::string_view text) { env.port = parse(name, text, 1, 65535); }},
    {"PYALLREDUCE_TIMEOUT_S",
     [](Env& env, std::string_view name, std::string_view text) {
       env.timeout_s = parse(name, text, 1e-3, 1e9);
     }},
    {"PYALLREDUCE_TRACE",
     [](Env& env, std::string_view, std::string_view text) { env.trace = text; }},
};

}  // namespace

Env read_env() {
  Env env;
  for (char** entry = environ; *entry; ++entry) {
    const std::string_view line(*entry), name = line.substr(0, line.find('='));
    if (!name.starts_with(kPrefix) || name.size() == line.size()) continue;
    const Variable* known = nullptr;
    std::string names;
    for (const Variable& variable : kVariables) {
      if (variable.name == name) known = &variable;
      names.append(" ").append(variable.name);
    }
    if (!known)
      throw UsageError("unknown environment variable " + std::string(name) +
                       "; known are:" + names + ". Correct or unset it.");
    known->read(env, name, line.substr(name.size() + 1));
  }
  return env;
}

std::string temporary_folder() {
  const char* const folder = std::getenv("TMPDIR");
  return folder && *folder ? folder : "/tmp";
}

}  // namespace pyar
