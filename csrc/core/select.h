// Which kernel serves a problem: rejects first, then the least cost. Pure host C++, runs and is tested without a GPU.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "api.h"
#include "variant.h"

namespace convext {

// Every variant compiled into this library, in the order of variants.inc. The index is the variant's handle in Python.
CONVEXT_API const std::vector<const Variant*>& variants();

// What the user allows; process-wide, set from Python.
struct Settings {
  Isa cpu_isa;  // at most what the CPU offers
  Accuracy accuracy;
};
CONVEXT_API Settings& settings();

// The best instruction set that this CPU and this build offer.
CONVEXT_API Isa detect_cpu_isa();

// Why the variant cannot serve the problem, in words, or nullptr. Half-precision problems on the CPU may be staged
// through float32. `tf32`: tensor-core kernels for float32 on CUDA may round their operands to tf32. It is the caller's
// wish and not a setting: who keeps a selection keeps it under the wish that it was made with.
CONVEXT_API const char* reject(const Variant& variant, Device device, Pass pass, const ConvProblem& problem,
                               bool tf32 = true);

// What a launch of a variant does for a problem, whose layouts are those that tensors arrive in: the kernel's own work
// and the copies that staging makes. Zeros for a variant without `work`.
CONVEXT_API Work work_of(const Variant& variant, const ConvProblem& problem);

// What a launch costs: on the CPU the sum over its work of what each term costs, in seconds; elsewhere the variant's own.
CONVEXT_API double cost_of(const Variant& variant, const ConvProblem& problem);

// Seconds that one of each term takes in each variant, by index. Process-wide; until it is set, and for variants beyond
// the end of what is given, every term takes `kUnmeasuredSeconds`. Not to be called beside a selection.
constexpr double kUnmeasuredSeconds = 1e-9;
CONVEXT_API void set_costs(std::vector<Work> seconds);

// Index of the cheapest variant that takes the problem, or -1.
CONVEXT_API int select(Device device, Pass pass, const ConvProblem& problem, bool tf32 = true);

// (variant, reason) for every variant of this device and pass that does not take the problem.
CONVEXT_API std::vector<std::pair<std::string, std::string>> reject_reasons(Device device, Pass pass,
                                                                            const ConvProblem& problem,
                                                                            bool tf32 = true);

}  // namespace convext
