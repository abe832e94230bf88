// Winograd's transforms around a plain matrix product, against a convolution in double: prints the
// largest relative errors of the result, of its pooled copy and of the three gradients.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cpu/winograd.h"

using namespace fastunet::cpu::winograd;

namespace {

// Allocated to the byte, so that a sanitizer sees the float that follows.
struct Floats {
  explicit Floats(int64_t size) : size(size), data(new float[static_cast<size_t>(size)]()) {}
  float& operator[](int64_t i) { return data[static_cast<size_t>(i)]; }
  int64_t size;
  std::unique_ptr<float[]> data;
};

std::mt19937 generator(0);

Floats noise(int64_t size) {
  Floats floats(size);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < size; ++i) floats[i] = normal(generator);
  return floats;
}

struct Problem {
  int64_t batch, height, width, inputs, outputs, padding;

  int64_t y_height() const { return height - 2 + 2 * padding; }
  int64_t y_width() const { return width - 2 + 2 * padding; }
};

template <typename T>
Images<T> images(T* data, int64_t height, int64_t width, int64_t channels) {
  return {data, height * width * channels, width * channels, channels};
}

// m = a b at each point, or a^T b.
void multiply(const Floats& a, const Floats& b, Floats& m, int64_t rows, int64_t depth,
              int64_t columns, bool turned) {
  for (int64_t p = 0; p < kPoints; ++p) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        float sum = 0;
        for (int64_t k = 0; k < depth; ++k) {
          const int64_t at = turned ? k * rows + i : i * depth + k;
          sum += a.data[p * rows * depth + at] * b.data[(p * depth + k) * columns + j];
        }
        m[(p * rows + i) * columns + j] = sum;
      }
    }
  }
}

struct Error {
  double largest = 0;
  double size = 1e-30;

  void add(double actual, double exact) {
    const double error = std::abs(actual - exact);
    largest = error <= largest ? largest : error;
    size = std::max(size, std::abs(exact));
  }
  double relative() const { return largest / size; }
};

// Result, pooled copy, gradients of input, weights and bias.
std::vector<double> errors(const Problem& c) {
  const int64_t h = c.y_height(), w = c.y_width();
  Floats x = noise(c.batch * c.height * c.width * c.inputs);
  Floats weights = noise(c.outputs * 9 * c.inputs), bias = noise(c.outputs);
  Floats grad = noise(c.batch * h * w * c.outputs);
  const Tiles tiles{h, w};
  const int64_t count = c.batch * tiles.per_image();

  // as torch.nn.Conv2d has them in channels_last
  const Weights<const float> layer{weights.data.get(), 1, 9 * c.inputs, 3 * c.inputs, c.inputs};
  Floats v(kPoints * count * c.inputs), u(kPoints * c.inputs * c.outputs);
  Floats m(kPoints * count * c.outputs), y(c.batch * h * w * c.outputs);
  Floats pooled(c.batch * (h / 2) * (w / 2) * c.outputs);
  const auto matrices = [](Floats& floats, int64_t rows, int64_t columns) {
    return Matrices<float>{floats.data.get(), rows * columns, columns};
  };
  const Input input{images<const float>(x.data.get(), c.height, c.width, c.inputs), c.height,
                    c.width, c.padding};
  transform_input(input, tiles, c.inputs, matrices(v, count, c.inputs), 0, count);
  transform_weights(layer, c.inputs, c.outputs, matrices(u, c.inputs, c.outputs));
  multiply(v, u, m, count, c.inputs, c.outputs, false);
  const bool pool = h >= 2 && w >= 2;
  const Images<float> nowhere{nullptr, 0, 0, 0};
  const auto result = [](Floats& floats, int64_t rows, int64_t columns) {
    return Matrices<const float>{floats.data.get(), rows * columns, columns};
  };
  transform_output(result(m, count, c.outputs), tiles, c.outputs,
                   {images(y.data.get(), h, w, c.outputs),
                    pool ? images(pooled.data.get(), h / 2, w / 2, c.outputs) : nowhere,
                    {nullptr, 0, 0, 0},
                    bias.data.get(),
                    true},
                   0, count);

  // the gradient of the input, six points at a time, zero where x is not positive
  const Weights<const float> turned{weights.data.get() + 8 * c.inputs, 9 * c.inputs, 1,
                                    -3 * c.inputs, -c.inputs};
  const Tiles x_tiles{c.height, c.width};
  const int64_t x_count = c.batch * x_tiles.per_image();
  Floats p(kPoints * x_count * c.outputs), n(kPoints * x_count * c.inputs);
  Floats back(kPoints * c.outputs * c.inputs), grad_x(x.size);
  const Input incoming{images<const float>(grad.data.get(), h, w, c.outputs), h, w, 2 - c.padding};
  transform_input(incoming, x_tiles, c.outputs, matrices(p, x_count, c.outputs), 0, x_count);
  Floats taps(9 * c.outputs * (c.inputs + 16));
  const auto straight = turn_weights(turned, c.outputs, c.inputs, taps.data.get());
  for (int64_t row = 0; row < kPatch; ++row) {
    Matrices<float> part = matrices(back, c.outputs, c.inputs);
    part.data += row * kPatch * part.point;
    transform_weights_row(row, straight, c.outputs, c.inputs, part);
  }
  multiply(p, back, n, x_count, c.outputs, c.inputs, false);
  transform_output(result(n, x_count, c.inputs), x_tiles, c.inputs,
                   {images(grad_x.data.get(), c.height, c.width, c.inputs), nowhere,
                    images<const float>(x.data.get(), c.height, c.width, c.inputs), nullptr, false},
                   0, x_count);

  // those of the weights and of the bias
  Floats q(kPoints * count * c.outputs), du(kPoints * c.outputs * c.inputs);
  Floats grad_weights(weights.size);
  std::vector<double> sums(static_cast<size_t>(c.outputs));
  const auto gradient = images<const float>(grad.data.get(), h, w, c.outputs);
  transform_gradient(gradient, tiles, c.outputs, matrices(q, count, c.outputs), 0, count);
  add_pixels(gradient, tiles, c.outputs, sums.data(), 0, count);
  multiply(q, v, du, c.outputs, count, c.inputs, true);
  transform_weight_gradient(result(du, c.outputs, c.inputs), c.inputs, c.outputs,
                            {grad_weights.data.get(), 1, 9 * c.inputs, 3 * c.inputs, c.inputs});

  // all of it in double
  std::vector<double> exact_y(static_cast<size_t>(y.size));
  std::vector<double> exact_x(static_cast<size_t>(x.size)),
      exact_w(static_cast<size_t>(weights.size));
  std::vector<double> exact_b(static_cast<size_t>(c.outputs));
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t i = 0; i < h; ++i) {
      for (int64_t j = 0; j < w; ++j) {
        for (int64_t o = 0; o < c.outputs; ++o) {
          const int64_t at = ((b * h + i) * w + j) * c.outputs + o;
          double sum = bias[o];
          exact_b[static_cast<size_t>(o)] += grad[at];
          for (int64_t tap = 0; tap < 9; ++tap) {
            const int64_t r = i + tap / 3 - c.padding, s = j + tap % 3 - c.padding;
            if (r < 0 || s < 0 || r >= c.height || s >= c.width) continue;
            for (int64_t k = 0; k < c.inputs; ++k) {
              const int64_t pixel = ((b * c.height + r) * c.width + s) * c.inputs + k;
              const int64_t weight = (o * 9 + tap) * c.inputs + k;
              sum += double(x[pixel]) * weights[weight];
              exact_x[static_cast<size_t>(pixel)] += double(grad[at]) * weights[weight];
              exact_w[static_cast<size_t>(weight)] += double(grad[at]) * x[pixel];
            }
          }
          exact_y[static_cast<size_t>(at)] = sum;
        }
      }
    }
  }
  std::vector<Error> error(5);
  for (int64_t i = 0; i < y.size; ++i) {
    const double sum = exact_y[static_cast<size_t>(i)];
    error[0].add(y[i], std::max(sum, 0.0));
    error[0].size = std::max(error[0].size, std::abs(sum));
  }
  error[1].size = error[0].size;
  for (int64_t i = 0; pool && i < pooled.size; ++i) {
    const int64_t o = i % c.outputs, column = i / c.outputs % (w / 2);
    const int64_t row = i / c.outputs / (w / 2) % (h / 2), b = i / c.outputs / (w / 2) / (h / 2);
    const int64_t at = ((b * h + 2 * row) * w + 2 * column) * c.outputs + o;
    const int64_t below = at + w * c.outputs;
    error[1].add(pooled[i], std::max({y[at], y[at + c.outputs], y[below], y[below + c.outputs]}));
  }
  for (int64_t i = 0; i < x.size; ++i) {
    error[2].size = std::max(error[2].size, std::abs(exact_x[static_cast<size_t>(i)]));
    error[2].add(grad_x[i], x[i] > 0 ? exact_x[static_cast<size_t>(i)] : 0.0);
  }
  for (int64_t i = 0; i < weights.size; ++i) {
    error[3].add(grad_weights[i], exact_w[static_cast<size_t>(i)]);
  }
  for (size_t o = 0; o < sums.size(); ++o) error[4].add(sums[o], exact_b[o]);
  std::vector<double> relative;
  for (const Error& one : error) relative.push_back(one.relative());
  return relative;
}

}  // namespace

int main() {
  const Problem problems[] = {
      {1, 3, 3, 1, 1, 0},    {2, 1, 1, 3, 5, 1},    {1, 6, 6, 16, 16, 0},
      {1, 9, 14, 17, 70, 1}, {2, 13, 7, 65, 64, 0}, {1, 2, 21, 130, 33, 1},
  };
  for (const Problem& problem : problems) {
    for (const double error : errors(problem)) std::printf("%.3g ", error);
    std::printf("\n");
  }
}
