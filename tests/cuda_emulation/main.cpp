// Runs one operator of csrc/cuda: labels on stdin, outputs on stdout, everything else in arguments:
//   forward|reverse 32|64 B D H W separate_touching WIDTH
//   forward|reverse 32|64 B D H W weight_map none|balanced|given W_BACKGROUND W_CELLS
//       W0 SIGMA SPACING_D SPACING_H SPACING_W DISTANCES
// With FAILING_LAUNCH=n the n-th launch fails; the exit code is CUDA's error.
// Or prints where pixel I lies on an axis:
//   position I STRIDE SIZE
#include <cstring>
#include <string>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/separate_touching.h"
#include "../../csrc/cuda/weight_map.h"

namespace {

using fastunet::cuda::Shape;

// memory of exactly this size that holds no number
template <typename T>
std::vector<T> fresh(int64_t size) {
  T nothing;
  std::memset(&nothing, 0xff, sizeof nothing);
  return std::vector<T>(static_cast<std::size_t>(size), nothing);
}

template <typename T>
void write(const std::vector<T>& values) {
  if (!values.empty()) std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

template <typename Id>
int run(const Shape& shape, char** arguments) {
  std::vector<Id> labels = fresh<Id>(shape.pixels());
  if (std::fread(labels.data(), sizeof(Id), labels.size(), stdin) != labels.size()) return 2;
  const std::string operation = arguments[0];
  if (operation == "separate_touching") {
    std::vector<Id> workspace = fresh<Id>(shape.pixels()), carved = workspace;
    const cudaError_t error = fastunet::cuda::separate_touching(
        labels.data(), shape, std::atoll(arguments[1]), workspace.data(), carved.data(),
        emulation::current_stream);
    write(carved);
    return error;
  }
  const std::string classes = arguments[1];
  const auto number = [&](int i) { return std::strtod(arguments[i], nullptr); };
  const float given[2] = {static_cast<float>(number(2)), static_cast<float>(number(3))};
  const bool distances = number(9) != 0;
  const fastunet::cuda::WeightMapOptions options{classes == "given" ? given : nullptr,
                                                 classes == "balanced",
                                                 number(4),
                                                 number(5),
                                                 number(6),
                                                 number(7),
                                                 number(8),
                                                 distances};
  std::vector<char> workspace = fresh<char>(fastunet::cuda::weight_map_workspace_bytes<Id>(shape));
  std::vector<float> weights = fresh<float>(shape.pixels());
  std::vector<float> d1 = fresh<float>(distances ? shape.pixels() : 0), d2 = d1;
  const cudaError_t error =
      fastunet::cuda::weight_map(labels.data(), shape, options, workspace.data(), weights.data(),
                                 d1.data(), d2.data(), emulation::current_stream);
  write(weights);
  write(d1);
  write(d2);
  return error;
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 5 && std::string(arguments[1]) == "position") {
    const int at = fastunet::cuda::position(std::atoll(arguments[2]), std::atoll(arguments[3]),
                                            std::atoi(arguments[4]));
    std::printf("%d", at);
    return 0;
  }
  if (count < 9) return 1;
  emulation::reverse = std::string(arguments[1]) == "reverse";
  const Shape shape{std::atoll(arguments[3]), std::atoi(arguments[4]), std::atoi(arguments[5]),
                    std::atoi(arguments[6])};
  if (const char* number = std::getenv("FAILING_LAUNCH")) {
    emulation::failing_launch = std::atoi(number);
  }
  const bool wide = std::string(arguments[2]) == "64";
  const int error = wide ? run<int64_t>(shape, arguments + 7) : run<int32_t>(shape, arguments + 7);
  // who asks next must not find an error that was reported
  return cudaGetLastError() == cudaSuccess ? error : 3;
}
