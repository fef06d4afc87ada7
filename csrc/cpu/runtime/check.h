// Errors of code that sees no torch: exceptions of the kind that STD_TORCH_CHECK throws, RuntimeError to Python.
#pragma once
#include <sstream>
#include <stdexcept>

namespace convext {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error("convext_cpu: " + text.str());
}

}  // namespace convext

#define CONVEXT_CHECK(condition, ...) \
  if (!(condition)) ::convext::fail(__VA_ARGS__)
