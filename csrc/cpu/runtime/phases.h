// How many images of a batch go through a row of layers together. One image at a time keeps what lies between two
// layers in the cache, but reads the weights anew for each; all at once does the opposite. Early layers have large
// images and small weights, late ones small images and large weights, so a row is cut into phases:
//
//   phase   layers     images together
//     0      0 ..  9          1          each thread takes images of its own
//     1     10 .. 20          2
//     2     21 .. 33         all         the threads share each layer
#pragma once
#include <cstdint>
#include <vector>

namespace convext {

// What a layer moves.
struct LayerBytes {
  int64_t weights;
  int64_t image;   // input, output and residual of one image
  int64_t output;  // of one image
};

struct Phase {
  int64_t first, count;  // of the layers
  int64_t images;        // together; the whole batch: the threads share each layer
};

// The phases of a row of layers, in order, every layer in one: those that take the least time by what they move.
// `images` of a phase divides the batch evenly among the threads, or is all of it. `second_level`: the bytes of a
// core's second-level cache.
std::vector<Phase> phases(const std::vector<LayerBytes>& layers, int64_t batch, int32_t threads, int64_t second_level);

}  // namespace convext
