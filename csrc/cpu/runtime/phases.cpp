#include "phases.h"

#include <algorithm>

namespace convext {
namespace {

// Weights are read in a row, ahead of their use, which takes about a third of the time that activations from memory
// take, written once and read once: with a Zen 4 core alone, 24 and 77 us a MB.
constexpr double kWeightByte = 1, kActivationByte = 3;

// Up to four times its second level, a core's part of the last level holds what it works on; from sixteen times on,
// everything comes from memory.
double share_from_memory(int64_t held, int64_t second_level) {
  const double low = 4.0 * second_level, high = 16.0 * second_level;
  return std::clamp((held - low) / (high - low), 0.0, 1.0);
}

}  // namespace

std::vector<Phase> phases(const std::vector<LayerBytes>& layers, int64_t batch, int32_t threads, int64_t second_level) {
  std::vector<int64_t> choices;
  for (int64_t images = 1; images < batch; ++images) {
    if (batch % (images * threads) == 0) choices.push_back(images);
  }
  choices.push_back(batch);
  const size_t count = choices.size();
  const auto cost_of = [&](const LayerBytes& layer, int64_t images) {
    const bool shared = images == batch;
    const int64_t held = layer.image * images / (shared ? threads : 1);  // by each thread
    const double reads = static_cast<double>(batch / images);
    return reads * layer.weights * kWeightByte +
           static_cast<double>(batch) * layer.image * kActivationByte * share_from_memory(held, second_level);
  };
  // Between two phases the whole batch lies in one piece, written and read, and leaves at least the core's own cache.
  const auto cost_of_seam = [&](const LayerBytes& layer) {
    const int64_t bytes = batch * layer.output;
    return bytes * (kWeightByte + 2 * kActivationByte * share_from_memory(bytes / threads, second_level));
  };
  // Least cost of the layers so far, by the choice for the last one; and, for each layer, the choice before.
  std::vector<double> cost(count, 0);
  std::vector<std::vector<size_t>> before(layers.size(), std::vector<size_t>(count));
  for (size_t i = 0; i < layers.size(); ++i) {
    const size_t cheapest = std::min_element(cost.begin(), cost.end()) - cost.begin();
    const double from_cheapest = i == 0 ? 0 : cost[cheapest] + cost_of_seam(layers[i - 1]);
    for (size_t c = 0; c < count; ++c) {
      before[i][c] = i > 0 && from_cheapest < cost[c] ? cheapest : c;
      cost[c] = (before[i][c] == c ? cost[c] : from_cheapest) + cost_of(layers[i], choices[c]);
    }
  }
  std::vector<Phase> found;
  size_t choice = std::min_element(cost.begin(), cost.end()) - cost.begin();
  for (int64_t i = static_cast<int64_t>(layers.size()) - 1; i >= 0; --i) {
    if (found.empty() || found.back().images != choices[choice]) found.push_back({i, 0, choices[choice]});
    found.back().first = i;
    ++found.back().count;
    choice = before[i][choice];
  }
  std::reverse(found.begin(), found.end());
  return found;
}

}  // namespace convext
