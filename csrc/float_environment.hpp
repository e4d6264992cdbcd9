// The floating-point environment that every result is defined in.
#pragma once

#include <cfenv>

namespace esfast {

// Round to nearest, subnormals kept, whatever the caller set (torch.set_flush_denormal and others);
// the caller's environment comes back at the end of the scope.
class DefaultFloats {
 public:
  DefaultFloats() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloats() { std::fesetenv(&saved_); }
  DefaultFloats(const DefaultFloats&) = delete;
  DefaultFloats& operator=(const DefaultFloats&) = delete;

 private:
  std::fenv_t saved_;
};

}  // namespace esfast
