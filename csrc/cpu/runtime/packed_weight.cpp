#include "packed_weight.h"

namespace convext {

PackedWeight::Registry& PackedWeight::registry() {
  static auto* const kept = new Registry;  // outlives every caller
  return *kept;
}

}  // namespace convext
