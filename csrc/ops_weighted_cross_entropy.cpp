// weighted_cross_entropy on CPU tensors, through torch's stable ABI. The schema and the argument
// checks are in fastunet/ops/weighted_cross_entropy/op.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/weighted_cross_entropy.h"
#include "ops.h"

namespace fastunet {
namespace {

using torch::stable::parallel_for;

// logits that are worth a thread
constexpr int64_t kGrain = 1 << 15;

// [B, K, ...] as images of pixels at one distance from each other; false if they are not.
bool find_layout(const Tensor& tensor, cpu::Layout* layout) {
  int64_t count = 1;
  layout->image = tensor.stride(0);
  layout->of_class = tensor.stride(1);
  layout->pixel = 1;
  for (int64_t axis = tensor.dim() - 1; axis >= 2; --axis) {
    if (tensor.size(axis) == 1) continue;
    if (count == 1) layout->pixel = tensor.stride(axis);
    if (tensor.stride(axis) != count * layout->pixel) return false;
    count *= tensor.size(axis);
  }
  return true;
}

// The arguments of weighted_cross_entropy, checked and in the types that the CPU computes with.
struct CrossEntropyInputs {
  Tensor logits;
  Tensor target;
  std::optional<Tensor> pixel_weight;
  std::optional<Tensor> class_weight;
  int64_t ignore_index;
  double label_smoothing;

  CrossEntropyInputs(const Tensor& any_logits, const Tensor& any_target,
                     const std::optional<Tensor>& any_pixel_weight,
                     const std::optional<Tensor>& any_class_weight, int64_t ignore,
                     double smoothing)
      : logits(any_logits),
        target(contiguous(any_target)),
        ignore_index(ignore),
        label_smoothing(smoothing) {
    const ScalarType dtype = logits.scalar_type(), id = target.scalar_type();
    STD_TORCH_CHECK(logits.dim() >= 2 && logits.size(1) > 0,
                    "weighted_cross_entropy: logits must be [B, K, ...] of at least one class");
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                        dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                    "weighted_cross_entropy: logits must be floating point");
    STD_TORCH_CHECK(id == ScalarType::Long || id == ScalarType::Int || id == ScalarType::Byte,
                    "weighted_cross_entropy: target must be int64, int32 or uint8");
    const int64_t pixels = logits.numel() / logits.size(1);
    check(target, "target", pixels);
    const ScalarType real = dtype == ScalarType::Double ? dtype : ScalarType::Float;
    if (any_pixel_weight.has_value()) {
      check(*any_pixel_weight, "pixel_weight", pixels);
      pixel_weight = contiguous(torch::stable::to(*any_pixel_weight, real));
    }
    if (any_class_weight.has_value()) {
      check(*any_class_weight, "class_weight", logits.size(1));
      class_weight = contiguous(torch::stable::to(*any_class_weight, real));
    }
  }

  static void check(const Tensor& tensor, const char* name, int64_t size) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == size, "weighted_cross_entropy: ", name,
                    " must have ", size, " elements on the CPU");
  }

  bool is_double() const { return logits.scalar_type() == ScalarType::Double; }

  template <typename Real>
  cpu::CrossEntropy<Real> problem() {
    cpu::CrossEntropy<Real> problem{};
    const ScalarType dtype = logits.scalar_type(), id = target.scalar_type();
    problem.images = logits.size(0);
    problem.classes = logits.size(1);
    problem.pixels = logits.size(0) == 0 ? 0 : target.numel() / logits.size(0);
    problem.number = dtype == ScalarType::Half       ? cpu::Number::kFloat16
                     : dtype == ScalarType::BFloat16 ? cpu::Number::kBFloat16
                                                     : cpu::Number::kReal;
    problem.id = id == ScalarType::Long  ? cpu::Id::kInt64
                 : id == ScalarType::Int ? cpu::Id::kInt32
                                         : cpu::Id::kUint8;
    problem.ignore_index = ignore_index;
    problem.label_smoothing = static_cast<Real>(label_smoothing);
    if (!find_layout(logits, &problem.logits_layout)) {
      logits = contiguous(logits);
      find_layout(logits, &problem.logits_layout);
    }
    problem.logits = logits.const_data_ptr();
    problem.target = target.const_data_ptr();
    if (pixel_weight) problem.pixel_weight = pixel_weight->const_data_ptr<Real>();
    if (class_weight) problem.class_weight = class_weight->const_data_ptr<Real>();
    return problem;
  }
};

// The gradient as logits lie, or a contiguous one that is copied there where they lie otherwise.
class Gradient {
 public:
  explicit Gradient(const Tensor& logits) : result_(empty_like(logits)), computed_(result_) {
    if (find_layout(result_, &layout_)) return;
    computed_ = new_empty(result_, result_.sizes());
    find_layout(computed_, &layout_);
  }

  template <typename Real>
  void give_to(cpu::CrossEntropy<Real>* problem) const {
    problem->gradient = computed_.mutable_data_ptr();
    problem->gradient_layout = layout_;
  }

  template <typename Real>
  void multiply(Real factor) const {
    Real* values = computed_.mutable_data_ptr<Real>();
    parallel_for(0, computed_.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) values[i] *= factor;
    });
  }

  Tensor finished() {
    if (computed_.get() != result_.get()) copy_(result_, computed_);
    return result_;
  }

 private:
  Tensor result_;
  Tensor computed_;
  cpu::Layout layout_{};
};

template <typename Real>
void run(const cpu::CrossEntropy<Real>& problem) {
  const int64_t grain = kGrain / (problem.classes * cpu::chunk_pixels(problem.classes));
  parallel_for(0, cpu::chunks(problem.images, problem.classes, problem.pixels),
               std::max<int64_t>(1, grain),
               [&](int64_t begin, int64_t end) { cpu::cross_entropy(problem, begin, end); });
}

double number_of(const Tensor& one) {
  const void* data = one.const_data_ptr();
  switch (one.scalar_type()) {
    case ScalarType::Double:
      return *static_cast<const double*>(data);
    case ScalarType::Half:
      return widened(*static_cast<const Float16*>(data));
    case ScalarType::BFloat16:
      return widened(*static_cast<const BFloat16*>(data));
    default:
      return *static_cast<const float*>(data);
  }
}

Tensor scalar(const Tensor& like, ScalarType dtype, double value) {
  const Tensor one = new_empty(like, {}, dtype);
  void* data = one.mutable_data_ptr();
  switch (dtype) {
    case ScalarType::Double:
      store(value, static_cast<double*>(data));
      break;
    case ScalarType::Half:
      store(static_cast<float>(value), static_cast<Float16*>(data));
      break;
    case ScalarType::BFloat16:
      store(static_cast<float>(value), static_cast<BFloat16*>(data));
      break;
    default:
      store(static_cast<float>(value), static_cast<float*>(data));
  }
  return one;
}

template <typename Real>
std::tuple<Tensor, Tensor, Tensor> forward(CrossEntropyInputs inputs, const std::string& reduction,
                                           bool with_gradient) {
  const ScalarType dtype = inputs.logits.scalar_type();
  const ScalarType real = inputs.is_double() ? dtype : ScalarType::Float;
  const bool reduces = reduction != "none", divides = reduces && reduction != "sum";
  std::optional<Gradient> gradient;
  if (with_gradient && reduces && dtype == real) gradient.emplace(inputs.logits);

  cpu::CrossEntropy<Real> problem = inputs.problem<Real>();
  problem.pixels_in_divisor = reduction == "weighted_mean";
  std::vector<cpu::Partial> partials(cpu::chunks(problem.images, problem.classes, problem.pixels));
  problem.partials = partials.data();
  Tensor loss = reduces ? inputs.target : new_empty(inputs.logits, inputs.target.sizes());
  if (!reduces) problem.pixel_loss = loss.mutable_data_ptr();
  // the divisor is known at the end only; where nothing is ignored or weighted it is this
  const double expected = divides ? static_cast<double>(problem.images * problem.pixels) : 1.0;
  problem.scale = static_cast<Real>(1.0 / expected);
  if (gradient) gradient->give_to(&problem);
  run(problem);

  cpu::Partial total;
  for (const cpu::Partial& partial : partials) {
    total.loss += partial.loss;
    total.counted += partial.counted;
    total.inside &= partial.inside;
  }
  if (!total.inside) {
    // arrives in Python as the IndexError that PyTorch raises
    throw std::out_of_range("weighted_cross_entropy: target " +
                            std::to_string(cpu::first_outside(problem)) + " is out of bounds");
  }
  const double divisor = divides ? static_cast<Real>(total.counted) : 1.0;
  if (gradient && divisor != expected) {
    gradient->multiply(static_cast<Real>(expected / divisor));
  }
  if (reduces) loss = scalar(inputs.logits, dtype, total.loss / divisor);
  return {loss, scalar(inputs.logits, real, divisor),
          gradient ? gradient->finished() : new_empty(inputs.logits, {0})};
}

template <typename Real>
Tensor backward(CrossEntropyInputs inputs, const Tensor& grad_loss, double divisor) {
  Gradient gradient(inputs.logits);
  cpu::CrossEntropy<Real> problem = inputs.problem<Real>();
  if (inputs.target.numel() == 0) return gradient.finished();
  gradient.give_to(&problem);
  Tensor incoming = grad_loss;
  const auto strides = grad_loss.strides();
  if (std::all_of(strides.begin(), strides.end(), [](int64_t stride) { return stride == 0; })) {
    // one number for all pixels
    problem.scale = static_cast<Real>(number_of(grad_loss) / divisor);
  } else {
    CrossEntropyInputs::check(grad_loss, "grad_loss", inputs.target.numel());
    incoming = contiguous(
        torch::stable::to(grad_loss, inputs.is_double() ? ScalarType::Double : ScalarType::Float));
    problem.incoming = incoming.const_data_ptr<Real>();
    problem.scale = static_cast<Real>(1.0 / divisor);
  }
  run(problem);
  return gradient.finished();
}

std::tuple<Tensor, Tensor, Tensor> weighted_cross_entropy_cpu(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& pixel_weight,
    const std::optional<Tensor>& class_weight, int64_t ignore_index, double label_smoothing,
    const std::string& reduction, bool with_gradient) {
  CrossEntropyInputs inputs(logits, target, pixel_weight, class_weight, ignore_index,
                            label_smoothing);
  return inputs.is_double() ? forward<double>(inputs, reduction, with_gradient)
                            : forward<float>(inputs, reduction, with_gradient);
}

Tensor weighted_cross_entropy_bwd_cpu(const Tensor& grad_loss, const Tensor& divisor,
                                      const Tensor& logits, const Tensor& target,
                                      const std::optional<Tensor>& pixel_weight,
                                      const std::optional<Tensor>& class_weight,
                                      int64_t ignore_index, double label_smoothing) {
  CrossEntropyInputs inputs(logits, target, pixel_weight, class_weight, ignore_index,
                            label_smoothing);
  CrossEntropyInputs::check(divisor, "divisor", 1);
  const double over = number_of(divisor);
  return inputs.is_double() ? backward<double>(inputs, grad_loss, over)
                            : backward<float>(inputs, grad_loss, over);
}

}  // namespace
}  // namespace fastunet

STABLE_TORCH_LIBRARY_IMPL(fastunet, CPU, m) {
  m.impl("weighted_cross_entropy", TORCH_BOX(&fastunet::weighted_cross_entropy_cpu));
  m.impl("weighted_cross_entropy_bwd", TORCH_BOX(&fastunet::weighted_cross_entropy_bwd_cpu));
}
